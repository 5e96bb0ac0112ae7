"""Every schedule against the formula its source publishes, in the source's own terms (a rate is 1 - decay)."""

import math
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from tables import rows
from torch import nn

from lightning_ema import (
    Annealing,
    Bema,
    Constant,
    Cosine,
    Debiased,
    Equal,
    ExponentialAnnealing,
    HalfLife,
    InversePower,
    PerUpdate,
    Power,
    Scaled,
    Schedule,
    Shifted,
    Then,
    Warmup,
    WeightAverage,
)
from lightning_ema.schedules import Plan

STEPS = (1, 2, 3, 7, 50, 99, 100, 101, 1000, 123_456, 10_000_000)


def clamp(low, value, high):
    return max(low, min(value, high))


FORMULAS = {
    "constant": (Constant(0.99), lambda n: 0.99),
    "tensorflow num_updates": (Warmup(0.999), lambda n: min(0.999, (1 + n) / (10 + n))),
    "warm-up offset": (Warmup(0.99, offset=30), lambda n: min(0.99, (1 + n) / (30 + n))),
    "composer half-life": (HalfLife(steps=40), lambda n: 2 ** (-1 / 40)),
    "yolo": (ExponentialAnnealing(0.9999, gamma=2000), lambda n: 0.9999 * (1 - math.exp(-n / 2000))),
    "mmengine annealing": (Annealing(0.9998, gamma=100), lambda n: 1 - max(2e-4, 100 / (100 + n))),
    "mmdet 3 exponential": (
        ExponentialAnnealing(0.9998, gamma=2000, offset=1),
        lambda n: 1 - ((1 - 2e-4) * math.exp(-(n + 1) / 2000) + 2e-4),
    ),
    "mmdet 2 exponential": (
        ExponentialAnnealing(0.9998, gamma=2000),
        lambda n: 1 - ((1 - 2e-4) * math.exp(-n / 2000) + 2e-4),
    ),
    "byol": (
        Cosine(0.996, 1.0, total_steps=100),
        lambda n: 1 - (1 - 0.996) * (math.cos(math.pi * min(n, 100) / 100) + 1) / 2,
    ),
    "timm warm-up": (InversePower(0.9999), lambda n: clamp(0.0, 1 - (1 + n / 1) ** -(2 / 3), 0.9999)),
    "ema_pytorch": (
        InversePower(0.995, inv_gamma=5, power=0.75, min_decay=0.3),
        lambda n: clamp(0.3, 1 - (1 + n / 5) ** -0.75, 0.995),
    ),
    "edm2 power": (Power(gamma=6.94), lambda n: (1 - 1 / n) ** 7.94),
    "swa": (Equal(), lambda n: 1 - 1 / n),
    "optax debias": (Debiased(0.9), lambda n: 1 - (1 - 0.9) / (1 - 0.9**n)),
    "torch AveragedModel": (Then(0.0, at=1, second=0.9), lambda n: 0.0 if n == 1 else 0.9),
    "copy, then annealing": (
        Then(0.0, at=1, second=Annealing(0.99, 10)),
        lambda n: 1 - max(0.01, 10 / (10 + n - 1)),
    ),
    "mean teacher": (Then(0.99, at=100, second=0.999), lambda n: 0.99 if n <= 100 else 0.999),
    "then counts anew": (Then(0.5, at=3, second=Equal()), lambda n: 0.5 if n <= 3 else 1 - 1 / (n - 3)),
    "goes on": (
        Shifted(ExponentialAnnealing(0.9999, gamma=2000), by=500),
        lambda n: 0.9999 * (1 - math.exp(-(n + 500) / 2000)),
    ),
    "longer than the run": (
        Cosine(0.996, 1.0, total_steps=100, extra_steps=5),
        lambda n: 1 - (1 - 0.996) * (math.cos(math.pi * min(n, 105) / 105) + 1) / 2,
    ),
    "bema": (Bema(kappa=0.6, rho=4, gamma=2), lambda n: 1 - (4 + 2 * n) ** -0.6),
    "batch of four": (Scaled(Warmup(0.99), 4), lambda n: min(0.99, (1 + n) / (10 + n)) ** 4),
    "once for each update": (PerUpdate(Warmup(0.99)), lambda n: min(0.99, (1 + n) / (10 + n))),
}
PER_STEP = [case for case, (schedule, _) in FORMULAS.items() if not isinstance(schedule, PerUpdate)]


