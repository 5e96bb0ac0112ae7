import itertools
import math

import pytest
import torch
from helpers import engine, history_of
from tables import rows
from torch import nn

from lightning_ema import (
    Annealing,
    Constant,
    Cosine,
    Debiased,
    Equal,
    HalfLife,
    PerUpdate,
    Power,
    Scaled,
    Schedule,
    Then,
    Warmup,
    WeightAverage,
)
from lightning_ema.schedules import profiles as module
from lightning_ema.schedules.history import Stretch
from lightning_ema.schedules.profiles import Timeline, ages, every, mean_age, profile

SCHEDULES = [
    Constant(0.9), Warmup(0.95), HalfLife(steps=4), Cosine(0.9, 1.0, total_steps=40), Power(sigma_rel=0.1), Equal(),
    Debiased(0.9), Then(0.0, at=1, second=0.9), Then(0.0, at=17, second=Equal()), Scaled(0.99, batch_factor=3),
    Annealing(0.99, 2.0),
]  # fmt: skip
SCHEDULES += [PerUpdate(schedule) for schedule in SCHEDULES]


def one_hot(gaps, schedule, **settings):
    """The profile as an average shows it that is fed with one unit vector after the other."""
    net = nn.Linear(len(gaps) + 1, 1, bias=False).double()
    net.weight.data.zero_()[0, 0] = 1
    average = WeightAverage(net, schedule, **settings)
    for number, gap in enumerate(gaps, 1):
        net.weight.data.zero_()[0, number] = 1
        average.step(gap)
    ((_, weights),) = average.named_tensors()
    return weights[0], average


@rows("gaps", [[1] * 40, [5] * 8, [1, 1, 7, 2, 2, 2, 13, 1, 6]])
@rows("schedule", SCHEDULES)
@rows("chunk", [3, 1 << 16])
def test_a_profile_is_what_unit_vectors_leave_in_an_average(schedule, gaps, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    seen, average = one_hot(gaps, schedule)
    timeline = Timeline(history_of(average).stretches)
    assert timeline.steps(0, len(gaps)).tolist() == list(itertools.accumulate(gaps))
    computed = profile(schedule, timeline)
    assert torch.allclose(computed, seen, rtol=0, atol=1e-15)
    assert abs(computed.sum() - 1) < 1e-14


@rows("gaps", [[1] * 40, [1, 1, 7, 2, 2, 2, 13, 1, 6]])
@rows("schedule", SCHEDULES)
@rows("chunk", [3, 1 << 16])
def test_ages_are_those_of_the_whole_profile(schedule, gaps, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    seen, average = one_hot(gaps, schedule)
    before = torch.tensor([sum(gaps), *(sum(gaps[i:]) for i in range(1, len(gaps) + 1))], dtype=torch.float64)
    timeline = Timeline(history_of(average).stretches)
    for made_of in (ages(timeline), ages(timeline, schedule)):
        assert made_of.mean == pytest.approx(float(seen @ before), abs=1e-6)
        assert made_of.start == pytest.approx(float(seen[0]), abs=1e-7)


def test_ages_of_a_long_run_are_read_no_further_back_than_they_matter(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1000)
    read = []

    class Counted(Schedule):
        def __call__(self, n):
            read.append(n)
            return 0.99

    assert ages(every(1, 10**7), Counted()).mean == pytest.approx(99)
    assert min(read) == 10**7 - 2999  # 0.99 ** 3000 * 1e7 is 8e-7 steps, 0.99 ** 2000 * 1e7 would be 0.02


def test_an_interval_leaves_out_what_it_does_not_see():
    seen, average = one_hot([1] * 20, Power(sigma_rel=0.1), every_n_steps=4)
    timeline = Timeline(history_of(average).stretches)
    assert timeline.steps(0, 5).tolist() == [4, 8, 12, 16, 20]
    assert torch.allclose(profile(Power(sigma_rel=0.1), timeline), seen[[0, 4, 8, 12, 16, 20]], rtol=0, atol=1e-15)


def test_a_change_of_schedule_in_a_resumed_run_is_followed():
    _, average = one_hot([1] * 5, Constant(0.5))
    resumed = WeightAverage(engine(average).module, Constant(0.75))
    resumed.load_state_dict(average.state_dict())
    resumed.step()
    resumed.step()
    timeline = Timeline(history_of(resumed).stretches)
    assert timeline.decays(0, 7).tolist() == [0.5] * 5 + [0.75] * 2
    assert timeline.decays(4, 6).tolist() == [0.5, 0.75]
    assert timeline.decays(3, 3).tolist() == []


@rows(
    ("schedule", "steps", "age"),
    [
        (Equal(), 1001, 500.0),
        (Constant(0.9), 5000, 0.9 / 0.1),
        (Debiased(0.9), 5000, 0.9 / 0.1),
        (HalfLife(steps=20), 5000, 1 / (2 ** (1 / 20) - 1)),
        (Then(0.0, at=100, second=Equal()), 200, 49.5),
        # sum_i i w(i) telescopes: the mean age is the sum of (i / U) ** (gamma + 1) over i < U
        (Power(gamma=3.0), 700, math.fsum((i / 700) ** 4 for i in range(1, 700))),
    ],
)
def test_the_mean_age_is_known(schedule, steps, age):
    timeline = every(1, steps)
    assert mean_age(profile(schedule, timeline), timeline) == pytest.approx(age, rel=1e-12)


def test_sigma_rel_is_the_width_of_the_profile():
    timeline = every(1, 20_000)
    weights = profile(Power(sigma_rel=0.1), timeline)[1:]
    at = timeline.steps(0, 20_000).double() / 20_000
    mean = weights @ at
    assert math.sqrt(weights @ (at - mean) ** 2) == pytest.approx(0.1, rel=1e-3)


def test_updates_until_a_step():
    stretch = Stretch("")
    for gap, count in ((2, 3), (5, 2)):  # steps 2, 4, 6, 11, 16
        stretch.add(gap, count)
    timeline = Timeline([stretch])
    assert [timeline.updates_until(s) for s in (0, 1, 2, 5, 6, 10, 11, 15, 16, 99)] == [0, 0, 1, 2, 3, 3, 4, 4, 5, 5]
    assert (timeline.num_updates, timeline.num_steps) == (5, 16)


def test_no_update_leaves_the_start():
    timeline = every(10, upto=9)
    assert profile(Equal(), timeline).tolist() == [1.0]
    assert mean_age(profile(Equal(), timeline), timeline) == 0.0


def test_half_a_million_steps_sum_to_one():
    weights = profile(Warmup(0.99999), every(1, 500_000))
    assert abs(weights.sum() - 1) < 1e-12 and weights.min() >= 0
