"""Recipes for OpenMMLab: mmengine, mmdetection, mmpretrain.

Formulas are in their words: ``r`` is the share of the new weights in an update, ``s`` the calls before this one and
``n = s + 1`` the calls with it. Our decay is ``1 - r``.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_ema.checks import check_count, check_flag
from lightning_ema.recipes.recipe import Recipe, buffers_where, decay_of, positive, share
from lightning_ema.schedules.base import Constant, PerUpdate, Schedule
from lightning_ema.schedules.basic import Annealing, Cosine, ExponentialAnnealing, InversePower


def mmengine_ema(
    momentum: float = 0.0002, interval: int = 1, update_buffers: bool = False, begin_iter: int = 0
) -> Recipe:
    """mmengine's ``ExponentialMovingAverage`` under its ``EMAHook``: ``r = momentum``.

    The call ``max(1, begin_iter)`` copies; every ``interval``-th one after it averages. For ``begin_epoch`` write
    ``begin_iter = (begin_epoch - 1) * steps_per_epoch + 1``. With ``update_buffers=True`` mmengine freezes integer
    buffers at their first value; here they are the live ones.

    Args:
        momentum: share of the new weights, in [0, 1].
        interval: calls from one update to the next.
        update_buffers: also average floating-point buffers; otherwise they are the live ones.
        begin_iter: up to this call the average is a copy.

    >>> mmengine_ema(interval=5)["decay"], mmengine_ema(interval=5)["start_step"]
    (PerUpdate(Constant(0.9998)), 1)
    """
    schedule = Constant(decay_of(momentum, "mmengine_ema: momentum"))
    return _after_a_copy("mmengine_ema", schedule, interval, update_buffers, begin_iter)


def mmengine_swa(interval: int = 1, update_buffers: bool = False, begin_iter: int = 0) -> Recipe:
    """mmengine's ``StochasticWeightAverage``: ``r = 1 / (s / interval + 1)``.

    That is the equal mean of the states at the first call and at every ``interval``-th one after it.
    Start, buffers and arguments as in :func:`mmengine_ema`.

    >>> round(mmengine_swa(interval=4)["decay"](8), 6)  # of the third state
    0.666667
    """
    check_count(interval, "mmengine_swa: interval", at_least=1)
    schedule = InversePower(decay=1.0, inv_gamma=interval, power=1.0)
    return _after_a_copy("mmengine_swa", schedule, interval, update_buffers, begin_iter)


def mmengine_annealing(
    momentum: float = 0.0002, gamma: float = 100, interval: int = 1, update_buffers: bool = False, begin_iter: int = 0
) -> Recipe:
    """mmengine's ``MomentumAnnealingEMA``: ``r = max(momentum, gamma / (gamma + s))``, where ``s`` counts calls.

    Start, buffers and arguments as in :func:`mmengine_ema`.

    >>> mmengine_annealing()["decay"]
    PerUpdate(Annealing(0.9998, 100))
    """
    decay = decay_of(momentum, "mmengine_annealing: momentum")
    schedule = Annealing(decay, positive(gamma, "mmengine_annealing: gamma"))
    return _after_a_copy("mmengine_annealing", schedule, interval, update_buffers, begin_iter)


def mmdet_exp_momentum(
    momentum: float = 0.0002, gamma: float = 2000, interval: int = 1, update_buffers: bool = False, begin_iter: int = 0
) -> Recipe:
    """mmdetection 3's and mmyolo's ``ExpMomentumEMA``: ``r = (1 - momentum) * exp(-(1 + s) / gamma) + momentum``.

    Start, buffers and arguments as in :func:`mmengine_ema`. Their configurations set ``update_buffers=True``.

    >>> mmdet_exp_momentum()["decay"]
    PerUpdate(ExponentialAnnealing(0.9998, 2000, offset=1))
    """
    decay = decay_of(momentum, "mmdet_exp_momentum: momentum")
    schedule = ExponentialAnnealing(decay, positive(gamma, "mmdet_exp_momentum: gamma"), offset=1)
    return _after_a_copy("mmdet_exp_momentum", schedule, interval, update_buffers, begin_iter)


def mmpretrain_cosine(
    momentum: float = 0.004,
    end_momentum: float = 0.0,
    interval: int = 1,
    update_buffers: bool = False,
    total_steps: int | None = None,
    begin_iter: int = 0,
) -> Recipe:
    """mmpretrain's ``CosineEMA``: ``r = end_momentum - (end_momentum - momentum) * (cos(pi * s / K) + 1) / 2``.

    ``K`` is the number of steps of the whole run. This is what mmpretrain computes; the formula in its documentation
    has another sign. Past ``K`` its rate rises again; here it stays ``end_momentum``. In its BYOL (0.004) and MoCo v3
    (0.01) the update runs before the target's forward pass, so that their target is one step behind this average.

    Args:
        momentum: share of the new weights at the start, in [0, 1].
        end_momentum: the same at the end.
        interval, update_buffers, begin_iter: as in :func:`mmengine_ema`.
        total_steps: ``K``. None: the length of the run, taken from the Trainer.

    >>> mmpretrain_cosine(total_steps=100)["decay"](100)
    1.0
    """
    start = decay_of(momentum, "mmpretrain_cosine: momentum")
    end = decay_of(end_momentum, "mmpretrain_cosine: end_momentum")
    if total_steps is not None:
        check_count(total_steps, "mmpretrain_cosine: total_steps", at_least=1)
    recipe = _after_a_copy("mmpretrain_cosine", Constant(1.0), interval, update_buffers, begin_iter)
    # a run's length counts from the start there, K from the first step of the run
    extra = 0 if total_steps is not None else recipe["start_step"]
    recipe["decay"] = PerUpdate(Cosine(start, end, total_steps, extra))
    return recipe


def mmdet2_base(momentum: float = 0.0002, interval: int = 1, skip_buffers: bool = False) -> Recipe:
    """mmdetection 2's ``BaseEMAHook``: ``r = momentum``, from the initial weights on, where ``n % interval == 0``.

    Args:
        momentum: share of the new weights, in [0, 1].
        interval: steps from one update to the next.
        skip_buffers: floating-point buffers are not averaged; they are the live ones.

    >>> mmdet2_base(momentum=0.001)["decay"]
    PerUpdate(Constant(0.999))
    """
    schedule = Constant(decay_of(momentum, "mmdet2_base: momentum"))
    return _from_the_initial_weights("mmdet2_base", schedule, interval, skip_buffers)


def mmdet2_exp(
    total_iter: float = 2000, momentum: float = 0.0002, interval: int = 1, skip_buffers: bool = False
) -> Recipe:
    """mmdetection 2's ``ExpMomentumEMAHook``: ``r = (1 - momentum) * exp(-n / total_iter) + momentum``.

    Arguments as in :func:`mmdet2_base`; ``total_iter`` is the time constant in steps.

    >>> mmdet2_exp()["decay"]
    PerUpdate(ExponentialAnnealing(0.9998, 2000))
    """
    decay = decay_of(momentum, "mmdet2_exp: momentum")
    schedule = ExponentialAnnealing(decay, positive(total_iter, "mmdet2_exp: total_iter"))
    return _from_the_initial_weights("mmdet2_exp", schedule, interval, skip_buffers)


def mmdet2_linear(
    warm_up: float = 100, momentum: float = 0.0002, interval: int = 1, skip_buffers: bool = False
) -> Recipe:
    """mmdetection 2's ``LinearMomentumEMAHook``: ``r = min(momentum ** interval, n / (warm_up + s))``.

    Two defects are followed, because trajectories rest on them: the power shrinks the rate where a longer interval
    would need a larger one, and the warm-up begins with the smallest rate instead of the largest. In new runs take
    :func:`mmengine_annealing`.

    Args:
        warm_up: steps over which the rate would rise, at least 1.
        momentum, interval, skip_buffers: as in :func:`mmdet2_base`.

    >>> mmdet2_linear(momentum=0.5)["decay"](1)
    0.99
    """
    decay_of(momentum, "mmdet2_linear: momentum")
    check_count(interval, "mmdet2_linear: interval", at_least=1)
    schedule = LinearMomentum(momentum, interval, warm_up)
    return _from_the_initial_weights("mmdet2_linear", schedule, interval, skip_buffers)


def mean_teacher_hook(momentum: float = 0.001, interval: int = 1, skip_buffer: bool = True) -> Recipe:
    """mmdetection 3's ``MeanTeacherHook``: ``r = momentum``, where ``n % interval == 0``.

    The teacher is set to the student once, before the first step. With ``skip_buffer=True`` the student's BatchNorm
    statistics never reach the teacher, not even at the start. Here the teacher is an average: one that is written
    ``into`` a module of yours leaves that module's buffers alone as well; one that is swapped in uses the live buffers.

    Args:
        momentum: share of the student's weights, in [0, 1].
        interval: steps from one update to the next.
        skip_buffer: parameters only; otherwise floating-point buffers are averaged too.

    >>> mean_teacher_hook()["buffers"]
    'copy'
    """
    check_flag(skip_buffer, "mean_teacher_hook: skip_buffer")
    schedule = Constant(decay_of(momentum, "mean_teacher_hook: momentum"))
    return _from_the_initial_weights("mean_teacher_hook", schedule, interval, skip_buffer)


@dataclass(frozen=True, repr=False)
class LinearMomentum(Schedule):
    """``d(n) = 1 - min(momentum ** interval, n / (warm_up + n - 1))``: a decay that falls. For :func:`mmdet2_linear`.

    >>> LinearMomentum(0.5, interval=1, warm_up=3)(1), LinearMomentum(0.5, interval=1, warm_up=3)(2)
    (0.6666666666666667, 0.5)
    """

    momentum: float
    interval: int
    warm_up: float

    def __post_init__(self) -> None:
        share(self.momentum, "mmdet2_linear: momentum")
        check_count(self.interval, "mmdet2_linear: interval", at_least=1)
        if positive(self.warm_up, "mmdet2_linear: warm_up") < 1:
            raise ValueError(f"mmdet2_linear: warm_up is {self.warm_up!r}; it must be at least 1.")

    def __call__(self, n: int) -> float:
        return 1 - min(self.momentum**self.interval, n / (self.warm_up + n - 1))

    @property
    def limit(self) -> float:
        return 1 - self.momentum**self.interval


def _after_a_copy(recipe: str, schedule: Schedule, interval: int, update_buffers: bool, begin_iter: int) -> Recipe:
    """mmengine's cadence: the first call copies, later ones average where ``s`` is a multiple of the interval."""
    check_count(interval, f"{recipe}: interval", at_least=1)
    check_flag(update_buffers, f"{recipe}: update_buffers")
    check_count(begin_iter, f"{recipe}: begin_iter", at_least=0)
    return Recipe(
        decay=PerUpdate(schedule),
        every_n_steps=interval,
        start_step=max(1, begin_iter),
        buffers=buffers_where(update_buffers),
    )


def _from_the_initial_weights(recipe: str, schedule: Schedule, interval: int, skip_buffers: bool) -> Recipe:
    """mmdetection 2's cadence: no first copy, and averaged where ``n`` is a multiple of the interval."""
    check_count(interval, f"{recipe}: interval", at_least=1)
    check_flag(skip_buffers, f"{recipe}: skip_buffers")
    return Recipe(decay=PerUpdate(schedule), every_n_steps=interval, buffers=buffers_where(averaged=not skip_buffers))
