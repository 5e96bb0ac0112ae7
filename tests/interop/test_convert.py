"""Files laid out as other systems do it: recognised, converted, resumed from. `parity/` has those that they write."""

import contextlib
import copy
import warnings

import pytest
import torch
from helpers import (
    EMAWeightAveraging,
    Regression,
    clones,
    ema,
    engine,
    equal,
    fit,
    loader,
    needs_weight_averaging,
    schedule_of,
    seeded,
    trainer,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_ema import Constant, Cosine, EMACallback, export_average, interop, recipes
from lightning_ema.__main__ import main
from lightning_ema.interop.naming import named_in_order

pytestmark = pytest.mark.filterwarnings("ignore")  # what a Trainer has to say of missing loops and few workers


def state(seed):
    """A ``state_dict`` of Regression with random values, integers too."""
    torch.manual_seed(seed)
    values = {
        name: torch.rand_like(tensor) if tensor.is_floating_point() else torch.tensor(seed)
        for name, tensor in Regression().state_dict().items()
    }
    return values


AVERAGE, LIVE = state(1), state(2)
PARAMETERS = [name for name, _ in Regression().named_parameters()]
MIXED = {name: AVERAGE[name] if name in PARAMETERS else LIVE[name] for name in AVERAGE}  # parameters only averaged
BUFFERS = {f"ema_{name.replace('.', '_')}": name for name in AVERAGE}


class Yolo(nn.Module):
    """A module as those files pickle it."""

    def __init__(self, values):
        super().__init__()
        self.net = Regression().net
        self.load_state_dict(values)


def prefixed(prefix, values):
    return {prefix + name: tensor for name, tensor in values.items()}


def mmengine():
    return {
        "meta": {"iter": 7},
        "state_dict": dict(AVERAGE),
        "ema_state_dict": {"steps": torch.tensor(7), **prefixed("module.", LIVE)},
    }


def mmdet2():
    """At the end of an epoch; integers beside the names are those of the start."""
    plain = {n: t if t.is_floating_point() else torch.tensor(0) for n, t in AVERAGE.items()}
    return {"meta": {"iter": 7}, "state_dict": {**plain, **{b: LIVE[name] for b, name in BUFFERS.items()}}}


def mmdet2_mid_epoch():
    beside = {b: AVERAGE[n] if AVERAGE[n].is_floating_point() else torch.tensor(0) for b, n in BUFFERS.items()}
    return {"meta": {"iter": 6}, "state_dict": {**LIVE, **beside}}  # it saves before it counts


def mean_teacher():
    return {"meta": {"iter": 7}, "state_dict": {**prefixed("teacher.", AVERAGE), **prefixed("student.", LIVE)}}


def timm():
    return {"epoch": 1, "arch": "net", "state_dict": dict(LIVE), "state_dict_ema": dict(AVERAGE)}


def yolo():
    return {"epoch": 1, "model": Yolo(LIVE), "ema": Yolo(AVERAGE), "updates": 7, "optimizer": None}


def shadows(**more):
    return {"shadow_params": [AVERAGE[name] for name in PARAMETERS], **more}


def diffusers():
    return shadows(decay=0.9999, min_decay=0.0, optimization_step=7, update_after_step=0, use_ema_warmup=False)


def torch_ema():
    return shadows(decay=0.99, num_updates=7, collected_params=None)


def lit_ema():
    short = {f"model_ema.{name.replace('.', '')}": AVERAGE[name] for name in PARAMETERS}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int)}
    return {"state_dict": {**LIVE, **short, **counters}}


def ema_pytorch():
    counters = {"initted": torch.tensor(True), "step": torch.tensor(7)}
    return {**prefixed("online_model.", LIVE), **prefixed("ema_model.", AVERAGE), **counters}


def averaged_model():
    return {"n_averaged": torch.tensor(7), **prefixed("module.", AVERAGE)}


def weight_averaging():
    return {
        "state_dict": dict(AVERAGE),
        "current_model_state": dict(LIVE),
        "averaging_state": {"n_averaged": torch.tensor(7)},
        "callbacks": {"EMAWeightAveraging{}": {"latest_update_step": 7}, "Other": {"kept": 1}},
    }


def stochastic_weight_averaging():
    states = {"n_averaged": 7, "latest_update_epoch": 6, "scheduler_state": None, "average_model_state": dict(AVERAGE)}
    return {"state_dict": dict(LIVE), "callbacks": {"StochasticWeightAveraging": states}, "lr_schedulers": [{}]}


