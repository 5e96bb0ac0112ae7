"""Promises 2 and 5: evaluations run on the average, files hold it, and before the first update both are live."""

from datetime import timedelta

import pytest
import torch
from helpers import BATCHES, Regression, clones, ema, engine, equal, fit, loader, seeded, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint

from lightning_ema import Constant, EMACallback

EMA_KEY = "EMACallback{'name': 'ema'}"


class Weights(Callback):
    """Which weights the module carries in each kind of evaluation."""

    def __init__(self):
        self.seen = {}

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.seen["sanity" if trainer.sanity_checking else "validate"] = clones(pl_module.state_dict())

    def on_test_batch_start(self, trainer, pl_module, *_):
        self.seen["test"] = clones(pl_module.state_dict())

    def on_predict_batch_start(self, trainer, pl_module, *_):
        self.seen["predict"] = clones(pl_module.state_dict())


class Reference(Callback):
    """The average, kept by hand: all of the state dict, one step at a time."""

    def __init__(self, decay):
        self.decay, self.average = decay, None

    def on_fit_start(self, trainer, pl_module):
        self.average = clones(pl_module.state_dict())

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        pass

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, live in pl_module.state_dict().items():
            if live.is_floating_point():
                self.average[name].lerp_(live, 1 - self.decay)
            else:
                self.average[name].copy_(live)


def close(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("after_fit", ["average", "live"])
def test_every_evaluation_sees_the_average(after_fit):
    reference, weights = Reference(0.9), Weights()
    module = seeded()
    this = fit(module, EMACallback(Constant(0.9), after_fit=after_fit), reference, weights)
    this.validate(module, loader(1), verbose=False)
    this.test(module, loader(1), verbose=False)
    this.predict(module, loader(1))
    for kind in ("validate", "test", "predict"):
        close(weights.seen[kind], reference.average)


def test_the_sanity_check_sees_the_live_weights():
    weights, module = Weights(), seeded()
    start = clones(module.state_dict())
    fit(module, ema(), weights)
    assert equal(weights.seen["sanity"], start)


@pytest.mark.parametrize(
    "callback", [{"start_step": 10**6}, {"start_epoch": 5}, {"every_n_steps": 100, "decay": Constant(0.9999)}]
)
def test_before_the_first_update_everything_is_live(callback, tmp_path):
    weights, module = Weights(), seeded()
    this = fit(module, ema(**callback), weights, ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
    live = clones(module.state_dict())
    assert equal(weights.seen["validate"], live)
    assert equal(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], live)
    this.test(module, loader(1), verbose=False)
    assert equal(weights.seen["test"], live)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize(
    "every", [{}, {"every_n_train_steps": 4}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}]
)
def test_the_best_file_scores_what_the_log_says(every, weights_only, precision, tmp_path):
    saving = ModelCheckpoint(tmp_path, monitor="val_loss", save_weights_only=weights_only, **every)
    module = seeded(norm=precision != "bf16-true")
    # the metric is logged before each save only where validation comes first
    run = {"val_check_interval": 2} if every.get("every_n_train_steps") else {}
    fit(module, ema(), saving, precision=precision, enable_checkpointing=True, **run)
    state = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
    best = Regression.load_from_checkpoint(saving.best_model_path)
    assert equal(best.state_dict(), state)
    if not every.get("every_n_train_steps"):
        (score,) = trainer(precision=precision).validate(best, loader(2), verbose=False)
        assert score["val_loss"] == saving.best_model_score.item()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("callbacks", [False, True])
