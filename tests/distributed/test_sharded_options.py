"""What else a run under FSDP2 or tensor parallelism may be asked for, in two processes on a CPU, with gloo."""

import pytest
import torch
from one_process import alone, averages_alone
from sharded import data, same
from sharded_options import CHECKS, RUNS, Parallel, Taught
from two_processes import ended

from lightning_ema import synthesize


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def seen(root):
    """How each check ended, in each of two processes."""
    return ended("sharded_options.py", root)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(seen, name):
    assert [rank[name] for rank in seen] == ["", ""]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNS)
def test_the_averages_are_those_of_one_process(seen, root, name):
    make, settings, arguments = RUNS[name]
    for mine, reference in zip(
        torch.load(root / f"{name}.pt"), averages_alone(make, settings, **arguments), strict=True
    ):
        same(mine, reference, 1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_parallel_run_is_that_of_one_process(seen, root):
    *sets, score = torch.load(root / "parallel.pt")
    for mine, reference in zip(sets, averages_alone(Parallel), strict=True):
        same(mine, reference, 1e-6)
    module = Parallel()
    module.configure_model()
    module.load_state_dict(sets[0])
    assert score == pytest.approx(validation_loss(module), abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_teacher_is_that_of_one_process(seen, root):
    weights, score = torch.load(root / "taught.pt")
    module = Taught()
    this = alone(module)
    same(weights, module.state_dict(), 1e-6)
    assert score == pytest.approx(float(this.callback_metrics["val_loss"]), abs=1e-6)


def test_averages_are_synthesized_from_snapshots(seen, root):
    same(synthesize(root / "snapshots", 0.05).weights, torch.load(root / "last.pt"), 1e-5)


def validation_loss(module):
    with torch.no_grad():
        return torch.stack([module.loss(batch) for batch in data(1)[1]]).mean().item()
