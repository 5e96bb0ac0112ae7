"""Checks and arithmetic over logits, targets and masks, which losses and metrics share.

A position is one element of the shape without the dimension of the classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-2
"""How far above 1 a probability may lie: bfloat16 has steps of 0.008 there."""


def kind(value: object) -> str:
    """What a value is, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} and shape {list(value.shape)}"
    return f"{value!r:.80} ({type(value).__name__})"


def check_floats(value: Tensor, name: str) -> None:
    """Refuse what is not a tensor of floats."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} is {kind(value)}; it must be a tensor of floats.")


def check_alike(student: Tensor, other: Tensor, names: tuple[str, str]) -> None:
    """Refuse two that are not tensors of floats of one shape."""
    for value, name in zip((student, other), names, strict=True):
        check_floats(value, name)
    if student.shape != other.shape:
        raise ValueError(
            f"{names[0]} has the shape {list(student.shape)}, {names[1]} {list(other.shape)}; they must be the same, "
            "because nothing is broadcast here."
        )


def check_classes(logits: Tensor, dim: int, name: str) -> None:
    """Refuse a dimension of classes that does not exist or has fewer than two of them."""
    if isinstance(dim, bool) or not isinstance(dim, int) or not -logits.dim() <= dim < logits.dim():
        raise ValueError(
            f"dim is {dim!r}, but {name} has the shape {list(logits.shape)}; dim must be the one of the classes. "
            "For outputs without classes take consistency.mse_outputs."
        )
    if logits.shape[dim] < 2:
        raise ValueError(
            f"{name} has the shape {list(logits.shape)}, so {logits.shape[dim]} class in dim={dim}, where softmax is 1 "
            "whatever the network says. Where one logit z stands for yes or no, pass "
            f"torch.cat([torch.zeros_like(z), z], dim={dim}); for outputs that are no logits take "
            "consistency.mse_outputs."
        )


def check_probabilities(values: Tensor, name: str) -> None:
    """Refuse values outside [0, 1], where looking costs no waiting: on the CPU, and not in a compiled graph."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = values.detach()
    if bool((values < 0).any()) or bool((values > 1 + ROUNDING).any()):
        low, high = (f"{float(value):.4g}" for value in values.float().aminmax())
        raise ValueError(
            f"{name} reaches from {low} to {high}; probabilities lie in [0, 1]. If these are logits, write "
            f"{name}.softmax(dim) with the dimension of the classes."
        )


def positions(logits: Tensor, dim: int) -> torch.Size:
    """The shape without the dimension of the classes."""
    shape = list(logits.shape)
    del shape[dim]
    return torch.Size(shape)


def mask_over(shape: torch.Size, mask: Tensor | None) -> Tensor | None:
    """The mask, spread over positions of ``shape``: each of its elements stands for all that follow.

    Raises:
        TypeError: the mask is not a tensor of bool or floats.
        ValueError: its shape is not a leading part of ``shape``.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(f"mask is {kind(mask)}; it must be a tensor of bool, or of weights in floats.")
    if mask.shape != shape[: mask.dim()]:
        raise ValueError(
            f"mask has the shape {list(mask.shape)}; the positions are {list(shape)}, and a mask must have that shape "
            "or the leading part of it."
        )
    spread = constant(mask).reshape(*mask.shape, *[1] * (len(shape) - mask.dim()))
    return spread.expand(shape)


def constant(tensor: Tensor) -> Tensor:
    """The tensor without a graph. Autograd cannot keep what was made under ``inference_mode``: that is copied.

    A compiled graph cannot ask, and copies always; its compiler may drop that again.
    """
    if torch.compiler.is_compiling() or tensor.is_inference():
        return tensor.detach().clone()
    return tensor.detach()


def target(tensor: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """A constant with zeros where the mask is 0, so that NaN there reaches no gradient; ``dim`` as everywhere."""
    if mask is None:
        return constant(tensor)
    masked = mask == 0
    return constant(tensor).masked_fill(masked if dim is None else masked.unsqueeze(dim), 0)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own type where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def expectation(probabilities: Tensor, values: Tensor, dim: int) -> Tensor:
    """``sum_c p_c v_c`` with ``0 * infinity = 0``: classes ruled out by minus infinity take no part."""
    return torch.where(probabilities == 0, 0, probabilities * values).sum(dim)


def mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """``sum(mask * values)`` over their number, masked ones counted; 0 where there are none."""
    if mask is not None:
        values = torch.where(mask != 0, values * mask.to(values.dtype), 0)
    return values.sum() / max(values.numel(), 1)