@rows("case", FORMULAS)
def test_decay_is_that_of_the_published_formula(case):
    schedule, formula = FORMULAS[case]
    for n in STEPS:
        assert schedule(n) == pytest.approx(formula(n), abs=1e-12), n
        assert 0 <= schedule(n) <= 1


@rows("case", PER_STEP)
@rows(("after", "upto"), [(0, 1), (0, 5), (1, 3), (4, 4), (2, 90), (95, 105), (60, 1200)])
def test_product_is_that_of_the_single_decays(case, after, upto):
    schedule, formula = FORMULAS[case]
    explicit = math.prod(formula(n) for n in range(after + 1, upto + 1))
    assert schedule.product(after, upto) == pytest.approx(explicit, abs=1e-12)


@rows("case", FORMULAS)
def test_limit_is_where_the_decay_goes(case):
    schedule, formula = FORMULAS[case]
    assert formula(10**12) == pytest.approx(schedule.limit, abs=1e-5)


@rows("case", FORMULAS)
def test_schedules_are_plain_values(case):
    schedule, _ = FORMULAS[case]
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert eval(repr(schedule)) == schedule
    with pytest.raises(AttributeError):
        schedule.decay = 0.5
    assert hash(schedule) == hash(eval(repr(schedule)))


@rows(
    ("schedule", "written"),
    [
        (Warmup(0.999), "Warmup(0.999)"),
        (Warmup(0.999, offset=3), "Warmup(0.999, offset=3)"),
        (Then(0.99, at=100, second=Cosine(0.9, 1.0)), "Then(0.99, 100, Cosine(0.9, 1.0))"),
        (Power(sigma_rel=0.1), "Power(sigma_rel=0.1)"),
        (Equal(), "Equal()"),
    ],
)
def test_schedules_print_as_they_are_written(schedule, written):
    assert repr(schedule) == written


def test_every_schedule_is_among_the_formulas():
    """Those that :mod:`lightning_ema` exports; users' own and test doubles aside."""
    exported = {kind for kind in Schedule.__subclasses__() if kind.__module__.startswith("lightning_ema.")}
    exported = {kind for kind in exported if not kind.__module__.startswith("lightning_ema.recipe")}
    assert {type(schedule) for schedule, _ in FORMULAS.values()} == exported


TEN_MILLION = 10_000_000
SHORT = [(TEN_MILLION - 1, TEN_MILLION), (TEN_MILLION - 7, TEN_MILLION), (TEN_MILLION - 1000, TEN_MILLION)]
LONG = [(5_000_000, TEN_MILLION), (9_000_000, TEN_MILLION - 1), (123, 1_000_000), (1, 2_000)]


def log_debiased(decay):
    """log of decay * (1 - decay^(n-1)) / (1 - decay^n), free of cancellation."""
    log = math.log(decay)
    return lambda n: log + np.log1p(-np.exp((n - 1) * log) * -math.expm1(log) / -np.expm1(n * log))


LOGARITHMS = {  # of the decays of closed-form products, accurate where the decay is near 1
    "constant": (Constant(0.9999), lambda n: np.full(len(n), math.log(0.9999))),
    "half-life": (HalfLife(steps=12_345), lambda n: np.full(len(n), -math.log(2) / 12_345)),
    "warm-up that never ends": (Warmup(1.0), lambda n: np.log1p(-9 / (10 + n))),
    "warm-up that ends within": (  # at 8,999,990
        Warmup(0.999999),
        lambda n: np.minimum(np.log1p(-9 / (10 + n)), math.log(0.999999)),
    ),
    "warm-up, another offset": (Warmup(1.0, offset=300), lambda n: np.log1p(-299 / (300 + n))),
    "annealing that never ends": (Annealing(1.0, gamma=100), lambda n: np.log1p(-100 / (100 + n))),
    "annealing that ends within": (  # at 9,499,905
        Annealing(1 - 1e-5, gamma=95),
        lambda n: np.minimum(np.log1p(-95 / (95 + n)), math.log(1 - 1e-5)),
    ),
    "power": (Power(gamma=6.94), lambda n: 7.94 * np.log1p(-1 / n)),
    "equal": (Equal(), lambda n: np.log1p(-1 / n)),
    "debiased": (Debiased(0.9999), log_debiased(0.9999)),
    "debiased, barely below 1": (Debiased(1 - 1e-8), log_debiased(1 - 1e-8)),
    "copy, then equal": (Then(0.0, at=1, second=Equal()), lambda n: np.log1p(-1 / (n - 1))),
    "then": (
        Then(0.99999, at=9_500_000, second=HalfLife(steps=1000)),
        lambda n: np.where(n <= 9_500_000, math.log(0.99999), -math.log(2) / 1000),
    ),
    "scaled": (Scaled(Equal(), 2.5), lambda n: 2.5 * np.log1p(-1 / n)),
    "shifted": (Shifted(Warmup(1.0), by=77), lambda n: np.log1p(-9 / (87 + n))),
}


