import math

import pytest
from tables import rows

from lightning_ema.semi_supervised.losses import cosine_ramp, linear_ramp, sigmoid_ramp

RAMPS = [sigmoid_ramp, linear_ramp, cosine_ramp]


@rows(
    ("ramp", "values"),
    [
        (sigmoid_ramp, [math.exp(-5), math.exp(-5 * 0.5625), math.exp(-1.25), 1.0]),
        (linear_ramp, [0.0, 0.25, 0.5, 1.0]),
        (cosine_ramp, [0.0, (1 - math.sqrt(0.5)) / 2, 0.5, 1.0]),
    ],
)
def test_values_at_the_quarters(ramp, values):
    assert [ramp(step, 40) for step in (0, 10, 20, 40)] == pytest.approx(values)


@rows("ramp", RAMPS)
def test_outside_of_the_ramp_its_ends_hold(ramp):
    assert ramp(-3, 40) == ramp(0, 40)
    assert ramp(41, 40) == ramp(10**9, 40) == ramp(math.inf, 40) == 1.0


@rows("ramp", RAMPS)
def test_a_ramp_of_no_steps_is_fully_on(ramp):
    assert ramp(0, 0) == ramp(7, 0) == 1.0


@rows("ramp", RAMPS)
def test_fractions_of_epochs_are_steps_too(ramp):
    assert ramp(1.25, 2.5) == ramp(1, 2)
    assert type(ramp(1, 2)) is type(ramp(0, 1)) is type(ramp(5, 2)) is float


@rows("ramp", RAMPS)
@rows("steps", [-1, math.inf, math.nan, True, None, "100"])
def test_bad_lengths_are_refused(ramp, steps):
    with pytest.raises(ValueError, match=rf"steps is {steps!r}; it must be a finite number of at least 0"):
        ramp(1, steps)


@rows("ramp", RAMPS)
@rows("step", [math.nan, None, "3"])
def test_bad_steps_are_refused(ramp, step):
    with pytest.raises(ValueError, match=rf"step is {step!r}; it must be a number"):
        ramp(step, 10)
