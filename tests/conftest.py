import functools
import weakref
from contextlib import contextmanager

import pytest
import torch
from lightning.fabric.utilities import registry
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

torch.set_num_threads(1)  # the modules are tiny: more threads only get in each other's way

# each Trainer looks through all installed packages for their callbacks; none is installed while tests run
registry.entry_points = functools.cache(registry.entry_points)


class _Allocations(TorchDispatchMode):
    """Counts the bytes of storage that operators bring into being: all of them, and the most alive at once."""

    def __init__(self):
        super().__init__()
        self.total = self.alive = self.peak = 0
        self._known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self._born(tensor.untyped_storage())
        return result

    def _born(self, storage):
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer in self._known or size == 0:
            return
        self._known[pointer] = size
        self.total += size
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._died, pointer)

    def _died(self, pointer):
        self.alive -= self._known.pop(pointer, 0)


@pytest.fixture
def count_allocations():
    @contextmanager
    def counting():
        with _Allocations() as allocations:
            yield allocations

    return counting


@pytest.fixture(autouse=True)
def dataloaders_as_torch_has_them():
    """Lightning 2.4 leaves the class patched where a module's or data module's loader method raises."""
    before = dict(vars(DataLoader))
    yield
    for name in ("__init__", "__setattr__", "__delattr__"):
        if name in before and vars(DataLoader)[name] is not before[name]:
            setattr(DataLoader, name, before[name])
        elif name not in before and name in vars(DataLoader):
            delattr(DataLoader, name)
