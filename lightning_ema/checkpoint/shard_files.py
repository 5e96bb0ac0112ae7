"""Folders of shards as torch writes them, read without running code from them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

INDEX = ".metadata"
"""The file in which torch says what is in which shard: a pickle."""

_INERT = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
}
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}
_RECORDS = "torch.distributed.checkpoint.metadata"


class _Inert(pickle.Unpickler):
    """Makes records and numbers alone: classes that do nothing when they are made."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INERT or (module in ("pathlib", "pathlib._local") and name in _PATHS):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout)):
            return getattr(torch, name)
        found = super().find_class(module, name) if module == _RECORDS and "." not in name else None
        if isinstance(found, type) and found.__module__ == _RECORDS:
            return found
        raise pickle.UnpicklingError(f"{module}.{name}")


class ShardReader(FileSystemReader):
    """Reads tensors from a folder of shards, and nothing else.

    Raises:
        ValueError: its index would run code, is damaged, or names files outside of the folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # torch's versions differ in what they take
        return read_index(self._folder)


def read_index(folder: Path) -> Metadata:
    """What a folder of shards says of itself.

    Raises:
        ValueError: it would run code, is damaged, names files outside of the folder, or more than these hold.
    """
    path = folder / INDEX
    try:
        index = _Inert(io.BytesIO(path.read_bytes())).load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no index of shards as torch writes it: it asks for {error}, which could run code. Nothing was "
            "run. Take another checkpoint."
        ) from error
    except Exception as error:  # a damaged pickle can raise anything; nothing in it was run
        raise ValueError(f"{path} is damaged ({error!r}). Take another checkpoint.") from error
    if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, Mapping):
        raise ValueError(f"{path} is no index of shards as torch writes it. Take another checkpoint.")
    _check_files(folder, index)
    return index


def tensors_in(index: Metadata) -> dict[str, TensorStorageMetadata]:
    """The tensors of an index, by key; what is not a tensor is a pickle, and is left where it is."""
    return {k: each for k, each in index.state_dict_metadata.items() if isinstance(each, TensorStorageMetadata)}


def check_tensors(index: Metadata, keys: Mapping[str, Any], where: Path) -> None:
    """Refuse an index in which one of these is something else than a tensor.

    Raises:
        ValueError: naming them.
    """
    others = [key for key in keys if isinstance(index.state_dict_metadata.get(key), BytesStorageMetadata)]
    if others:
        raise ValueError(f"{where}: {', '.join(others)} are pickles, where tensors belong. Take another checkpoint.")


def _check_files(folder: Path, index: Metadata) -> None:
    places, held = index.storage_data or {}, 0
    names = {str(getattr(place, "relative_path", "")) for place in places.values()}
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder / INDEX} names the file {name!r}, which is not in the folder. It is not read.")
        if not path.is_file():
            raise ValueError(f"{folder} is no complete checkpoint: {name} is missing. Take another one.")
        held += path.stat().st_size
    wanted = sum(each.size.numel() * each.properties.dtype.itemsize for each in tensors_in(index).values())
    if wanted > held:
        raise ValueError(
            f"{folder / INDEX} lists tensors of {wanted:,} bytes, and its files have {held:,}. It is damaged, and is "
            "not read. Take another checkpoint."
        )
