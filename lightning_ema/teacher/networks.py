"""Student and teacher as two networks: whether they are built alike, noticing edits, what is copied between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from lightning_ema.distributed.base import same_cut
from lightning_ema.modules.named_tensors import Survey, Table, without_wrappers

_SHOWN = 6


class Watched:
    """A module as it was at one moment, to notice cheaply that another tensor or submodule stands in its place."""

    def __init__(self, module: nn.Module) -> None:
        self._survey = Survey(module)
        self._places: list[tuple[Table, str, Tensor, int]] = [
            (table, leaf, candidate.tensor, candidate.tensor.data_ptr())
            for candidate in self._survey.candidates
            for table, leaf in candidate.slots
        ]

    def holds(self) -> bool:
        """Whether the module still has the same submodules, and the same floating-point tensors in the same memory."""
        if not self._survey.holds():
            return False
        for table, leaf, tensor, pointer in self._places:
            if table.get(leaf) is not tensor or tensor.data_ptr() != pointer:
                return False
        return True


def networks(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The student and the teacher of a module.

    Raises:
        ValueError: there is none yet.
    """
    student, teacher = getattr(module, "student", None), getattr(module, "teacher", None)
    if not isinstance(student, nn.Module) or not isinstance(teacher, nn.Module):
        raise ValueError(
            f"{type(module).__name__} has no student: assign the network to train, self.student = ..., in __init__ "
            "or configure_model. The teacher is made from it."
        )
    return student, teacher


def check_width(teacher: nn.Module) -> None:
    """Refuse a teacher of 16 bits.

    Raises:
        ValueError: naming a parameter and the precision to use instead.
    """
    narrow = [
        name for name, p in teacher.named_parameters() if p.is_floating_point() and torch.finfo(p.dtype).bits < 32
    ]
    if narrow:
        raise ValueError(
            f"the teacher's {narrow[0]} has 16 bits, in which an average stops moving. Train with "
            "precision='bf16-mixed' or '16-mixed' instead, which keep the weights in float32."
        )


def check_alike(student: nn.Module, teacher: nn.Module, buffers: bool) -> None:
    """Refuse a teacher that could not follow each tensor of its student.

    Args:
        student: the network that is trained.
        teacher: its average. Buffers that it has beyond the student's are its own business.
        buffers: whether the teacher's buffers follow the student's, as its parameters do.

    Raises:
        ValueError: naming the tensors that differ and what to write.
    """
    _check_shards(student, teacher)
    problems, remedies = _parameters_apart(student, teacher), []
    if problems:
        remedies.append(
            "Leave self.teacher out, and it is made as a copy of the student; or build it as you build the student: "
            "self.teacher = make_network(); self.student = make_network()."
        )
    if ties := _ties_apart(student, teacher):
        problems += ties
        remedies.append("Tie the same parameters in both, as one object (a.weight = b.weight), or in neither.")
    if buffers and (of_buffers := _buffers_apart(student, teacher)):
        problems += of_buffers
        remedies.append(
            "Give buffers the same shapes in both, from the start of training on, or leave the teacher's alone: "
            "MeanTeacherConfig(buffers='ignore')."
        )
    if problems:
        more = f"\n  ... ({len(problems)} in all)" if len(problems) > _SHOWN else ""
        listed = "\n  ".join(problems[:_SHOWN])
        raise ValueError(
            f"the teacher is not built like the student, so that it cannot follow:\n  {listed}{more}\n"
            + "\n".join(remedies)
        )


def copy_frozen(student: nn.Module, teacher: nn.Module, averaged: Sequence[str]) -> None:
    """Copies the parameters that are not averaged."""
    tensors = Survey(teacher).tensors
    for name, tensor in Survey(student).tensors.items():
        if name not in averaged and isinstance(tensor, nn.Parameter):
            tensors[name].copy_(tensor)


def fit_buffers(student: nn.Module, teacher: nn.Module) -> None:
    """Gives the teacher's buffers the shapes of the student's, where a forward pass of either has resized its own.

    Observers of quantisation-aware training do that. Running statistics of normalization layers keep theirs: where they
    differ, the networks are not built alike.
    """
    statistics = {candidate.name for candidate in Survey(student).candidates if candidate.statistic}
    of_teacher = _named(teacher.named_buffers())
    for name, buffer in _named(student.named_buffers()).items():
        other = of_teacher.get(name)
        if other is not None and name not in statistics and other.shape != buffer.shape:
            with torch.no_grad():
                other.resize_(buffer.shape).copy_(buffer)


def copy_buffers(student: nn.Module, teacher: nn.Module, averaged: Sequence[str]) -> None:
    """Copies the buffers that are not averaged.

    Raises:
        ValueError: a buffer of the student was added, or changed its shape.
    """
    of_teacher = _named(teacher.named_buffers())
    for name, buffer in _named(student.named_buffers()).items():
        target = of_teacher.get(name)
        if target is None or target.shape != buffer.shape:
            check_alike(student, teacher, buffers=True)
        elif name not in averaged:
            target.copy_(buffer)


def _check_shards(student: nn.Module, teacher: nn.Module) -> None:
    of_teacher = Survey(teacher).tensors
    for name, tensor in Survey(student).tensors.items():
        if name in of_teacher and not same_cut(tensor, of_teacher[name]):
            raise ValueError(
                f"student.{name} and teacher.{name} are not sharded alike. In configure_model apply the same "
                "fully_shard and parallelize_module calls to self.student and to self.teacher, after the student was "
                "assigned."
            )


def _parameters_apart(student: nn.Module, teacher: nn.Module) -> list[str]:
    of_student, of_teacher = (_all(network.named_parameters) for network in (student, teacher))
    extra = [f"{name}: the student has no such parameter" for name in of_teacher if name not in of_student]
    return _apart(of_student, of_teacher) + extra


def _buffers_apart(student: nn.Module, teacher: nn.Module) -> list[str]:
    return _apart(*(_all(network.named_buffers) for network in (student, teacher)))


def _apart(of_student: dict[str, Tensor], of_teacher: dict[str, Tensor]) -> list[str]:
    problems = []
    for name, tensor in of_student.items():
        other = of_teacher.get(name)
        if other is None:
            problems.append(f"{name}: the teacher has no such tensor")
        elif tensor.shape != other.shape:
            problems.append(f"{name}: shape {tuple(tensor.shape)} in the student, {tuple(other.shape)} in the teacher")
    return problems


def _ties_apart(student: nn.Module, teacher: nn.Module) -> list[str]:
    of_student, of_teacher = _ties(student), _ties(teacher)
    return [
        f"{' and '.join(sorted(names))}: one parameter in the {where}, several in the other network"
        for where, ties in (("student", of_student - of_teacher), ("teacher", of_teacher - of_student))
        for names in sorted(ties, key=sorted)
    ]


def _ties(network: nn.Module) -> set[frozenset[str]]:
    return {frozenset(c.names) for c in Survey(network).candidates if len(c.names) > 1 and not c.is_buffer}


def _all(named: Callable[..., Iterable[tuple[str, Tensor]]]) -> dict[str, Tensor]:
    return _named(named(remove_duplicate=False))


def _named(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {without_wrappers(name): tensor for name, tensor in tensors}
