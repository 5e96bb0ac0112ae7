"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_or_not(path: Path) -> Iterator[Path]:
    """Gives a file beside ``path`` to write to, which takes its name once all of it is on the disk.

    Whatever is raised meanwhile, what was at ``path`` before is still there, and nothing else is left. The new file has
    the mode of the one that it replaces, or of any new one.

    Raises:
        OSError: the file cannot be written there, as on a full disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        temporary.touch()
        mode = (path if path.exists() else temporary).stat().st_mode
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(folder: Path, what: str) -> None:
    """Refuse a folder in which no file can be made; it is made where it is missing.

    Args:
        folder: the folder.
        what: is to be written there.

    Raises:
        ValueError: naming the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_or_not(folder / "writable") as trial:
            trial.write_bytes(b"1")
        (folder / "writable").unlink()
    except OSError as error:
        raise ValueError(
            f"{what} cannot be written to {folder}: {error}. Give a folder that can be written."
        ) from error