@rows(("after", "upto"), SHORT + LONG)
@rows("case", LOGARITHMS)
def test_interval_products_up_to_ten_million_steps(case, after, upto):
    schedule, logarithm = LOGARITHMS[case]
    if case == "copy, then equal" and after == 1:
        after = 2  # the logarithm of a copy is minus infinity
    steps = np.arange(after + 1, upto + 1, dtype=np.float64)
    explicit = math.exp(float(np.sum(logarithm(steps), dtype=np.longdouble)))
    assert schedule.product(after, upto) == pytest.approx(explicit, rel=1e-12, abs=0)


@rows(
    ("schedule", "decay"),
    [
        (Warmup(1.0), lambda n: Fraction(1 + n, 10 + n)),
        (Warmup(1.0, offset=1), lambda n: Fraction(1)),
        (Warmup(1.0, offset=10.5), lambda n: Fraction(2 + 2 * n, 21 + 2 * n)),
        (Annealing(1.0, gamma=100), lambda n: Fraction(n, 100 + n)),
        (Annealing(1.0, gamma=2.5), lambda n: Fraction(2 * n, 5 + 2 * n)),
        (Equal(), lambda n: Fraction(n - 1, n)),
        (Power(gamma=2.0), lambda n: Fraction(n - 1, n) ** 3),
    ],
)
@rows(("after", "upto"), [(1, 2), (1, 9), (1, 12), (3, 150), (TEN_MILLION - 400, TEN_MILLION)])
def test_interval_products_against_exact_fractions(schedule, decay, after, upto):
    exact = math.prod((decay(n) for n in range(after + 1, upto + 1)), start=Fraction(1))
    assert schedule.product(after, upto) == pytest.approx(float(exact), rel=1e-12, abs=0)


def test_long_intervals_of_a_warm_up_take_no_longer_than_short_ones():
    """Ten million factors one by one would take seconds; the closed form reads no single decay."""

    class Counting(Warmup):
        calls = 0

        def __call__(self, n):
            type(self).calls += 1
            return super().__call__(n)

    assert 0 < Counting(0.9999999).product(0, TEN_MILLION) < 1e-50
    assert Counting.calls == 0


STEPS_SEEN = 120


def profile(schedule, dtype):
    """The weight of each state in the average: state k is one-hot at k, and state 0 the one before the first step."""
    module = nn.Module()
    module.state = nn.Parameter(torch.zeros(STEPS_SEEN + 1, dtype=dtype))
    with torch.no_grad():
        module.state[0] = 1
    average = WeightAverage(module, schedule)
    for k in range(1, STEPS_SEEN + 1):
        with torch.no_grad():
            module.state.zero_()[k] = 1
        average.step()
    return average.state_dict()["average"]["state"].double().numpy()  # before any correction


@rows("case", FORMULAS)
def test_weights_sum_to_one(case):
    schedule, formula = FORMULAS[case]
    weights = profile(schedule, torch.float32)
    assert weights.sum() == pytest.approx(1, abs=1e-6)
    assert weights.min() >= 0
    if schedule(1) == 0:  # it starts from the first state
        assert weights[0] == 0
        assert weights[1:].sum() == pytest.approx(1, abs=1e-6)
    kept = np.cumprod([formula(n) for n in range(STEPS_SEEN, 0, -1)])[::-1]  # by steps n .. the last
    explicit = [(1 - formula(k)) * (kept[k] if k < STEPS_SEEN else 1) for k in range(1, STEPS_SEEN + 1)]
    assert profile(schedule, torch.float64) == pytest.approx([kept[0], *explicit], abs=1e-12)


@rows("case", FORMULAS)
def test_mean_age_obeys_its_recurrence(case):
    schedule, _ = FORMULAS[case]
    ages = STEPS_SEEN - np.arange(STEPS_SEEN + 1)
    assert mean_age(schedule, STEPS_SEEN) == pytest.approx((profile(schedule, torch.float64) * ages).sum(), abs=1e-9)


