"""One of several averages is selected in each validation, by scores worked out here in trainers of their own."""

import copy
import logging
import math
from dataclasses import dataclass

import pytest
import torch
from helpers import EMACallback, Regression, clones, engine, equal, fit, loader, seeded, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_ema import Bema, Constant, PerUpdate, Recalibrate, Schedule, Select, SwitchEMA, Warmup, export_average
from lightning_ema.evaluation.passes import said_of
from lightning_ema.evaluation.selection import best_of
from lightning_ema.interop.export import describe

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["Constant_0.2", "Constant_0.8"]


def selecting(metric="val_loss", mode="min", every=1, live=False, **kwargs):
    select = Select(metric, mode=mode, every=every, live=live)
    return EMACallback([Constant(0.2), Constant(0.8)], evaluate=select, **kwargs)


@dataclass(frozen=True)
class Halves(Schedule):
    """A schedule of one's own."""

    def __call__(self, n):
        return 0.5


class Scored(Regression):
    """Also logs a metric of which the largest is the best."""

    def validation_step(self, batch, batch_idx):
        self.log_dict({"val_loss": self.loss(batch), "score": -self.loss(batch)})


class Judge(Callback):
    """Scores all averages in each validation, in a copy of the module."""

    def __init__(self, callback):
        self.callback, self.scores, self.weights, self.seen, self.logged = callback, [], [], [], []

    def on_validation_end(self, this, pl_module):
        if this.sanity_checking or this.state.fn != "fit":
            return
        scores = []
        self.weights.append([clones(average.named_tensors()) for average in self.callback.averages])
        for weights in self.weights[-1]:
            module = Scored()
            module.load_state_dict({**pl_module.state_dict(), **weights})
            (alone,) = trainer().validate(module, loader(2), verbose=False)
            scores.append(alone["val_loss"])
        self.scores.append(scores)
        self.seen.append(self.callback.averages.index(self.callback.selected))
        self.logged.append({name: float(value) for name, value in this.callback_metrics.items()})


def judged(callback, *others, epochs=4, module=None, **kwargs):
    judge = Judge(callback)
    module = module or seeded(Scored, lr=0.1)
    this = fit(module, callback, judge, *others, max_epochs=epochs, **kwargs)
    return this, module, judge


def test_the_best_is_selected_logged_saved_and_applied(tmp_path, caplog):
    callback = selecting()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss", save_top_k=-1)
    with caplog.at_level(logging.INFO):
        _, module, judge = judged(callback, saving, enable_checkpointing=True)
    winners = [scores.index(min(scores)) for scores in judge.scores]
    assert set(winners) == {0, 1}  # else the test would show nothing
    assert judge.seen == winners
    for epoch, (scores, logged, winner) in enumerate(zip(judge.scores, judge.logged, winners, strict=True)):
        assert [logged[f"val_loss/ema_{name}"] for name in NAMES] == pytest.approx(scores, rel=1e-5)
        assert logged["val_loss"] == pytest.approx(min(scores), rel=1e-5)
        file = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        selected = judge.weights[epoch][winner]
        assert all(torch.equal(file["state_dict"][name], value) for name, value in selected.items())
        for which, place in ((None, winner), (0, 0), (1, 1)):
            weights = torch.load(export_average(file, tmp_path / "weights.pt", which=which))
            expected = judge.weights[epoch][place]
            assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert all(torch.equal(module.state_dict()[name], value) for name, value in judge.weights[-1][winners[-1]].items())
    said = [record.message for record in caplog.records if "is selected" in record.message]
    assert len(said) == len(winners)
    assert f"by val_loss the decay {NAMES[winners[-1]]} is selected" in said[-1]
    at_the_end = [message for message in caplog.messages if "selected last" in message]
    assert at_the_end == [
        f"EMACallback 'ema': selected last by val_loss: the decay {NAMES[winners[-1]]} (place {winners[-1]}, counted "
        "from 0). Evaluations, files saved from here on and the module have it; a checkpoint saved before has the one "
        "that was selected then."
    ]


