"""evaluate="both" and evaluate="all": a pass of its own for each further set of weights, beside the usual one."""

import csv
import itertools
import re

import pytest
import torch
from helpers import Regression, clones, ema, equal, fit, loader, seeded, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MeanMetric

from lightning_ema import Bema, Constant, EMACallback, Recalibrate, Select

pytestmark = pytest.mark.filterwarnings("ignore")


class Measured(Regression):
    """Logs a number, a metric object, and what it gathered itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mean = MeanMetric()
        self.gathered = []

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.mean.update(loss)
        self.gathered.append(loss)
        self.log("val_loss", loss)
        self.log("val_mean", self.mean)

    def on_validation_epoch_end(self):
        self.log("val_worst", torch.stack(self.gathered).max())
        self.gathered.clear()


def score(module, weights):
    """What a plain validation of these weights logs."""
    other = Measured(**{k: module.hparams[k] for k in ("dropout", "norm", "lr")})
    other.load_state_dict(weights, strict=False)
    (logged,) = trainer().validate(other, loader(2), verbose=False)
    return logged


class Weights(Callback):
    """The live weights at the end of each epoch's training."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.live = clones(pl_module.state_dict())


@pytest.mark.parametrize("decay", [0.9, [0.9, Constant(0.5), Bema()]], ids=["one", "several"])
@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_every_set_of_weights_has_its_own_score(decay, buffers):
    several = isinstance(decay, list)
    callback = EMACallback(decay, evaluate="all" if several else "both", buffers=buffers, after_fit="live")
    module, weights = seeded(Measured), Weights()
    logged = fit(module, callback, weights).callback_metrics
    words = {"/ema_Constant_0.5": 1, "/ema_Bema": 2} if several else {}
    for suffix, place in {"": 0, "_live": None, **words}.items():
        held = {} if place is None else dict(callback.averages[place].named_tensors())
        for name, value in score(module, {**weights.live, **held}).items():
            assert logged[name + suffix] == pytest.approx(value, abs=1e-6), name + suffix
    live, average = logged["val_loss_live"], logged["val_loss"]
    assert live != average


def rows(tmp_path):
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        return list(csv.DictReader(file))


def test_training_and_the_average_scores_are_those_without(tmp_path):
    ends = []
    for evaluate in ("average", "both"):
        module = seeded(Measured, dropout=0.3)
        logger = CSVLogger(tmp_path / evaluate)
        fit(module, ema(evaluate=evaluate, after_fit="live"), logger=logger, val_check_interval=2, max_epochs=3)
        scores = [(r["val_loss"], r["val_mean"], r["val_worst"]) for r in rows(tmp_path / evaluate) if r["val_loss"]]
        ends.append((clones(module.state_dict()), torch.get_rng_state(), scores))
    assert equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2] and len(ends[0][2]) == 9


def test_the_loggers_see_both_in_one_row(tmp_path):
    fit(seeded(Measured), ema(evaluate="both"), logger=CSVLogger(tmp_path))
    both = [row for row in rows(tmp_path) if row["val_loss"]]
    assert len(both) == 2
    assert all(row["val_loss_live"] and row["val_loss"] != row["val_loss_live"] for row in both)