@pytest.mark.parametrize("weights_only", [False, True])
def test_evaluating_a_file_gives_its_logged_score(fresh, callbacks, weights_only, tmp_path):
    saving = ModelCheckpoint(tmp_path, monitor="val_loss", save_weights_only=weights_only)
    module = seeded()
    this = fit(module, ema(), saving, enable_checkpointing=True)
    path = saving.best_model_path
    if fresh:
        this, module = trainer(*([ema()] if callbacks else [])), seeded()
    (score,) = this.validate(module, loader(2), ckpt_path=path, verbose=False)
    assert score["val_loss"] == saving.best_model_score.item()


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize(
    "when",
    [
        {"train_time_interval": timedelta(microseconds=1)},
        {"save_last": True, "monitor": "val_loss"},
        {"save_last": "link"},
        {"every_n_train_steps": 5, "save_top_k": -1},
        {"save_on_train_epoch_end": True},
        {"every_n_epochs": 2},
    ],
    ids=lambda when: next(iter(when)),
)
def test_every_file_holds_the_average_of_its_moment(when, weights_only, tmp_path):
    moments = {}

    class Remembers(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            moments[trainer.global_step] = clones(callback.average.named_tensors())

    callback = ema()
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_weights_only=weights_only, **when)
    fit(seeded(), callback, Remembers(), saving, enable_checkpointing=True)
    files = list(tmp_path.glob("*.ckpt"))
    assert files
    for path in files:
        file = torch.load(path, weights_only=True)
        expected = moments[file["global_step"]]
        assert equal({name: file["state_dict"][name] for name in expected}, expected), path


@pytest.mark.parametrize("entry_point", ["validate", "test"])
def test_the_trainers_own_best_file(entry_point, tmp_path):
    class Both(Regression):
        def test_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch))

    saving, module = ModelCheckpoint(tmp_path, monitor="val_loss"), seeded(Both)
    this = fit(module, ema(), saving, enable_checkpointing=True)
    (score,) = getattr(this, entry_point)(ckpt_path="best", dataloaders=loader(2), verbose=False)
    assert score["val_loss"] == saving.best_model_score.item()


HOOKS = [
    "on_train_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_end",
    "on_fit_end",
]


class Notes(Callback):
    """What other callbacks have been told of each validation."""

    def __init__(self):
        self.scores = []

    def on_validation_end(self, trainer, pl_module):
        self.scores.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_the_place_among_the_callbacks_does_not_matter(tmp_path):
    def run(place):
        notes, stops = Notes(), EarlyStopping("val_loss", min_delta=0.05, patience=1)
        saves = ModelCheckpoint(tmp_path / str(place), monitor="val_loss", save_top_k=-1, filename="{epoch}")
        callbacks = [notes, stops, saves]
        callbacks.insert(place, ema())
        fit(seeded(), *callbacks, max_epochs=8, enable_checkpointing=True)
        files = {path.name: torch.load(path, weights_only=True) for path in (tmp_path / str(place)).iterdir()}
        held = {name: (file["state_dict"], file["callbacks"][EMA_KEY]["live"]) for name, file in files.items()}
        return notes.scores, float(saves.best_model_score), held

    first, *others = (run(place) for place in range(4))
    assert 2 <= len(first[2]) < 8  # early stopping has stopped by the average's score
    for scores, best, files in others:
        assert (scores, best, files.keys()) == (*first[:2], first[2].keys())
        for name, (average, live) in files.items():
            assert equal(average, first[2][name][0]) and equal(live, first[2][name][1])


