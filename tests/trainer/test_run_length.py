from types import SimpleNamespace

import pytest

from lightning_ema.schedules.basic import Plan
from lightning_ema.trainer.run_length import Pace, begins, pace, plan


class GradientAccumulationScheduler: ...


def trainer(**changed):
    """Stands for a trainer of 10 batches an epoch, 2 to a step, for 6 epochs."""
    known = {
        "num_training_batches": 10,
        "accumulate_grad_batches": 2,
        "max_epochs": 6,
        "max_steps": -1,
        "current_epoch": 0,
        "optimizers": [None],
        "callbacks": [],
        "train_dataloader": SimpleNamespace(batch_size=4),
        "world_size": 3,
        "ckpt_path": None,
        "global_step": 0,
        "fit_loop": SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=-1)),
    }
    return SimpleNamespace(**{**known, **changed})


def test_a_run_of_epochs():
    this = trainer()
    assert pace(this, Pace(), 0) == Pace(5, 0)
    assert plan(this, Pace(5, 0)) == Plan(30, 5, 24.0)


def test_the_nearer_end_counts_and_max_steps_counts_each_optimizer():
    assert plan(trainer(max_steps=7), Pace(5, 0)).total_steps == 7
    assert plan(trainer(max_steps=7, optimizers=[None, None]), Pace(5, 0)).total_steps == 4
    assert plan(trainer(max_steps=70), Pace(5, 0)).total_steps == 30


def test_what_is_not_known():
    assert pace(trainer(num_training_batches=float("inf")), Pace(), 0) == Pace(None, 0)
    changing = trainer(callbacks=[GradientAccumulationScheduler()])
    assert pace(changing, Pace(), 0) == Pace(None, 0)
    assert plan(changing, Pace(None, 0)) == Plan(None, None, None)
    assert plan(trainer(max_epochs=-1), Pace(5, 0)).total_steps is None


def test_a_resume_in_other_processes_has_epochs_of_another_length():
    # 2 epochs of 5 steps and 3 steps of the third are behind; from here an epoch has 2 steps
    now = pace(trainer(num_training_batches=4, current_epoch=2), Pace(5, 0), 13)
    assert now == Pace(2, 7)  # 13 - (2 * 2 + 2): the epoch that was begun is over
    assert plan(trainer(), now).total_steps == 2 * 6 + 7


@pytest.mark.parametrize("changed", [{"ckpt_path": "a.ckpt"}, {"global_step": 1}])
def test_a_run_that_goes_on_does_not_begin(changed):
    assert begins(trainer())
    assert not begins(trainer(**changed))