def test_monitors_run_once_and_may_name_either(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val_loss", filename="{val_loss:.6f}-{val_loss_live:.6f}", save_top_k=1)
    live = ModelCheckpoint(tmp_path / "live", monitor="val_loss_live")
    patience = EarlyStopping("val_loss", patience=1, min_delta=100.0)
    this = fit(seeded(), ema(evaluate="both"), best, live, patience, max_epochs=9, enable_checkpointing=True)
    assert this.current_epoch == 2  # one epoch, and one of patience: had it fired twice an epoch, it had ended at one
    assert best.best_model_score < 10 and live.best_model_score is not None
    module = Regression.load_from_checkpoint(best.best_model_path)
    (logged,) = trainer().validate(module, loader(2), verbose=False)
    assert f"val_loss={logged['val_loss']:.6f}" in best.best_model_path


@pytest.mark.parametrize("after_fit", ["average", "live"])
@pytest.mark.parametrize("entry_point", ["validate", "test"])
def test_alone_after_a_fit(after_fit, entry_point):
    callback, module, weights = ema(evaluate="both", after_fit=after_fit), seeded(), Weights()
    this = fit(module, callback, weights)
    before = clones(module.state_dict())
    (logged,) = getattr(this, entry_point)(module, loader(2), verbose=False)
    name = {"validate": "val_loss", "test": "test_loss"}[entry_point]
    assert equal(module.state_dict(), before)
    held = dict(callback.average.named_tensors())
    for suffix, tensors in {"": {**weights.live, **held}, "_live": weights.live}.items():
        assert logged[name + suffix] == pytest.approx(score_plain(tensors), abs=1e-6)
    this.fit_loop.max_epochs = 3
    this.fit(module, loader(), loader(2))  # the live weights are found again
    assert callback.average.num_steps == 18


def score_plain(weights):
    module = Regression()
    module.load_state_dict(weights)
    (logged,) = trainer().validate(module, loader(2), verbose=False)
    return logged["val_loss"]


def test_a_file_under_test_is_scored_with_both_of_its_halves(tmp_path):
    callback, module = ema(evaluate="both", after_fit="live"), seeded()
    this = fit(module, callback)
    (live,) = trainer().validate(module, loader(2), verbose=False)
    this.save_checkpoint(tmp_path / "x.ckpt")
    (logged,) = this.validate(module, loader(2), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert logged["val_loss_live"] == live["val_loss"] != logged["val_loss"]


def test_before_the_first_update_both_are_the_live_weights():
    callback = ema(evaluate="both", start_step=100)
    logged = fit(seeded(), callback).callback_metrics
    assert logged["val_loss"] == logged["val_loss_live"]


def test_recalibrated_statistics_belong_to_each_average():
    class Network(Measured):
        def forward(self, x):
            return self.net(x)

    seen = {}

    class Sees(Network):
        def validation_step(self, batch, batch_idx):
            weight = self.net[0].weight.sum().item()
            seen[weight] = (clones(self.state_dict()), len(seen))
            super().validation_step(batch, batch_idx)

    callback = EMACallback(
        [Constant(0.9), Constant(0.5)], evaluate="all", buffers=Recalibrate(batches=3), after_fit="live"
    )
    module = seeded(Sees)
    fit(module, callback, max_epochs=1, num_sanity_val_steps=0)
    assert len(seen) == 3  # the average, the live weights, the other average
    for place, (weights, _) in enumerate(seen.values()):
        if place == 1:
            assert equal(weights, module.state_dict())
            continue
        other = Network()
        other.load_state_dict(weights)
        torch.optim.swa_utils.update_bn(list(loader())[:3], other)
        torch.testing.assert_close(other.net[1].running_var, weights["net.1.running_var"])


class Counts(Regression):
    """Counts batches in a floating-point buffer, which is averaged like any other."""

    def __init__(self):
        super().__init__()
        self.register_buffer("batches", torch.zeros(()))

    def on_validation_epoch_start(self):
        self.batches.zero_()

    def validation_step(self, batch, batch_idx):
        self.batches += 1
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.log("batches", self.batches.clone())


def test_the_first_pass_finds_again_what_it_wrote_to_buffers_that_are_swapped_in():
    logged = fit(seeded(Counts), ema(evaluate="both")).callback_metrics
    assert logged["batches"] == logged["batches_live"] == 2


PASSES = itertools.count(1)


class Raises(Regression):
    """Fails in a pass after the first. What a module counts itself is put back before each further pass."""

    def on_validation_epoch_start(self):
        self.fails = next(PASSES) == self.failing

    def validation_step(self, batch, batch_idx):
        if self.fails:
            raise ArithmeticError
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("failing", [2, 3], ids=["of the live weights", "of a further average"])
def test_an_error_in_a_further_pass_leaves_the_live_weights(failing, monkeypatch):
    module, weights = seeded(Raises), Weights()
    module.failing = failing
    monkeypatch.setitem(globals(), "PASSES", itertools.count(1))
    callback = EMACallback([0.9, 0.5], evaluate="both" if failing == 2 else "all")
    with pytest.raises(ArithmeticError):
        fit(module, callback, weights, num_sanity_val_steps=0)
    assert equal(module.state_dict(), weights.live)
    assert "log" not in vars(module)


class SavesInside(Regression):
    """Saves from inside every validation pass."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.trainer.save_checkpoint(self.folder / f"{len(list(self.folder.iterdir()))}.ckpt")


def test_a_file_written_in_any_pass_holds_the_first_average_and_the_live_weights(tmp_path):
    module = seeded(SavesInside)
    module.folder = tmp_path
    callback = EMACallback([0.9, Constant(0.5)], evaluate="all")
    fit(module, callback, max_epochs=1, num_sanity_val_steps=0)
    files = [torch.load(tmp_path / f"{count}.ckpt", weights_only=False) for count in range(6)]  # 3 passes, 2 batches
    for file in files[1:]:
        assert equal(file["state_dict"], files[0]["state_dict"])
        (entry,), (first,) = ([e for k, e in f["callbacks"].items() if "EMA" in k] for f in (file, files[0]))
        assert equal(entry["live"], first["live"])
        assert equal(entry["further"][0], first["further"][0])


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="'a' and 'b' both evaluate an average of the same tensors"):
        fit(seeded(), EMACallback(name="a", evaluate="both"), EMACallback(name="b"))


def test_until_the_first_update_the_others_are_the_live_weights_too():
    callback = EMACallback([0.9, Constant(0.5)], evaluate="all", every_n_steps=100)
    metrics = fit(seeded(Measured), callback).callback_metrics
    assert metrics["val_loss"] == metrics["val_loss_live"] == metrics["val_loss/ema_Constant_0.5"]


ALL = {"decay": [0.9, Constant(0.5)], "evaluate": "all"}
SELECTING = {"decay": [0.9, Constant(0.5)], "evaluate": Select("val_loss")}


@pytest.mark.parametrize(
    ("arguments", "monitor", "told"),
    [
        (
            ALL,
            "val_loss/ema_Constant_0.5",
            "the first average, .* Monitor 'val_loss', and put that decay",
        ),
        (ALL, "val_mean/ema_Constant_0.5", "let evaluate=Select\\('val_mean', mode='max'\\) choose"),
        (
            SELECTING,
            "val_loss/ema_0.9",
            "the average that is selected, .* Monitor 'val_loss', the score",
        ),
        ({"evaluate": "both"}, "val_loss_live", "holds the average, .* Monitor 'val_loss', or write evaluate='live'"),
        (ALL, "val_loss", None),
        (SELECTING, "val_loss", None),
        ({"evaluate": "both"}, "val_loss", None),
        (ALL, None, None),
    ],
)
def test_files_kept_by_the_score_of_weights_that_they_do_not_hold(arguments, monitor, told, tmp_path, recwarn):
    mode = "max" if monitor and "mean" in monitor else "min"
    keeps = ModelCheckpoint(tmp_path, monitor=monitor, mode=mode)
    stops = EarlyStopping("val_loss", patience=9)  # to stop by the score of other weights is no mistake
    callback = EMACallback(**arguments)
    fit(seeded(Measured), callback, keeps, stops, enable_checkpointing=True)
    said = [str(warning.message) for warning in recwarn if "a ModelCheckpoint monitors" in str(warning.message)]
    assert [bool(re.search(f"EMACallback 'ema': .*monitors '{monitor}', .*{told}", text)) for text in said] == (
        [True] if told else []
    )
    if arguments is ALL and told:  # which is true
        held = torch.load(keeps.best_model_path)["state_dict"]
        first = score(Measured(), held)[monitor.partition("/")[0]]
        assert abs(first - float(keeps.best_model_score)) > 1e-4


def test_of_several_loaders_too(tmp_path, recwarn):
    keeps = ModelCheckpoint(tmp_path, monitor="val_loss/ema_Constant_0.5/dataloader_idx_1")
    this = trainer(EMACallback(**ALL), keeps, max_epochs=1, enable_checkpointing=True)

    class Two(Regression):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    this.fit(seeded(Two), loader(), [loader(1), loader(2)])
    assert any("Monitor 'val_loss/dataloader_idx_1', and put" in str(warning.message) for warning in recwarn)
