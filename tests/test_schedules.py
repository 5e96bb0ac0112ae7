"""Every schedule against the formula its source publishes, in the source's own terms (a rate is 1 - decay)."""

import math
import pickle
import warnings
from fractions import Fraction

import pytest

from lightning_ema import (
    Annealing,
    Constant,
    CopyFirst,
    Cosine,
    Debiased,
    Equal,
    ExponentialAnnealing,
    HalfLife,
    InversePower,
    Plan,
    Power,
    Ramp,
    Scaled,
    Schedule,
    Then,
    Warmup,
)

STEPS = (1, 2, 3, 7, 50, 99, 100, 101, 1000, 123_456, 10_000_000)


def clamp(low, value, high):
    return max(low, min(value, high))


FORMULAS = {
    "constant": (Constant(0.99), lambda n: 0.99),
    "tensorflow num_updates": (Warmup(0.999), lambda n: min(0.999, (1 + n) / (10 + n))),
    "warm-up offset": (Warmup(0.99, offset=30), lambda n: min(0.99, (1 + n) / (30 + n))),
    "composer half-life": (HalfLife(steps=40), lambda n: 2 ** (-1 / 40)),
    "yolo": (Ramp(0.9999, tau=2000), lambda n: 0.9999 * (1 - math.exp(-n / 2000))),
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
    "torch AveragedModel": (CopyFirst(0.9), lambda n: 0.0 if n == 1 else 0.9),
    "copy, then annealing": (CopyFirst(Annealing(0.99, 10)), lambda n: 1 - max(0.01, 10 / (10 + n - 1))),
    "mean teacher": (Then(0.99, at=100, second=0.999), lambda n: 0.99 if n <= 100 else 0.999),
    "then counts anew": (Then(0.5, at=3, second=Equal()), lambda n: 0.5 if n <= 3 else 1 - 1 / (n - 3)),
    "batch of four": (Scaled(Warmup(0.99), 4), lambda n: min(0.99, (1 + n) / (10 + n)) ** 4),
}


@pytest.mark.parametrize("case", FORMULAS)
def test_decay_is_that_of_the_published_formula(case):
    schedule, formula = FORMULAS[case]
    for n in STEPS:
        assert schedule(n) == pytest.approx(formula(n), abs=1e-12), n
        assert 0 <= schedule(n) <= 1


@pytest.mark.parametrize("case", FORMULAS)
@pytest.mark.parametrize(("after", "upto"), [(0, 1), (0, 5), (1, 3), (4, 4), (2, 90), (95, 105), (60, 1200)])
def test_product_is_that_of_the_single_decays(case, after, upto):
    schedule, formula = FORMULAS[case]
    explicit = math.prod(formula(n) for n in range(after + 1, upto + 1))
    assert schedule.product(after, upto) == pytest.approx(explicit, abs=1e-12)


@pytest.mark.parametrize("case", FORMULAS)
def test_limit_is_where_the_decay_goes(case):
    schedule, formula = FORMULAS[case]
    assert formula(10**12) == pytest.approx(schedule.limit, abs=1e-5)


@pytest.mark.parametrize("case", FORMULAS)
def test_schedules_are_plain_values(case):
    schedule, _ = FORMULAS[case]
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert eval(repr(schedule)) == schedule
    with pytest.raises(AttributeError):
        schedule.decay = 0.5
    assert hash(schedule) == hash(eval(repr(schedule)))


def test_equal_is_the_mean_exactly():
    mean, states = Fraction(0), [Fraction(k, 7) for k in (3, -2, 9, 4)]
    for n, state in enumerate(states, start=1):
        decay = Fraction(n - 1, n)
        assert Equal()(n) == float(decay)
        mean = decay * mean + (1 - decay) * state
    assert mean == sum(states) / 4


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, math.sqrt(1 / 12)])
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


class TestWhatTheRunFillsIn:
    plan = Plan(total_steps=100, steps_per_epoch=20, samples_per_step=64)

    def test_cosine_takes_the_length_of_the_run(self):
        assert Cosine(0.9, 1.0).bind(self.plan) == Cosine(0.9, 1.0, total_steps=100)
        assert Cosine(0.9, 1.0, total_steps=7).bind(self.plan) == Cosine(0.9, 1.0, total_steps=7)

    def test_half_life_in_epochs_and_samples(self):
        assert HalfLife(epochs=2.5).bind(self.plan) == HalfLife(steps=50)
        assert HalfLife(samples=640).bind(self.plan) == HalfLife(steps=10)

    def test_composed_schedules_pass_on_their_own_part_of_the_run(self):
        assert CopyFirst(Cosine(0.9, 1.0)).bind(self.plan) == CopyFirst(Cosine(0.9, 1.0, total_steps=99))
        bound = Then(Cosine(0.5, 0.9), at=30, second=Cosine(0.9, 1.0)).bind(self.plan)
        assert bound == Then(Cosine(0.5, 0.9, total_steps=30), at=30, second=Cosine(0.9, 1.0, total_steps=70))
        assert Scaled(HalfLife(epochs=1), 2).bind(self.plan) == Scaled(HalfLife(steps=20), 2)

    @pytest.mark.parametrize(
        "schedule", [Cosine(0.9, 1.0), HalfLife(epochs=1), HalfLife(samples=9), CopyFirst(Cosine(0.5, 1))]
    )
    def test_what_the_run_does_not_know_is_refused_with_the_remedy(self, schedule):
        with pytest.raises(ValueError, match=r"needs the .* this run does not know .*Write it in steps"):
            schedule.bind(Plan())

    @pytest.mark.parametrize("schedule", [Cosine(0.9, 1.0), HalfLife(epochs=1), Then(0.5, 1, HalfLife(samples=9))])
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
    (lambda: Ramp(0.9, tau=0), "tau is 0; it must be a positive"),
    (lambda: Annealing(0.9, gamma=-1), "gamma is -1"),
    (lambda: ExponentialAnnealing(0.9, 10, offset=-1), "offset is -1"),
    (lambda: Cosine(0.9, 1.5), "end is 1.5; it must lie in"),
    (lambda: Cosine(0.9, 1.0, total_steps=0), "total_steps is 0"),
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
    (lambda: CopyFirst(7), "decay is 7"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_arguments_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("value", ["0.9", None, True, [0.9]])
def test_a_decay_that_is_no_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="it must be a number from 0 to 1"):
        Constant(value)


def test_a_momentum_given_for_a_decay_is_named():
    with pytest.warns(UserWarning, match=r"If 0.001 is a momentum \(1 - decay, .*write decay=0.999 instead"):
        Warmup(0.001)


@pytest.mark.parametrize("make", [lambda: Constant(0.0), lambda: Then(0.0, 5, 0.99), lambda: Constant(0.5)])
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
