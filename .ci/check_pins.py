"""Names what is installed in the Makefile's environments and not pinned. ``make check-pins`` runs it.

A folder's name says which constraints file pins what is in it: constraints.txt for ``.venv``, and constraints-NAME.txt
for ``.venv-NAME`` and for ``.venv/NAME``, which ``pip install --target`` fills. So an environment or a folder that is
added later is read too.
"""

import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

EXEMPT = {"pip", "lightning-ema"}  # pip comes with the Python that makes the environment; the other is this project


def main(root: Path) -> int:
    """Prints a line for each package that is not pinned; returns 1 if there is one, or if there is nothing to read."""
    places = list(environments(root))
    if not places:
        print(f"{root}: there is no environment .venv*; `make setup` makes one")
        return 1
    missing = [f"{place}: {line}" for place, folders, file in places for line in unpinned(folders, root / file)]
    print("\n".join(missing) or f"everything is pinned in {', '.join(place for place, _, _ in places)}")
    return 1 if missing else 0


def environments(root: Path) -> Iterator[tuple[str, list[Path], str]]:
    """Name, folders of packages and constraints file of each environment and each ``--target`` folder."""
    for environment in sorted(root.glob(".venv*")):
        suffix = environment.name.removeprefix(".venv")
        yield environment.name, list(environment.glob("lib/python*/site-packages")), f"constraints{suffix}.txt"
        for target in sorted({path.parent for path in environment.glob("*/*.dist-info")}):
            yield f"{environment.name}/{target.name}", [target], f"constraints-{target.name}.txt"


def unpinned(folders: list[Path], file: Path) -> Iterator[str]:
    """A line for each package in these folders that the constraints file does not pin, or at another version."""
    packages = installed(folders)
    if not packages:  # an environment has pip at least
        yield "no package was found in it; `make clean` and set it up again"
    if not file.is_file():
        yield f"{file.name}, which is to pin what is in it, is missing"
        return
    pinned = pins(file.read_text())
    for name, version in packages:
        expected = pinned.get(canonicalize_name(name), set())
        if expected and expected != {version}:
            yield f"{name} is {version}, but {file.name} says {' and '.join(sorted(expected))}"
        elif not expected and canonicalize_name(name) not in EXEMPT:
            yield f"{name} {version} is not pinned; write {name}=={version} into {file.name}"


def installed(folders: Iterable[Path]) -> list[tuple[str, str]]:
    """Name and version of each package in these folders, the name as it writes it."""
    found = distributions(path=[str(folder) for folder in folders])
    return sorted({(each.metadata["Name"], public(each.version)) for each in found})


def pins(text: str) -> dict[str, set[str]]:
    """The versions that a constraints file pins each package at. Ranges do not pin, nor do lines for other Pythons."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if not (line := line.partition("#")[0].strip()):
            continue
        wanted = Requirement(line)
        exact = {public(each.version) for each in wanted.specifier if each.operator == "==" and "*" not in each.version}
        if exact and (wanted.marker is None or wanted.marker.evaluate()):
            found.setdefault(canonicalize_name(wanted.name), set()).update(exact)
    return found


def public(version: str) -> str:
    """The version without a local suffix: ``2.13.0+cpu`` is a build of 2.13.0."""
    return Version(version).public


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parents[1]))
