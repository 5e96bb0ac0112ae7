"""Nothing is lost of a teacher either: a run taken up from any point ends bit for bit where the whole one does."""

from functools import cache
from itertools import product

import lightning
import pytest
import torch
from helpers import clones, ema, equal, loader, seed_everything, seeded, trainer, widest
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


RESUMED = [point for point in POINTS if point != "end of training"]
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Runs a setting once to its end, with saves at all points that such a run passes; gives the end and the files."""

    @cache
    def run_once(setting, with_ema, in_mid_epoch):
        points = [point for point in RESUMED if bool(POINTS[point][2]) == in_mid_epoch]
        folder, (kind, config, settings) = tmp_path_factory.mktemp("whole"), SETTINGS[setting]
        savers = {point: Saves(POINTS[point][0], folder / f"{point}.ckpt", POINTS[point][1]) for point in points}
        more = POINTS[points[0]][2]
        end = run(kind, config, *savers.values(), *averages(with_ema), **settings, **more)
        assert all(saver.count >= saver.at for saver in savers.values())
        return end, {point: saver.path for point, saver in savers.items()}

    return run_once


def averages(with_ema):
    return [ema()] if with_ema else []


@pytest.mark.parametrize(
    ("point", "setting", "with_ema"),
    [
        pytest.param(*case, marks=widest(case[0] == "mid epoch" or case[1:] == ("plain", True)))
        for case in product(RESUMED, SETTINGS, [False, True])
    ],
    ids=lambda value: {False: "alone", True: "beside an EMACallback"}.get(value, value),
)
def test_from_any_point(point, setting, with_ema, uninterrupted):
    if (point, setting) == ("mid epoch", "accumulation") and Version(lightning.__version__) < Version("2.5"):
        pytest.skip("Lightning 2.4 itself, without any callback, does not resume exactly inside an accumulation")
    (kind, config, settings), more = SETTINGS[setting], POINTS[point][2]
    whole, files = uninterrupted(setting, with_ema, bool(more))
    again = run(kind, config, *averages(with_ema), ckpt_path=files[point], **settings, **more)
    assert_same_end(whole, again)


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
