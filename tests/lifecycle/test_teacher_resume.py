"""Nothing is lost of a teacher either: a run taken up from any point ends bit for bit where the whole one does."""

import lightning
import pytest
import torch
from helpers import clones, ema, equal, loader, seed_everything, seeded, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from packaging.version import Version
from taught import Manual, Taught
from test_resume_anywhere import EPOCHS, POINTS, Resumable, Saves
from torch import nn

from lightning_ema import Constant, Cosine, MeanTeacherConfig

pytestmark = pytest.mark.filterwarnings("ignore")


class Calm(Taught):
    """Without dropout, whose random numbers a resumed run draws anew."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.student[2], self.teacher[2] = nn.Identity(), nn.Identity()


class CalmManual(Manual, Calm):
    pass


SETTINGS = {
    "plain": (Calm, {}, {}),
    "copied buffers": (Calm, {"buffers": "copy"}, {}),
    "own buffers": (Calm, {"buffers": "ignore"}, {}),
    "teacher in train mode": (Calm, {"teacher_mode": "train"}, {}),
    "burn-in": (Calm, {"burn_in_steps": 11}, {}),
    "interval": (Calm, {"every_n_steps": 5, "decay": Constant(0.99)}, {}),
    "cosine over the run": (Calm, {"decay": Cosine(0.5, 1.0), "ramp_up_steps": 14}, {}),
    "accumulation": (Calm, {}, {"accumulate_grad_batches": 3}),
    "two optimizers": (CalmManual, {}, {}),
    "bf16-mixed": (Calm, {}, {"precision": "bf16-mixed"}),
}


class End(Callback):
    def on_train_end(self, trainer, pl_module):
        self.weights = clones(pl_module.state_dict())
        self.optimizers = [clones(s) for o in trainer.optimizers for s in o.state_dict()["state"].values()]
        callback = pl_module.teacher_callback
        self.counts = callback.num_steps, callback.average.num_updates, callback.average.decay


def run(kind, config, *callbacks, ckpt_path=None, **settings):
    module = seeded(kind, mean_teacher=MeanTeacherConfig(**config))
    seed_everything(3, verbose=False)
    end = End()
    trainer(*callbacks, end, max_epochs=EPOCHS, **settings).fit(module, Resumable(), loader(2), ckpt_path=ckpt_path)
    return end


def assert_same_end(first, second):
    assert first.counts == second.counts
    assert equal(first.weights, second.weights)
    assert all(equal(a, b) for a, b in zip(first.optimizers, second.optimizers, strict=True))


@pytest.mark.parametrize("with_ema", [False, True], ids=["alone", "beside an EMACallback"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("point", [point for point in POINTS if point != "end of training"])
def test_from_any_point(point, setting, with_ema, tmp_path):
    if (point, setting) == ("mid epoch", "accumulation") and Version(lightning.__version__) < Version("2.5"):
        pytest.skip("Lightning 2.4 itself, without any callback, does not resume exactly inside an accumulation")
    hook, at, more = POINTS[point]
    kind, config, settings = SETTINGS[setting]
    averages = lambda: [ema()] if with_ema else []  # noqa: E731
    saver = Saves(hook, tmp_path / "x.ckpt", at)
    whole = run(kind, config, saver, *averages(), **settings, **more)
    assert saver.count >= at
    assert_same_end(whole, run(kind, config, *averages(), ckpt_path=tmp_path / "x.ckpt", **settings, **more))


class Fails(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise ArithmeticError


def test_after_an_exception(tmp_path):
    whole = run(Calm, {})
    with pytest.raises(ArithmeticError):
        run(Calm, {}, Fails(), OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)
    (file,) = tmp_path.iterdir()
    assert_same_end(whole, run(Calm, {}, ckpt_path=file))


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_file_written_before_the_teachers_turn_holds_its_update(weights_only, tmp_path):
    class SavesEarly(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)

    module = seeded(Calm)
    trainer(SavesEarly(), max_epochs=1).fit(module, Resumable(), loader(2))
    assert equal(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"], module.state_dict())
