import os
import stat
import subprocess
import sys

import pytest
import torch
from helpers import clones, ema, equal, fit, seeded
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_ema import Constant, Cosine, EMACallback, export_average
from lightning_ema.__main__ import main
from lightning_ema.interop import export


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    callback, follower = ema(), EMACallback(Constant(0.99), name="slow", evaluate="live")
    module = seeded()
    this = fit(module, callback, follower)
    this.save_checkpoint(folder / "full.ckpt")
    this.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return folder, clones(module.state_dict()), clones(follower.average.named_tensors())


def test_safetensors_hold_the_averaged_model_and_say_where_it_is_from(run, tmp_path):
    folder, state, _ = run
    path = export_average(folder / "full.ckpt", tmp_path / "out.safetensors")
    assert equal(load_file(path), state)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "average": "ema",
            "steps": "12",
            "updates": "12",
            "decay": "Warmup(0.9)",
            "decay_in_force": "0.590909",  # (1 + 12) / (10 + 12)
            "horizon": "2.44444",  # 22 / 9
        }


@pytest.mark.skipif(os.name == "nt", reason="a file's mode there says only whether it can be written to")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_has_the_mode_of_any_new_one_or_keeps_its_own(run, tmp_path, suffix):
    before = os.umask(0o027)
    try:
        path = export_average(run[0] / "full.ckpt", tmp_path / f"out{suffix}")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o664)
        export_average(run[0] / "full.ckpt", path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o664
    finally:
        os.umask(before)


def test_each_of_several_averages_names_its_own_decay_and_horizon(tmp_path):
    callback = EMACallback([0.5, Constant(0.99), Cosine(0.6, 1.0)], start_step=2)
    fit(seeded(), callback).save_checkpoint(tmp_path / "x.ckpt")
    told = []
    for which in range(3):
        path = export_average(tmp_path / "x.ckpt", tmp_path / f"{which}.safetensors", which=which)
        with safe_open(path, "pt") as file:
            told.append(file.metadata())
    assert [one["which"] for one in told] == ["0", "1", "2"]
    assert {one["updates"] for one in told} == {"10"} and {one["steps"] for one in told} == {"12"}
    assert [one["decay_in_force"] for one in told] == ["0.5", "0.99", "1"]  # the 10th of 10 steps since the start
    assert [one["horizon"] for one in told] == ["2", "100", "inf"]


def test_a_pt_file_and_a_checkpoint_in_memory(run, tmp_path):
    folder, state, _ = run
    content = torch.load(folder / "full.ckpt", weights_only=True)
    path = export_average(content, str(tmp_path / "out.pt"))
    assert equal(torch.load(path, weights_only=True), state)


def test_the_average_of_a_follower(run, tmp_path):
    folder, state, slow = run
    exported = load_file(export_average(folder / "full.ckpt", tmp_path / "slow.safetensors", name="slow"))
    assert exported.keys() == state.keys()
    assert equal({name: exported[name] for name in slow}, slow)


@pytest.mark.parametrize(("installed", "suffix"), [(True, ".safetensors"), (False, ".pt")])
def test_without_a_suffix_what_is_installed_decides(run, tmp_path, monkeypatch, installed, suffix):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: object() if installed else None)
    assert export_average(run[0] / "full.ckpt", tmp_path / "out").suffix == suffix


def test_safetensors_that_are_not_installed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install safetensors, or write to a \.pt file"):
        export_average(run[0] / "full.ckpt", tmp_path / "out.safetensors")


def test_files_without_an_average_of_that_name(run, tmp_path):
    with pytest.raises(ValueError, match="a weights-only file, whose state_dict is the averaged model already"):
        export_average(run[0] / "weights.ckpt", tmp_path / "out.pt")
    with pytest.raises(ValueError, match=r"no average under EMACallback\{'name': 'fast'\}, but under .*'ema'.*'slow'"):
        export_average(run[0] / "full.ckpt", tmp_path / "out.pt", name="fast")
    with pytest.raises(ValueError, match=r"out\.bin: the suffix must be \.safetensors or \.pt"):
        export_average(run[0] / "full.ckpt", tmp_path / "out.bin")


def test_an_average_without_updates(tmp_path):
    fit(seeded(), ema(start_step=99)).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"'ema' has not been updated yet \(step 12\)"):
        export_average(tmp_path / "x.ckpt", tmp_path / "out.pt")
    assert "average: not started, the live weights are it" in export.describe(tmp_path / "x.ckpt")


def test_inspecting_says_what_there_is(run, capsys):
    folder, state, slow = run
    assert main(["inspect", str(folder / "full.ckpt")]) == 0
    text = capsys.readouterr().out
    content = torch.load(folder / "full.ckpt", weights_only=True)
    live = content["callbacks"]["EMACallback{'name': 'ema'}"]["live"]
    difference = torch.cat([(live[n] - state[n]).flatten() for n in live]).norm()
    norm = torch.cat([live[n].flatten() for n in live]).norm()
    distance = difference / norm
    slows = torch.cat([(live[n] - slow[n]).flatten() for n in live]).norm() / norm
    for line in (
        "epoch 2, global step 12, state_dict: 9 tensors",
        "EMACallback{'name': 'ema'}",
        "EMACallback{'name': 'slow'}",
        "steps 12, updates 12, skipped 0, start at step 0",
        "average: 8 tensors, 0 of them stored here (0.0 kB), the others in state_dict",
        "live weights: 8 tensors stored here (0.3 kB)",  # 81 float32
        "average: 8 tensors, 8 of them stored here (0.3 kB)",
        "decay: Warmup(0.9)",
        "decay in force: 0.590909, a horizon of 2 steps",  # (1 + 12) / (10 + 12)
        f"distance between live weights and average: {distance:.4g} of",
        f"distance between live weights and average: {slows:.4g} of",
    ):
        assert line in text, line
    assert main(["inspect", str(folder / "weights.ckpt")]) == 0
    assert "no average of lightning_ema" in capsys.readouterr().out


def test_exporting_from_the_command_line(run, tmp_path):
    command = [sys.executable, "-m", "lightning_ema", "export", run[0] / "full.ckpt", tmp_path / "out.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "out.safetensors")
    assert equal(load_file(tmp_path / "out.safetensors"), run[1])


def test_errors_on_the_command_line_are_one_sentence(run, tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing.ckpt")]) == 1
    assert "No such file" in capsys.readouterr().err
    assert main(["export", str(run[0] / "weights.ckpt"), str(tmp_path / "o.pt")]) == 1
    assert capsys.readouterr().err.startswith("error: the checkpoint holds no average")
    torch.save({"state_dict": {}, "hyper_parameters": pytest.Cache}, tmp_path / "odd.ckpt")
    assert main(["inspect", str(tmp_path / "odd.ckpt")]) == 1
    assert "If you trust who wrote it, add --trust" in capsys.readouterr().err
    assert main(["inspect", "--trust", str(tmp_path / "odd.ckpt")]) == 0


def test_a_bfloat16_model_is_exported_in_its_own_dtype(tmp_path):
    callback = ema()
    fit(seeded(norm=False), callback, precision="bf16-true").save_checkpoint(tmp_path / "x.ckpt")
    exported = load_file(export_average(tmp_path / "x.ckpt", tmp_path / "out.safetensors"))
    assert all(exported[n].dtype == torch.bfloat16 for n in exported)
    assert all(torch.equal(exported[n], t.bfloat16()) for n, t in callback.average.named_tensors())
