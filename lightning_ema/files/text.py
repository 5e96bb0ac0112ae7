"""Text that comes from files, for a person to read."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""The text with every sign that steers a terminal, or does not show, as an escape.

    >>> printable("net.\x1b[2Jweight\nnet.bias")
    'net.\\x1b[2Jweight\nnet.bias'
    """
    return "".join(sign if sign.isprintable() or sign == "\n" else ascii(sign)[1:-1] for sign in text)