def nemo():
    averages = [AVERAGE[name] for name in PARAMETERS]
    inner = Regression().configure_optimizers().state_dict()
    optimizer = {"opt": inner, "ema": averages, "current_step": 7, "decay": 0.999, "every_n_steps": 1}
    return {"state_dict": dict(MIXED), "optimizer_states": [optimizer], "callbacks": {"EMA": {}}}


LIVE_INTEGERS = {n: AVERAGE[n] if AVERAGE[n].is_floating_point() else LIVE[n] for n in AVERAGE}
# system: file, further arguments, the average, the live weights, steps
LAYOUTS = {
    "mmengine": (mmengine, {}, AVERAGE, LIVE, 7),
    "mmdet2": (mmdet2, {}, LIVE_INTEGERS, LIVE, 7),
    "mmdet2_mid_epoch": (mmdet2_mid_epoch, {}, LIVE_INTEGERS, LIVE, 7),
    "mean_teacher": (mean_teacher, {}, AVERAGE, LIVE, 7),
    "timm": (timm, {}, AVERAGE, LIVE, None),
    "yolo": (yolo, {"allow_code": True}, AVERAGE, LIVE, 7),
    "diffusers": (diffusers, {"like": LIVE}, MIXED, {}, 7),
    "torch_ema": (torch_ema, {"like": {"model": LIVE}, "live": {"model": LIVE}}, MIXED, LIVE, 7),
    "lit_ema": (lit_ema, {}, MIXED, LIVE, 7),
    "ema_pytorch": (ema_pytorch, {}, AVERAGE, LIVE, 7),
    "averaged_model": (averaged_model, {}, AVERAGE, {}, 7),
    "weight_averaging": (weight_averaging, {}, AVERAGE, LIVE, 7),
    "stochastic_weight_averaging": (stochastic_weight_averaging, {}, MIXED, LIVE, None),
    "nemo": (nemo, {"live": LIVE}, MIXED, LIVE, 7),
}


def test_an_average_without_live_weights_beside_it():
    found = interop.read({"state_dict_ema": dict(AVERAGE), "state_dict": None})
    assert found.system == "timm" and equal(found.weights, AVERAGE) and found.live == {}


@pytest.mark.parametrize("system", LAYOUTS)
def test_whatever_stands_under_a_key_no_other_error_is_raised(system):
    make, arguments, *_ = LAYOUTS[system]
    content = make()
    for changed in _changed(content):
        with contextlib.suppress(ValueError):
            interop.read(changed, **arguments)


def _changed(content, depth=2):
    """The content with each of its entries, and of those within, put in place of by what does not belong there."""
    for key, value in content.items():
        yield from ({**content, key: other} for other in (None, 3, "x", [1], {}))
        if isinstance(value, dict) and depth > 1:
            yield from ({**content, key: inner} for inner in _changed(value, depth - 1))


def test_what_a_system_does_not_write_is_told_with_its_name():
    with pytest.raises(ValueError, match=r"of stochastic_weight_averaging, but .* \(AttributeError.*--system NAME"):
        interop.read({**stochastic_weight_averaging(), "state_dict": None})
    with pytest.raises(ValueError, match=r"no average is recognised in the file\. Its keys: state_dict\. Known"):
        interop.read({"state_dict": None})


def test_every_reader_has_a_layout_here():
    assert LAYOUTS.keys() == interop.READERS.keys()


class Watch(Callback):
    """Notes with which weights a fit begins: live, averaged, and those that an evaluation would see."""

    def __init__(self, callback):
        self.average = lambda: callback.average

    def on_train_start(self, trainer, pl_module):
        average = self.average()
        self.live = clones(pl_module.state_dict())
        self.averaged = clones(average.named_tensors())
        self.counters = average.num_steps, average.num_updates
        with average.swapped():
            self.carried = clones(pl_module.state_dict())