def mean_age(schedule, n):
    age = 0.0
    for k in range(1, n + 1):
        age = schedule(k) * (age + 1)
    return age


AGES = {  # schedule, step, mean age as its docstring states it, tolerance
    "constant": (Constant(0.98), 3000, 0.98 / 0.02, 1e-9),
    "warm-up, growing": (Warmup(0.9999), 300, 301 / 10, 1e-9),
    "warm-up, growing, another offset": (Warmup(0.9999, offset=4), 3000, 3001 / 4, 1e-6),
    "warm-up, over": (Warmup(0.95), 5000, 19, 1e-9),
    "half-life": (HalfLife(steps=50), 3000, 1 / (2 ** (1 / 50) - 1), 1e-9),
    "half-life, in short": (HalfLife(steps=50), 3000, 50 / math.log(2) - 1 / 2, 0.01),
    "exponential, from its beginning": (ExponentialAnnealing(0.98, gamma=20), 3000, 49, 1e-9),
    "annealing, growing": (Annealing(0.9999, gamma=20), 500, 500 / 21, 1e-9),
    "annealing, over": (Annealing(0.9, gamma=20), 2000, 9, 1e-9),
    "exponential": (ExponentialAnnealing(0.98, gamma=20, offset=1), 3000, 49, 1e-9),
    "cosine": (Cosine(0.5, 0.95, total_steps=100), 3000, 19, 1e-9),
    "inverse power 1": (InversePower(1.0, inv_gamma=4, power=1.0), 700, 700 / 5, 1e-9),
    "inverse power 2/3": (InversePower(1.0), 1_000_000, 1_000_000 ** (2 / 3), 0.01 * 10_000),
    "inverse power 1/2": (InversePower(1.0, inv_gamma=5, power=0.5), 500_000, 100_000**0.5, 0.01 * 316),
    "power": (Power(gamma=3.0), 400, 400 / 5 - 1 / 2, 1e-3),
    "power by its width": (Power(sigma_rel=0.1), 1000, 1000 / (6.937 + 2) - 1 / 2, 0.01),
    "equal": (Equal(), 333, 332 / 2, 1e-9),
    "debiased": (Debiased(0.99), 150, 99 - 150 * 0.99**150 / (1 - 0.99**150), 1e-9),
    "copy first": (Then(0.0, at=1, second=Annealing(0.9999, gamma=20)), 501, 500 / 21, 1e-9),
    "then": (Then(Equal(), at=30, second=0.95), 2000, 19, 1e-9),
    "scaled": (Scaled(0.99, 4), 2000, 0.99**4 / (1 - 0.99**4), 1e-9),
    "scaled, about": (Scaled(0.9999, 4), 60_000, 9999 / 4, 2),
}


@rows("case", AGES)
def test_mean_age_is_that_of_the_documentation(case):
    schedule, n, stated, tolerance = AGES[case]
    assert mean_age(schedule, n) == pytest.approx(stated, abs=tolerance)


def test_an_inverse_power_above_one_never_forgets_its_start():
    schedule = InversePower(1.0, power=1.5)
    assert schedule.product(0, 100_000) == pytest.approx(schedule.product(0, 1000), rel=0.1)
    assert schedule.product(0, 100_000) > 0.1


def test_equal_is_the_mean_exactly():
    mean, states = Fraction(0), [Fraction(k, 7) for k in (3, -2, 9, 4)]
    for n, state in enumerate(states, start=1):
        decay = Fraction(n - 1, n)
        assert Equal()(n) == float(decay)
        mean = decay * mean + (1 - decay) * state
    assert mean == sum(states) / 4


@rows("sigma_rel", [0.01, 0.05, 0.1, 0.2, math.sqrt(1 / 12)])
def test_power_has_the_relative_width_asked_for(sigma_rel):
    gamma = Power(sigma_rel=sigma_rel).exponent
    # mean and variance of the density (gamma + 1) t ** gamma on [0, 1]
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-9)


def test_debiased_gives_the_first_state_before_the_start_no_weight():
    weights = [0.0] * 6
    weights[0] = 1.0  # the state before the first step
    for n in range(1, 6):
        weights = [Debiased(0.8)(n) * w for w in weights]
        weights[n] += 1 - Debiased(0.8)(n)
    expected = [0.0] + [0.8 ** (5 - n) * 0.2 / (1 - 0.8**5) for n in range(1, 6)]
    assert weights == pytest.approx(expected, abs=1e-15)


