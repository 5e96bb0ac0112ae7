"""The paragraph after a fit: sentences worked out by hand, and the facts behind them by brute force."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import Regression, ema, engine, fit, seeded
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_only
from tables import rows
from torch import nn

from lightning_ema import (
    Bema,
    Constant,
    Cosine,
    EMACallback,
    Equal,
    HalfLife,
    InversePower,
    MeanTeacherConfig,
    MeanTeacherMixin,
    PerUpdate,
    Power,
    Schedule,
    Warmup,
    WeightAverage,
)
from lightning_ema.averaging.report import LARGE_START, REACHED, SMALL_DISTANCE, Facts, facts_of, report
from lightning_ema.checkpoint.entry import seal
from lightning_ema.schedules.profiles import Ages

pytestmark = pytest.mark.filterwarnings("ignore:.*(a tenth of the horizon|used to create the checkpoint)")

FACTS = Facts(
    schedule="Warmup(0.99)",
    num_steps=2000,
    num_updates=2000,
    num_skipped=0,
    started=True,
    start_step=0,
    every_n_steps=1,
    steps_per_decay=1,
    decay=0.99,
    limit=0.99,
    ages=Ages(mean=99.0, start=0.0),
    distance=0.125,
    precision=2.0**-23,
)
GAIN = (
    "Live weights and average lie 0.12 of the live weights' norm apart: far enough for a gain, which only scoring both "
)


@dataclass(frozen=True)
class Mine(Schedule):
    decay: float

    def __call__(self, n):
        return self.decay


def said(**facts):
    return report(replace(FACTS, **facts))


class TestSentences:
    def test_a_run_without_anything_to_complain_of(self):
        assert report(FACTS) == (
            "2,000 steps, 2,000 updates with Warmup(0.99). The decay ends at 0.99, a horizon of 100 steps; what is "
            f"averaged is 99 steps old on average. {GAIN}can tell (with EMACallback: evaluate='both')."
        )

    def test_counts(self):
        assert said(num_steps=1, num_updates=1).startswith("1 step, 1 update with Warmup(0.99). ")
        assert "2,000 steps, 97 updates since step 1,030 with" in said(num_updates=97, start_step=1030)
        assert "2,000 updates with Warmup(0.99), 1 update left out because of weights that were not" in said(
            num_skipped=1
        )
        assert ", 12 updates left out because of weights that were not finite. The decay" in said(num_skipped=12)

    def test_a_horizon_is_in_steps_also_where_the_decay_is_that_of_an_update(self):
        assert "a horizon of 500 steps" in said(steps_per_decay=5, every_n_steps=5)
        assert "a horizon of 100 steps" in said(every_n_steps=5)
        assert "a horizon of 1.5 steps; what is averaged is 0.5 steps old" in said(
            decay=1 / 3, limit=0, ages=Ages(0.5, 0)
        )

    def test_a_horizon_that_was_not_reached(self):
        sentence = (
            "The horizon of 1,000 steps that the schedule aims at was not reached: its warm-up is longer than the"
        )
        assert sentence in said(limit=0.999)
        assert "not reached" not in said(limit=1.0)
        short = 1 - 1 / (1000 * REACHED * 0.999)
        assert sentence in said(limit=0.999, decay=short)
        assert "not reached" not in said(limit=0.999, decay=1 - 1 / (1000 * REACHED * 1.001))
        assert "horizon of 5,000 steps that" in said(limit=0.999, steps_per_decay=5, every_n_steps=5)

    def test_the_start_that_is_left(self):
        assert "37% of the average is still the weights at its start: the decay is too high" in said(
            ages=Ages(99, 0.3678)
        )
        assert "apart, which says little while the start weighs so much." in said(ages=Ages(99, 0.3678))
        assert "still the weights at its start" in said(ages=Ages(99, LARGE_START))
        assert "start" not in said(ages=Ages(99, LARGE_START - 1e-6))

    @rows("schedule", [Equal(), InversePower(1.0, power=1.0)])
    def test_in_an_equal_mean_the_start_is_one_of_the_states(self, schedule):
        average = WeightAverage(Regression(), schedule, start_step=2)
        trained(average, (1,) * 11)
        assert "start:" not in average.report()  # nine states or ten, of equal weight
        constant = WeightAverage(Regression(), Constant(0.9), start_step=2)
        trained(constant, (1,) * 11)
        assert "39% of the average is still the weights at its start" in constant.report()  # 0.9 ** 9

    def test_distances(self):
        near = (
            "Live weights and average lie 0.005 of the live weights' norm apart: so near that hardly any gain is to be"
        )
        assert near in said(distance=SMALL_DISTANCE)
        assert "far enough for a gain" in said(distance=SMALL_DISTANCE * 1.01)
        for distance in (math.nan, math.inf):
            assert "The live weights or the average are not finite." in said(distance=distance)
            assert "apart" not in said(distance=distance)

    def test_updates_lost_in_rounding(self):
        # a share of 1 / (1 + 99), a distance of 1/8: a move of 1/800, against half of 2 ** -8 and of 2 ** -9
        assert "far enough for a gain" in said(precision=2.0**-9)  # 1.28 halves
        text = said(precision=2.0**-8)  # 0.64 halves
        assert (
            "The average hardly moves: an update changes it by 0.6 of what its dtype rounds away, at a distance" in text
        )
        assert "gain" not in text
        # rarer updates move it further
        assert "far enough for a gain" in said(precision=2.0**-8, every_n_steps=2)
        assert "hardly moves" not in said(precision=2.0**-8, ages=None)
        assert "hardly moves" not in said(precision=2.0**-8, distance=0.0)

    def test_a_decay_of_one(self):
        text = said(decay=1.0, limit=1.0, ages=Ages(500.0, 0.0))
        assert "The decay ends at 1: the average no longer moves; what is averaged is 500 steps old on average." in text

    def test_without_an_update(self):
        nothing = {"num_updates": 0, "ages": None, "distance": 0.0}
        start = " every file has the live weights; the average starts no earlier than the run ends: lower start_step or"
        assert start in said(**nothing, started=False, start_step=3000)
        assert start in said(**nothing, start_step=2000)
        assert "; every_n_steps=300 is longer than what was left of the run" in said(**nothing, every_n_steps=300)
        assert "; the weights were never finite when one was due" in said(**nothing, num_skipped=2000)
        assert "apart" not in said(**nothing) and "horizon" not in said(**nothing)

    def test_it_is_one_line_without_markup(self):
        for text in (said(), said(limit=0.999, num_skipped=3, ages=Ages(99, 0.4)), said(num_updates=0, started=False)):
            assert text.isprintable() and text.isascii() and not set("[]{}*`|") & set(text)


def trained(average, gaps=(1,) * 40):
    noise = torch.Generator().manual_seed(5)
    for gap in gaps:
        with torch.no_grad():
            for parameter in engine(average).module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=noise))
        average.step(gap)
    return average


def weight_of_each_state(schedule, steps, every, per_update, start):
    """The share of each state in the average, followed update by update."""
    shares, last = {start: 1.0}, start
    for step in range(start + every, steps + 1, every):
        decay = 1.0
        for n in range(last + 1, step + 1):
            decay *= schedule(n - start)
        decay = schedule(step - start) if per_update else decay
        shares = {state: share * decay for state, share in shares.items()}
        shares[step], last = 1 - decay, step
    return shares


class TestFacts:
    @rows("schedule", [Warmup(0.9), Constant(0.97), Equal(), Power(sigma_rel=0.1), Mine(0.8)])
    @rows(("every", "per_update"), [(1, False), (3, False), (3, True), (7, False)])
    @rows("start", [0, 4])
    def test_ages_against_brute_force(self, schedule, every, per_update, start):
        net = nn.Linear(1, 1)
        given = PerUpdate(schedule) if per_update else schedule
        average = WeightAverage(net, given, every_n_steps=every, start_step=start)
        facts = facts_of(engine(trained(average)), 0)
        shares = weight_of_each_state(schedule, 40, every, per_update, start)
        assert sum(shares.values()) == pytest.approx(1)
        assert facts.ages.mean == pytest.approx(sum(share * (40 - state) for state, share in shares.items()))
        assert facts.ages.start == pytest.approx(shares[start], abs=1e-7)
        assert facts.decay == schedule(40 - start)

    def test_under_per_update_a_horizon_covers_the_steps_of_its_updates(self):
        said = trained(WeightAverage(nn.Linear(1, 1), PerUpdate(0.9), every_n_steps=4)).report()
        assert "40 steps, 10 updates with PerUpdate(0.9). The decay ends at 0.9, a horizon of 40 steps;" in said
        said = trained(WeightAverage(nn.Linear(1, 1), Constant(0.9), every_n_steps=4)).report()
        assert "The decay ends at 0.9, a horizon of 10 steps;" in said

    def test_the_paragraph_of_an_average_followed_by_hand(self):
        net = nn.Linear(1, 1, bias=False)
        net.weight.data.fill_(8)
        average = WeightAverage(net, Constant(0.5), every_n_steps=2)
        for value in (0, 4, 2, 8, 5):
            net.weight.data.fill_(value)
            average.step()
        # decays of 1/4: 8 -> 5 -> 29/4; the states 8, 4 and 8 weigh 1/16, 3/16, 3/4 and are 5, 3 and 1 steps old
        assert average.report() == (
            "5 steps, 2 updates with Constant(0.5). The decay ends at 0.5, a horizon of 2.0 steps; what is averaged is "
            "1.6 steps old on average. Live weights and average lie 0.45 of the live weights' norm apart: far enough "
            "for a gain, which only scoring both can tell (with EMACallback: evaluate='both')."
        )

    def test_it_changes_nothing_and_can_be_asked_at_any_time(self):
        average = WeightAverage(Regression(), [0.9, Equal()], start_step=2)
        assert "0 updates" in average.report()
        trained(average, (1,) * 9)
        before = {name: tensor.clone() for name, tensor in average.named_tensors()}
        free = average.report()
        with average.swapped():
            assert average.report() == free
        average.apply(keep=True)
        assert average.report() == free
        average.restore()
        assert all(torch.equal(before[name], tensor) for name, tensor in average.named_tensors())
        assert "7 updates since step 2 with Equal()" in average.averages[1].report()

    def test_weights_that_are_not_finite(self):
        average = trained(WeightAverage(nn.Linear(2, 2), 0.9))
        engine(average).module.weight.data[0, 0] = math.nan
        assert math.isnan(average.distance()) and "are not finite" in average.report()
        average.step()
        assert "are not finite" in average.report()

    def test_a_teacher_of_half_precision_that_stands_still(self):
        net, teacher = nn.Linear(64, 64), nn.Linear(64, 64).bfloat16()
        net.weight.data.fill_(1.0), net.bias.data.fill_(1.0)
        average = WeightAverage(net, Constant(0.9), into=teacher)
        net.weight.data.fill_(1.03), net.bias.data.fill_(1.03)
        before = teacher.weight.clone()
        for _ in range(50):
            average.step()
        assert torch.equal(before, teacher.weight)  # 3% away, an update moves it by 0.3%; bfloat16 has steps of 0.8%
        assert "The average hardly moves" in average.report()
        net.weight.data.fill_(1.2), net.bias.data.fill_(1.2)
        average.step()
        assert not torch.equal(before, teacher.weight)
        assert "hardly moves" not in average.report()

    def test_a_decay_that_ends_at_one_is_not_taken_for_rounding(self):
        average = trained(WeightAverage(nn.Linear(3, 3), Cosine(0.9, 1.0, total_steps=400)), (1,) * 400)
        assert average.decay == 1 and "The decay ends at 1: the average no longer moves" in average.report()
        assert "hardly moves" not in average.report()

    def test_a_schedule_that_corrects_its_average_has_no_ages(self):
        average = trained(WeightAverage(nn.Linear(3, 3), Bema()))
        assert facts_of(engine(average), 0).ages is None and "old on average" not in average.report()

    def test_a_resumed_run_under_another_schedule_knows_both(self):
        first = trained(WeightAverage(nn.Linear(1, 1), Constant(0.5)), (1,) * 3)
        second = WeightAverage(engine(first).module, Constant(0.75))
        second.load_state_dict(first.state_dict())
        trained(second, (1,) * 2)
        ages = facts_of(engine(second), 0).ages
        # 0.75 ** 2 of the first average, whose states weigh 1/2, 1/4, 1/8 and 1/8 and are 2, 3, 4 and 5 steps old
        assert ages.mean == pytest.approx(0.25 * 0.75 * 1 + 0.5625 * (2 / 2 + 3 / 4 + 4 / 8 + 5 / 8))
        assert ages.start == pytest.approx(0.5625 / 8)

    def test_a_resumed_run_asked_before_its_first_update_speaks_of_what_there_is(self):
        first = trained(WeightAverage(nn.Linear(1, 1), Constant(0.5)), (1,) * 3)
        second = WeightAverage(engine(first).module, Constant(0.75))
        second.load_state_dict(first.state_dict())
        assert facts_of(engine(second), 0).ages == facts_of(engine(first), 0).ages

    @pytest.mark.parametrize("lose", ["the history", "the class of the schedule"])
    def test_what_is_not_known_is_not_said(self, lose):
        first = trained(WeightAverage(nn.Linear(1, 1), Mine(0.5)), (1,) * 3)
        state = first.state_dict()
        if lose == "the history":
            (history,) = state["histories"]
            state["histories"] = [history | {"stretches": [], "unrecorded_steps": 3, "unrecorded_updates": 3}]
            seal(state)
        second = WeightAverage(engine(first).module, Constant(0.75))
        second.load_state_dict(state)
        trained(second, (1,) * 2)
        assert facts_of(engine(second), 0).ages is None and "old on average" not in second.report()
        assert "0.75, a horizon of 4.0 steps. Live" in second.report()


class TestInAFit:
    def paragraphs(self, caplog):
        return [text for text in caplog.messages if "live weights' norm apart" in text or "Without an update" in text]

    def test_the_log_holds_it_once_and_it_is_that_of_the_average(self, caplog):
        callback = ema()
        with caplog.at_level("INFO"):
            fit(seeded(), callback)
        assert self.paragraphs(caplog) == [f"EMACallback 'ema': {callback.average.report()}"]
        # (1 + 12) / (10 + 12) is 0.590909
        assert (
            "12 steps, 12 updates with Warmup(0.9). The decay ends at 0.590909, a horizon of 2.4 steps" in caplog.text
        )
        assert "The horizon of 10 steps that the schedule aims at was not reached" in caplog.text

    def test_several_averages_have_one_each(self, caplog):
        with caplog.at_level("INFO"):
            fit(seeded(), EMACallback([0.9, HalfLife(epochs=1)]))
        assert len(self.paragraphs(caplog)) == 2 and "with HalfLife(steps=6). The decay" in caplog.text

    def test_accumulated_batches_and_a_late_start(self, caplog):
        with caplog.at_level("INFO"):
            fit(seeded(), ema(start_epoch=1), accumulate_grad_batches=2)
        assert "6 steps, 3 updates since step 3 with" in caplog.text

    def test_a_start_that_never_came(self, caplog):
        with caplog.at_level("INFO"):
            fit(seeded(), ema(start_epoch=9))
        (text,) = self.paragraphs(caplog)
        assert "12 steps, 0 updates with" in text and "lower start_step or start_epoch" in text

    def test_not_on_other_processes(self, caplog, monkeypatch):
        class Second(Callback):
            def on_train_end(self, trainer, pl_module):
                monkeypatch.setattr(rank_zero_only, "rank", 1)

        with caplog.at_level("INFO"):
            fit(seeded(), ema(), Second())
        assert not self.paragraphs(caplog)

    def test_not_in_a_trial(self, caplog):
        with caplog.at_level("INFO"):
            fit(seeded(), ema(), fast_dev_run=True)
        assert not self.paragraphs(caplog)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_not_after_an_exception(self, caplog, error):
        class Fails(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                raise error("on purpose")

        with caplog.at_level("INFO"), pytest.raises((error, SystemExit)):
            fit(seeded(), ema(), Fails())
        assert not self.paragraphs(caplog)

    def test_a_resumed_run_tells_the_whole_of_it(self, caplog, tmp_path):
        fit(seeded(), ema(), ModelCheckpoint(tmp_path, filename="last"), enable_checkpointing=True)
        with caplog.at_level("INFO"):
            fit(seeded(), ema(), max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
        assert "18 steps, 18 updates with" in self.paragraphs(caplog)[-1]

    def test_a_teacher_has_one_too(self):
        class Student(MeanTeacherMixin, Regression):
            mean_teacher = MeanTeacherConfig(decay=0.9)

            def __init__(self):
                super().__init__()
                self.student = self.net

            def configure_optimizers(self):
                return torch.optim.SGD(self.student.parameters(), 0.01)

        module = seeded(Student)
        fit(module)
        (callback,) = [c for c in module.trainer.callbacks if "Teacher" in type(c).__name__]
        assert callback.average.report().startswith("12 steps, 12 updates with Warmup(0.9).")