@pytest.mark.parametrize("system", LAYOUTS)
def test_a_file_is_recognised_and_a_trainer_goes_on_with_its_average(system, tmp_path):
    make, arguments, average, live, steps = LAYOUTS[system]
    torch.save(make(), tmp_path / "file.pt")
    found = interop.read(tmp_path / "file.pt", **arguments)
    assert found.system == system
    assert equal(found.weights, average) and equal(found.live, live)
    assert found.steps == steps

    interop.write(found, tmp_path / "resume.ckpt", "lightning", steps=7 if steps is None else None)
    callback = ema(decay=0.5)
    watch = Watch(callback)
    fit(seeded(), callback, watch, ckpt_path=tmp_path / "resume.ckpt", max_steps=20)
    live, floats = live or average, {name for name in average if average[name].is_floating_point()}
    assert equal(watch.live, live)
    assert equal(watch.averaged, {name: average[name] for name in floats})
    assert equal(watch.carried, {name: (average if name in floats else live)[name] for name in average})
    assert watch.counters == (7, 7)
    assert callback.average.num_steps == 7 + 12


def test_the_first_update_after_an_import_is_that_of_an_uninterrupted_run(tmp_path):
    interop.write(interop.read(timm()), tmp_path / "x.ckpt", "lightning", steps=20)
    callback = EMACallback(0.9)
    fit(seeded(), callback, ckpt_path=tmp_path / "x.ckpt", max_steps=1)
    decay = (1 + 21) / (10 + 21)  # the 21st step of the warm-up, not its first
    live = dict(engine(callback.average).named_live())
    for name, tensor in callback.average.named_tensors():
        torch.testing.assert_close(tensor, decay * AVERAGE[name] + (1 - decay) * live[name])


def test_updates_that_are_fewer_than_the_steps(tmp_path):
    content = weight_averaging()
    content["callbacks"]["EMAWeightAveraging{}"]["latest_update_step"] = 28
    interop.write(interop.read(content), tmp_path / "x.ckpt", "lightning")
    callback = ema()
    watch = Watch(callback)
    fit(seeded(), callback, watch, ckpt_path=tmp_path / "x.ckpt", max_steps=1)
    assert watch.counters == (28, 7)


BEGUN = {
    "epoch": 0,
    "global_step": 7,
    "pytorch-lightning_version": "2.6.0",
    "optimizer_states": [],
    "lr_schedulers": [],
}


@pytest.mark.parametrize(
    "settings",
    [{}, {"start_step": 50}, {"start_epoch": 1}, recipes.lightning_ema_weight_averaging(decay=0.9)],
    ids=["at once", "step", "epoch", "recipe"],
)
def test_an_average_of_lightnings_own_file_counts_from_its_own_start(settings, tmp_path, caplog):
    torch.save({**weight_averaging(), **BEGUN}, tmp_path / "theirs.ckpt")
    callback = ema(**settings)
    watch = Watch(callback)
    with caplog.at_level("INFO"):
        fit(seeded(), callback, watch, ckpt_path=tmp_path / "theirs.ckpt", max_steps=20)
    floats = {name for name in AVERAGE if AVERAGE[name].is_floating_point()}
    assert equal(watch.live, LIVE) and equal(watch.averaged, {name: AVERAGE[name] for name in floats})
    assert "goes on at step 7, 7 updates, with the average of Lightning's WeightAveraging" in caplog.text
    report = callback.average.report()
    assert report.startswith("19 steps, 19 updates with") and "start" not in report


@pytest.mark.parametrize("start", [0, 3])
def test_a_file_of_lightnings_own_from_before_its_first_update_has_no_average(start, tmp_path, caplog):
    content = {**weight_averaging(), **BEGUN, "averaging_state": {"n_averaged": torch.tensor(0)}}
    torch.save({**content, "callbacks": {}}, tmp_path / "theirs.ckpt")
    callback = ema(start_step=start)
    watch = Watch(callback)
    with caplog.at_level("INFO"):
        fit(seeded(), callback, watch, ckpt_path=tmp_path / "theirs.ckpt", max_steps=20)
    assert equal(watch.live, LIVE) and watch.counters == (0, 0)
    assert equal(watch.averaged, {name: LIVE[name] for name in watch.averaged})  # AVERAGE is what that run began with
    assert "is from before its first update; the average starts from its live weights" in caplog.text
    assert callback.average.num_updates == 12 - start


def test_the_steps_that_are_brought_along_are_part_of_the_run(tmp_path):
    interop.write(interop.read(timm()), tmp_path / "x.ckpt", "lightning", steps=5000)
    for schedule, bound in ((Constant(0.999), Constant(0.999)), (Cosine(0.9, 1.0), Cosine(0.9, 1.0, total_steps=5012))):
        callback = EMACallback(schedule)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer(callback).fit(seeded(), loader(), ckpt_path=tmp_path / "x.ckpt")
        assert not [str(one.message) for one in said if "EMACallback" in str(one.message)]
        assert schedule_of(callback.average) == bound and callback.average.num_steps == 5012


