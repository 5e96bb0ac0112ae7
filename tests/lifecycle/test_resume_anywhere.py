"""Promise 3, from every point at which Lightning can save: the resumed run ends where the uninterrupted one does."""

import warnings
from functools import cache

import lightning
import pytest
import torch
from helpers import (
    BATCHES,
    EMAWeightAveraging,
    Regression,
    TwoOptimizers,
    clones,
    ema,
    engine,
    equal,
    fit,
    loader,
    needs_weight_averaging,
    seed_everything,
    seeded,
    trainer,
    widest,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, OnExceptionCheckpoint
from packaging.version import Version
from torch.utils.data import DataLoader, TensorDataset

from lightning_ema import (
    Annealing,
    Bema,
    Constant,
    Cosine,
    Debiased,
    EMACallback,
    Equal,
    ExponentialAnnealing,
    HalfLife,
    InversePower,
    Power,
    Scaled,
    SwitchEMA,
    Then,
)
from lightning_ema.checkpoint.entry import list_tensors, seal

EPOCHS = 4


class Resumable(DataLoader):
    """A loader without shuffling that goes on at the batch where it was saved, as Lightning asks of resumable ones."""

    def __init__(self):
        super().__init__(loader().dataset, batch_size=8)
        self.position = 0

    def __iter__(self):
        start, self.position = self.position, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.position = (index + 1) % BATCHES
                yield batch

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Saves(Callback):
    """Saves once, in one hook; before or after ours."""

    def __init__(self, hook, path, at):
        self.count, self.at, self.path = 0, at, path
        setattr(self, hook, self.save)

    def save(self, trainer, *_):
        if not trainer.sanity_checking:
            self.count += 1
            if self.count == self.at:
                trainer.save_checkpoint(self.path)


class Final(Callback):
    def on_train_end(self, trainer, pl_module):
        (self.callback,) = [c for c in trainer.callbacks if isinstance(c, EMACallback)]
        average = self.callback.average
        self.live, self.average = clones(engine(average).named_live()), clones(average.named_tensors())
        self.counters = {k: v for k, v in average.state_dict().items() if isinstance(v, (int, bool))}
        self.integers = {k: v.clone() for k, v in pl_module.state_dict().items() if not v.is_floating_point()}
        self.optimizers = [clones(s) for o in trainer.optimizers for s in o.state_dict()["state"].values()]


def run(module, callbacks, ckpt_path=None, epochs=EPOCHS, **settings):
    seed_everything(3, verbose=False)
    final = Final()
    this = trainer(*callbacks, final, max_epochs=epochs, **settings)
    this.fit(module, Resumable(), loader(2), ckpt_path=ckpt_path)
    return final


def assert_same_end(first, second):
    assert equal(first.live, second.live)
    assert equal(first.average, second.average)
    assert equal(first.integers, second.integers)
    assert first.counters == second.counters
    assert len(first.optimizers) == len(second.optimizers) > 0
    assert all(equal(a, b) for a, b in zip(first.optimizers, second.optimizers, strict=True))


SCHEDULES = [
    Equal(),
    Power(sigma_rel=0.1),
    Debiased(0.9),
    ExponentialAnnealing(0.99, gamma=5),
    Annealing(0.99, gamma=3),
    ExponentialAnnealing(0.99, gamma=5, offset=1),
    InversePower(0.99),
    HalfLife(epochs=0.5),
    Cosine(0.5, 1.0),
    Then(0.0, at=1, second=0.9),
    Then(0.5, at=7, second=Cosine(0.9, 1.0)),
    Scaled(0.99, batch_factor=3),
]
POINTS = {
    "epoch end": ("on_train_epoch_end", 2, {}),
    "mid epoch": ("on_train_batch_end", 9, {}),
    "validation end": ("on_validation_end", 2, {}),
    "validation end in mid epoch": ("on_validation_end", 3, {"val_check_interval": 2}),
    "end of training": ("on_train_end", 1, {}),  # of two epochs
}
SETTINGS = {
    "plain": ({}, {}),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}),
    "accumulation": ({}, {"accumulate_grad_batches": 3}),
    "interval": ({"every_n_steps": 5, "decay": Constant(0.99)}, {}),
    "delayed": ({"start_step": 7}, {}),
    "copied buffers": ({"buffers": "copy"}, {}),
    "several": ({"decay": [0.9, Equal()]}, {}),
    "corrected": ({"decay": Bema()}, {}),
    "switched each epoch": ({}, {}),
    "switched at steps": ({}, {}),
    "switched, only followed": ({"evaluate": "live"}, {}),
    **{f"{type(s).__name__} decay": ({"decay": s}, {}) for s in SCHEDULES},
}


