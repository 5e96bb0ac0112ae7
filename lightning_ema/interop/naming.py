"""Giving tensors the names of a model: those of a file that has none, or other ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_ema.interop.imported import Weights, is_statistic

PARAMETERS_ALONE = (
    "A file of the averaged parameters alone settles it: torch.save({name: p for name, p in model.named_parameters() "
    "if p.requires_grad}, 'parameters.pt')"
)


def named_in_order(values: Sequence[Tensor], model: Weights) -> Weights:
    """Names for tensors that stand in the order of a model's parameters.

    Entries of the model that have no average (frozen parameters, buffers) may stand in between: the names are those
    that keep the order and fit every shape, and there must be one such choice only.

    Args:
        values: the tensors.
        model: the model's ``state_dict``, or its parameters by name.

    Raises:
        ValueError: no choice of names fits, or several do.
    """
    candidates, seen = [], set()
    for name, tensor in model.items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        if memory not in seen and not is_statistic(name, tensor):  # a tied parameter counts once
            candidates.append((name, tensor))
        seen.add(memory)
    first = _first_fit(values, candidates)
    if len(first) < len(values):
        raise ValueError(
            f"{len(values)} averages without names do not fit the model's {len(candidates)} parameters: there is none "
            f"left for number {len(first) + 1}, of shape {tuple(values[len(first)].shape)}, after "
            f"{', '.join(first[-2:]) or 'none'}. Give the model that was averaged. {PARAMETERS_ALONE}."
        )
    last = _first_fit(values[::-1], candidates[::-1])[::-1]
    several = [f"number {n}: {a} or {b}" for n, (a, b) in enumerate(zip(first, last, strict=True), 1) if a != b]
    if several:
        raise ValueError(
            f"{len(values)} averages without names fit the model's {len(candidates)} entries in several ways: "
            f"{'; '.join(several[:4])}. {PARAMETERS_ALONE}."
        )
    return dict(zip(first, values, strict=True))


def renamed(weights: Weights, model: Weights) -> Weights:
    """Weights under the names of a model, where these are the same but for one prefix in front of all of them.

    Raises:
        ValueError: no prefix, or more than one, makes all names and shapes fit.
    """
    first = next(iter(weights), "")
    ways = [("", "")]
    ways += [("", name.removesuffix(first)) for name in model if name.endswith(f".{first}")]
    ways += [(first.removesuffix(name), "") for name in model if first.endswith(f".{name}")]
    fits = []
    for before, now in ways:
        names = {name: now + name.removeprefix(before) for name in weights if name.startswith(before)}
        if len(names) == len(weights) and all(
            n in model and model[n].shape == weights[k].shape for k, n in names.items()
        ):
            fits.append({names[name]: tensor for name, tensor in weights.items()})
            if not before and not now:
                return fits[0]
    if len(fits) > 1:
        raise ValueError(
            f"{first!r} and what stands beside it fit the model under several names: "
            f"{', '.join(next(iter(fit)) for fit in fits)}. Rename the file's weights first."
        )
    if not fits:
        lost = [
            f"{n}: {_shape(t)} in the file, {_shape(model.get(n))} in the model"
            for n, t in weights.items()
            if n not in model or model[n].shape != t.shape
        ]
        raise ValueError(
            "the file's weights do not fit the model, not even with a prefix in front of their names:\n  "
            + "\n  ".join(lost[:8])
            + ("\n  ..." if len(lost) > 8 else "")
            + "\nGive the model that was averaged."
        )
    return fits[0]


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"shape {tuple(tensor.shape)}"


def _first_fit(values: Sequence[Tensor], candidates: Sequence[tuple[str, Tensor]]) -> list[str]:
    """The first candidates, in their order, whose shapes are those of the values; fewer names where these run out."""
    names: list[str] = []
    for name, tensor in candidates:
        if len(names) < len(values) and tensor.shape == values[len(names)].shape:
            names.append(name)
    return names
