"""Recipes for timm, ema_pytorch, diffusers, torch_ema, composer, EDM2, torch and Lightning.

In the formulas ``d`` is the decay of a call and ``n`` counts the calls from 1. Integer buffers are the live ones in all
of them, whatever the other system does with them.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence

from lightning_ema.checks import check_count, check_flag
from lightning_ema.recipes.recipe import Recipe, buffers_where, positive, share
from lightning_ema.schedules.base import Constant, PerUpdate, Schedule
from lightning_ema.schedules.basic import HalfLife, InversePower, Warmup
from lightning_ema.schedules.composed import Shifted, Then
from lightning_ema.schedules.growing import Equal, Power


def timm_v3(
    decay: float = 0.9999,
    min_decay: float = 0.0,
    update_after_step: int = 0,
    use_warmup: bool = False,
    warmup_gamma: float = 1.0,
    warmup_power: float = 2 / 3,
    exclude_buffers: bool = False,
) -> Recipe:
    """timm's ``ModelEmaV3``, called as ``update(model, step=n)`` with ``n`` from 1, as its training script does.

    Up to ``n = update_after_step + 1`` it copies. After that ``t = n - update_after_step - 1`` and ``d = decay``; with
    ``use_warmup`` ``d = clamp(1 - (1 + t / warmup_gamma) ** -warmup_power, min_decay, decay)``.

    Args:
        decay: in [0, 1].
        min_decay: lower limit of the warm-up, not above ``decay``; without warm-up timm does not read it.
        update_after_step: calls that copy, besides the first.
        use_warmup, warmup_gamma, warmup_power: as above.
        exclude_buffers: floating-point buffers are the live ones.

    >>> timm_v3(use_warmup=True)["decay"](7)
    0.75
    """
    share(decay, "timm_v3: decay")
    if share(min_decay, "timm_v3: min_decay") > decay and use_warmup:
        raise ValueError(f"timm_v3: min_decay {min_decay} is above decay {decay}; swap them.")
    check_count(update_after_step, "timm_v3: update_after_step", at_least=0)
    check_flag(use_warmup, "timm_v3: use_warmup")
    check_flag(exclude_buffers, "timm_v3: exclude_buffers")
    inv_gamma = positive(warmup_gamma, "timm_v3: warmup_gamma")
    power = positive(warmup_power, "timm_v3: warmup_power")
    return Recipe(
        decay=InversePower(decay, inv_gamma, power, min_decay) if use_warmup else Constant(decay),
        start_step=update_after_step + 1,
        buffers=buffers_where(averaged=not exclude_buffers),
    )


def ema_pytorch(
    beta: float = 0.9999,
    update_after_step: int = 100,
    update_every: int = 10,
    inv_gamma: float = 1.0,
    power: float = 2 / 3,
    min_value: float = 0.0,
) -> Recipe:
    """ema_pytorch's ``EMA`` (0.8): ``d = clamp(1 - (1 + e / inv_gamma) ** -power, min_value, beta)``.

    There ``e = n - 1 - update_after_step``. It acts at the calls ``n = 1, 1 + update_every, 1 + 2 * update_every,
    ...``: while ``e <= 0`` it copies, after that it averages. So the average starts at the last of the copying calls.
    ``beta=1`` freezes it there.

    Args:
        beta: upper limit of the decay, in [0, 1].
        update_after_step: calls after the first that copy.
        update_every: calls from one update to the next.
        inv_gamma, power: of the warm-up.
        min_value: lower limit of the decay, not above ``beta``.

    >>> ema_pytorch()["start_step"], ema_pytorch()["decay"]
    (101, PerUpdate(InversePower(0.9999)))
    """
    share(beta, "ema_pytorch: beta")
    share(min_value, "ema_pytorch: min_value")
    if min_value > beta:
        raise ValueError(f"ema_pytorch: min_value {min_value} is above beta {beta}; swap them.")
    check_count(update_after_step, "ema_pytorch: update_after_step", at_least=0)
    check_count(update_every, "ema_pytorch: update_every", at_least=1)
    gamma, power = positive(inv_gamma, "ema_pytorch: inv_gamma"), positive(power, "ema_pytorch: power")
    schedule: Schedule = Constant(1.0) if beta == 1 else InversePower(beta, gamma, power, min_value)
    uncounted = update_after_step % update_every  # from the last copy to the step at which e begins to count
    return Recipe(
        decay=PerUpdate(Then(0.0, uncounted, schedule) if uncounted else schedule),
        every_n_steps=update_every,
        start_step=update_after_step - uncounted + 1,
        buffers="average",
    )


def diffusers(
    decay: float = 0.9999,
    min_decay: float = 0.0,
    update_after_step: int = 0,
    use_ema_warmup: bool = False,
    inv_gamma: float = 1.0,
    power: float = 2 / 3,
) -> Recipe:
    """diffusers' ``EMAModel``: ``d = clamp((1 + s) / (10 + s), min_decay, decay)``, ``s = n - update_after_step - 1``.

    With ``use_ema_warmup`` ``d = clamp(1 - (1 + s / inv_gamma) ** -power, min_decay, decay)``. Where ``s <= 0`` it
    copies. It holds parameters only: buffers are the live ones.

    Args:
        decay: upper limit of the decay, in [0, 1].
        min_decay: lower limit of the decay, not above ``decay``.
        update_after_step: calls that copy, besides the first.
        use_ema_warmup, inv_gamma, power: as above.

    >>> diffusers()["decay"], diffusers()["start_step"]
    (Warmup(0.9999), 1)
    """
    share(decay, "diffusers: decay")
    if share(min_decay, "diffusers: min_decay") > decay:
        raise ValueError(f"diffusers: min_decay {min_decay} is above decay {decay}; swap them.")
    check_count(update_after_step, "diffusers: update_after_step", at_least=0)
    check_flag(use_ema_warmup, "diffusers: use_ema_warmup")
    inv_gamma, power = positive(inv_gamma, "diffusers: inv_gamma"), positive(power, "diffusers: power")
    if use_ema_warmup:
        schedule: Schedule = InversePower(decay, inv_gamma, power, min_decay)
    else:
        schedule = _warmup_from(min_decay, decay)
    return Recipe(decay=schedule, start_step=update_after_step + 1, buffers="copy")


def torch_ema(decay: float, use_num_updates: bool = True) -> Recipe:
    """torch_ema's ``ExponentialMovingAverage``, LitEma: ``d = min(decay, (1 + n) / (10 + n))``.

    It begins with the initial weights. It holds parameters only: buffers are the live ones.

    Args:
        decay: in [0, 1].
        use_num_updates: the warm-up above; without it ``d = decay``.

    >>> torch_ema(0.995)["decay"]
    Warmup(0.995)
    """
    share(decay, "torch_ema: decay")
    check_flag(use_num_updates, "torch_ema: use_num_updates")
    return Recipe(decay=Warmup(decay) if use_num_updates else Constant(decay), buffers="copy")


def composer(
    half_life: str | None = "1000ba",
    smoothing: float | None = None,
    ema_start: str = "0.0dur",
    update_interval: str | None = None,
) -> Recipe:
    """composer's ``EMA``: ``d = 2 ** (-update_interval / half_life)``, or ``d = smoothing``, at each update.

    At the end of batch ``max(1, ema_start)`` it copies; it updates where the number of batches since the beginning of
    the run is a multiple of ``update_interval``. Updates here count from the start, so that a start has to be such a
    multiple itself. With ``ema_start`` at 0 and an interval above 1 the average begins with the initial weights, where
    composer takes those after the first batch.

    Args:
        half_life: in batches, ``"1000ba"``; None where ``smoothing`` is given.
        smoothing: the decay of an update, in [0, 1].
        ema_start: in batches, ``"500ba"``, or ``"0.0dur"``, the beginning.
        update_interval: in batches; None: ``"1ba"``.

    >>> composer(half_life="500ba", update_interval="10ba")["decay"].product(0, 500)
    0.5
    """
    if (half_life is None) == (smoothing is None):
        raise ValueError(
            f"composer: half_life is {half_life!r} and smoothing is {smoothing!r}; give exactly one of them. "
            "As in composer, a smoothing needs half_life=None beside it."
        )
    every = 1 if update_interval is None else _batches(update_interval, "composer: update_interval", at_least=1)
    start = 0 if re.fullmatch(r"0*\.?0*dur", ema_start) else _batches(ema_start, "composer: ema_start", at_least=0)
    if start % every:
        raise ValueError(
            f"composer: ema_start is {ema_start!r}; it must be a multiple of update_interval, "
            f"{update_interval!r}, such as '{start - start % every + every}ba'."
        )
    if half_life is not None:
        schedule: Schedule = HalfLife(steps=_batches(half_life, "composer: half_life", at_least=1))
    else:
        schedule = PerUpdate(Constant(share(smoothing or 0.0, "composer: smoothing")))
    return Recipe(
        decay=schedule,
        every_n_steps=every,
        start_step=max(start, 1) if every == 1 else start,
        buffers="average",
    )


def edm2(stds: Sequence[float] = (0.05, 0.1)) -> Recipe:
    """EDM2's ``PowerFunctionEMA``: ``d = (1 - 1 / n) ** (gamma + 1)``, with ``gamma`` of each width in ``stds``.

    It is exact at any ``every_n_steps``. Buffers are the live ones. Add ``snapshots=Snapshots(...)`` to give any other
    width afterwards. Source: Karras et al. 2024, arXiv 2312.02696.

    Args:
        stds: standard deviations of the profiles relative to the run, in (0, 0.2887]; one average for each.

    >>> edm2()["decay"], edm2([0.1])["decay"]
    ([Power(sigma_rel=0.05), Power(sigma_rel=0.1)], [Power(sigma_rel=0.1)])
    """
    if not isinstance(stds, Sequence) or not stds:
        raise TypeError(f"edm2: stds is {stds!r}; it must be a list of widths, such as [0.05, 0.1] or [0.1].")
    for std in stds:
        if positive(std, "edm2: stds") > math.sqrt(1 / 12):
            raise ValueError(
                f"edm2: {std!r} in stds; it must lie in (0, 0.2887], where the upper end is the plain mean."
            )
    return Recipe(decay=[Power(sigma_rel=std) for std in stds], buffers="copy")


def torch_swa(use_buffers: bool = False) -> Recipe:
    """torch's ``AveragedModel`` as it is by default: the equal mean of the states at which it is called.

    When that is, is up to its user: add ``start_step`` (or ``start_epoch``) and ``every_n_steps``.

    Args:
        use_buffers: floating-point buffers are averaged too; otherwise they are the live ones. Where ``update_bn`` is
            run at the end, write ``EMACallback(**torch_swa() | {"buffers": "recalibrate"})``.

    >>> torch_swa()
    {'decay': Equal(), 'buffers': 'copy'}
    """
    check_flag(use_buffers, "torch_swa: use_buffers")
    return Recipe(decay=Equal(), buffers=buffers_where(use_buffers))


def torch_averaged_model(decay: float = 0.999, use_buffers: bool = False) -> Recipe:
    """torch's ``AveragedModel`` with ``get_ema_multi_avg_fn(decay)``: the first call copies, then ``d = decay``.

    Args:
        decay: in [0, 1].
        use_buffers: floating-point buffers are averaged too; otherwise they are the live ones.

    >>> torch_averaged_model()
    {'decay': Constant(0.999), 'start_step': 1, 'buffers': 'copy'}
    """
    check_flag(use_buffers, "torch_averaged_model: use_buffers")
    schedule = Constant(share(decay, "torch_averaged_model: decay"))
    return Recipe(decay=schedule, start_step=1, buffers=buffers_where(use_buffers))


def lightning_ema_weight_averaging(
    use_buffers: bool = True,
    decay: float = 0.999,
    update_every_n_steps: int = 1,
    update_starting_at_step: int | None = None,
) -> Recipe:
    """Lightning's ``EMAWeightAveraging``: the first update copies, then ``d = decay`` at each.

    It updates at the steps ``n`` where ``n - 1`` is a multiple of ``update_every_n_steps`` and not below
    ``update_starting_at_step``. Its ``update_starting_at_epoch`` does not delay these updates: it adds others at the
    ends of epochs. It has no counterpart; what is usually meant is ``start_epoch`` of EMACallback. It averages integer
    buffers too, so that its files hold a ``num_batches_tracked`` that lags behind; here that is the live count.

    Args:
        use_buffers: floating-point buffers are averaged too; otherwise they are the live ones.
        decay: in [0, 1].
        update_every_n_steps: steps from one update to the next.
        update_starting_at_step: the first step that can update, counted from 0.

    >>> lightning_ema_weight_averaging(update_every_n_steps=4, update_starting_at_step=6)["start_step"]
    9
    """
    recipe = "lightning_ema_weight_averaging"
    check_flag(use_buffers, f"{recipe}: use_buffers")
    check_count(update_every_n_steps, f"{recipe}: update_every_n_steps", at_least=1)
    if update_starting_at_step is not None:
        check_count(update_starting_at_step, f"{recipe}: update_starting_at_step", at_least=0)
    waited = math.ceil((update_starting_at_step or 0) / update_every_n_steps)
    return Recipe(
        decay=PerUpdate(Constant(share(decay, f"{recipe}: decay"))),
        every_n_steps=update_every_n_steps,
        start_step=waited * update_every_n_steps + 1,
        buffers=buffers_where(use_buffers),
    )


def _warmup_from(lowest: float, decay: float) -> Schedule:
    """``max(lowest, min(decay, (1 + n) / (10 + n)))`` with ``lowest <= decay``."""
    if lowest == decay:
        return Constant(decay)
    # the steps before the warm-up passes the lowest decay
    below = math.ceil((10 * lowest - 1) / (1 - lowest)) - 1
    if below < 1:
        return Warmup(decay)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a floor so low that it looks like a momentum
        floor = Constant(lowest)
    return Then(floor, below, Shifted(Warmup(decay), below))


def _batches(time: str, argument: str, at_least: int) -> int:
    """The number in a time string of composer's such as ``"10ba"``."""
    found = re.fullmatch(r"(\d+)ba", time)
    if found is None:
        raise ValueError(
            f"{argument} is {time!r}; only batches can be turned into steps, such as '1000ba'. In epochs write "
            "EMACallback(HalfLife(epochs=2), start_epoch=5)."
        )
    check_count(int(found[1]), argument, at_least)
    return int(found[1])
