"""A module's own loading: what it makes of a ``state_dict``, without a change to the module. Knows torch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_ema.modules.named_tensors import Survey, tables_of, without_wrappers

Hook = Callable[[dict[str, Any]], None]


def migrates(module: nn.Module) -> bool:
    """Whether loading into the module may do more than copy each tensor to that of its name."""
    for part in module.modules():
        methods = (type(part).load_state_dict, type(part)._load_from_state_dict)
        if any(not method.__module__.startswith("torch.") for method in methods):
            return True
        if part._load_state_dict_pre_hooks or part._load_state_dict_post_hooks:
            return True
    return False


def through(module: nn.Module, file: Mapping[str, Any], state_dict: dict[str, Any], hook: Hook) -> dict[str, Tensor]:
    """What the module would hold after loading a ``state_dict`` the way it loads that of the file.

    The tensors of the module are given other storage for as long as that takes, in dtypes that are no narrower than
    those of ``state_dict``. What the hook sets on the module is taken back.

    Args:
        module: the module.
        file: what was read, before any hook saw it.
        state_dict: in the place of the file's.
        hook: the module's own ``on_load_checkpoint``.

    Returns:
        The tensors that were loaded, by all of their names.
    """
    content = {**file, "state_dict": state_dict}
    with _set_apart(module, _widest(state_dict)):
        hook(content)
        loaded = module.load_state_dict(content["state_dict"], strict=False)
        missing = {without_wrappers(key) for key in getattr(loaded, "missing_keys", ())}
        return {name: t.detach() for name, t in Survey(module).tensors.items() if name not in missing}


def put_into(state_dict: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A copy of a ``state_dict`` with other tensors in the places of those names, tied ones included."""
    changed = like(state_dict, state_dict)
    by_memory = {}
    for key, value in state_dict.items():
        name = without_wrappers(key)
        if name in tensors:
            changed[key] = tensors[name]
            if isinstance(value, Tensor) and value.numel():
                by_memory[_memory(value)] = tensors[name]
    for key, value in state_dict.items():
        if isinstance(value, Tensor) and value.numel() and _memory(value) in by_memory:
            changed[key] = by_memory[_memory(value)]
    return changed


def like(state_dict: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` of this content, which knows the versions of layers that another one knows."""
    copied = type(state_dict)(content) if isinstance(state_dict, dict) else dict(content)
    if hasattr(state_dict, "_metadata"):
        copied._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return copied


@contextmanager
def _set_apart(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    tables = [(table, dict(table)) for part in module.modules() for table in tables_of(part)[:2]]
    tensors = {id(t): t for _, content in tables for t in content.values() if t is not None and not is_lazy(t)}
    storages = [(tensor, tensor.data) for tensor in tensors.values()]
    attributes = {part: dict(vars(part)) for part in module.modules()}
    try:
        with torch.no_grad():
            for tensor, live in storages:
                floats = dtype is not None and live.is_floating_point()
                wider = torch.promote_types(live.dtype, dtype) if dtype is not None and floats else live.dtype
                tensor.data = live.to(wider, copy=True)
        yield
    finally:
        for part, before in attributes.items():
            vars(part).clear()
            vars(part).update(before)
        for table, content in tables:
            table.clear()
            table.update(content)
        for tensor, live in storages:
            tensor.data = live


def _widest(state_dict: Mapping[str, Any]) -> torch.dtype | None:
    dtypes = [v.dtype for v in state_dict.values() if isinstance(v, Tensor) and v.is_floating_point()]
    widest = None
    for dtype in dtypes:
        widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return widest


def _memory(tensor: Tensor) -> tuple[int, Any, Any]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()
