"""test(ckpt_path=file) scores what `evaluate` asks for, whichever half of the file lies in its state_dict."""

import pytest
import torch
from helpers import Regression, clones, equal, fit, loader, seeded, trainer

from lightning_ema import Bema, Constant, EMACallback, Select

DECAYS = [Constant(0.9), Constant(0.5)]
WRITTEN = {
    "average": {"decay": Constant(0.9)},
    "live": {"decay": Constant(0.9), "evaluate": "live"},
    "several": {"decay": DECAYS},
    "selected": {"decay": DECAYS, "evaluate": Select("val_loss")},
    "wider": {"decay": Constant(0.9), "dtype": torch.float64},
    "corrected": {"decay": Bema()},
}


def written(tmp_path, make=Regression, weights_only=False, **settings):
    """A file, and its live weights and averages."""
    callback, module = EMACallback(**{"after_fit": "live", **settings}), seeded(make)
    this = fit(module, callback)
    path = tmp_path / "file.ckpt"
    this.save_checkpoint(path, weights_only=weights_only)
    halves = {"live": clones(module.state_dict())}
    for place, average in enumerate(callback.averages):
        with average.swapped():
            halves[place] = clones(module.state_dict())
    halves["selected"] = halves[callback.averages.index(callback.selected)]
    return path, halves


def score(weights, entry_point="test", make=Regression):
    module = seeded(make)
    module.load_state_dict(weights)
    (scores,) = getattr(trainer(), entry_point)(module, loader(2), verbose=False)
    return scores


def scores_of(path, entry_point="test", make=Regression, **settings):
    module, scores = seeded(make), {}
    this = trainer(EMACallback(**settings))
    for each in getattr(this, entry_point)(module, loader(2), ckpt_path=path, verbose=False):
        scores |= each
    return scores, module


@pytest.mark.parametrize("entry_point", ["test", "validate"])
@pytest.mark.parametrize("evaluate", ["average", "live", "both"])
@pytest.mark.parametrize("case", ["average", "live", "several", "wider", "corrected"])
def test_what_is_asked_for_is_scored(case, evaluate, entry_point, tmp_path):
    path, halves = written(tmp_path, **WRITTEN[case])
    scores, module = scores_of(path, entry_point, **{**WRITTEN[case], "evaluate": evaluate})
    name = "test_loss" if entry_point == "test" else "val_loss"
    live, average = score(halves["live"], entry_point)[name], score(halves[0], entry_point)[name]
    assert scores[name] == pytest.approx(live if evaluate == "live" else average, abs=1e-7)
    if evaluate == "both":
        assert scores[f"{name}_live"] == pytest.approx(live, abs=1e-7)
    assert abs(live - average) > 1e-4
    held = torch.load(path, weights_only=True)["state_dict"]
    assert equal(module.state_dict(), held)  # as Lightning leaves it


def test_all_of_the_files_averages_are_scored(tmp_path):
    path, halves = written(tmp_path, decay=DECAYS)
    scores, _ = scores_of(path, decay=DECAYS, evaluate="all")
    assert scores["test_loss/ema_Constant_0.5"] == pytest.approx(score(halves[1])["test_loss"], abs=1e-7)
    assert scores["test_loss_live"] == pytest.approx(score(halves["live"])["test_loss"], abs=1e-7)


@pytest.mark.parametrize("evaluate", ["average", Select("val_loss"), Select("val_loss", live=True)])
def test_of_a_file_in_which_one_was_selected_that_one_is_scored_where_it_is_asked_for(evaluate, tmp_path):
    path, halves = written(tmp_path, decay=DECAYS, evaluate=Select("val_loss"))
    scores, _ = scores_of(path, decay=DECAYS, evaluate=evaluate)
    expected = halves[0] if evaluate == "average" else halves["selected"]
    assert scores["test_loss"] == pytest.approx(score(expected)["test_loss"], abs=1e-7)


def test_predictions_too(tmp_path):
    path, halves = written(tmp_path, decay=Constant(0.9))
    for evaluate, half in (("average", 0), ("live", "live")):
        module = seeded()
        module.load_state_dict(halves[half])
        expected = torch.cat(trainer().predict(module, loader(2)))
        this = trainer(EMACallback(Constant(0.9), evaluate=evaluate))
        assert torch.equal(torch.cat(this.predict(seeded(), loader(2), ckpt_path=path)), expected)


def test_after_a_fit_of_its_own_the_live_weights_and_averages_come_back(tmp_path):
    path, halves = written(tmp_path, decay=Constant(0.9))
    callback, module = EMACallback(Constant(0.9), evaluate="both"), seeded()
    this = fit(module, callback, max_epochs=1)
    averages = clones(callback.average.named_tensors())
    (scores,) = this.test(module, loader(2), ckpt_path=path, verbose=False)
    assert scores["test_loss_live"] == pytest.approx(score(halves["live"])["test_loss"], abs=1e-7)
    assert equal(callback.average.named_tensors(), averages)


class Migrates(Regression):
    def on_load_checkpoint(self, checkpoint):
        weights = checkpoint["state_dict"]
        weights["net.0.weight"] = weights["net.0.weight"] * 3


def test_both_halves_go_through_the_modules_own_loading(tmp_path):
    path, halves = written(tmp_path, decay=Constant(0.9))
    for half in (0, "live"):
        halves[half]["net.0.weight"] = halves[half]["net.0.weight"] * 3
    scores, _ = scores_of(path, make=Migrates, decay=Constant(0.9), evaluate="both")
    assert scores["test_loss"] == pytest.approx(score(halves[0])["test_loss"], abs=1e-6)
    assert scores["test_loss_live"] == pytest.approx(score(halves["live"])["test_loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("then", "now", "refused"),
    [
        ("average", "average", None),
        ("average", "live", "holds the average weights alone .* asks for the live ones. Write evaluate='average'"),
        ("average", "both", "holds the average weights alone .* asks for the live ones"),
        ("live", "live", None),
        ("live", "average", "holds the live weights alone .* asks for the average ones. Write evaluate='live'"),
        ("live", "both", "holds the live weights alone .* asks for the average ones"),
    ],
)
def test_of_a_weights_only_file_only_what_it_holds(then, now, refused, tmp_path):
    path, halves = written(tmp_path, weights_only=True, decay=Constant(0.9), evaluate=then)
    if refused:
        with pytest.raises(ValueError, match=refused):
            scores_of(path, decay=Constant(0.9), evaluate=now)
    else:
        scores, _ = scores_of(path, decay=Constant(0.9), evaluate=now)
        assert scores["test_loss"] == pytest.approx(score(halves[0 if now == "average" else "live"])["test_loss"])


@pytest.mark.parametrize("evaluate", ["average", "live"])
def test_a_file_of_a_run_without_an_average_is_scored_as_it_is(evaluate, tmp_path):
    module = seeded()
    fit(module).save_checkpoint(tmp_path / "plain.ckpt")
    fit_only = fit(seeded())
    fit_only.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for name in ("plain.ckpt", "weights.ckpt"):
        scores, _ = scores_of(tmp_path / name, decay=Constant(0.9), evaluate=evaluate)
        held = torch.load(tmp_path / name, weights_only=True)["state_dict"]
        assert scores["test_loss"] == score(held)["test_loss"]


def test_a_further_average_that_the_file_lacks_is_refused(tmp_path):
    path, _ = written(tmp_path, decay=Constant(0.9))
    with pytest.raises(ValueError, match=r"holds 1 averages, and that of place 1 is asked for.*decay=Constant\(0\.9\)"):
        scores_of(path, decay=DECAYS, evaluate="all")