class TestPerUpdate:
    def test_an_update_reads_the_schedule_once_at_its_last_step(self):
        assert PerUpdate(0.9).product(0, 5) == 0.9  # without it 0.9 ** 5
        assert PerUpdate(Equal()).product(2, 8) == 7 / 8  # without it 2 / 8
        assert PerUpdate(Warmup(0.99)).product(3, 10) == 11 / 20
        assert PerUpdate(0.9).product(5, 5) == 1  # no step, so nothing is forgotten

    def test_a_number_is_a_constant_and_the_limit_is_that_of_the_schedule(self):
        assert PerUpdate(0.9)(1) == PerUpdate(0.9)(1000) == PerUpdate(0.9).limit == 0.9
        assert PerUpdate(Then(0.0, at=3, second=0.99)).limit == 0.99
        assert PerUpdate(Equal()).limit == 1

    def test_a_correction_is_that_of_the_schedule(self):
        assert not PerUpdate(0.9).corrects and PerUpdate(0.9).bias(90) == 0
        assert PerUpdate(Bema()).corrects and PerUpdate(Bema()).bias(90) == Bema().bias(90) > 0

    @pytest.mark.parametrize("once", [PerUpdate(0.9), PerUpdate(Bema())], ids=repr)
    @pytest.mark.parametrize(
        "around",
        [
            lambda s: Then(s, 5, 0.9),
            lambda s: Then(0.9, 5, s),
            lambda s: Shifted(s, 2),
            lambda s: Scaled(s, 2),
            PerUpdate,
        ],
    )
    def test_it_stands_outermost(self, around, once):
        with pytest.raises(ValueError, match=r"^PerUpdate\(.*Write it once, outermost, for instance PerUpdate\(Then\("):
            around(once)


class TestWhatTheRunFillsIn:
    plan = Plan(total_steps=100, steps_per_epoch=20, samples_per_step=64)

    def test_cosine_takes_the_length_of_the_run(self):
        assert Cosine(0.9, 1.0).bind(self.plan) == Cosine(0.9, 1.0, total_steps=100)
        assert Cosine(0.9, 1.0, total_steps=7).bind(self.plan) == Cosine(0.9, 1.0, total_steps=7)

    def test_cosine_can_end_later_than_the_run(self):
        assert Cosine(0.9, 1.0, extra_steps=3).bind(self.plan) == Cosine(0.9, 1.0, total_steps=100, extra_steps=3)
        assert Cosine(0.5, 1.0, extra_steps=100).bind(self.plan)(100) == pytest.approx(0.75)

    def test_a_schedule_that_goes_on_ends_where_the_run_ends(self):
        bound = Shifted(Cosine(0.5, 1.0), by=50).bind(self.plan)
        assert bound == Shifted(Cosine(0.5, 1.0, total_steps=150), by=50)
        assert bound(25) == pytest.approx(0.75) and bound(100) == 1

    def test_half_life_in_epochs_and_samples(self):
        assert HalfLife(epochs=2.5).bind(self.plan) == HalfLife(steps=50)
        assert HalfLife(samples=640).bind(self.plan) == HalfLife(steps=10)

    def test_composed_schedules_pass_on_their_own_part_of_the_run(self):
        copied = Then(0.0, at=1, second=Cosine(0.9, 1.0)).bind(self.plan)
        assert copied == Then(0.0, at=1, second=Cosine(0.9, 1.0, total_steps=99))
        bound = Then(Cosine(0.5, 0.9), at=30, second=Cosine(0.9, 1.0)).bind(self.plan)
        assert bound == Then(Cosine(0.5, 0.9, total_steps=30), at=30, second=Cosine(0.9, 1.0, total_steps=70))
        assert Scaled(HalfLife(epochs=1), 2).bind(self.plan) == Scaled(HalfLife(steps=20), 2)
        assert PerUpdate(Cosine(0.9, 1.0)).bind(self.plan) == PerUpdate(Cosine(0.9, 1.0, total_steps=100))
        assert PerUpdate(0.9).bind(self.plan) == PerUpdate(0.9)

    @rows("schedule", [Cosine(0.9, 1.0), HalfLife(epochs=1), HalfLife(samples=9), Then(0.0, 1, Cosine(0.5, 1))])
    def test_what_the_run_does_not_know_is_refused_with_the_remedy(self, schedule):
        with pytest.raises(ValueError, match=r"needs the .* this run does not know .*Write it in steps"):
            schedule.bind(Plan())

    @rows("schedule", [Cosine(0.9, 1.0), HalfLife(epochs=1), Then(0.5, 1, HalfLife(samples=9))])
    def test_unbound_schedules_say_what_to_write(self, schedule):
        with pytest.raises(ValueError, match=r"Write (Cosine|HalfLife)\(.*steps=\.\.\.\), or use it in EMACallback"):
            schedule(5)


