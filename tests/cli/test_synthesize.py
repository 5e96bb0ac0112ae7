import pytest
import torch
from safetensors import safe_open
from torch import nn

from lightning_ema import HalfLife, Power, Snapshots, WeightAverage, synthesize
from lightning_ema.__main__ import main
from lightning_ema.posthoc.snapshots import files_in, take


@pytest.fixture
def directory(tmp_path):
    net = nn.Linear(3, 2)
    averages = [WeightAverage(net, Power(sigma_rel=sigma_rel)) for sigma_rel in (0.05, 0.10)]
    for _ in range(160):
        net.weight.data.add_(torch.randn_like(net.weight))
        for average in averages:
            average.step()
        take(Snapshots(tmp_path / "run", every_n_steps=10), averages)
    return tmp_path / "run"


def test_safetensors_with_metadata(directory, tmp_path, capsys):
    assert main(["synthesize", str(directory), str(tmp_path / "out.safetensors"), "--sigma-rel", "0.075"]) == 0
    made = synthesize(directory, sigma_rel=0.075)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in made.weights.items())
        assert file.metadata()["average"] == "Power(sigma_rel=0.075)" and file.metadata()["steps"] == "160"
    said = capsys.readouterr().out
    assert f"residual of the profile: {made.residual:.2g}" in said
    assert "32 coefficients over 16 snapshots of the steps 10 to 160" in said
    assert f"{made.coefficients[-1].value:+.4f}  Power(sigma_rel=0.1) at step 160" in said


def test_a_snapshot_is_not_overwritten(directory, capsys):
    """The shell writes out ``run/*.pt``, and the name of the new file was forgotten."""
    files = sorted(directory.iterdir())
    before = files[-1].read_bytes()
    assert main(["synthesize", *map(str, files), "--sigma-rel", "0.075"]) == 1
    assert "has the name of a snapshot and is not written to" in capsys.readouterr().err
    assert files[-1].read_bytes() == before


def test_pt_with_a_profile_from_listed_files_at_a_step(directory, tmp_path):
    files = [str(path) for path in next(iter(files_in(directory).values()))]
    out = tmp_path / "out.pt"
    arguments = ["--profile", "HalfLife(steps=12)", "--at-step", "120"]
    assert main(["synthesize", *files, str(out), *arguments]) == 0
    made = synthesize(directory, profile=HalfLife(steps=12), at_step=120)
    assert torch.equal(torch.load(out, weights_only=True)["weight"], made.weights["weight"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--sigma-rel", "0.5"], "sigma_rel is 0.5"),
        (["--sigma-rel", "0.005"], "cannot be put together"),
        (["--profile", "__import__('os')"], "no schedule '__import__'"),
        (["--profile", "HalfLife(epochs=2)"], "HalfLife(steps=...)"),
        (["--sigma-rel", "0.075", "--at-step", "500"], "at_step is 500"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(arguments, complaint, directory, tmp_path, capsys):
    assert main(["synthesize", str(directory), str(tmp_path / "out.pt"), *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and complaint in said and "Traceback" not in said
    assert not (tmp_path / "out.pt").exists()


def test_a_missing_directory_and_a_wrong_suffix(directory, tmp_path, capsys):
    assert main(["synthesize", str(tmp_path / "no"), str(tmp_path / "out.pt"), "--sigma-rel", "0.075"]) == 1
    assert main(["synthesize", str(directory), str(tmp_path / "out.ckpt"), "--sigma-rel", "0.075"]) == 1
    assert ".safetensors or .pt" in capsys.readouterr().err


def test_one_of_sigma_rel_and_profile_is_needed(directory, tmp_path):
    for arguments in ([], ["--sigma-rel", "0.1", "--profile", "Equal()"]):
        with pytest.raises(SystemExit):
            main(["synthesize", str(directory), str(tmp_path / "out.pt"), *arguments])
