"""Snapshots written in a Trainer's run, resumed, and what is synthesized from them afterwards."""

import pytest
import torch
from helpers import BATCHES, clones, equal, fit, seeded
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ema import Bema, Constant, EMACallback, Power, Schedule, Snapshots, synthesize

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTHS = [Power(sigma_rel=0.05), Power(sigma_rel=0.1)]


def steps_in(directory):
    return sorted(int(path.stem.rsplit("-", 1)[1]) for path in directory.glob("snapshot-*.pt"))


def tracking(directory, decay=WIDTHS, every=2, start=0, **kwargs):
    return EMACallback(decay, start_step=start, snapshots=Snapshots(directory, every_n_steps=every, **kwargs))


def test_another_width_is_had_afterwards(tmp_path):
    module, wanted = seeded(), Power(sigma_rel=0.075)
    callback = tracking(tmp_path, decay=[*WIDTHS, wanted], every=10, keep=64)
    fit(module, callback, max_epochs=40)
    snapshots = [callback.averages[0], callback.averages[1]]
    assert len(steps_in(tmp_path)) == 24
    made = synthesize(tmp_path, sigma_rel=0.08)  # tracked widths alone would do; the third one is in the files too
    assert made.step == 240 and made.residual < 0.01
    direct = synthesize(tmp_path, profile=wanted)
    assert direct.residual < 1e-6
    for name, value in callback.averages[2].named_tensors():
        torch.testing.assert_close(direct.weights[name], value, rtol=0, atol=1e-5)
    assert snapshots[0].num_steps == 240
    other = seeded()
    other.load_state_dict(made.weights)
    assert torch.equal(other.net[1].num_batches_tracked, module.net[1].num_batches_tracked)


def test_the_end_of_the_run_is_in_them_and_the_limit_holds(tmp_path):
    fit(seeded(), tracking(tmp_path, every=5, keep=2))
    assert steps_in(tmp_path) == [10, 12]


def test_without_a_directory_they_go_beside_the_run(tmp_path):
    fit(seeded(), tracking(None), default_root_dir=tmp_path)
    assert steps_in(tmp_path / "snapshots") == [2, 4, 6, 8, 10, 12]


def test_the_end_of_a_run_stays_when_it_is_resumed(tmp_path, caplog):
    saving = ModelCheckpoint(tmp_path, filename="x")  # the last file is written before the last snapshot
    fit(seeded(), tracking(tmp_path, every=5), saving, enable_checkpointing=True)
    assert steps_in(tmp_path) == [5, 10, 12]
    fit(seeded(), tracking(tmp_path, every=5), max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert steps_in(tmp_path) == [5, 10, 12, 15, 18]
    assert "are removed" not in caplog.text


def test_a_trial_run_writes_and_removes_nothing(tmp_path):
    fit(seeded(), tracking(tmp_path, every=1), fast_dev_run=True)
    assert steps_in(tmp_path) == []
    fit(seeded(), tracking(tmp_path, every=5), max_epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    fit(seeded(), tracking(tmp_path, every=5), ckpt_path=tmp_path / "x.ckpt")
    fit(seeded(), tracking(tmp_path, every=5), fast_dev_run=True, ckpt_path=tmp_path / "x.ckpt")
    assert steps_in(tmp_path) == [5, 6, 10, 12]


@pytest.mark.parametrize("saved_before_ours", [True, False])
def test_a_resumed_run_leaves_the_files_of_the_whole_one(saved_before_ours, tmp_path):
    class Saves(Callback):
        def on_train_epoch_end(self, trainer, pl_module):  # Lightning 2.4 trains one batch more after saves elsewhere
            if trainer.global_step == 2 * BATCHES:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    callbacks = [Saves(), tracking(tmp_path / "whole", every=3)]
    fit(seeded(), *(callbacks if saved_before_ours else callbacks[::-1]), max_epochs=3)
    assert steps_in(tmp_path / "whole") == [3, 6, 9, 12, 15, 18]
    kept = {p.name: torch.load(p, weights_only=True) for p in (tmp_path / "whole").glob("*.pt")}
    resumed = tracking(tmp_path / "whole", every=3)
    seen = []

    class Watches(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(steps_in(tmp_path / "whole"))

    fit(seeded(), resumed, Watches(), max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
    again = {p.name: torch.load(p, weights_only=True) for p in (tmp_path / "whole").glob("*.pt")}
    assert seen == [[3, 6, 9, 12]]
    assert kept.keys() == again.keys()  # one run: the same name in the files
    assert steps_in(tmp_path / "whole") == [3, 6, 9, 12, 15, 18]


def test_training_and_averages_are_those_without(tmp_path):
    ends = []
    for snapshots in (None, Snapshots(tmp_path, every_n_steps=2)):
        module, callback = seeded(dropout=0.3), EMACallback(WIDTHS, snapshots=snapshots, after_fit="live")
        fit(module, callback)
        ends.append((clones(module.state_dict()), clones(callback.average.named_tensors()), torch.get_rng_state()))
    assert equal(ends[0][0], ends[1][0]) and equal(ends[0][1], ends[1][1]) and torch.equal(ends[0][2], ends[1][2])


def test_a_delayed_start_counts_from_there(tmp_path):
    callback = EMACallback(WIDTHS, start_step=4, snapshots=Snapshots(tmp_path, every_n_steps=3))
    fit(seeded(), callback)
    assert steps_in(tmp_path) == [7, 10, 12]


def test_a_run_that_ends_before_the_start_writes_nothing(tmp_path):
    fit(seeded(), tracking(tmp_path, every=1, start=99))
    assert steps_in(tmp_path) == []


class Mine(Schedule):
    def __call__(self, n):
        return 0.5


@pytest.mark.parametrize(
    ("decay", "message"),
    [(Mine(), "A snapshot must say the exact schedule"), (Bema(), "corrects its average by the live weights")],
)
def test_what_cannot_be_synthesized_is_refused_at_the_start(decay, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(seeded(), tracking(tmp_path, decay=decay))


def test_a_directory_alone_is_no_snapshots(tmp_path):
    with pytest.raises(TypeError, match=r"it must be Snapshots, such as Snapshots\(every_n_steps=1000\)"):
        EMACallback(Constant(0.9), snapshots=str(tmp_path))


def test_best_files_and_snapshots_go_together(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    fit(seeded(), tracking(tmp_path / "s"), best, max_epochs=3, enable_checkpointing=True)
    module = seeded()
    fit(module, tracking(tmp_path / "s"), max_epochs=4, ckpt_path=best.best_model_path)
    assert steps_in(tmp_path / "s")[-1] == 4 * BATCHES