BAD = [
    (lambda: Constant(1.2), "decay is 1.2; it must lie in"),
    (lambda: Constant(-0.1), "decay is -0.1; it must lie in"),
    (lambda: Constant(math.nan), "decay is nan"),
    (lambda: Warmup(0.9, offset=0.5), "offset is 0.5; it must be at least 1"),
    (lambda: HalfLife(), "got nothing; give exactly one of"),
    (lambda: HalfLife(steps=1, epochs=2), "got steps, epochs; give exactly one"),
    (lambda: HalfLife(steps=0), "steps is 0; it must be a positive"),
    (lambda: HalfLife(steps=True), "steps is True; it must be a positive"),
    (lambda: HalfLife(steps="5"), "steps is '5'; it must be a positive"),
    (lambda: Warmup(0.9, offset=math.inf), "offset is inf; it must be a positive, finite"),
    (lambda: Power(sigma_rel="a"), "sigma_rel is 'a'; it must be a positive"),
    (lambda: Power(gamma=True), "gamma is True"),
    (lambda: ExponentialAnnealing(0.9, gamma=0), "gamma is 0; it must be a positive"),
    (lambda: Annealing(0.9, gamma=-1), "gamma is -1"),
    (lambda: ExponentialAnnealing(0.9, 10, offset=-1), "offset is -1"),
    (lambda: Cosine(0.9, 1.5), "end is 1.5; it must lie in"),
    (lambda: Cosine(0.9, 1.0, total_steps=0), "total_steps is 0"),
    (lambda: Cosine(0.9, 1.0, extra_steps=-1), "extra_steps is -1; it must be at least 0"),
    (lambda: Shifted(0.9, by=-1), "Shifted: by is -1; it must be at least 0"),
    (lambda: Shifted(2, by=1), "decay is 2"),
    (lambda: InversePower(0.9, min_decay=0.95), "min_decay 0.95 is above decay 0.9; swap them"),
    (lambda: InversePower(0.9, power=0), "power is 0"),
    (lambda: Power(), "give exactly one of them"),
    (lambda: Power(sigma_rel=0.1, gamma=1), "give exactly one of them"),
    (lambda: Power(sigma_rel=0.3), r"sigma_rel is 0.3; it must lie in \(0, 0.2887\]"),
    (lambda: Power(gamma=-0.5), "gamma is -0.5"),
    (lambda: Debiased(1), r"A mean of all states is Equal\(\)"),
    (lambda: Then(0.9, at=0, second=0.99), "at is 0; it must be at least 1"),
    (lambda: Then(0.9, at=5, second=2), "decay is 2; it must lie in"),
    (lambda: Scaled(0.9, -4), "batch_factor is -4"),
    (lambda: Then(0.0, at=1, second=7), "decay is 7"),
    (lambda: PerUpdate(7), "decay is 7"),
]


@rows(("make", "message"), BAD)
def test_bad_arguments_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@rows("value", ["0.9", None, True, [0.9]])
def test_a_decay_that_is_no_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="it must be a number from 0 to 1"):
        Constant(value)


def test_a_momentum_given_for_a_decay_is_named():
    with pytest.warns(UserWarning, match=r"If 0.001 is a momentum \(1 - decay, .*write decay=0.999 instead"):
        Warmup(0.001)


@rows("make", [lambda: Constant(0.0), lambda: Then(0.0, 5, 0.99), lambda: Constant(0.5)])
def test_a_plain_copy_is_no_mistake(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()


def test_a_users_own_schedule_needs_nothing_but_its_decay():
    class Sawtooth(Schedule):
        def __call__(self, n):
            return 0.5 if n % 2 else 0.9

    assert Sawtooth().product(0, 3) == pytest.approx(0.5 * 0.9 * 0.5)
    assert Then(Sawtooth(), 2, 0.99).bind(Plan(total_steps=9))(2) == 0.9
