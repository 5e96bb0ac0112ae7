"""Which samples of a labeled dataset keep their labels. Knows torch, not Lightning."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from lightning_ema.checks import check_count

REMEDY = "Labels must be whole numbers from 0, one for each sample, for instance [0, 2, 1]."


def split_by_class(labels: Sequence[int] | Tensor, per_class: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Draws ``per_class`` samples of each class; the rest stays without labels.

    The same ``labels`` and ``seed`` give the same split in every process and on every run. With the same seed a smaller
    ``per_class`` draws a part of what a larger one draws.

    Args:
        labels: the class of each sample, whole numbers from 0, shape ``[N]``.
        per_class: how many samples of each class that occurs are drawn, at least 1.
        seed: decides which, at least 0.

    Returns:
        The indices of the samples that keep their labels and those of all others, both in ascending order.

    Raises:
        ValueError, TypeError: ``labels`` are not whole numbers from 0, or a class has fewer than ``per_class`` samples.
    """
    check_count(per_class, "per_class", at_least=1)
    check_count(seed, "seed", at_least=0)
    classes = as_classes(labels)
    counts = Counter(classes.tolist())
    scarce = [f"class {name} has {count}" for name, count in sorted(counts.items()) if count < per_class]
    if scarce:
        raise ValueError(
            f"{per_class} samples of each class are to keep their labels, but {', '.join(scarce)}. Ask for at most "
            f"{min(counts.values())} of each class, or leave those classes out of the dataset."
        )
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    drawn = torch.cat([order[classes[order] == name][:per_class] for name in sorted(counts)])
    keeps = torch.zeros(len(classes), dtype=torch.bool)
    keeps[drawn] = True
    return keeps.nonzero().flatten().tolist(), (~keeps).nonzero().flatten().tolist()


def as_classes(labels: Sequence[int] | Tensor) -> Tensor:
    """The labels as one int64 tensor of shape ``[N]``.

    Raises:
        ValueError, TypeError: they are not whole numbers from 0, or there are none.
    """
    given: Any
    try:
        given = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"labels cannot be read as numbers ({error}). {REMEDY}") from error
    if given.ndim != 1 or not len(given):
        raise ValueError(f"labels have the shape {list(given.shape)}. {REMEDY}")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"labels are of {given.dtype}. {REMEDY}")
    classes: Tensor = given.to("cpu", torch.int64)
    if classes.min() < 0:
        raise ValueError(f"a label is {int(classes.min())}. {REMEDY} What has no label belongs into `unlabeled`.")
    return classes


def labels_of(dataset: Dataset[Any], labels: Sequence[int] | Tensor | None) -> Sequence[int] | Tensor:
    """The labels given, the dataset's ``targets``, or those found by reading all items.

    Raises:
        ValueError, TypeError: there is not one for each sample, or an item is no pair of input and label.
    """
    size = len_of(dataset)
    found: Sequence[int] | Tensor | None = getattr(dataset, "targets", None) if labels is None else labels
    if found is None:
        return [label_of(dataset[index]) for index in range(size)]
    if len(found) != size:
        raise ValueError(f"there are {len(found)} labels, but {size} samples in `labeled`. Give one for each.")
    return found


def label_of(item: Any) -> int:
    """The label in an item of a labeled dataset.

    Raises:
        TypeError: the item is no pair, or its label no whole number.
    """
    if not isinstance(item, (tuple, list)):
        raise TypeError(f"an item of `labeled` is a {type(item).__name__}; it must be a pair (input, label).")
    if len(item) != 2:
        raise TypeError(f"an item of `labeled` has {len(item)} entries; it must be a pair (input, label).")
    try:
        return operator.index(item[1])
    except TypeError as error:
        raise TypeError(f"an item of `labeled` has the label {item[1]!r}. {REMEDY}") from error


def len_of(dataset: Dataset[Any]) -> int:
    """The number of samples of a map-style dataset."""
    return len(dataset)  # type: ignore[arg-type]


def check_map_style(dataset: Dataset[Any], name: str) -> None:
    """Refuse a dataset whose samples cannot be drawn by index."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            f"{name} is of type {type(dataset).__name__}; it must have `__len__` and `__getitem__`, as a TensorDataset "
            "or a list of samples has, because samples are drawn by index."
        )
