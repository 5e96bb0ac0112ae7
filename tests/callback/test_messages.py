import pytest

from lightning_ema import Constant, Cosine, Equal, Power, Warmup
from lightning_ema.callback.messages import still_rising, too_long
from lightning_ema.schedules.base import horizon


def test_horizon():
    assert horizon(0.99) == pytest.approx(100)
    assert horizon(1.0) == float("inf")


def test_a_horizon_longer_than_the_run_is_said_with_both_numbers():
    assert "10,000 steps, longer than the whole run of 2,000 steps" in too_long(Constant(0.9999), 2000)
    assert "decay=0.995" in too_long(Constant(0.9999), 2000)
    assert too_long(Constant(0.999), 2000) is None


@pytest.mark.parametrize("schedule", [Equal(), Power(sigma_rel=0.1), Cosine(0.9, 1.0, total_steps=10)])
def test_an_endless_horizon_is_meant(schedule):
    assert too_long(schedule, 10) is None
    assert still_rising(schedule, 10) is None


def test_a_warm_up_that_the_run_does_not_finish_is_said():
    # (1 + 2820) / (10 + 2820)
    remark = still_rising(Warmup(0.998), 2820)
    assert "0.9968 at the last of 2,820 steps" in remark
    assert "every decay of 0.9968 and above gives the same average" in remark
    assert still_rising(Warmup(0.99), 2820) is None
    assert still_rising(Constant(0.998), 2820) is None
