"""One word for one thing: what the code and the pages no longer call by its old name."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXTS = [
    path
    for folder in ("lightning_ema", "tests", "docs", "examples", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".yaml", ".svg") and path != Path(__file__)
]
TEXTS += [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml")]

NOWHERE = re.compile(
    r"(?<![A-Za-z])(loans?|lends?|lent|lending|recall(s|ed|ing)?|lenders?|custod\w*|absorb\w*|absorption\w*|spellings?|"
    r"take_back|put_aside)(?![A-Za-z])",
    re.IGNORECASE,
)
"""Words that stand nowhere: in no name, no sentence, no message. A mark stands in the place of the quoted old name."""

NO_NAME = [
    "deliver",
    "course",
    "pairing",
    "aside",
    "found",
    "choice",
    "chosen",
    "portion",
    "portions",
    "shares",
    "settle",
    "footprint",
    "advice",
    "second_pass",
    "reconcile",
    "alone",
    "meet",
    "forgive",
    "hang",
    "take_down",
    "suspended",
    "put_down",
    "take_up",
]
"""Words that are no longer names of files, classes, functions, arguments and keys; in a sentence they may stand."""


def parts(name):
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")


def names_in(path):
    """The names that a file gives: its own, and those of its classes, functions, arguments and attributes."""
    yield path.stem
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_old_words_stand_nowhere():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:90]}"
        for path in TEXTS
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if NOWHERE.search(line)
    ]
    assert found == []


def test_old_words_name_nothing_in_the_package():
    def old(name):
        words = parts(name)
        return [word for word in NO_NAME if word == name.strip("_").lower() or word in words]

    files = sorted((ROOT / "lightning_ema").rglob("*.py"))
    assert {f"{path.relative_to(ROOT)}: {name}" for path in files for name in names_in(path) if old(name)} == set()
