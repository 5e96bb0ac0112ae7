"""Several decays in one callback: what is evaluated, saved, resumed, logged and exported."""

import copy
import csv

import pytest
import torch
from helpers import Regression, clones, ema, engine, equal, fit, loader, seeded, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_ema import Bema, Constant, EMACallback, Equal, Recalibrate, export_average
from lightning_ema.__main__ import main

DECAYS = [0.9, Equal(), Bema()]


def alone(decay, **kwargs):
    callback = EMACallback(decay, **kwargs)
    fit(seeded(), callback)
    return clones(callback.average.named_tensors())


def test_each_equals_the_one_kept_alone():
    together = EMACallback(DECAYS)
    fit(seeded(), together)
    assert together.averages[0] is together.average
    for decay, average in zip(DECAYS, together.averages, strict=True):
        assert equal(average.named_tensors(), alone(decay))


@pytest.mark.parametrize("evaluate", ["average", "live"])
@pytest.mark.parametrize("decay", [DECAYS, [Bema(), 0.9], Bema()], ids=["first plain", "first corrected", "alone"])
def test_a_resumed_run_ends_where_the_whole_one_does(decay, evaluate, tmp_path):
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    whole, again = (EMACallback(decay, evaluate=evaluate) for _ in range(2))
    fit(seeded(), whole, saving, max_epochs=4, enable_checkpointing=True)
    fit(seeded(), again, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert equal(engine(whole.average).named_live(), engine(again.average).named_live())
    for one, other in zip(whole.averages, again.averages, strict=True):
        assert equal(one.named_tensors(), other.named_tensors())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("decay", [DECAYS, [Bema(), 0.9]], ids=["first plain", "first corrected"])
def test_the_file_holds_what_was_scored_and_every_average_can_be_taken_out(decay, precision, tmp_path):
    callback, module = EMACallback(decay, after_fit="live"), seeded(norm=False)
    this = fit(module, callback, precision=precision)
    this.save_checkpoint(tmp_path / "file.ckpt")
    for which, average in enumerate(callback.averages):
        out = export_average(tmp_path / "file.ckpt", tmp_path / f"{which}.pt", which=which)
        exported = torch.load(out)
        with average.swapped():
            assert equal(exported, module.state_dict())
    assert equal(torch.load(tmp_path / "file.ckpt")["state_dict"], torch.load(tmp_path / "0.pt"))


def test_a_corrected_average_that_is_only_followed_is_exported_corrected(tmp_path):
    callback, module = EMACallback(Bema(), evaluate="live"), seeded()
    fit(module, callback).save_checkpoint(tmp_path / "file.ckpt")
    exported = torch.load(export_average(tmp_path / "file.ckpt", tmp_path / "out.pt"))
    for name, value in callback.average.named_tensors():
        torch.testing.assert_close(exported[name], value, rtol=0, atol=1e-7)


def test_the_entry_holds_the_average_before_its_correction(tmp_path):
    callback = EMACallback(Bema(), after_fit="live")
    fit(seeded(), callback).save_checkpoint(tmp_path / "file.ckpt")
    (entry,) = torch.load(tmp_path / "file.ckpt")["callbacks"].values()
    assert equal(entry["average"], callback.average.state_dict()["average"])
    assert not equal(entry["average"], callback.average.named_tensors())


class Network(Regression):
    def forward(self, x):
        return self.net(x)


def test_recalibrated_statistics_are_exported_with_their_average(tmp_path):
    def run(evaluate, **kwargs):
        callback = EMACallback(
            [0.9, Constant(0.5)], evaluate=evaluate, buffers=Recalibrate(batches=3), after_fit="live"
        )
        return fit(seeded(Network), callback, **kwargs)

    this = run("all")
    this.save_checkpoint(tmp_path / "file.ckpt")
    run("all", max_epochs=3, ckpt_path=tmp_path / "file.ckpt").save_checkpoint(tmp_path / "again.ckpt")
    for which, name in enumerate(("val_loss", "val_loss/ema_Constant_0.5")):
        module = Network()
        module.load_state_dict(torch.load(export_average(tmp_path / "file.ckpt", tmp_path / "x.pt", which=which)))
        (alone,) = trainer().validate(module, loader(2), verbose=False)
        assert this.callback_metrics[name] == pytest.approx(alone["val_loss"], abs=1e-6)
    run("average").save_checkpoint(tmp_path / "followed.ckpt")
    with pytest.raises(ValueError, match=r"estimated for the first average alone, .* evaluate='all' estimates them"):
        export_average(tmp_path / "followed.ckpt", tmp_path / "x.pt", which=1)


def test_after_fit_the_module_holds_the_corrected_average():
    callback, module = EMACallback(Bema()), seeded()
    fit(module, callback)
    expected = alone(Bema(), after_fit="live")
    assert equal({name: module.state_dict()[name] for name in expected}, expected)


def test_the_command_line_takes_any_of_them_and_names_the_range(tmp_path, capsys):
    fit(seeded(), EMACallback([0.9, 0.99], after_fit="live")).save_checkpoint(tmp_path / "file.ckpt")
    assert main(["export", str(tmp_path / "file.ckpt"), str(tmp_path / "out.pt"), "--which", "1"]) == 0
    assert main(["export", str(tmp_path / "file.ckpt"), str(tmp_path / "out.pt"), "--which", "2"]) == 1
    assert "which is 2; the checkpoint holds 2 averages under 'ema'" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "file.ckpt")]) == 0
    assert "further averages stored here: 1" in capsys.readouterr().out