def test_inspecting_has_a_line_for_each_average_and_says_which_is_in_state_dict(tmp_path):
    this, _, judge = judged(selecting("score"), epochs=1)  # the smallest score is the worst
    this.save_checkpoint(tmp_path / "file.ckpt")
    live = torch.load(tmp_path / "file.ckpt", weights_only=True)["callbacks"]["EMACallback{'name': 'ema'}"]["live"]
    lines = [line.strip() for line in describe(tmp_path / "file.ckpt").splitlines()]
    places = [line for line in lines if line.startswith("place ")]
    for place, (name, horizon, average) in enumerate(zip((0.2, 0.8), (1, 5), judge.weights[-1], strict=True)):
        apart = torch.cat([(live[n] - average[n]).flatten() for n in live]).norm()
        distance = apart / torch.cat([value.flatten() for value in live.values()]).norm()
        expected = (
            f"place {place}: Constant({name}); decay in force: {name}, a horizon of {horizon} steps; distance between "
            f"live weights and average: {distance:.4g} of the live weights' norm"
        )
        assert places[place] == expected + ("; in state_dict, selected by a metric" if place == 1 else "")
    assert len([line for line in lines if "distance" in line]) == 2


@pytest.mark.parametrize(("settings", "marked"), [({}, [True, False]), ({"evaluate": "live"}, [False, False])])
def test_inspecting_several_that_no_metric_chooses_among(settings, marked, tmp_path):
    callback = EMACallback([0.2, Constant(0.8)], start_step=3, **settings)
    fit(seeded(), callback).save_checkpoint(tmp_path / "file.ckpt")
    places = [line.strip() for line in describe(tmp_path / "file.ckpt").splitlines() if "place" in line]
    assert ["in state_dict" in line for line in places] == marked
    assert "place 0: Warmup(0.2); decay in force: 0.2, a horizon of 1 steps; distance" in places[0]
    own = EMACallback([Constant(0.8), Halves()], **settings)
    fit(seeded(), own).save_checkpoint(tmp_path / "file.ckpt")
    places = [line.strip() for line in describe(tmp_path / "file.ckpt").splitlines() if "place" in line]
    assert places[1].startswith("place 1: test_select.Halves(); distance")  # text cannot tell what it computes
    late = EMACallback([0.2, 0.8], start_step=99, **settings)
    fit(seeded(), late).save_checkpoint(tmp_path / "file.ckpt")
    places = [line.strip() for line in describe(tmp_path / "file.ckpt").splitlines() if "place" in line]
    assert places == ["place 0: decay in force: 0.181818, a horizon of 1 steps", "place 1: not started"]


def test_averages_that_the_warm_up_still_makes_the_same_are_said_to_be_it(caplog):
    callback = EMACallback([0.99, 0.999], evaluate=Select("val_loss"))
    with caplog.at_level(logging.INFO):
        fit(seeded(), callback, max_epochs=1)
    assert equal(*(average.named_tensors() for average in callback.averages))
    (said,) = [message for message in caplog.messages if "is selected" in message]
    assert "by val_loss the decay 0.99 is selected" in said
    assert said.endswith(  # (1 + 6) / (10 + 6)
        "So far 0.99, 0.999 are one and the same average: their warm-up has come to a decay of 0.4375 only. Compare "
        "smaller decays, or Constant(...)."
    )