def test_a_decay_that_the_file_does_not_say_is_no_other_setting(tmp_path):
    def warned(content, **kwargs):
        interop.write(interop.read(content), tmp_path / "x.ckpt", "lightning", **kwargs)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fit(seeded(), EMACallback(Constant(0.5)), ckpt_path=tmp_path / "x.ckpt", max_steps=1)
        return [str(one.message) for one in said if "other settings" in str(one.message)]

    assert not warned(timm(), steps=5000)
    export_average(tmp_path / "x.ckpt", tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"average": "ema", "steps": "5000", "updates": "5000"}
    (text,) = warned(lit_ema())
    assert "decay: Warmup(0.9999) in the file, Constant(0.5) now" in text


@needs_weight_averaging
def test_lightnings_own_files_go_on_with_their_epoch_and_optimizer(tmp_path):
    averaging = EMAWeightAveraging(decay=0.5)
    this = fit(seeded(), averaging, ModelCheckpoint(tmp_path, filename="last"), enable_checkpointing=True)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert this.global_step == 12
    assert main(["import", str(tmp_path / "last.ckpt"), "--as", "lightning", "--out", str(tmp_path / "x.ckpt")]) == 0
    converted = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert equal(converted["state_dict"], content["state_dict"])
    assert "current_model_state" not in converted
    assert [key.split("{")[0] for key in converted["callbacks"]] == ["ModelCheckpoint", "EMACallback"]
    callback = ema()
    watch = Watch(callback)
    went_on = fit(seeded(), callback, watch, ckpt_path=tmp_path / "x.ckpt", max_epochs=3)
    assert equal(watch.live, content["current_model_state"])
    assert went_on.global_step == 18 and callback.average.num_steps == content["averaging_state"]["n_averaged"] + 6


def test_stochastic_weight_averaging_as_lightning_writes_it(tmp_path):
    class Kept(Callback):
        def __init__(self):
            self.states = []

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                trainer.save_checkpoint(tmp_path / "swa.ckpt")
                self.live = clones(pl_module.state_dict())

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch >= 1:
                self.states.append(clones(pl_module.named_parameters()))

    kept = Kept()
    fit(seeded(), StochasticWeightAveraging(0.01, swa_epoch_start=2), kept, max_epochs=5)
    found = interop.read(tmp_path / "swa.ckpt")
    assert found.updates == 3 and found.steps is None
    for name in PARAMETERS:  # it averages the weights at the start of the epochs 1, 2 and 3
        torch.testing.assert_close(found.weights[name], sum(each[name] for each in kept.states[:3]) / 3)
    assert equal(found.live, kept.live)
    assert torch.equal(found.weights["net.1.running_mean"], kept.live["net.1.running_mean"])
    with pytest.raises(ValueError, match=r"of stochastic_weight_averaging does not say how many steps .* --steps N"):
        interop.write(found, tmp_path / "x.ckpt", "lightning")


def test_torchs_averaged_model_beside_other_things(tmp_path):
    module = seeded()
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for seed in (1, 2):
        module.load_state_dict(state(seed))
        average.update_parameters(module)
    torch.save({"model": module.state_dict(), "model_ema": average.state_dict()}, tmp_path / "x.pt")
    found = interop.read(tmp_path / "x.pt")
    assert found.because.startswith("under 'model_ema': n_averaged")
    assert found.steps == 2
    assert torch.allclose(found.weights["net.0.weight"], (state(1)["net.0.weight"] + state(2)["net.0.weight"]) / 2)


# --- on the command line ------------------------------------------------------------------------------------------


