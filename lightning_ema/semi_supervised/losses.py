"""Losses between student and teacher, their targets, and ramps for their weight: pure functions.

Notation, used in every formula below:

* ``z``, ``z'``: what student and teacher put out; logits, where an argument says so;
* ``p = softmax(z)``, ``q = softmax(z')``: their class probabilities, over dimension ``dim``;
* ``C``: the number of classes. Logits are ``[N, C, ...]`` (``dim=1``, as in ``torch.nn.functional.cross_entropy``);
  for ``[N, T, C]`` write ``dim=-1``;
* position: one element of ``[N, ...]``, the shape without ``dim``. A sample, or a pixel in segmentation.

Every loss is a mean over *all* positions of the batch. A ``mask`` multiplies positions before that mean, and the
masked ones still count in its divisor: the fewer are let through, the less the loss weighs (FixMatch). So the weight
of a loss means the same for every size of batch and image. A mask is bool, or a tensor of weights; its shape is
``[N, ...]`` or the leading part of it, such as ``[N]`` for whole images. What targets hold at masked positions does
not matter, be it NaN or a label that does not exist.

Gradients flow to the student alone. Everything is computed in float32 at least, under autocast too. An empty batch
and one that is masked as a whole give 0 with a gradient of 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_ema.semi_supervised.logits import (
    check_alike,
    check_classes,
    check_floats,
    check_probabilities,
    expectation,
    kind,
    mask_over,
    mean,
    positions,
    target,
    wide,
)
from lightning_ema.semi_supervised.ramps import cosine_ramp, is_number, linear_ramp, sigmoid_ramp

__all__ = [
    "align_distribution",
    "cosine_ramp",
    "cross_entropy",
    "kl",
    "linear_ramp",
    "mse",
    "mse_outputs",
    "pseudo_labels",
    "sharpen",
    "sigmoid_ramp",
]

SMALLEST_SHARE = 1e-6
"""What a class has at least in the distributions of ``align_distribution``, so that nothing is divided by zero."""


def mse(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, *, dim: int = 1) -> Tensor:
    """Squared error between probabilities: ``sum_c (p_c - q_c)^2 / C``, the mean over positions.

    Both arguments go through a softmax. For outputs that are not logits take :func:`mse_outputs`.

    Source: Mean Teacher (arXiv 1703.01780), whose code divides by the number of classes as well.

    Args:
        student_logits: ``[N, C, ...]``.
        teacher_logits: the same shape; no gradient flows to it.
        mask: ``[N, ...]`` or its leading part; see the top of this module.
        dim: the dimension of the classes.

    Returns:
        A scalar in [0, 2 / C].

    Raises:
        TypeError: an argument is not a tensor of floats.
        ValueError: the shapes differ, or there are fewer than two classes in ``dim``.

    >>> mse(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]]))  # p = (1/2, 1/2), q = (1/4, 3/4)
    tensor(0.0625)
    """
    _check_pair(student_logits, teacher_logits, dim)
    mask = mask_over(positions(student_logits, dim), mask)
    p = wide(student_logits).softmax(dim)
    q = wide(target(teacher_logits, mask, dim)).softmax(dim)
    return mean((p - q).square().mean(dim), mask)


def mse_outputs(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error between outputs as they are: ``(z - z')^2``, the mean over all elements.

    For regression, boxes, features, key points. Here every element is a position.

    Args:
        student: any shape.
        teacher: the same shape; no gradient flows to it.
        mask: that shape or its leading part, such as ``[N]``; see the top of this module.

    Returns:
        A scalar of at least 0, in the square of the outputs' unit.

    Raises:
        TypeError: an argument is not a tensor of floats.
        ValueError: the shapes differ.

    >>> mse_outputs(torch.tensor([1.0, 5.0]), torch.tensor([4.0, 5.0]))
    tensor(4.5000)
    """
    check_alike(student, teacher, ("student", "teacher"))
    mask = mask_over(student.shape, mask)
    return mean((wide(student) - wide(target(teacher, mask))).square(), mask)


def kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, *, dim: int = 1) -> Tensor:
    """Kullback-Leibler divergence ``KL(q || p) = sum_c q_c log(q_c / p_c)``, the mean over positions.

    Its gradient is that of :func:`cross_entropy` with ``q`` as the target; it is zero where both agree. For a
    sharpened teacher write ``kl(student_logits, teacher_logits / temperature)``.

    Sources: Mean Teacher (arXiv 1703.01780) compares it with the squared error; UDA (arXiv 1904.12848) trains with it.

    Args:
        student_logits: ``[N, C, ...]``. Minus infinity rules a class out.
        teacher_logits: the same shape; no gradient flows to it.
        mask: ``[N, ...]`` or its leading part; see the top of this module.
        dim: the dimension of the classes.

    Returns:
        A scalar of at least 0, in nats.

    Raises:
        TypeError: an argument is not a tensor of floats.
        ValueError: the shapes differ, or there are fewer than two classes in ``dim``.

    >>> kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -math.inf]]))  # p = (1/2, 1/2), q = (1, 0): log 2
    tensor(0.6931)
    """
    _check_pair(student_logits, teacher_logits, dim)
    mask = mask_over(positions(student_logits, dim), mask)
    log_p = wide(student_logits).log_softmax(dim)
    log_q = wide(target(teacher_logits, mask, dim)).log_softmax(dim)
    return mean(expectation(log_q.exp(), log_q - log_p, dim), mask)


def cross_entropy(student_logits: Tensor, targets: Tensor, mask: Tensor | None = None, *, dim: int = 1) -> Tensor:
    """Cross entropy with soft targets or with labels, the mean over positions.

    * floats ``t``, shape ``[N, C, ...]``: ``-sum_c t_c log p_c``. These are probabilities, not logits:
      ``teacher_logits.float().softmax(1)``, or what :func:`sharpen` and :func:`align_distribution` give.
    * integers ``y``, shape ``[N, ...]``: ``-log p_y``.

    FixMatch is ``cross_entropy(student_logits, *pseudo_labels(teacher_logits, 0.95))``.

    Sources: FixMatch (arXiv 2001.07685) for labels and mask; ReMixMatch (arXiv 1911.09785) for soft targets.

    Args:
        student_logits: ``[N, C, ...]``. Minus infinity rules a class out.
        targets: probabilities or labels as above; no gradient flows to them.
        mask: ``[N, ...]`` or its leading part; see the top of this module. Unlike the ``ignore_index`` of
            ``torch.nn.functional.cross_entropy`` it leaves the divisor as it is.
        dim: the dimension of the classes.

    Returns:
        A scalar of at least 0, in nats.

    Raises:
        TypeError: ``student_logits`` is not a tensor of floats, ``targets`` not one of floats or integers.
        ValueError: the shapes do not fit, there are fewer than two classes in ``dim``, or soft targets lie outside
            [0, 1]; that last one is looked for on the CPU only, because an accelerator would have to be waited for.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([3, 1]), torch.tensor([True, False]))  # log(4) / 2
    tensor(0.6931)
    """
    check_floats(student_logits, "student_logits")
    check_classes(student_logits, dim, "student_logits")
    shape = positions(student_logits, dim)
    mask = mask_over(shape, mask)
    log_p = wide(student_logits).log_softmax(dim)
    if not isinstance(targets, Tensor) or targets.dtype == torch.bool or targets.is_complex():
        raise TypeError(
            f"targets is {kind(targets)}; it must be probabilities (a tensor of floats) or labels (one of integers)."
        )
    if targets.is_floating_point():
        check_alike(student_logits, targets, ("student_logits", "targets"))
        targets = target(targets, mask, dim)
        check_probabilities(targets, "targets")
        return mean(-expectation(wide(targets), log_p, dim), mask)
    if targets.shape != shape:
        raise ValueError(
            f"labels have the shape {list(targets.shape)}, logits {list(student_logits.shape)}; without the classes "
            f"in dim={dim} that is {list(shape)}, which the labels must have."
        )
    labels = target(targets, mask).long().unsqueeze(dim)
    return mean(-log_p.gather(dim, labels).squeeze(dim), mask)


def pseudo_labels(teacher_logits: Tensor, threshold: float, *, dim: int = 1) -> tuple[Tensor, Tensor]:
    """The teacher's most probable class, and where it is sure of it: ``argmax_c q_c`` and ``max_c q_c >= threshold``.

    For probabilities (aligned ones, means over views) pass their logarithm, ``probabilities.log()``.

    Source: FixMatch (arXiv 2001.07685), threshold 0.95.

    Args:
        teacher_logits: ``[N, C, ...]``.
        threshold: in [0, 1]; 0 accepts everything but NaN.
        dim: the dimension of the classes.

    Returns:
        Labels (int64) and mask (bool), both ``[N, ...]``. Where logits are NaN the mask is False.

    Raises:
        TypeError: ``teacher_logits`` is not a tensor of floats.
        ValueError: the threshold lies outside [0, 1], or there are fewer than two classes in ``dim``.

    >>> pseudo_labels(torch.tensor([[0.0, math.log(3)], [0.1, 0.0]]), threshold=0.75)
    (tensor([1, 0]), tensor([ True, False]))
    """
    check_floats(teacher_logits, "teacher_logits")
    check_classes(teacher_logits, dim, "teacher_logits")
    if not is_number(threshold) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold!r}; it must be a number in [0, 1], for instance 0.95.")
    confidence, labels = wide(teacher_logits.detach()).softmax(dim).max(dim)
    return labels, confidence >= threshold