@pytest.mark.parametrize(
    ("schedules", "step", "same"),
    [
        ([Warmup(0.9), Warmup(0.99)], 79, True),  # 80 / 89 is below 0.9, 82 / 91 above
        ([Warmup(0.9), Warmup(0.99)], 81, False),
        ([Warmup(0.9), Warmup(0.99, offset=20)], 5, False),
        ([PerUpdate(Warmup(0.9)), PerUpdate(Warmup(0.99))], 79, True),
        ([PerUpdate(Warmup(0.9)), Warmup(0.99)], 79, False),  # they differ where an update covers several steps
        ([PerUpdate(Constant(0.9)), PerUpdate(Bema())], 5, False),
        ([Constant(0.9), Warmup(0.9)], 500, False),  # their scores may be equal, as those of accuracy often are
        ([Constant(0.9), Constant(0.99)], 5, False),
    ],
)
def test_only_warm_ups_that_are_still_rising_make_one_average_of_two(schedules, step, same):
    told = said_of("acc", {"a": 0.5, "b": 0.5, "c": 0.25}, "b", [*schedules, Constant(0.5)], step)
    assert told.startswith("by acc the decay b is selected, with 0.5 (a 0.5, c 0.25).")
    assert ("So far a, b are one and the same average" in told) is same
    other = said_of("acc", {"a": 0.4, "b": 0.5, "c": 0.25}, "b", [*schedules, Constant(0.5)], step)
    assert "So far" not in other


def test_live_weights_after_fit_are_not_said_to_be_selected(caplog):
    with caplog.at_level(logging.INFO):
        judged(selecting(after_fit="live"), epochs=1)
    assert "Evaluations, files saved from here on have it; a checkpoint" in caplog.text


def test_the_largest_is_the_best_where_that_is_asked_for():
    _, _, smallest = judged(selecting())
    _, _, largest = judged(selecting("score", mode="max"))
    assert largest.seen == smallest.seen


def test_a_selection_in_every_second_validation_holds_for_two():
    _, _, judge = judged(selecting(every=2))
    _, _, always = judged(selecting())
    assert judge.seen == [always.seen[0], always.seen[0], always.seen[2], always.seen[2]]
    assert f"val_loss/ema_{NAMES[0]}" in judge.logged[0]
    for scores, seen, logged in zip(judge.scores, judge.seen, judge.logged, strict=True):
        assert logged["val_loss"] == pytest.approx(scores[seen], rel=1e-5)