def test_weights_alone_with_what_is_known_of_them(tmp_path, capsys):
    torch.save(lit_ema(), tmp_path / "file.pt")
    assert main(["import", str(tmp_path / "file.pt"), "--as", "weights"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("lit_ema: model_ema.<name without dots> with model_ema.decay")
    assert out[1] == "average: 9 tensors, float32; steps 7"
    assert out[2] == "live weights: 9 tensors"
    assert out[-1] == str(tmp_path / "file-average.safetensors")
    assert equal(load_file(tmp_path / "file-average.safetensors"), MIXED)
    with safe_open(tmp_path / "file-average.safetensors", "pt") as file:
        assert file.metadata() == {"average": "lit_ema", "steps": "7", "decay": "Warmup(0.9999)"}


def test_a_file_with_code_is_refused_and_the_risk_is_said(tmp_path, capsys):
    torch.save(yolo(), tmp_path / "best.pt")
    command = ["import", str(tmp_path / "best.pt"), "--as", "weights", "--out", str(tmp_path / "out.pt")]
    assert main(command) == 1
    message = capsys.readouterr().err
    assert "cannot be read without running code that is in it" in message
    assert "can do anything on your machine" in message and "--allow-code" in message
    assert not (tmp_path / "out.pt").exists()
    assert main([*command, "--allow-code"]) == 0
    assert equal(torch.load(tmp_path / "out.pt", weights_only=True), AVERAGE)


def test_code_of_a_program_that_is_not_there(tmp_path, capsys, monkeypatch):
    torch.save(yolo(), tmp_path / "best.pt")
    monkeypatch.delattr("test_convert.Yolo")
    assert main(["import", str(tmp_path / "best.pt"), "--as", "weights", "--allow-code"]) == 1
    assert "must be importable" in capsys.readouterr().err


def test_the_file_that_is_read_is_not_written_to(tmp_path, capsys):
    torch.save(timm(), tmp_path / "a.pt")
    assert main(["import", str(tmp_path / "a.pt"), "--as", "weights", "--out", str(tmp_path / "a.pt")]) == 1
    assert "a.pt is the file that is read, and is not written to" in capsys.readouterr().err


def test_an_import_without_live_weights_says_what_training_begins_with(tmp_path, capsys):
    torch.save(averaged_model(), tmp_path / "a.pt")
    assert main(["import", str(tmp_path / "a.pt"), "--as", "lightning"]) == 0
    out = capsys.readouterr().out
    assert "live weights: none in the file" in out and "training goes on from the average" in out
    assert (tmp_path / "a-average.ckpt").exists()


def test_a_file_of_timm_goes_on_under_the_names_of_the_module(tmp_path, capsys):
    def bare(values):
        return {name.removeprefix("net."): tensor for name, tensor in values.items()}

    torch.save({"state_dict": bare(LIVE), "state_dict_ema": bare(AVERAGE)}, tmp_path / "timm.pth.tar")
    torch.save(Regression().state_dict(), tmp_path / "module.pt")
    command = ["import", str(tmp_path / "timm.pth.tar"), "--as", "lightning", "--out", str(tmp_path / "timm.ckpt")]
    assert main([*command, "--steps", "125000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "average: 9 tensors, float32; steps 125,000, from --steps (unknown to the file)"
    assert lines[3].startswith(
        "names: 0.weight, ... as in the file. Where those of the LightningModule have more in front"
    )
    assert "such as net.0.weight, add --like FILE" in lines[3]
    assert main([*command, "--steps", "125000", "--like", str(tmp_path / "module.pt")]) == 0
    assert "--like" not in capsys.readouterr().out
    callback = EMACallback(**recipes.timm_v3(decay=0.9998))
    watch = Watch(callback)
    fit(seeded(), callback, watch, ckpt_path=tmp_path / "timm.ckpt")
    assert equal(watch.live, LIVE)
    assert equal(watch.averaged, {name: tensor for name, tensor in AVERAGE.items() if tensor.is_floating_point()})
    assert callback.average.num_steps == 125_012


def test_steps_that_are_given_count_instead_of_the_files(tmp_path, capsys):
    torch.save(lit_ema(), tmp_path / "a.pt")
    assert main(["import", str(tmp_path / "a.pt"), "--as", "lightning", "--steps", "28"]) == 0
    assert "; steps 28, from --steps (7 in it)" in capsys.readouterr().out
    callback = ema()
    fit(seeded(), callback, ckpt_path=tmp_path / "a-average.ckpt", max_steps=1)
    assert callback.average.num_steps == 29


# --- nothing is guessed -------------------------------------------------------------------------------------------


def test_an_unknown_file_is_told_what_is_known_and_what_it_holds():
    with pytest.raises(ValueError, match=r"no average is recognised in the file\. Its keys: weights, epoch") as error:
        interop.read({"weights": LIVE, "epoch": 3})
    message = str(error.value)
    for system in interop.READERS:
        assert f"\n  {system}: " in message


def uncounted(content):
    """The file of a model without BatchNorm, or with one that does not count."""
    return {**content, "state_dict": {n: t for n, t in content["state_dict"].items() if "tracked" not in n}}


def test_both_readings_of_mmdetection_2_are_named_where_no_count_tells():
    with pytest.raises(ValueError, match=r"in several ways; choose with --system NAME .*\n  mmdet2: .*\n  mmdet2_mid_"):
        interop.read(uncounted(mmdet2()))
    plain = interop.read(uncounted(mmdet2()), system="mmdet2")
    other = interop.read(uncounted(mmdet2_mid_epoch()), system="mmdet2_mid_epoch")
    for found in (plain, other):
        assert equal(found.weights, {n: t for n, t in AVERAGE.items() if "tracked" not in n})
    with pytest.raises(ValueError, match="no average is recognised in the file by the reader of timm"):
        interop.read(mmdet2(), system="timm")
    with pytest.raises(ValueError, match=r"system is 'yolov9'; accepted are 'weight_averaging'"):
        interop.read(mmdet2(), system="yolov9")


def test_counts_of_mmdetection_2_that_contradict_each_other_or_its_name():
    content = mmdet2()
    content["state_dict"] |= {"b.num_batches_tracked": torch.tensor(3), "ema_b_num_batches_tracked": torch.tensor(1)}
    with pytest.raises(ValueError, match=r"in several ways; choose with --system NAME"):
        interop.read(content)
    with pytest.raises(ValueError, match="no average is recognised in the file by the reader of mmdet2_mid_epoch"):
        interop.read(mmdet2(), system="mmdet2_mid_epoch")


def test_two_averages_in_one_file():
    with pytest.raises(ValueError, match=r"averaged_model: under 'a': .*\n  averaged_model: under 'b': "):
        interop.read({"a": averaged_model(), "b": averaged_model()})


def test_names_that_lost_their_dots_are_refused_where_they_can_be_read_in_two_ways():
    content = lit_ema()
    content["state_dict"]["net.0weight"] = torch.zeros(8, 4)
    with pytest.raises(ValueError, match=r"net0weight: net\.0\.weight or net\.0weight"):
        interop.read(content)
    content = mmdet2()
    content["state_dict"]["net_0.weight"] = torch.zeros(8, 4)
    with pytest.raises(ValueError, match=r"ema_net_0_weight: net\.0\.weight or net_0\.weight"):
        interop.read(content, system="mmdet2")


def test_lit_ema_below_a_prefix_and_without_its_model():
    short = {f"model_ema.{name.replace('.', '')}": AVERAGE[name] for name in PARAMETERS}
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(-1, dtype=torch.int)}
    found = interop.read({"state_dict": {**prefixed("model.", LIVE), **short, **counters}})
    assert equal(found.weights, prefixed("model.", MIXED))
    assert (found.steps, found.decay) == (None, "Constant(0.9)")
    with pytest.raises(ValueError, match="are not the names of the file's live weights without their dots"):
        interop.read({"state_dict": {**short, **counters}})


@pytest.mark.parametrize("make", [diffusers, torch_ema])
def test_a_list_without_names_needs_the_model(make):
    with pytest.raises(ValueError, match=r"no names. Give the model's with --like FILE"):
        interop.read(make())


def linear(*sizes):
    return {f"{n}.weight": torch.full((out, 3), float(n)) for n, out in enumerate(sizes)}


def test_a_list_is_paired_in_order_where_shapes_leave_one_way_only():
    values = [torch.ones(4, 3), torch.ones(6, 3)]
    paired = named_in_order(values, linear(4, 5, 6))  # the second one was frozen
    assert list(paired) == ["0.weight", "2.weight"]
    with pytest.raises(ValueError, match=r"in several ways: number 1: 0\.weight or 1\.weight.*torch\.save\("):
        named_in_order(values, linear(4, 4, 6))
    with pytest.raises(ValueError, match=r"none left for number 2, of shape \(6, 3\), after 0\.weight"):
        named_in_order(values, linear(4, 5, 5))
    with pytest.raises(ValueError, match="number 2"):  # the order counts
        named_in_order(values, linear(6, 4))


def test_a_tied_parameter_is_one_of_the_list():
    shared = torch.zeros(4, 3)
    model = {"encoder.weight": shared, "middle.weight": torch.zeros(4, 3), "decoder.weight": shared}
    paired = named_in_order([torch.ones(4, 3), torch.ones(4, 3)], model)
    assert list(paired) == ["encoder.weight", "middle.weight"]


def test_names_are_made_to_fit_the_module(tmp_path):
    inner = {name.removeprefix("net."): tensor for name, tensor in AVERAGE.items()}
    content = {"state_dict": {n.removeprefix("net."): t for n, t in LIVE.items()}, "state_dict_ema": inner}
    found = interop.read(content, like={"state_dict": LIVE, "hyper_parameters": {"lr": 0.25}})
    assert equal(found.weights, AVERAGE) and equal(found.live, LIVE)
    path = interop.write(found, tmp_path / "x.ckpt", "lightning", steps=3)
    assert Regression.load_from_checkpoint(path).hparams.lr == 0.25
    with pytest.raises(
        ValueError, match=r"not even with a prefix.*\n  0\.weight: shape \(8, 4\) in the file, shape \(4, 3\) in"
    ):
        interop.read(content, like=linear(4, 5))


def test_a_prefix_that_fits_twice_is_refused():
    both = {**prefixed("a.", LIVE), **prefixed("b.", LIVE)}
    with pytest.raises(ValueError, match=r"fit the model under several names: a\.net\.0\.weight, b\.net\.0\.weight"):
        interop.read(timm(), like=both)


def test_a_file_from_before_the_first_update():
    for content in ({**mmengine(), "ema_state_dict": {"steps": torch.tensor(0), **prefixed("module.", LIVE)}},
                    {**ema_pytorch(), "initted": torch.tensor(False)},
                    {**averaged_model(), "n_averaged": torch.tensor(0)}):  # fmt: skip
        with pytest.raises(ValueError, match="it holds no average yet"):
            interop.read(content)


def test_nemos_other_file_is_not_taken_for_the_average():
    with pytest.raises(ValueError, match=r"state_dict is live.*whose name ends in -EMA\.ckpt"):
        interop.read({**nemo(), "state_dict": dict(LIVE)})


def test_an_older_file_of_nemo_is_known_by_its_name(tmp_path):
    plain = {"state_dict": dict(AVERAGE), "callbacks": {"EMA": {"cur_step": 7}}}
    torch.save(plain, tmp_path / "run-EMA.ckpt")
    torch.save(plain, tmp_path / "run.ckpt")
    found = interop.read(tmp_path / "run-EMA.ckpt")
    assert (found.system, found.steps) == ("nemo", 7) and equal(found.weights, AVERAGE)
    with pytest.raises(ValueError, match="no average is recognised"):
        interop.read(tmp_path / "run.ckpt")


def test_live_weights_that_do_not_fit_the_average():
    content = timm()
    content["state_dict"]["net.0.weight"] = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"net\.0\.weight: shape \(3, 4\) live, \(8, 4\) averaged"):
        interop.read(content)


def test_a_checkpoint_of_this_package_is_pointed_to_export(tmp_path):
    fit(seeded(), ema()).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="EMACallback resumes from it as it is"):
        interop.read(tmp_path / "x.ckpt")


def test_a_pickled_module_is_no_file_of_weights(tmp_path):
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"holds a list, not a dictionary"):
        interop.read(tmp_path / "x.pt")


