"""What to watch while a teacher trains a student: metrics for ``self.log``.

All of them add up counts or squares over batches and processes and divide once, in ``compute``, so that neither the
size of a batch nor its process matters. None of them is ever NaN because nothing was counted: each says what it
gives then.

>>> from lightning_ema.semi_supervised.losses import pseudo_labels
>>> rate = PseudoLabelAcceptance()
>>> labels, mask = pseudo_labels(torch.tensor([[9.0, 0.0], [0.1, 0.0], [0.0, 9.0], [0.2, 0.0]]), threshold=0.95)
>>> rate.update(mask)
>>> rate.compute()
tensor(0.5000)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ema.modules.named_tensors import Survey
from lightning_ema.semi_supervised.logits import check_alike, check_classes, kind


class _Share(Metric):
    """``hits / total``, both summed over batches and processes; 0 where ``total`` is 0."""

    full_state_update = False
    is_differentiable = False
    hits: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The share as a scalar in [0, 1]."""
        return self.hits / self.total.clamp(min=1)


class PseudoLabelAcceptance(_Share):
    """The share of positions whose pseudo-label was accepted: accepted / all; 0 where there were none.

    Positions are samples, or pixels in segmentation.
    """

    def update(self, mask: Tensor) -> None:
        """Counts one batch.

        Args:
            mask: bool, any shape; the second value of :func:`~lightning_ema.semi_supervised.losses.pseudo_labels`.

        Raises:
            TypeError: the mask is not a tensor of bool.
        """
        _check_bool(mask)
        self.hits += mask.sum()
        self.total += mask.numel()


class PseudoLabelAccuracy(_Share):
    """The share of accepted pseudo-labels that are right: right / (accepted and known); 0 where there were none.

    So 0 may mean that nothing was accepted: log :class:`PseudoLabelAcceptance` beside it.
    """

    higher_is_better = True

    def update(self, labels: Tensor, mask: Tensor, true_labels: Tensor) -> None:
        """Counts one batch.

        Args:
            labels: integers, any shape; the first value of :func:`~lightning_ema.semi_supervised.losses.pseudo_labels`.
            mask: bool, the same shape; its second value.
            true_labels: integers, the same shape. Negative ones are unknown and left out; for another mark, such as
                255, pass ``mask & (true_labels != 255)``.

        Raises:
            TypeError: the mask is not a tensor of bool, or labels are not tensors of integers.
            ValueError: the shapes differ.
        """
        _check_bool(mask)
        for name, value in (("labels", labels), ("true_labels", true_labels)):
            if not isinstance(value, Tensor) or value.dtype == torch.bool or _floats(value):
                raise TypeError(f"{name} is {kind(value)}; it must be a tensor of integers, one label each.")
            if value.shape != mask.shape:
                raise ValueError(f"{name} has the shape {list(value.shape)}, mask {list(mask.shape)}; they must agree.")
        counted = mask & (true_labels >= 0)
        self.hits += (counted & (labels == true_labels)).sum()
        self.total += counted.sum()


class TeacherStudentAgreement(_Share):
    """The share of positions where teacher and student predict the same class; 0 where there were none.

    ``argmax_c z_c == argmax_c z'_c``, the first of equal maxima counting.

    Args:
        dim: the dimension of the classes; 1 for ``[N, C, ...]``, -1 for ``[N, T, C]``.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def update(self, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """Counts one batch.

        Args:
            student_logits: ``[N, C, ...]``; probabilities do as well.
            teacher_logits: the same shape.

        Raises:
            TypeError: an argument is not a tensor of floats.
            ValueError: the shapes differ, or there are fewer than two classes in ``dim``.
        """
        check_alike(student_logits, teacher_logits, ("student_logits", "teacher_logits"))
        check_classes(student_logits, self.dim, "student_logits")
        same = student_logits.argmax(self.dim) == teacher_logits.argmax(self.dim)
        self.hits += same.sum()
        self.total += same.numel()


class RelativeWeightDistance(Metric):
    """How far the teacher is from the student: ``||student - teacher|| / ||student||`` over all weights together.

    Over several updates ``sqrt(sum ||student - teacher||^2 / sum ||student||^2)``; for the distance at one moment
    update once, for instance in ``on_train_epoch_end``. Processes that hold the same weights give the value of one.
    0 where nothing was seen or the student is zero.

    An update reads every weight once, in float32 at least.
    """

    full_state_update = False
    is_differentiable = False
    distance: Tensor
    norm: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("distance", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("norm", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, student: nn.Module | Iterable[Tensor], teacher: nn.Module | Iterable[Tensor]) -> None:
        """Compares the weights as they are now.

        Args:
            student: a module, whose parameters are paired by name (wrapper prefixes left out, tied ones once), or
                tensors, which are paired in their order.
            teacher: the same.

        Raises:
            TypeError: one is a module and the other is not, or something is not a tensor of floats.
            ValueError: names, numbers or shapes do not match.
        """
        for name, one, other in _paired(student, teacher):
            for tensor in (one, other):
                if not isinstance(tensor, Tensor) or not _floats(tensor):
                    raise TypeError(f"{name} is {kind(tensor)}; weights are tensors of floats. Leave others out.")
            if one.shape != other.shape:
                raise ValueError(f"{name}: {list(one.shape)} in the student, {list(other.shape)} in the teacher.")
            live = one.to(torch.promote_types(one.dtype, torch.float32))
            self.distance += _square(live - other.to(live.device, live.dtype)).to(self.distance)
            self.norm += _square(live).to(self.norm)

    def compute(self) -> Tensor:
        """The distance as a scalar of at least 0."""
        return torch.where(self.norm > 0, self.distance / self.norm, 0.0).sqrt()


def _paired(
    student: nn.Module | Iterable[Tensor], teacher: nn.Module | Iterable[Tensor]
) -> list[tuple[str, Tensor, Tensor]]:
    if isinstance(student, nn.Module) and isinstance(teacher, nn.Module):
        first, second = _weights(student), _weights(teacher)
        if unpaired := sorted(first.keys() ^ second.keys()):
            raise ValueError(
                f"{len(unpaired)} parameters are not in both of student and teacher: {', '.join(unpaired[:6])}. Pass "
                "the parts that correspond, such as student.backbone and teacher.backbone."
            )
        return [(name, first[name], second[name]) for name in first]
    if isinstance(student, (nn.Module, Tensor, dict)) or isinstance(teacher, (nn.Module, Tensor, dict)):
        raise TypeError(
            f"student is a {type(student).__name__} and teacher a {type(teacher).__name__}; pass two modules, or two "
            "lists of tensors."
        )
    ones, others = list(student), list(teacher)
    if len(ones) != len(others):
        raise ValueError(f"the student has {len(ones)} tensors, the teacher {len(others)}; they are paired in order.")
    return [(f"tensor {place}", one, other) for place, (one, other) in enumerate(zip(ones, others, strict=True))]


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {found.name: found.tensor for found in Survey(module).candidates if not found.is_buffer}


def _square(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm.square()


def _floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _check_bool(mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask is {kind(mask)}; it must be a tensor of bool, for instance mask > 0.")
