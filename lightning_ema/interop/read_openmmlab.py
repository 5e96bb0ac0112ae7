"""Readers of files of OpenMMLab: mmengine, mmdetection 2, the mean teachers of mmdetection 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from lightning_ema.interop.imported import (
    Content,
    Imported,
    Weights,
    below,
    count_of,
    grouped,
    refuse_ambiguous,
    state_of,
    tensors,
)


def mmengine(content: Content) -> Imported | None:
    """mmengine's ``EMAHook``: ``state_dict`` is the average, ``ema_state_dict`` holds ``steps`` and ``module.<live>``.

    The two have changed places in the file, for whoever reads ``state_dict`` alone.
    """
    inner = content.get("ema_state_dict")
    if not isinstance(inner, Mapping) or "state_dict" not in content:
        return None
    return Imported(
        "mmengine",
        "ema_state_dict with steps and module.<name>, as mmengine's EMAHook writes it; state_dict is the average there",
        tensors(content["state_dict"]),
        below("module.", inner),
        steps=count_of(inner.get("steps")),
    )


def mmdet2(content: Content) -> Imported | None:
    """mmdetection 2 at the end of an epoch: plain names hold the average, ``ema_<name with _ for .>`` live weights."""
    plain, beside = _mmdet2(content)
    ahead = _ahead(plain, beside)
    if not beside or ahead == "plain":
        return None
    return Imported(
        "mmdet2",
        "state_dict holds ema_<name> beside <name>, and mmdetection 2 had exchanged the two before it saved, as at the "
        f"end of an epoch{_counted(ahead)}: <name> is the average",
        _with_integers_of(beside, plain),
        {**plain, **beside},
        steps=_iterations(content),
    )


def mmdet2_mid_epoch(content: Content) -> Imported | None:
    """mmdetection 2 inside an epoch, or in a run by iterations: plain names are live, ``ema_<name>`` the average."""
    plain, beside = _mmdet2(content)
    ahead = _ahead(plain, beside)
    if not beside or ahead == "beside":
        return None
    before = _iterations(content)  # the iteration in which it saves is not counted yet
    return Imported(
        "mmdet2_mid_epoch",
        "state_dict holds ema_<name> beside <name>, and was saved in the middle of an epoch or by iterations, where "
        f"mmdetection 2 has not exchanged the two{_counted(ahead)}: ema_<name> is the average",
        _with_integers_of(plain, {**plain, **beside}),
        plain,
        steps=None if before is None else before + 1,
    )


def mean_teacher(content: Content) -> Imported | None:
    """mmdetection 3's semi-supervised detectors: ``teacher.<name>`` and ``student.<name>``."""
    state = tensors(state_of(content))
    teacher, student = below("teacher.", state), below("student.", state)
    if not teacher or teacher.keys() != student.keys():
        return None
    others = len(state) - 2 * len(teacher)
    return Imported(
        "mean_teacher",
        "teacher.<name> and student.<name>, as mmdetection 3's semi-supervised detectors have them",
        teacher,
        student,
        steps=_iterations(content),
        notes=(f"{others} entries that are neither teacher's nor student's are left out.",) if others else (),
    )


def _iterations(content: Content) -> int | None:
    meta = content.get("meta")
    return count_of(meta.get("iter")) if isinstance(meta, Mapping) else None


def _ahead(plain: Weights, beside: Weights) -> Literal["plain", "beside"] | None:
    """The side on which BatchNorm has counted more batches: the live one. None where the counts do not tell."""
    names = [name for name in beside if name.endswith("num_batches_tracked")]
    more = [int(plain[name]) - int(beside[name]) for name in names]
    if max(more, default=0) * min(more, default=0) < 0 or not any(more):
        return None
    return "plain" if max(more) > 0 else "beside"


def _counted(ahead: str | None) -> str:
    return "" if ahead is None else " (num_batches_tracked tells which are live)"


def _with_integers_of(live: Weights, average: Weights) -> Weights:
    """This system averages floats only; its copies of integers are those of the start."""
    integers = {name: t for name, t in live.items() if not (t.is_floating_point() or t.is_complex())}
    return {**average, **integers}


def _mmdet2(content: Content) -> tuple[Weights, Weights]:
    """The plain entries, and by the same names what stands in the ``ema_`` buffers; none where there are none."""
    state = tensors(state_of(content))
    by_buffer = grouped((f"ema_{name.replace('.', '_')}", name) for name in state)
    buffers = {buffer: names for buffer, names in by_buffer.items() if buffer in state}
    plain = {name: tensor for name, tensor in state.items() if name not in buffers}
    kept = {buffer: [name for name in names if name in plain] for buffer, names in buffers.items()}
    refuse_ambiguous(kept)
    return plain, {names[0]: state[buffer] for buffer, names in kept.items() if names}