class SavesIn(Callback):
    def __init__(self, hook, path, weights_only):
        setattr(self, hook, lambda trainer, pl_module, *_: self.save(trainer, pl_module))
        self.path, self.weights_only, self.live, self.expected = path, weights_only, None, None

    def save(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        trainer.save_checkpoint(self.path, self.weights_only)
        (average,) = [c.average for c in trainer.callbacks if isinstance(c, EMACallback)]
        self.live, self.expected = clones(engine(average).named_live()), clones(average.named_tensors())
        self.updates = average.num_updates
        assert average.num_steps == trainer.global_step, "a step was not taken up before the save"


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_save_from_any_hook_holds_the_average_and_the_live_weights(hook, weights_only, first, tmp_path):
    saver, callback = SavesIn(hook, tmp_path / "x.ckpt", weights_only), ema()
    fit(seeded(), *([saver, callback] if first else [callback, saver]))
    file = torch.load(tmp_path / "x.ckpt", weights_only=True)
    state = {name: file["state_dict"][name] for name in saver.expected}
    assert equal(state, saver.expected if saver.updates else saver.live)
    if not weights_only and saver.updates:
        assert equal(file["callbacks"][callback.state_key]["live"], saver.live)
        assert not equal(saver.live, saver.expected)
    if hook not in ("on_train_start", "on_train_batch_start"):
        assert saver.updates > 0


@pytest.mark.parametrize("after_fit", ["average", "live"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_save_after_fit_holds_the_average(after_fit, weights_only, tmp_path):
    callback, module = ema(after_fit=after_fit), seeded()
    this = fit(module, callback)
    this.save_checkpoint(tmp_path / "x.ckpt", weights_only)
    file = torch.load(tmp_path / "x.ckpt", weights_only=True)
    average = clones(callback.average.named_tensors())
    assert equal({name: file["state_dict"][name] for name in average}, average)
    if not weights_only:
        assert equal(file["callbacks"][callback.state_key]["live"], engine(callback.average).named_live())


def test_an_exception_leaves_live_weights_and_a_file_of_the_average(tmp_path):
    class Fails(Regression):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking and self.current_epoch == 1:
                raise ZeroDivisionError
            super().validation_step(batch, batch_idx)

    callback, module = ema(), seeded(Fails)
    with pytest.raises(ZeroDivisionError):
        fit(module, callback, OnExceptionCheckpoint(tmp_path), enable_checkpointing=True, default_root_dir=tmp_path)
    live, average = clones(engine(callback.average).named_live()), clones(callback.average.named_tensors())
    assert not equal(live, average)
    assert equal({name: module.state_dict()[name] for name in live}, live)
    file = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert equal({name: file["state_dict"][name] for name in average}, average)
    assert equal(file["callbacks"][callback.state_key]["live"], live)


@pytest.mark.parametrize("weights_only", [False, True])
def test_weights_that_lie_in_a_users_flat_buffer(weights_only, tmp_path):
    module, callback = seeded(norm=False), ema()
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])
    offset = 0
    for p in module.parameters():
        p.data = flat[offset : offset + p.numel()].view_as(p)
        offset += p.numel()
    saver = SavesIn("on_train_batch_end", tmp_path / "x.ckpt", weights_only)
    fit(module, callback, saver)
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert equal(state, saver.expected)
    assert not equal(saver.expected, saver.live)


def test_a_save_of_another_module_does_not_hold_this_average(tmp_path):
    callback, other = ema(), seeded()
    fit(seeded(), callback)
    this = trainer(callback)
    this.validate(other, loader(1), verbose=False)
    this.save_checkpoint(tmp_path / "x.ckpt")
    file = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert callback.state_key not in file["callbacks"]
    assert equal(file["state_dict"], other.state_dict())


def test_the_file_is_an_ordinary_checkpoint_of_the_usual_keys(tmp_path):
    keys = []
    for callbacks in ([], [ema()]):
        module = seeded()
        fit(module, *callbacks).save_checkpoint(tmp_path / "x.ckpt")
        keys.append(list(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]))
    assert keys[0] == keys[1]


def test_the_file_grows_by_the_averaged_tensors_only(tmp_path):
    class HalfFrozen(Regression):
        def __init__(self):
            super().__init__(norm=False)
            self.frozen = torch.nn.Linear(300, 300).requires_grad_(False)

    sizes = []
    for callbacks in ([], [ema()]):
        fit(seeded(HalfFrozen), *callbacks).save_checkpoint(tmp_path / "x.ckpt")
        sizes.append((tmp_path / "x.ckpt").stat().st_size)
    averaged = 4 * (4 * 8 + 8 + 8 + 1)
    assert averaged < sizes[1] - sizes[0] < averaged + 4096  # names and zip records; the frozen layer is 361 kB


def test_after_fit_the_module_holds_the_average_in_its_own_storage():
    callback, module = ema(), seeded()
    pointers = [p.data_ptr() for p in module.parameters()]
    fit(module, callback)
    assert [p.data_ptr() for p in module.parameters()] == pointers
    assert equal(
        {name: module.state_dict()[name] for name, _ in callback.average.named_tensors()},
        callback.average.named_tensors(),
    )
    assert callback.average.num_updates == 2 * BATCHES