SWITCHES = {"switched each epoch": "epoch", "switched at steps": 3, "switched, only followed": 9}


def ours(setting):
    switches = [SwitchEMA(every=SWITCHES[setting])] if setting in SWITCHES else []
    return [EMACallback(**{"decay": 0.9, **SETTINGS[setting][0]}), *switches]


def same_file(first, second):
    """Whether two checkpoints hold the same, bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_file(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_file, first, second))
    return first == second


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Runs a setting once to its end, with saves at all points that such a run passes; gives the end and the files."""

    @cache
    def run_once(setting, place, at):
        points = [point for point, values in POINTS.items() if values[2:] == POINTS[at][2:]]
        folder = tmp_path_factory.mktemp("whole")
        savers = {point: Saves(POINTS[point][0], folder / f"{point}.ckpt", POINTS[point][1]) for point in points}
        callbacks = [*savers.values()]
        callbacks = [*ours(setting), *callbacks] if place == "after ours" else [*callbacks, *ours(setting)]
        epochs = 2 if at == "end of training" else EPOCHS
        end = run(seeded(), callbacks, epochs=epochs, **POINTS[at][2], **SETTINGS[setting][1])
        assert all(saver.count >= saver.at for saver in savers.values())
        return end, {point: saver.path for point, saver in savers.items()}

    return run_once


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("point", "setting"),
    [
        pytest.param(point, setting, marks=widest(point == "mid epoch" or setting in ("plain", "switched at steps")))
        for point in POINTS
        for setting in SETTINGS
        if point == "mid epoch" or "decay" not in setting
    ],
)
def test_automatic_optimization(point, setting, uninterrupted):
    if (point, setting) == ("mid epoch", "accumulation") and Version(lightning.__version__) < Version("2.5"):
        pytest.skip("Lightning 2.4 itself, without any callback, does not resume exactly inside an accumulation")
    (whole, before), (other, after) = (uninterrupted(setting, place, point) for place in ("before ours", "after ours"))
    assert_same_end(whole, other)
    files = [before[point], after[point]]
    if same_file(*(torch.load(file, weights_only=True) for file in files)):
        files = files[:1]  # else a switch of weights lies between them
    if point == "end of training":
        whole, _ = uninterrupted(setting, "before ours", "mid epoch")
    for file in files:
        again = run(seeded(), ours(setting), ckpt_path=file, **POINTS[point][2], **SETTINGS[setting][1])
        assert_same_end(whole, again)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("point", ["epoch end", "mid epoch", "validation end"])
def test_manual_optimization_with_two_optimizers(point, tmp_path):
    hook, at, settings = POINTS[point]
    whole = run(seeded(TwoOptimizers), [ema(), Saves(hook, tmp_path / "x.ckpt", at)], **settings)
    assert_same_end(whole, run(seeded(TwoOptimizers), [ema()], ckpt_path=tmp_path / "x.ckpt", **settings))


@pytest.mark.filterwarnings("ignore")
def test_inside_a_validation(tmp_path):
    saver = Saves("on_validation_batch_end", tmp_path / "x.ckpt", 3)
    whole = run(seeded(), [ema(), saver])
    again = run(seeded(), [ema()], ckpt_path=tmp_path / "x.ckpt")
    assert_same_end(whole, again)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_epoch_end", "on_validation_end"])
