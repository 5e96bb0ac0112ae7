"""The real LightningCLI, with a YAML file and with arguments on the command line."""

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from command_line import cli
from helpers import engine, schedule_of, settings_of

import lightning_ema
from lightning_ema import (
    Annealing,
    Bema,
    Constant,
    Cosine,
    Debiased,
    EMACallback,
    Equal,
    ExponentialAnnealing,
    HalfLife,
    InversePower,
    PerUpdate,
    Power,
    Recalibrate,
    Scaled,
    Schedule,
    Select,
    Shifted,
    Snapshots,
    SwitchEMA,
    Then,
    Warmup,
)
from lightning_ema.callback.ema_callback import holder_of

HERE = Path(__file__).parents[1]


def config(tmp_path, *others, **init_args):
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "accelerator": "cpu",
                    "max_epochs": 2,
                    "logger": False,
                    "enable_checkpointing": False,
                    "enable_progress_bar": False,
                    "callbacks": [{"class_path": "lightning_ema.EMACallback", "init_args": init_args}, *others],
                }
            }
        )
    )
    return f"--config={path}"


COSINE = {"class_path": "lightning_ema.Cosine", "init_args": {"start": 0.5, "end": 1.0}}


def callback_of(made, kind=EMACallback):
    (callback,) = [c for c in made.trainer.callbacks if type(c) is kind]
    return callback


def all_settings_of(callback):
    return holder_of(callback).settings


def test_a_yaml_file_with_a_schedule_trains(tmp_path):
    callback = callback_of(cli("fit", config(tmp_path, decay=COSINE)))
    assert settings_of(callback).decay == Cosine(0.5, 1.0)
    assert schedule_of(callback.average) == Cosine(0.5, 1.0, total_steps=12)
    assert callback.average.num_updates == 12


def as_yaml(value):
    if not isinstance(value, Schedule):
        return value
    given = {field.name: as_yaml(getattr(value, field.name)) for field in fields(value)}
    return {"class_path": f"lightning_ema.{type(value).__name__}", "init_args": given}


def test_every_schedule_comes_out_of_yaml(tmp_path):
    schedules = [
        Annealing(0.99, gamma=10),
        Bema(eta=0.3),
        Constant(0.9),
        Cosine(0.5, 1.0, total_steps=10),
        Debiased(0.9),
        Equal(),
        ExponentialAnnealing(0.99, gamma=10, offset=1),
        HalfLife(epochs=2),
        InversePower(0.99, power=0.75),
        PerUpdate(Then(0.0, at=3, second=Equal())),
        Power(sigma_rel=0.1),
        Scaled(Warmup(0.99), batch_factor=2),
        Shifted(Warmup(0.99), by=7),
        Then(0.5, at=3, second=Then(Constant(0.9), at=2, second=Equal())),
        Warmup(0.9, offset=3),
    ]
    public = {name for name in lightning_ema.__all__ if _is_schedule(getattr(lightning_ema, name))}
    assert {type(schedule).__name__ for schedule in schedules} == public - {"Schedule"}
    made = cli(config(tmp_path, decay=[0.999, *map(as_yaml, schedules)]), run=False)
    assert list(settings_of(callback_of(made)).decays) == [Warmup(0.999), *schedules]


def _is_schedule(named):
    return isinstance(named, type) and issubclass(named, Schedule)


def test_every_argument_can_be_written_in_yaml(tmp_path):
    nested = {
        "class_path": "lightning_ema.Then",
        "init_args": {
            "first": 0.5,
            "at": 3,
            "second": {"class_path": "lightning_ema.Constant", "init_args": {"decay": 0.99}},
        },
    }
    once = {"class_path": "lightning_ema.PerUpdate", "init_args": {"schedule": nested}}
    arguments = {
        "decay": once, "every_n_steps": 1, "start_step": 2, "start_epoch": 1,
        "include": ["net.*"], "exclude": ["net.4.bias"], "include_frozen": True, "buffers": "copy",
        "dtype": "torch.float64", "device": "cpu", "evaluate": "live", "after_fit": "live", "on_nonfinite": "skip",
        "name": "slow", "shard": True, "snapshots": {"dirpath": "there", "every_n_steps": 7, "keep": 9},
    }  # fmt: skip
    assert arguments.keys() == inspect.signature(EMACallback).parameters.keys()
    switch = {"class_path": "lightning_ema.SwitchEMA", "init_args": {"every": "epoch", "name": "slow"}}
    made = cli(config(tmp_path, switch, **arguments), run=False)
    callback = callback_of(made)
    settings, own = settings_of(callback), all_settings_of(callback)
    assert settings.decay == PerUpdate(Then(0.5, at=3, second=Constant(0.99)))
    assert (settings.start_step, settings.include, settings.exclude) == (2, ("net.*",), ("net.4.bias",))
    assert (settings.dtype, settings.device) == (torch.float64, torch.device("cpu"))
    assert (settings.include_frozen, settings.buffers, settings.on_nonfinite) == (True, "copy", "skip")
    assert (own.shard, own.snapshots) == (True, Snapshots("there", every_n_steps=7, keep=9))
    assert (own.start_epoch, own.evaluation.evaluate, own.after_fit, own.name) == (1, "live", "live", "slow")
    switching = callback_of(made, SwitchEMA)
    assert (switching.state_dict()["every"], switching.state_key) == ("epoch", "SwitchEMA{'name': 'slow'}")