def test_a_finished_yolo_run_has_the_average_under_model():
    found = interop.read({"model": Yolo(AVERAGE).half(), "ema": None, "updates": None})
    assert found.steps is None and found.live == {}
    assert torch.equal(found.weights["net.0.weight"], AVERAGE["net.0.weight"].half())


def test_what_is_read_is_left_as_it_is(tmp_path):
    content = weight_averaging()
    before = copy.deepcopy(content)
    interop.write(interop.read(content), tmp_path / "x.ckpt", "lightning")
    assert content.keys() == before.keys() and content["callbacks"] == before["callbacks"]
    assert equal(content["state_dict"], before["state_dict"])


def test_a_half_precision_average_goes_on_in_float32(tmp_path):
    found = interop.read({"model": None, "ema": Yolo(AVERAGE).half(), "updates": 7})
    callback = ema(decay=0.5)
    watch = Watch(callback)
    interop.write(found, tmp_path / "x.ckpt", "lightning")
    fit(seeded(), callback, watch, ckpt_path=tmp_path / "x.ckpt", max_steps=1)
    assert torch.equal(watch.averaged["net.0.weight"], AVERAGE["net.0.weight"].half().float())
    assert callback.average.state_dict()["average"]["net.0.weight"].dtype == torch.float32


def test_an_average_wider_than_the_model_is_not_rounded_through_it(tmp_path):
    halves = {n: t.bfloat16() if t.is_floating_point() else t for n, t in LIVE.items() if "net.1." not in n}
    wide = {n: AVERAGE[n] for n in halves}
    interop.write(
        interop.read({"state_dict": halves, "state_dict_ema": wide}), tmp_path / "x.ckpt", "lightning", steps=7
    )
    callback = ema(decay=0.5)
    watch = Watch(callback)
    fit(seeded(norm=False).bfloat16(), callback, watch, ckpt_path=tmp_path / "x.ckpt", max_steps=1)
    assert equal(watch.averaged, wide) and equal(watch.live, halves)


