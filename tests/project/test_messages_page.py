"""docs/messages.md lists what the package raises, warns of and logs, as the source says it."""

import ast
import re

import house
import message_page
import pytest

SAYS = {"warn", "warning", "rank_zero_warn", "rank_zero_info", "say"}


def plain(text):
    return re.sub(r"\s+", " ", text)


def pieces(node):
    """The texts in an expression, without what a logger fills in, that have 12 characters or more and a space."""
    texts = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    found = (plain(piece).strip() for text in texts for piece in re.split("%[a-z]", text))
    return [piece for piece in found if len(piece) >= 12 and " " in piece]


@pytest.fixture(scope="module")
def page():
    entries = re.findall(r"^- (.+?)<br>\n  [\w, ]+ · `[\w.]+`", message_page.listed(), re.MULTILINE | re.DOTALL)
    assert len(entries) > 200
    return [plain(re.sub(r"(?<!`)`{1,2}<br>\n  `{1,2}(?!`)", " ", entry).strip("`")) for entry in entries]


def test_all_that_is_raised_or_said_is_on_the_page(page):
    missing, text = [], "\n".join(page)
    for path in house.FILES:
        for node in ast.walk(house.tree(path)):
            said = isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) in SAYS
            if said or isinstance(node, ast.Raise):
                missing += [f"{house.name_of(path)}: {piece}" for piece in pieces(node) if piece not in text]
    assert missing == []


def test_sentences_that_functions_return_are_on_the_page(page):
    text, found = "\n".join(page), []
    for path in (house.PACKAGE / "callback" / "messages.py", house.PACKAGE / "averaging" / "report.py"):
        for function in house.tree(path).body:
            if isinstance(function, ast.FunctionDef):
                found += [piece for node in function.body[1:] for piece in pieces(node)]  # after its docstring
    assert len(found) > 30
    assert [piece for piece in found if piece not in text] == []


def test_nothing_else_is_on_the_page(page):
    trees = [house.tree(path) for path in house.FILES]
    docs = {id(n.value) for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    texts = [n.value for t in trees for n in ast.walk(t) if isinstance(n, ast.Constant) and id(n) not in docs]
    known = "\n".join(plain(text) for text in texts if isinstance(text, str))
    for entry in page:
        literal = re.split(r"<[^<>]*>|[\[\]|()…]|[.,:;] ", entry)
        assert [text for text in map(str.strip, literal) if len(text) >= 12 and text not in known] == [], entry


SOURCES = {
    "ops/one.py": r"""
import warnings
from lightning_ema.checks import reason, count
ADVICE = "Write a number."
WHY = {"A": "it is old, and slow", "B": "it is new, and slow"}
class Settings:
    def __init__(self, decay, path=None):
        if decay is None:
            raise ValueError("decay is None. "
                             f"{ADVICE}") from None
        raise TypeError(f"{decay!r} has {decay.shape} and {len(path):,} parts{' of 16 bits' if path else ''}.")
    def check(self, kind):
        problems = [f"{name}: not in the file" for name in kind]
        problems += [f"{name}: not in the module" for name in kind]
        if problems:
            raise ValueError(f"{type(self).__name__} does not fit:\n  " + "\n  ".join(problems) + "\nTake another.")
        if kind is None:
            raise broken([f"it is {kind}; no kind is so"])
        raise RuntimeError(f"not beside {kind}: {WHY[kind]}.")
    def tell(self, steps):
        self.warn(f"odd steps, {', '.join(map(repr, steps)) or 'none'}.")
        self.say("goes on late." if steps else "goes on early.")
        if why := reason(steps, "never seen before"):
            self.say(why)
        raise ValueError(f"One: {count(steps)}")
    def say(self, text):
        rank_zero_info(f"Settings {self.name}: {text}")
def log(path, late):
    _log.warning("%s: it is %d steps late", path, late)
""",
    "checks.py": '''
def reason(steps: int, when: str) -> str | None:
    """Said where :class:`~a.Steps` are odd.

    More of it."""
    if steps % 2:
        return None
    how = "an odd way" if steps == 1 else f"{steps:,} odd ways"
    return f"There is {how} at `{steps}`, {when}."
def count(steps: int) -> str:
    return f"{steps} of them"
def broken(lines: list[str]) -> ValueError:
    return ValueError("it is broken:\\n  " + "\\n  ".join(lines) + "\\nTake another.")
def silent(steps: int) -> str:
    return "Nobody says this sentence."
''',
}
EXPECTED = """## ops/one.py

- `decay is None. Write a number.`<br>
  ValueError · `Settings.__init__`

- `<decay> has <shape of decay> and <number of path> parts [of 16 bits].`<br>
  TypeError · `Settings.__init__`

- `<Settings> does not fit:`<br>
  `(<name>: not in the file | <name>: not in the module)`<br>
  `…`<br>
  `Take another.`<br>
  ValueError · `Settings.check`

- `it is <kind>; no kind is so`<br>
  ValueError · `Settings.check`

- `not beside <kind>: (it is old, and slow | it is new, and slow).`<br>
  RuntimeError · `Settings.check`

- `odd steps, (<steps>, … | none).`<br>
  warning · `Settings.tell`

- `goes on late.`<br>
  log line · `Settings.tell`

- `goes on early.`<br>
  log line · `Settings.tell`

- `<path>: it is <late> steps late`<br>
  warning · `log`

## checks.py

- ``There is (an odd way | <steps> odd ways) at `<steps>`, never seen before.``<br>
  log line · `reason`. Said where `Steps` are odd.

- `it is broken:`<br>
  `<lines>`<br>
  `…`<br>
  `Take another.`<br>
  ValueError · `broken`
"""


def test_each_form_of_a_message_is_written_as_by_hand(tmp_path):
    for name, source in SOURCES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    assert message_page.listed([tmp_path / name for name in SOURCES], tmp_path) == EXPECTED


def test_the_list_stands_in_its_place_and_nowhere_without_one():
    assert message_page.filled(f"# A\n\n{message_page.PLACE}\nB\n") == f"# A\n\n{message_page.listed()}\nB\n"
    assert message_page.PLACE in (house.PACKAGE.parent / "docs" / "messages.md").read_text()
    with pytest.raises(LookupError, match="has no line"):
        message_page.filled("# A page\n")