@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_selects_what_the_whole_one_does(tmp_path, every):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = selecting(every=every)
    _, module, all_of_it = judged(whole, saving, enable_checkpointing=True)
    again, resumed = selecting(every=every), seeded(Scored, lr=0.1)
    _, _, rest = judged(again, module=resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert rest.seen == all_of_it.seen[1:]
    assert equal(module.state_dict(), resumed.state_dict())
    for one, other in zip(whole.averages, again.averages, strict=True):
        assert equal(one.named_tensors(), other.named_tensors())


def test_without_select_a_resumed_run_goes_on_with_the_first_average(tmp_path):
    this, _, judge = judged(selecting("score"), epochs=1)  # the smallest score is the worst
    assert judge.seen == [1]
    this.save_checkpoint(tmp_path / "file.ckpt")
    resumed, module = EMACallback([Constant(0.2), Constant(0.8)]), seeded(Scored, lr=0.1)
    _, _, rest = judged(resumed, epochs=2, module=module, ckpt_path=tmp_path / "file.ckpt")
    assert resumed.selected is resumed.average
    assert rest.logged[-1]["val_loss"] == pytest.approx(rest.scores[-1][0], rel=1e-5)
    assert equal(
        resumed.average.named_tensors(), {n: module.state_dict()[n] for n, _ in engine(resumed.average).named_live()}
    )


class Saving(Scored):
    """Saves a file in the middle of the second validation."""

    path = None

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.path and self.global_step == 12:
            self.trainer.save_checkpoint(self.path)


def test_a_run_resumed_inside_a_validation_selects_in_the_same_ones(tmp_path):
    whole, module = selecting(every=2), seeded(Saving, lr=0.1)
    module.path = tmp_path / "inside.ckpt"
    fit(module, whole, max_epochs=4)
    again, resumed = selecting(every=2), seeded(Saving, lr=0.1)
    _, _, rest = judged(again, module=resumed, ckpt_path=module.path)
    name = f"val_loss/ema_{NAMES[0]}"
    assert [name in logged for logged in rest.logged] == [False, True, True]  # the third of four, kept in the fourth
    assert equal(module.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("kwargs", [{"limit_val_batches": 0}, {"max_steps": 5}])
def test_a_run_in_which_nothing_could_be_selected_says_so(kwargs):
    callback = selecting()
    with pytest.warns(
        UserWarning, match=r"Select\('val_loss'\) selected nothing: no validation was run after the first upd"
    ):
        fit(seeded(), callback, **kwargs)
    assert callback.selected is callback.average


def test_training_is_what_it_is_without():
    def live(callback):
        module = seeded(Scored, dropout=0.5)
        fit(module, callback, max_epochs=3)
        return clones(engine(callback.average).named_live())

    assert equal(live(selecting()), live(EMACallback([Constant(0.2), Constant(0.8)])))


def test_live_weights_are_logged_beside():
    callback = selecting(live=True)
    this, _, _ = judged(callback, epochs=2)
    assert {"val_loss", "val_loss_live", *(f"val_loss/ema_{name}" for name in NAMES)} <= this.callback_metrics.keys()


def test_a_score_that_is_no_number_does_not_win():
    assert best_of([math.nan, 0.5], "min", before=0) == 1
    assert best_of([math.nan, 0.5], "max", before=0) == 1
    assert best_of([math.nan, math.nan], "max", before=1) == 1


def test_evaluations_after_the_fit_are_of_the_selected_one():
    this, module, judge = judged(selecting(after_fit="live"))
    (after,) = this.validate(module, loader(2), verbose=False)
    assert after["val_loss"] == pytest.approx(min(judge.scores[-1]), rel=1e-5)
    twin = copy.deepcopy(module)
    assert equal(twin.state_dict(), module.state_dict())


class Once(IterableDataset):
    """Data that can be gone through once."""

    def __init__(self):
        self.left = list(loader(2))

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        return self.left.pop()


def test_a_test_after_the_fit_is_one_pass_and_logs_nothing_of_the_last_validation():
    this, module, _ = judged(selecting())
    (tested,) = this.test(module, DataLoader(Once(), batch_size=None), verbose=False)
    assert tested.keys() == {"test_loss"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"decay": 0.9},
            r"evaluate=Select\(metric='val_loss'.* needs several decays to choose from, .* decay=\[0.99, 0.999\]",
        ),
        (
            {"buffers": "recalibrate"},
            r"evaluate=Select\(metric='val_loss'.* beside buffers='recalibrate': write buffers='average'",
        ),
        ({"buffers": Recalibrate(batches=3)}, "beside buffers='recalibrate': write buffers='average'"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        EMACallback(**{"decay": [0.9, 0.99], "evaluate": Select("val_loss"), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": ""}, "Select: metric is ''; it must be the name of a metric"),
        ({"metric": None}, "Select: metric is None; it must be the name of a metric"),
        ({"mode": "least"}, "Select: mode is 'least'; accepted are 'min', 'max'"),
        ({"every": 0}, "Select: every is 0; it must be at least 1"),
    ],
)
def test_a_selection_checks_its_own_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Select(**{"metric": "val_loss", **arguments})


@pytest.mark.parametrize("order", [1, -1])
def test_live_weights_are_not_set_to_one_average_and_then_another(order):
    with pytest.raises(ValueError, match=r"SwitchEMA beside evaluate=Select\(...\): .* Leave one of the two out"):
        fit(seeded(), *[selecting(), SwitchEMA()][::order])


def test_a_metric_that_is_not_logged():
    with pytest.raises(ValueError, match=r"Select\('val_los'\): the module logs no such metric .* It logs score, val_"):
        judged(selecting("val_los"))
