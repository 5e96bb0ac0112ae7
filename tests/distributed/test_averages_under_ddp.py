"""Several averages, further passes and a resume in two processes on a CPU, under DDP with gloo."""

import pytest
import torch
from helpers import Regression, loader, trainer
from two_processes import results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def seen(folder):
    """What each process saw."""
    return results("averages_under_ddp.py", folder)


def test_averages_are_those_of_the_live_weights_and_the_same_in_each_process(seen):
    for rank in seen:
        assert rank["processes"] == 2
        assert rank["by hand"] == [True, True]
        assert rank["applied"]
    assert seen[0]["weights"] == seen[1]["weights"]


@pytest.mark.filterwarnings("ignore")
def test_every_set_of_weights_has_its_own_score(seen, folder):
    for rank, saw in enumerate(seen):
        names = ["val_loss", "val_loss_live", "val_loss/ema_Constant_0.5"]
        for name, weights in zip(names, torch.load(folder / f"{rank}.pt"), strict=True):
            module = Regression(norm=False)
            module.load_state_dict(weights)
            (alone,) = trainer().validate(module, loader(2), verbose=False)
            assert saw["logged"][name] == pytest.approx(alone["val_loss"], abs=1e-6)


def test_a_resumed_run_ends_where_the_whole_one_does(seen):
    assert [rank["resumed"] for rank in seen] == [[True, True], [True, True]]
