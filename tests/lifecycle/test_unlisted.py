"""Situations of a Trainer that no list of features names, against the promises."""

import gc
from contextlib import suppress

import pytest
import torch
from helpers import BATCHES, Regression, clones, engine, equal, fit, loader, seed_everything, seeded, trainer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from taught import Taught

from lightning_ema import Bema, Constant, EMACallback, Equal, MeanTeacherConfig, Select, SwitchEMA

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_barebones_trainer_trains_evaluates_and_applies():
    """It refuses loggers, checkpoints and what is logged; the average is kept all the same."""
    ends = []
    for barebones in (False, True):
        seed_everything(3, verbose=False)
        module = seeded()
        callback = EMACallback([0.9, Equal()], evaluate="all")
        this = Trainer(barebones=True, accelerator="cpu", max_epochs=2, callbacks=[callback]) if barebones else (
            trainer(callback)
        )  # fmt: skip
        this.fit(module, loader(), loader(2))
        ends.append((clones(module.state_dict()), clones(engine(callback.average).named_live())))
    assert equal(ends[0][0], ends[1][0]) and equal(ends[0][1], ends[1][1])


class ReadsInTheMiddle(Callback):
    """Evaluates an average of its own accord in the middle of training, as a sampler of images does."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ema = next(callback for callback in trainer.callbacks if isinstance(callback, EMACallback))
        for average in ema.averages:
            with average.swapped() as module, torch.no_grad():
                module.eval()
                module.net(batch[0])
                module.train()
            self.seen.append(average.num_updates)


@pytest.mark.parametrize("order", [1, -1], ids=["switched behind it", "switched before it"])
@pytest.mark.parametrize("first", [True, False])
def test_a_callback_that_swaps_every_average_in_in_every_batch_changes_nothing(first, order):
    ends = []
    for reads in (None, ReadsInTheMiddle()):
        callback = EMACallback([Constant(0.9), Bema()], after_fit="live")
        ours = [callback, SwitchEMA(every=4)][::order]
        callbacks = ours if reads is None else [reads, *ours] if first else [*ours, reads]
        module = seeded()
        fit(module, *callbacks, precision="bf16-mixed")
        averages = [clones(average.named_tensors()) for average in callback.averages]
        ends.append((clones(module.state_dict()), averages))
    assert equal(ends[0][0], ends[1][0])
    assert all(equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))
    assert len(reads.seen) == 2 * 2 * BATCHES


@pytest.mark.parametrize("order", [1, -1], ids=["switched behind it", "switched before it"])
def test_a_teacher_beside_an_average_that_switches_follows_the_switched_student(order):
    """Callbacks of the trainer run before those of the module: the teacher sees the student that was switched."""
    module = seeded(Taught, mean_teacher=MeanTeacherConfig(decay=Constant(0.0)))
    callback = EMACallback(Constant(0.5), after_fit="live")
    fit(module, *[callback, SwitchEMA(every=1)][::order])
    students = dict(module.student.named_parameters())
    averages = {n.removeprefix("student."): t for n, t in callback.average.named_tensors()}
    for name, teacher in module.teacher.named_parameters():
        assert torch.equal(teacher, students[name])  # a decay of 0 copies
        assert torch.equal(teacher, averages[name])


class Plain(Callback):
    """What each validation logged."""

    def __init__(self):
        self.logged = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_a_selection_in_the_middle_of_epochs_whose_loaders_are_made_anew():
    callback, plain = EMACallback([Constant(0.2), Constant(0.8)], evaluate=Select("val_loss")), Plain()
    often = {"val_check_interval": 0.5, "reload_dataloaders_every_n_epochs": 1, "limit_val_batches": 1}
    fit(seeded(lr=0.1), callback, plain, max_epochs=3, **often)
    assert len(plain.logged) == 6
    for logged in plain.logged:
        several = [logged[f"val_loss/ema_Constant_{decay}"] for decay in (0.2, 0.8)]
        assert logged["val_loss"] == pytest.approx(min(several), rel=1e-6)
        assert several[0] != several[1]


def test_files_that_are_scored_between_two_fits_change_nothing(tmp_path):
    ends = []
    for scored in (False, True):
        callback, module = EMACallback([Constant(0.2), Constant(0.8)], evaluate=Select("val_loss")), seeded(lr=0.1)
        this = fit(module, callback, max_epochs=2)
        this.save_checkpoint(tmp_path / "x.ckpt")
        if scored:
            this.test(module, loader(2), verbose=False)
            this.validate(module, loader(2), ckpt_path=tmp_path / "x.ckpt", verbose=False)
            this.predict(module, loader(2), ckpt_path=tmp_path / "x.ckpt")
        this.fit_loop.max_epochs = 4
        this.fit(module, loader(), loader(2))
        averages = [clones(average.named_tensors()) for average in callback.averages]
        ends.append((clones(engine(callback.average).named_live()), clones(module.state_dict()), averages))
    (live, carried, averages), (live_too, carried_too, averages_too) = ends
    assert equal(live, live_too) and equal(carried, carried_too)
    assert all(equal(a, b) for a, b in zip(averages, averages_too, strict=True))


class Stops(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            raise ZeroDivisionError


@pytest.mark.parametrize("others", [[], [Stops()]], ids=["to its end", "until an exception"])
def test_a_module_moved_after_a_fit_leaves_its_memory_behind(others):
    """The engine keeps views of large 16-bit weights between updates."""
    module, callback = seeded(norm=False), EMACallback(Constant(0.9), after_fit="live")
    module.large = torch.nn.Linear(1024, 1024, bias=False)
    with suppress(ZeroDivisionError):
        fit(module, callback, *others, precision="bf16-true")
    assert callback.average.num_updates > 0
    places = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    module.double()
    gc.collect()
    narrow = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.dtype == torch.bfloat16]
    assert not [tensor for tensor in narrow if tensor.untyped_storage().data_ptr() in places]


class Recorded(Callback):
    """The live weights after each batch, and before the first."""

    def __init__(self):
        self.states = []

    def on_train_start(self, trainer, pl_module):
        self.states.append(clones(pl_module.named_parameters()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.states.append(clones(pl_module.named_parameters()))


def averaged(states, name, first=0, decay=0.5):
    """``average = decay * average + (1 - decay) * live`` over the states from ``first`` on, in float64."""
    average = states[first][name].double()
    for state in states[first + 1 :]:
        average = decay * average + (1 - decay) * state[name].double()
    return average


class WithBackbone(Regression):
    def __init__(self):
        super().__init__(norm=False)
        self.backbone = self.net[0]

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), 0.05)


def test_lightnings_finetuning_callback_unfreezes_a_backbone_that_joins_then():
    def run(*callbacks):
        module, recorded = seeded(WithBackbone), Recorded()
        finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
        fit(module, *callbacks, finetuning, recorded, max_epochs=3)
        return recorded.states

    without = run()
    callback = EMACallback(Constant(0.5), after_fit="live")
    states = run(callback)
    assert all(equal(one, other) for one, other in zip(without, states, strict=True))
    average = dict(callback.average.named_tensors())
    assert equal(
        {name: states[0][name] for name in ("net.0.weight", "net.0.bias")},
        {name: states[BATCHES][name] for name in ("net.0.weight", "net.0.bias")},
    )  # frozen in the first epoch
    for name, first in {"net.0.weight": BATCHES, "net.4.weight": 0}.items():
        torch.testing.assert_close(average[name].double(), averaged(states, name, first), rtol=1e-5, atol=1e-6)


class SeveralLosses(Regression):
    """One step of its optimizer asks for the loss several times."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def test_an_optimizer_that_asks_for_the_loss_several_times_makes_one_step_of_a_batch():
    recorded, callback = Recorded(), EMACallback(Constant(0.5), after_fit="live")
    fit(seeded(SeveralLosses, norm=False), callback, recorded, max_epochs=2)
    assert callback.average.num_steps == 2 * BATCHES
    for name, average in callback.average.named_tensors():
        torch.testing.assert_close(average.double(), averaged(recorded.states, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        {"detect_anomaly": True, "num_sanity_val_steps": -1, "gradient_clip_val": 0.1},
        {"profiler": "simple", "deterministic": True, "overfit_batches": 2},
        {"max_time": {"hours": 1}, "inference_mode": False, "use_distributed_sampler": False},
    ],
    ids=lambda flags: ", ".join(flags),
)
def test_flags_that_change_how_a_trainer_runs_change_nothing_between_it_and_the_average(flags):
    runs = {}
    for name, callbacks in {"without": [], "with": [EMACallback(Constant(0.5), after_fit="live")]}.items():
        recorded = Recorded()
        fit(seeded(), *callbacks, recorded, **flags)
        runs[name] = recorded.states
    assert all(equal(one, other) for one, other in zip(runs["without"], runs["with"], strict=True))
    for name, average in callbacks[0].average.named_tensors():
        if name in runs["with"][0]:
            torch.testing.assert_close(average.double(), averaged(runs["with"], name), rtol=1e-5, atol=1e-6)