def logged(tmp_path, callback):
    fit(seeded(), callback, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("evaluate", ["average", "live"])
def test_further_averages_are_logged_where_there_are_several(evaluate, tmp_path):
    def keys(decay):
        rows = logged(tmp_path / str(len(decay)), EMACallback(decay, evaluate=evaluate))
        return {key for row in rows for key in row if "ema" in key}

    first = {"ema/decay", "ema/distance", "ema/updates"}
    assert keys([0.9]) == first
    words = ("ema_0.99", "ema_Constant_0.5")
    assert keys([0.9, 0.99, Constant(0.5)]) == first | {
        f"{word}/{what}" for word in words for what in ("decay", "distance")
    }


def test_what_is_logged_belongs_to_its_average(tmp_path):
    callback = EMACallback([Constant(0.5), Constant(0.75)], after_fit="live")
    last = [row for row in logged(tmp_path, callback) if "ema/decay" in row][-1]
    first, second = callback.averages
    assert (float(last["ema/decay"]), float(last["ema_Constant_0.75/decay"])) == (0.5, 0.75)
    assert float(last["ema/distance"]) == pytest.approx(first.distance())
    assert float(last["ema_Constant_0.75/distance"]) == pytest.approx(second.distance())


def test_all_of_one_average_are_it_and_the_live_weights():
    scores = [fit(seeded(), EMACallback(0.9, evaluate=evaluate)).callback_metrics for evaluate in ("all", "both")]
    assert scores[0].keys() == scores[1].keys() >= {"val_loss", "val_loss_live"}
    assert equal(*scores)


def test_training_and_a_plain_validation_are_those_of_the_on_first_only():
    one, several = seeded(), seeded()
    scores = []
    for module, decay in ((one, 0.9), (several, DECAYS)):
        this = fit(module, EMACallback(decay, after_fit="live"))
        scores.append(this.callback_metrics["val_loss"])
    assert equal(one.state_dict(), several.state_dict())
    assert scores[0] == scores[1]


def test_a_callback_of_several_can_be_copied_with_its_module():
    callback, module = ema(decay=[0.9, 0.99]), seeded()
    this = fit(module, callback)
    twin_module, twin = copy.deepcopy((module, callback))
    for one, other in zip(callback.averages, twin.averages, strict=True):
        assert equal(one.named_tensors(), other.named_tensors())
    assert engine(twin.averages[1]).module is twin_module
    trainer(twin).validate(twin_module, loader(2), verbose=False)
    assert this.callback_metrics


class Seen(Regression):
    def on_validation_start(self):
        self.seen = clones(self.named_parameters())


def test_evaluations_carry_the_first():
    callback, module = EMACallback([Constant(0.9), Constant(0.5)], after_fit="live"), seeded(Seen)
    fit(module, callback)
    assert equal(module.seen, {n: t for n, t in callback.average.named_tensors() if n in module.seen})