@pytest.mark.parametrize(
    ("settings", "averaged"),
    [
        ({"buffers": "copy"}, PARAMETERS),
        ({"include": ["net.4.*"]}, ["net.4.weight", "net.4.bias"]),
        ({"name": "slow", "evaluate": "live"}, [n for n in AVERAGE if AVERAGE[n].is_floating_point()]),
    ],
)
def test_the_callbacks_settings_win_over_what_the_file_holds(settings, averaged, tmp_path):
    found = interop.read(timm())
    interop.write(found, tmp_path / "x.ckpt", "lightning", steps=7, name=settings.get("name", "ema"))
    callback = ema(decay=0.5, **settings)
    watch = Watch(callback)
    fit(seeded(), callback, watch, ckpt_path=tmp_path / "x.ckpt", max_steps=1)
    assert equal(watch.averaged, {name: AVERAGE[name] for name in averaged})
    assert equal(watch.live, LIVE)


def test_another_name_than_that_of_the_callback_is_refused(tmp_path):
    interop.write(interop.read(averaged_model()), tmp_path / "x.ckpt", "lightning", name="slow")
    with pytest.raises(ValueError, match=r"no average under EMACallback\{'name': 'ema'\}, but under .*'slow'"):
        fit(seeded(), ema(), ckpt_path=tmp_path / "x.ckpt")