def sharpen(probabilities: Tensor, temperature: float, *, dim: int = 1) -> Tensor:
    """``p_c^(1/T) / sum_k p_k^(1/T)``: lower temperatures ``T`` favour the most probable class; 1 changes nothing.

    The same as ``softmax(logits / T)`` where ``p = softmax(logits)``.

    Source: MixMatch (arXiv 1905.02249), temperature 0.5.

    Args:
        probabilities: ``[N, C, ...]``, in [0, 1].
        temperature: a positive, finite number.
        dim: the dimension of the classes.

    Returns:
        Probabilities of that shape, in float32 at least.

    Raises:
        TypeError: ``probabilities`` is not a tensor of floats.
        ValueError: the temperature is not positive, there are fewer than two classes in ``dim``, or (on the CPU)
            values lie outside [0, 1].

    >>> sharpen(torch.tensor([[0.25, 0.75]]), temperature=0.5)  # 1/16 and 9/16, over 10/16
    tensor([[0.1000, 0.9000]])
    """
    check_floats(probabilities, "probabilities")
    check_classes(probabilities, dim, "probabilities")
    check_probabilities(probabilities, "probabilities")
    if not is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature!r}; it must be a positive, finite number, for instance 0.5.")
    p = wide(probabilities)
    powers = (p / p.amax(dim, keepdim=True)).pow(1 / temperature)  # the largest is 1: no sum can vanish
    return powers / powers.sum(dim, keepdim=True)


def align_distribution(probabilities: Tensor, wanted: Tensor, predicted: Tensor, *, dim: int = 1) -> Tensor:
    """Distribution alignment: ``p_c w_c / r_c``, divided by its sum over the classes.

    ``w`` is how often each class should be predicted, ``r`` how often it has been lately. Keep ``r`` yourself, for
    instance ``predicted.lerp_(probabilities.mean(0), 0.01)`` after each batch, starting from ``1 / C`` everywhere.

    Source: ReMixMatch (arXiv 1911.09785): ``w`` from the labels, ``r`` the running mean of predictions for unlabeled
    data over 128 batches. Shares below ``1e-6``, in ``w`` and in ``r``, count as ``1e-6``.

    Args:
        probabilities: ``[N, C, ...]``, in [0, 1].
        wanted: ``w``, shape ``[C]``, in [0, 1].
        predicted: ``r``, shape ``[C]``, in [0, 1].
        dim: the dimension of the classes.

    Returns:
        Probabilities of the shape of ``probabilities``, in float32 at least.

    Raises:
        TypeError: an argument is not a tensor of floats.
        ValueError: a shape does not fit, there are fewer than two classes in ``dim``, or (on the CPU) values lie
            outside [0, 1].

    >>> align_distribution(torch.tensor([[0.5, 0.5]]), torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2]))
    tensor([[0.2000, 0.8000]])
    """
    check_floats(probabilities, "probabilities")
    check_classes(probabilities, dim, "probabilities")
    check_probabilities(probabilities, "probabilities")
    classes = probabilities.shape[dim]
    for name, distribution in (("wanted", wanted), ("predicted", predicted)):
        check_floats(distribution, name)
        if distribution.shape != (classes,):
            raise ValueError(
                f"{name} has the shape {list(distribution.shape)}; it must be [{classes}], one share for each class "
                f"in dim={dim} of probabilities {list(probabilities.shape)}."
            )
        check_probabilities(distribution, name)
    ratio = wide(wanted).clamp(min=SMALLEST_SHARE) / wide(predicted).clamp(min=SMALLEST_SHARE)
    along = [1] * probabilities.dim()
    along[dim] = classes
    aligned = wide(probabilities) * ratio.reshape(along)
    return aligned / aligned.sum(dim, keepdim=True)


def _check_pair(student_logits: Tensor, teacher_logits: Tensor, dim: int) -> None:
    check_alike(student_logits, teacher_logits, ("student_logits", "teacher_logits"))
    check_classes(student_logits, dim, "student_logits")