def test_several_decays_and_what_is_done_with_them_in_yaml(tmp_path):
    switch = {"class_path": "lightning_ema.SwitchEMA", "init_args": {"every": 4}}
    made = cli(config(tmp_path, switch, decay=[0.9, 0.99], evaluate="all"), run=False)
    assert settings_of(callback_of(made)).decays == (Warmup(0.9), Warmup(0.99))
    assert all_settings_of(callback_of(made)).evaluation.evaluate == "all"
    assert callback_of(made, SwitchEMA).state_dict()["every"] == 4


def test_a_selection_and_recalibration_in_yaml_train(tmp_path):
    select = {"metric": "val_loss", "mode": "max", "every": 2, "live": True}
    evaluate = {"class_path": "lightning_ema.Select", "init_args": select}
    callback = callback_of(cli("fit", config(tmp_path, decay=[0.9, 0.99], evaluate=evaluate)))
    assert all_settings_of(callback).evaluation.evaluate == Select("val_loss", mode="max", every=2, live=True)
    assert callback.selected in callback.averages
    buffers = {"class_path": "lightning_ema.Recalibrate", "init_args": {"batches": 3}}
    callback = callback_of(cli(config(tmp_path, buffers=buffers), run=False))
    assert all_settings_of(callback).recalibrate == Recalibrate(batches=3)
    callback = callback_of(cli(config(tmp_path, buffers="recalibrate"), run=False))
    assert all_settings_of(callback).recalibrate == Recalibrate(batches=100)


@pytest.mark.parametrize(("written", "start_epoch", "start_step"), [(0.5, 0.5, 6), (1, 1, 6), (0, 0, 0)])
def test_the_start_in_yaml_is_an_epoch_or_a_share(written, start_epoch, start_step, tmp_path):
    callback = callback_of(cli("fit", config(tmp_path, start_epoch=written)))
    assert repr(all_settings_of(callback).start_epoch) == repr(start_epoch)
    assert engine(callback.average).start_step == start_step


def test_short_names_on_the_command_line(tmp_path):
    made = cli(
        "--trainer.callbacks+=EMACallback", "--trainer.callbacks.decay=0.99", "--trainer.logger=false", run=False
    )
    assert settings_of(callback_of(made)).decay.decay == 0.99
    made = cli(
        "--trainer.callbacks+=EMACallback",
        "--trainer.callbacks.decay=Cosine",
        "--trainer.callbacks.decay.start=0.5",
        "--trainer.callbacks.decay.end=0.9",
        "--trainer.logger=false",
        run=False,
    )
    assert settings_of(callback_of(made)).decay == Cosine(0.5, 0.9)


@pytest.mark.parametrize("bad", [{"decay": 1.5}, {"buffers": "ignore"}, {"every_n_steps": 0}])
def test_a_bad_value_is_refused_by_name(bad, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        cli(config(tmp_path, **bad), run=False)
    (name,) = bad
    assert name in capsys.readouterr().err + str(error.value)


def test_print_config_round_trips(tmp_path):
    script = "import lightning_ema; from command_line import cli; cli(*__import__('sys').argv[1:])"

    def printed(argument):
        command = [sys.executable, "-W", "ignore", "-c", script, "fit", argument, "--print_config"]
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout

    first = printed(config(tmp_path, decay=COSINE, include=["net.*"]))
    (tmp_path / "again.yaml").write_text(first)
    assert printed(f"--config={tmp_path / 'again.yaml'}") == first
    (callback,) = yaml.safe_load(first)["trainer"]["callbacks"]
    assert callback["class_path"] == "lightning_ema.EMACallback"
    assert callback["init_args"]["decay"]["class_path"] == "lightning_ema.Cosine"
    assert callback["init_args"]["every_n_steps"] == 1
