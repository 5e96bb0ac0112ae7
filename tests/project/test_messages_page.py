"""docs/messages.md says of every warning and error what to do; the texts are read from the source."""

import messages


def test_every_message_has_an_entry():
    assert not messages.without_entry()  # `python tests/messages.py` prints the entries to write


def test_every_entry_is_of_a_message_and_says_what_to_do():
    texts, entries = messages.messages(), messages.entries(messages.PAGE.read_text())
    assert len(entries) > 200
    for entry, advice in entries.items():
        assert any(text.startswith(entry) for text in texts), entry
        assert entry in texts or len(entry) >= 12, entry
        assert len(advice.split()) >= 3, entry


def test_messages_are_found_wherever_they_are_said(monkeypatch, tmp_path):
    (tmp_path / "lightning_ema").mkdir()
    (tmp_path / "lightning_ema" / "one.py").write_text(
        "import warnings\n"
        "def reason(x):\n    return f'{x} is odd.' if x % 2 else 'all is ' + 'even.'\n"
        "def tell(x):\n"
        "    warnings.warn(f'careful with {x}.')\n"
        "    _log.warning('%s: late', x)\n"
        "    if (found := remark(x)):\n        raise ValueError(found)\n"
        "    raise TypeError(reason(x)) from None\n"
        "class A:\n    def f(self):\n        self._warn(f'A {self.b}: {self.c}')\n        raise\n"
    )
    (tmp_path / "lightning_ema" / "two.py").write_text(
        "def remark(x):\n    return 'said\\n  elsewhere' if x else None\n"
    )
    monkeypatch.setattr(messages, "ROOT", tmp_path)
    found = messages.messages()
    assert set(found) == {"careful with ….", "…: late", "said elsewhere", "… is odd.", "all is even."}