def test_a_second_run_resumes_from_the_first_ones_own_file(tmp_path):
    interop.write(interop.read(mmengine()), tmp_path / "x.ckpt", "lightning")
    whole, first, second = ema(), ema(), ema()
    module = seeded()
    fit(module, whole, ckpt_path=tmp_path / "x.ckpt", max_epochs=2)
    fit(seeded(), first, ckpt_path=tmp_path / "x.ckpt", max_epochs=1).save_checkpoint(tmp_path / "y.ckpt")
    again = seeded()
    fit(again, second, ckpt_path=tmp_path / "y.ckpt", max_epochs=2)
    assert equal(again.state_dict(), module.state_dict())
    assert second.average.num_steps == whole.average.num_steps == 7 + 12


def test_names_of_a_compiled_model_and_a_safetensors_file_of_the_model(tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in LIVE.items()}, tmp_path / "model.safetensors")
    compiled = {"n_averaged": torch.tensor(7), **prefixed("module._orig_mod.", AVERAGE)}
    found = interop.read(compiled, like=tmp_path / "model.safetensors", live=tmp_path / "model.safetensors")
    assert equal(found.weights, AVERAGE) and equal(found.live, LIVE)


def test_what_the_average_lacks_is_taken_from_the_model_and_said():
    found = interop.read(torch_ema(), like=LIVE)
    (note,) = [note for note in found.notes if "--like" in note]
    assert note.startswith("Taken from the model of --like, 3 tensors") and "net.1.running_mean" in note


def test_damaged_files_and_missing_folders(tmp_path, capsys):
    torch.save(timm(), tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "empty.pt").touch()
    for name in ("half", "text", "empty"):
        assert main(["import", str(tmp_path / f"{name}.pt"), "--as", "weights"]) == 1
        assert "no file of torch.save" in capsys.readouterr().err, name
    assert main(["import", str(tmp_path / "nothing.pt"), "--as", "weights"]) == 1
    assert "No such file" in capsys.readouterr().err
    command = ["import", str(tmp_path / "whole.pt"), "--as", "weights", "--out", str(tmp_path / "there" / "x.pt")]
    assert main(command) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_steps_that_are_none():
    with pytest.raises(ValueError, match="steps is 0"):
        interop.write(interop.read(timm()), "x.ckpt", "lightning", steps=0)
    with pytest.raises(ValueError, match=r"form is 'onnx'; accepted are 'lightning', 'weights'"):
        interop.write(interop.read(timm()), "x.ckpt", "onnx")
