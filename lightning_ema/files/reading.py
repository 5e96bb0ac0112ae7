"""Reading files of ``torch.save``: no code from a file is run without the caller's word for it."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

DAMAGES = (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, struct.error)
"""What reading a damaged pickle raises, beside what torch says of one."""


def load(path: Path, *, trust: bool = False, mmap: bool = False) -> Any:
    """The content of a file, on the CPU.

    Args:
        path: of the file.
        trust: allow it to run code while it is read.
        mmap: leave the tensors on the disk until they are used.

    Raises:
        ValueError: its records are compressed, which torch does not do: a small file could fill the memory.
        pickle.UnpicklingError: it would run code, or is no file of ``torch.save``.
        RuntimeError, EOFError: it is damaged.
    """
    check_size(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust, mmap=mmap)
    except DAMAGES as error:
        if trust:  # then they may come from the code in it
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def check_size(path: Path) -> None:
    """Refuse a file that becomes larger when it is read than it is.

    Raises:
        ValueError: naming it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # no zip file, or one that torch will refuse
        return
    total = sum(record.file_size for record in records)
    if any(record.compress_type != zipfile.ZIP_STORED for record in records) or total > path.stat().st_size:
        raise ValueError(
            f"{path} holds compressed records, {total:,} bytes in a file of {path.stat().st_size:,}. torch.save writes "
            "none: load it yourself and save it anew, if you know where it comes from."
        )
