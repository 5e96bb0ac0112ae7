"""While a file is written everybody sees the weights that it holds; before and after it the live ones."""

import copy
import pickle

import pytest
import torch
from helpers import BATCHES, Regression, TwoOptimizers, clones, ema, equal, fit, seeded, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_ema import Constant, EMACallback, Select


class Sees(Callback):
    """Writes down, as scvi-tools' and transformers' callbacks do, what the module holds while a file is written."""

    def __init__(self):
        self.seen = []

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.seen.append(clones(pl_module.state_dict()))


class SavesModule(ModelCheckpoint):
    """Writes the module itself beside its file."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.seen = [*getattr(self, "seen", []), clones(pl_module.state_dict())]


class SeesItself(Regression):
    def on_save_checkpoint(self, checkpoint):
        self.seen = [*getattr(self, "seen", []), clones(self.state_dict())]


SETTINGS = {
    "average": {},
    "live": {"evaluate": "live"},
    "both": {"evaluate": "both"},
    "all": {"decay": [Constant(0.9), Constant(0.5)], "evaluate": "all"},
    "selected": {"decay": [Constant(0.9), Constant(0.5)], "evaluate": Select("val_loss")},
    "recalibrated": {"buffers": "recalibrate"},
    "double": {"dtype": torch.float64},
    "before the start": {"start_step": 1000},
}


class Recalibrates(SeesItself):
    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("case", SETTINGS)
def test_every_hook_sees_what_the_file_holds(case, order, weights_only, tmp_path):
    kept = SavesModule(tmp_path, filename="file", save_weights_only=weights_only)
    before, behind, module = Sees(), Sees(), seeded(Recalibrates)
    callback = EMACallback(**{"decay": Constant(0.9), **SETTINGS[case]})
    fit(module, *[before, callback, behind][::order], kept, enable_checkpointing=True, max_epochs=1)
    file = torch.load(tmp_path / "file.ckpt", weights_only=True)
    seen = [*before.seen, *behind.seen, *getattr(kept, "seen", []), *module.seen]
    assert len(seen) == (1 if weights_only else 4)  # of a weights-only file Lightning tells the module alone
    assert all(equal(each, file["state_dict"]) for each in seen)


WHEN = [
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_epoch_end",
    "on_validation_end",
]


@pytest.mark.parametrize("evaluate", ["average", "both", "live"])
@pytest.mark.parametrize("make", [SeesItself, TwoOptimizers])
def test_a_save_in_any_hook_leaves_the_training_as_it_was(make, evaluate, tmp_path):
    def save(trainer, pl_module, *rest):
        trainer.save_checkpoint(tmp_path / "any.ckpt")

    plain, beside, saves, sees = seeded(make), seeded(make), Callback(), Sees()
    for hook in [*WHEN, "on_before_zero_grad", "on_after_backward", "on_before_optimizer_step"]:
        setattr(saves, hook, save)
    fit(plain)
    fit(beside, saves, ema(evaluate=evaluate, after_fit="live"), sees)
    assert equal(plain.named_parameters(), beside.named_parameters())
    assert len(sees.seen) > 6 * BATCHES


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after_fit", ["average", "live"])
def test_what_is_raised_meanwhile_leaves_the_live_weights(error, after_fit, tmp_path):
    class Raises(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            raise error

    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            before = clones(pl_module.state_dict())
            with pytest.raises(error):
                trainer.save_checkpoint(tmp_path / "never.ckpt")
            assert equal(before, pl_module.state_dict())

    fit(seeded(), ema(after_fit=after_fit), Raises(), Saves())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after_fit", ["average", "live"])
def test_a_save_after_the_fit_is_alike(after_fit, tmp_path):
    sees, module = Sees(), seeded(SeesItself)
    this = fit(module, sees, ema(decay=Constant(0.9), after_fit=after_fit))
    held = clones(module.state_dict())
    this.save_checkpoint(tmp_path / "after.ckpt")
    file = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    assert equal(sees.seen[-1], file) and equal(module.seen[-1], file)
    assert equal(module.state_dict(), held) and equal(held, file) == (after_fit == "average")


def test_of_two_callbacks_over_different_parts_the_file_holds_both(tmp_path):
    parts = [ema(include=[f"net.{n}.*"], name=str(n), decay=Constant(0.9), after_fit="live") for n in (0, 4)]
    sees, module = Sees(), seeded(norm=False)
    this = fit(module, parts[0], sees, parts[1])
    this.save_checkpoint(tmp_path / "parts.ckpt")
    averages = {name: tensor for part in parts for name, tensor in part.average.named_tensors()}
    assert equal(sees.seen[-1], averages)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_a_copied_trainer_has_a_save_of_its_own(copied, tmp_path):
    module = seeded()
    this = fit(module, ema(decay=Constant(0.9), after_fit="live"))
    other = copied(this)
    other.save_checkpoint(tmp_path / "other.ckpt")
    assert other.save_checkpoint.__self__ is other
    this.save_checkpoint(tmp_path / "this.ckpt")
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("this.ckpt", "other.ckpt"))
    assert equal(first["state_dict"], second["state_dict"])


def test_callbacks_made_anew_for_each_fit_leave_one_hook():
    module = seeded()
    this = trainer(ema(name="first"), max_epochs=1)
    left = []
    for name in ("a", "b", "c"):
        this.callbacks = [ema(name=name)]
        this.fit_loop.max_epochs += 1
        fit(module, ema(name=name), max_epochs=1)
        left.append(sorted(key for key in vars(module) if "checkpoint" in key))
        hook, depth = vars(module)["on_save_checkpoint"], 0
        while hook is not None:
            hook, depth = getattr(hook, "_own", None), depth + 1
        assert depth == 1
    assert left[0] == left[1] == left[2]


class Between(Regression):
    """Saves between its forward and its backward pass."""

    def forward(self, x):
        return self.net(x)

    def on_before_backward(self, loss):
        if self.global_step in (3, 8):
            self.trainer.save_checkpoint(self.path)


class SharedWeights(Between):
    """Whose parameters are views of one buffer, so that contents change places in a swap."""

    def __init__(self):
        super().__init__()
        layer = self.net[0]
        flat = torch.cat([layer.weight.detach().flatten(), layer.bias.detach()])
        layer.weight, layer.bias = nn.Parameter(flat[:32].view(8, 4)), nn.Parameter(flat[32:])


@pytest.mark.parametrize("buffers", ["average", "copy", "recalibrate"])
@pytest.mark.parametrize("make", [Between, SharedWeights])
def test_a_save_between_forward_and_backward_changes_no_gradient(make, buffers, tmp_path):
    modules = [seeded(make), seeded(make)]
    for module, callbacks in zip(modules, ([], [ema(buffers=buffers, after_fit="live")]), strict=True):
        module.path = tmp_path / f"{len(callbacks)}.ckpt"
        fit(module, *callbacks)
    assert equal(*(module.state_dict() for module in modules))


class Reads(Callback):
    """Reads the average in one hook, before its callback had its turn."""

    def __init__(self, hook, callback, read):
        self.values = []

        def look(trainer, pl_module, *rest):
            average = callback.average
            if average is not None and trainer.training:
                self.values.append((trainer.global_step, read(average)))

        setattr(self, hook, look)


def inside(average):
    with average.swapped():
        return average.num_steps


READ = {
    "num_steps": lambda average: average.num_steps,
    "num_updates": lambda average: average.num_updates,
    "state_dict": lambda average: average.state_dict()["num_steps"],
    "report": lambda average: int(average.report().split()[0]),
    "swapped": inside,
}


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_before_zero_grad", "on_train_epoch_end"])
def test_reading_takes_up_the_steps_that_were_taken(hook, read):
    callback = ema()
    reads = Reads(hook, callback, READ[read])
    fit(seeded(), reads, callback)
    assert reads.values and all(steps == value for steps, value in reads.values)


def test_what_is_read_is_the_average_of_all_steps():
    first, second = ema(decay=Constant(0.5), name="a"), ema(decay=Constant(0.5), name="b", evaluate="live")
    values = lambda average: clones(average.named_tensors())  # noqa: E731
    early, late = Reads("on_train_batch_end", first, values), Reads("on_train_batch_end", second, values)
    fit(seeded(), early, first, second, late)
    assert len(early.values) == 2 * BATCHES
    assert all(equal(a[1], b[1]) for a, b in zip(early.values, late.values, strict=True))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("where", ["on_validation_start", "on_validation_epoch_start", "on_validation_end"])
def test_a_swap_of_ones_own_in_a_validation_hook_is_no_error(where, order):
    callback, seen = ema(decay=Constant(0.9), after_fit="live"), []

    def score(trainer, pl_module):
        with callback.average.swapped():
            seen.append((clones(pl_module.named_parameters()), clones(callback.average.named_tensors())))

    own = Callback()
    setattr(own, where, score)
    fit(seeded(norm=False), *[own, callback][::order])
    assert len(seen) == 3  # the sanity check too
    assert all(equal(carried, average) for carried, average in seen)


@pytest.mark.parametrize("evaluate", ["both", "all"])
@pytest.mark.parametrize("where", ["validation_step", "on_validation_epoch_end", "on_validation_model_eval"])
def test_the_trainer_can_be_copied_in_an_evaluation(where, evaluate):
    class Copies(Regression):
        pass

    def copies(self, *args):
        copy.deepcopy(self.trainer)
        return getattr(super(Copies, self), where)(*args)

    setattr(Copies, where, copies)
    this = fit(seeded(Copies), ema(evaluate=evaluate), max_epochs=1)
    assert "val_loss_live" in this.callback_metrics or where != "validation_step"


@pytest.mark.parametrize("evaluate", ["both", "all", "average", "live"])
def test_weights_loaded_after_a_fit_are_evaluated_as_they_are(evaluate):
    module, other = seeded(), seeded()
    this = fit(module, ema(evaluate=evaluate))
    module.load_state_dict(other.state_dict())
    (scores,) = this.validate(module, this.val_dataloaders, verbose=False)
    (expected,) = trainer().validate(other, this.val_dataloaders, verbose=False)
    assert scores["val_loss"] == expected["val_loss"]


@pytest.mark.parametrize("evaluate", ["both", "all"])
def test_the_score_of_the_live_weights_is_there_in_the_sanity_check(evaluate):
    class Keeps(Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            self.metrics = dict(trainer.callback_metrics)

    keeps = Keeps()
    fit(seeded(), keeps, ema(evaluate=evaluate))
    assert keeps.metrics["val_loss_live"] == keeps.metrics["val_loss"]
