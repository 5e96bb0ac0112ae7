"""examples/05_distributed.py in two processes: trained under DDP, gone on with under FSDP2; what it prints holds."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from two_processes import run

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "05_distributed.py"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    yield import_module("05_distributed")
    sys.modules.pop("05_distributed")


def printed(*arguments):
    ran = run(SCRIPT, *arguments)
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = re.search(r"epoch (\d+), test error: average ([\d.]+)%, live weights ([\d.]+)%", ran.stdout)
    return int(said[1]), float(said[2]), float(said[3])


def error_of(module):
    """In %, computed here."""
    images, labels = import_module("digits").load()[1].tensors
    with torch.no_grad():
        return 100 * module.eval().layers(images).argmax(1).ne(labels).double().mean().item()


@pytest.mark.filterwarnings("ignore")
def test_a_run_under_ddp_is_gone_on_with_under_fsdp(example, tmp_path):
    first = printed("--shard", "--epochs", 1, "--out", tmp_path)
    second = printed("--strategy", "fsdp", "--epochs", 1, "--resume", tmp_path / "ddp.ckpt", "--out", tmp_path)
    for epoch, (name, said) in enumerate({"ddp": first, "fsdp": second}.items(), start=1):
        module = example.Classifier.load_from_checkpoint(tmp_path / f"{name}.ckpt")
        average = error_of(module)
        (entry,) = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["callbacks"].values()
        module.load_state_dict(entry["live"])
        assert said == (epoch, pytest.approx(average, abs=0.006), pytest.approx(error_of(module), abs=0.006))
    assert second[1] < first[1]  # it went on, from the average it had