def test_after_an_exception(hook, tmp_path):
    class Fails(Callback):
        def fail(self, trainer, *_):
            if trainer.current_epoch == 1 and not trainer.sanity_checking:
                raise ZeroDivisionError

    setattr(Fails, hook, Fails.fail)
    whole = run(seeded(), [ema()])
    saving = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    with pytest.raises(ZeroDivisionError):
        run(seeded(), [ema(), Fails(), OnExceptionCheckpoint(tmp_path)], **saving)
    assert_same_end(whole, run(seeded(), [ema()], ckpt_path=tmp_path / "on_exception.ckpt"))


@pytest.mark.filterwarnings("ignore")
def test_the_file_of_an_exception_in_mid_epoch_holds_the_steps_taken(tmp_path):
    class Fails(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 3:
                raise ZeroDivisionError

    saving = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    with pytest.raises(ZeroDivisionError):
        run(seeded(), [ema(), Fails(), OnExceptionCheckpoint(tmp_path)], **saving)
    file = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    (entry,) = [state for key, state in file["callbacks"].items() if key.startswith("EMACallback")]
    assert entry["num_steps"] == entry["num_updates"] == BATCHES + 3
    run(seeded(), [ema()], ckpt_path=tmp_path / "on_exception.ckpt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("after_fit", ["average", "live"])
def test_after_fit(after_fit, tmp_path):
    whole = run(seeded(), [ema()])
    callback, module = ema(after_fit=after_fit), seeded()
    seed_everything(3, verbose=False)
    this = trainer(callback, max_epochs=2)
    this.fit(module, Resumable(), loader(2))
    this.save_checkpoint(tmp_path / "x.ckpt")
    assert_same_end(whole, run(seeded(), [ema()], ckpt_path=tmp_path / "x.ckpt"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved_in_epoch", [0, 1, 2])
def test_layers_unfrozen_before_or_after_the_point_of_resuming(saved_in_epoch, tmp_path):
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)

        def on_fit_start(self, trainer, pl_module):
            super().on_fit_start(trainer, pl_module)
            if any(p is pl_module.net[0].weight for g in trainer.optimizers[0].param_groups for p in g["params"]):
                pl_module.net[0].requires_grad_(True)  # Lightning restores the groups, but not what was unfrozen

    class TrainsHead(Regression):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05, momentum=0.9)

    def callbacks():
        return [ema(), Unfreeze()]

    saver = Saves("on_train_epoch_end", tmp_path / "x.ckpt", saved_in_epoch + 1)
    whole = run(seeded(TrainsHead, norm=False), [*callbacks(), saver])
    assert "net.0.weight" in whole.average
    assert_same_end(whole, run(seeded(TrainsHead, norm=False), callbacks(), ckpt_path=tmp_path / "x.ckpt"))


def sealed(change):
    """A change of which the checksums know."""

    def changed(entry):
        change(entry)
        list_tensors(entry, "live"), seal(entry)

    return changed


class TestTheFile:
    def written(self, tmp_path, **arguments):
        callback = ema(**arguments)
        fit(seeded(), callback).save_checkpoint(tmp_path / "x.ckpt")
        return torch.load(tmp_path / "x.ckpt", weights_only=True), callback.state_key

    @pytest.mark.parametrize(
        "settings", [{}, {"start_epoch": 1}, {"start_epoch": 9}, {"decay": [0.9, Equal()]}, {"every_n_steps": 3}]
    )
    @pytest.mark.filterwarnings("ignore:every_n_steps", "ignore:.*longer than the whole run")
    def test_the_same_settings_are_no_change(self, settings, tmp_path):
        arguments = {"decay": 0.9, **settings}
        fit(seeded(), EMACallback(**arguments)).save_checkpoint(tmp_path / "x.ckpt")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fit(seeded(), EMACallback(**arguments), max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
        assert not [str(w.message) for w in told if "other settings" in str(w.message)]

    def test_changed_settings_are_said_once_and_hold(self, tmp_path):
        self.written(tmp_path)
        callback = ema(decay=0.99, every_n_steps=2, name="ema")
        with pytest.warns(
            UserWarning, match=r"decay: Warmup\(0.9\) in the file, Warmup\(0.99\) now; every_n_steps: 1 in"
        ):
            trainer(callback, max_epochs=3).fit(seeded(), loader(), loader(1), ckpt_path=tmp_path / "x.ckpt")
        assert callback.average.num_steps == 3 * BATCHES
        assert callback.average.num_updates == 2 * BATCHES + BATCHES // 2

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(("then", "now"), [("average", "copy"), ("copy", "average")])
    def test_another_policy_for_buffers_holds_from_here_on(self, then, now, tmp_path):
        self.written(tmp_path, buffers=then)
        callback = ema(buffers=now)
        fit(seeded(), callback, max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
        assert ("net.1.running_mean" in dict(callback.average.named_tensors())) == (now == "average")

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda entry: entry.update(format=7), "format 7; this version"),
            (lambda entry: entry.update(format=1), "format 1, which versions before the first release wrote"),
            (lambda entry: entry.pop("num_updates"), r"\n  num_updates is missing; accepted is"),
            (
                sealed(lambda entry: entry["names"].remove("net.0.weight")),
                "does not fit Regression:\n  net.0.weight: not in the state\nGive the module the tensors that it had",
            ),
            (
                sealed(lambda entry: entry["live"].update({"net.0.weight": torch.zeros(1)})),
                r"does not fit Regression:\n  net.0.weight: shape \(1,\) in the state, \(8, 4\) in the module",
            ),
            (
                sealed(lambda entry: entry["names"].append("other.weight")),
                r"does not fit Regression:\n  other.weight: not in the state\n  other.weight: not in the module",
            ),
        ],
        ids=["newer", "older", "missing counter", "missing tensor", "misshapen", "unknown tensor"],
    )
    def test_a_damaged_or_foreign_entry_is_refused_before_anything_is_trained(self, damage, message, tmp_path):
        file, key = self.written(tmp_path)
        damage(file["callbacks"][key])
        torch.save(file, tmp_path / "y.ckpt")
        callback = ema()
        with pytest.raises(ValueError, match=message):
            fit(seeded(), callback, max_epochs=3, ckpt_path=tmp_path / "y.ckpt")
        assert callback.average is None or callback.average.num_steps == 0

    @needs_weight_averaging
    @pytest.mark.filterwarnings("ignore")
    def test_files_of_lightnings_own_callback_are_gone_on_from(self, tmp_path):
        module = seeded()
        fit(module, EMAWeightAveraging(decay=0.9), Saves("on_train_epoch_end", tmp_path / "theirs.ckpt", 2))
        file = torch.load(tmp_path / "theirs.ckpt", weights_only=True)
        callback, seen = ema(), {}

        class First(Callback):
            def on_train_start(self, trainer, pl_module):
                seen["live"] = clones(pl_module.state_dict())
                seen["average"] = clones(callback.average.named_tensors())
                seen["updates"] = callback.average.num_updates

        fit(seeded(), callback, First(), max_epochs=3, ckpt_path=tmp_path / "theirs.ckpt")
        assert equal(seen["live"], file["current_model_state"])
        assert equal(seen["average"], {name: file["state_dict"][name] for name in seen["average"]})
        assert not equal(seen["average"], {name: seen["live"][name] for name in seen["average"]})
        assert seen["updates"] == 2 * BATCHES
        assert callback.average.num_updates == 3 * BATCHES

    def test_saving_needs_no_second_copy(self, count_allocations, tmp_path):
        module, callback = seeded(), ema()
        module.big = torch.nn.Linear(2000, 800)
        this = fit(module, callback)
        with count_allocations() as allocated:
            checkpoint = this._checkpoint_connector.dump_checkpoint(weights_only=False)
        assert allocated.peak < 0.1 * 4 * 2000 * 800
        assert callback.state_key in checkpoint["callbacks"]


class TestAFileIsTestedAfterFit:
    @pytest.fixture
    def files(self, tmp_path):
        fit(seeded(lr=0.001), ema()).save_checkpoint(tmp_path / "older.ckpt")
        this = fit(seeded(lr=0.001), ema())
        this.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
        return tmp_path

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("entry_point", ["validate", "test", "predict"])
    @pytest.mark.parametrize("name", ["older.ckpt", "weights.ckpt"])
    @pytest.mark.parametrize("after_fit", ["average", "live"])
    def test_it_is_what_is_evaluated_and_no_state_is_harmed(self, files, name, after_fit, entry_point):
        callback, module = ema(after_fit=after_fit), seeded()
        this = fit(module, callback)
        live, average = clones(engine(callback.average).named_live()), clones(callback.average.named_tensors())
        everything = clones(module.state_dict())
        for _ in range(2):
            kwargs = {} if entry_point == "predict" else {"verbose": False}
            getattr(this, entry_point)(module, loader(1), ckpt_path=files / name, **kwargs)
            assert equal(module.state_dict(), torch.load(files / name, weights_only=True)["state_dict"])
            assert equal(callback.average.named_tensors(), average)
        this.save_checkpoint(files / "after.ckpt")
        seen = {}

        class First(Callback):
            def on_train_start(self, trainer, pl_module):
                seen["live"] = clones(pl_module.state_dict())
                seen["average"] = clones(callback.average.named_tensors())

        fit(module, callback, First())
        assert equal({name: seen["live"][name] for name in live}, live)
        assert equal(seen["average"], average)
        if after_fit == "live":
            assert equal(seen["live"], everything)
        assert callback.average.num_updates == 4 * BATCHES
        resumed = ema()
        fit(seeded(), resumed, First(), max_epochs=3, ckpt_path=files / "after.ckpt")
        assert resumed.average.num_updates == 3 * BATCHES

    @pytest.mark.filterwarnings("ignore")
    def test_weights_loaded_by_the_user_after_that_count(self, files, caplog):
        callback, module = ema(), seeded()
        this = fit(module, callback)
        this.test(module, loader(1), ckpt_path=files / "older.ckpt", verbose=False)
        mine = seeded(lr=0.3).state_dict()
        module.load_state_dict(mine)
        seen = {}

        class First(Callback):
            def on_train_start(self, trainer, pl_module):
                seen.update(clones(pl_module.state_dict()))

        with caplog.at_level("INFO"):
            fit(module, callback, First())
        assert equal(seen, mine)
        assert "changed since the end of training" in caplog.text


def test_one_callback_over_folds_models_and_trainers():
    callback, expected = ema(), []
    for fold in range(3):
        fresh, module = ema(), seeded(lr=0.01 * (fold + 1))
        fit(module, fresh)
        expected.append(clones(fresh.average.named_tensors()))
    for fold in range(3):
        fit(seeded(lr=0.01 * (fold + 1)), callback)
        assert equal(callback.average.named_tensors(), expected[fold])


def test_two_trainers_in_turn_do_not_mix():
    first, second = ema(), ema()
    one, two = seeded(), seeded(lr=0.01)
    fit(one, first)
    kept = clones(first.average.named_tensors())
    fit(two, second)
    assert equal(first.average.named_tensors(), kept)
    assert first.average.num_steps == second.average.num_steps == 2 * BATCHES


def test_an_unrelated_dataset_helper_is_what_it_says():
    data = Resumable()
    assert isinstance(data.dataset, TensorDataset)
    data.load_state_dict({"position": 4})
    assert len(list(data)) == 2
    assert len(list(data)) == BATCHES
