"""The hooks: what counts as a step, what joins, what is logged, what is refused."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import (
    BATCHES,
    EMAWeightAveraging,
    Regression,
    clones,
    ema,
    engine,
    equal,
    fit,
    loader,
    needs_weight_averaging,
    schedule_of,
    seeded,
    settings_of,
    trainer,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_ema import Constant, Cosine, EMACallback, HalfLife, Warmup
from lightning_ema.averaging.tracker import Tracker
from lightning_ema.callback.ema_callback import EMACallback as Implementation


class Manual(Regression):
    """Manual optimization; ``steps`` says how often each optimizer steps in a batch."""

    def __init__(self, steps=(1,), raw=False):
        super().__init__(norm=False)
        self.automatic_optimization = False
        self.steps, self.raw = steps, raw

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer, steps in zip(optimizers, self.steps, strict=True):
            for _ in range(steps):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                (optimizer.optimizer if self.raw else optimizer).step()

    def configure_optimizers(self):
        parts = [self.net[0].parameters(), self.net[4].parameters()]
        if len(self.steps) == 1:
            return torch.optim.SGD(self.parameters(), 0.01)
        return [torch.optim.SGD(part, 0.01) for part in parts]


class TestSteps:
    @pytest.mark.parametrize("raw", [False, True])
    @pytest.mark.parametrize(("steps", "expected"), [((1,), 1), ((10,), 10), ((1, 1), 1), ((1, 5), 5), ((0, 3), 3)])
    def test_a_batch_counts_as_the_most_steps_of_any_optimizer(self, steps, expected, raw):
        callback = ema()
        fit(seeded(Manual, steps=steps, raw=raw), callback, max_epochs=1)
        assert callback.average.num_steps == expected * BATCHES

    @pytest.mark.parametrize("accumulated", [1, 2, 4])
    def test_accumulated_batches_are_one_step(self, accumulated):
        callback = ema()
        this = fit(seeded(), callback, accumulate_grad_batches=accumulated)
        assert callback.average.num_steps == callback.average.num_updates == this.global_step

    def test_ten_steps_in_a_batch_keep_the_product_of_ten_decays(self):
        callback, module = EMACallback(Constant(0.9)), seeded(Manual, steps=(10,))
        start = clones(module.state_dict())
        fit(module, callback, max_epochs=1, limit_train_batches=1)
        average, live = dict(callback.average.named_tensors()), dict(engine(callback.average).named_live())
        for name in average:
            expected = 0.9**10 * start[name] + (1 - 0.9**10) * live[name]
            torch.testing.assert_close(average[name], expected, rtol=1e-5, atol=1e-6)

    def test_a_batch_that_is_skipped_still_steps_in_float32(self):
        class Skips(Regression):
            def training_step(self, batch, batch_idx):
                return None if batch_idx % 2 else super().training_step(batch, batch_idx)

        callback = ema()
        this = fit(seeded(Skips), callback, max_epochs=1)
        assert callback.average.num_steps == this.global_step == BATCHES

    def test_an_optimizer_of_something_else_does_not_count(self):
        class Other(Manual):
            def __init__(self):
                super().__init__(steps=(1, 3))
                self.other = nn.Linear(1, 1)

            def configure_optimizers(self):
                return [torch.optim.SGD(self.net.parameters(), 0.01), torch.optim.SGD(self.other.parameters(), 0.01)]

        callback = ema(include=["net.*"])
        fit(seeded(Other), callback, max_epochs=1)
        assert callback.average.num_steps == BATCHES

    def test_an_optimizer_that_cannot_be_seen_is_said(self):
        class Unseen:
            """Lightning's protocol of an optimizer, without torch's."""

            def __init__(self, parameters):
                self.param_groups, self.state, self.defaults = [{"params": list(parameters)}], {}, {}

            def step(self, closure=None):
                return closure()

            def zero_grad(self, set_to_none=True): ...
            def state_dict(self):
                return {}

            def load_state_dict(self, state): ...

        class Uses(Regression):
            def configure_optimizers(self):
                return Unseen(self.parameters())

        with pytest.warns(UserWarning, match=r"trainer took 6 steps, but no optimizer that trains averaged parameters"):
            fit(seeded(Uses), ema(), max_epochs=1)


class TestWhatJoins:
    def test_a_layer_unfrozen_by_finetuning_joins_with_the_value_it_had(self):
        class Unfreeze(BaseFinetuning):
            def freeze_before_training(self, pl_module):
                self.freeze(pl_module.net[0])

            def finetune_function(self, pl_module, epoch, optimizer):
                if epoch == 1:
                    self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)

        class TrainsHead(Regression):
            def configure_optimizers(self):
                return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)

        seen = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                tensors = clones(callback.average.named_tensors())
                seen.append((tensors.get("net.0.weight"), pl_module.net[0].weight.detach().clone()))

        callback = EMACallback(Constant(0.5))
        module = seeded(TrainsHead, norm=False)
        expected = module.net[0].weight.detach().clone()
        fit(module, callback, Unfreeze(), Watch())
        assert all(average is None for average, _ in seen[:BATCHES])
        for average, live in seen[BATCHES:]:
            expected = 0.5 * expected + 0.5 * live
            torch.testing.assert_close(average, expected)

    def test_layers_built_in_configure_model_or_setup(self):
        class Late(Regression):
            def __init__(self):
                super().__init__(norm=False)
                net, self.net = self.net, None
                self.late = [net]

            def configure_model(self):
                if self.net is None:
                    self.net = self.late[0]

        callback = ema()
        fit(seeded(Late), callback)
        assert callback.average.num_updates == 2 * BATCHES

    def test_lazy_layers(self):
        class Lazy(Regression):
            def __init__(self):
                super().__init__(norm=False)
                self.net[0] = nn.LazyLinear(8)

            def loss(self, batch):
                x, y = batch
                return nn.functional.mse_loss(self.net(x), y)

        callback = ema()
        fit(seeded(Lazy), callback)
        assert "net.0.weight" in dict(callback.average.named_tensors())

    @pytest.mark.parametrize("whole", [False, True], ids=["a part is compiled", "the module is compiled"])
    def test_compiled_modules(self, whole):
        module = seeded(norm=False)
        if whole:
            target = torch.compile(module, backend="eager")
        else:
            module.net = torch.compile(module.net, backend="eager")
            module.loss = lambda batch: nn.functional.mse_loss(module.net(batch[0]), batch[1])
            target = module
        callback = ema()
        fit(target, callback)
        assert [n for n, _ in callback.average.named_tensors()] == [
            "net.0.weight", "net.0.bias", "net.4.weight", "net.4.bias",
        ]  # fmt: skip
        assert callback.average.num_updates == 2 * BATCHES

    def test_a_module_that_cannot_be_copied(self):
        module = seeded()
        module.generator = (i for i in range(3))
        with pytest.raises(TypeError):
            copy.deepcopy(module)
        callback = ema()
        fit(module, callback)
        assert callback.average.num_updates == 2 * BATCHES


class TestStart:
    @pytest.mark.parametrize(
        ("start_epoch", "start_step", "started_at"), [(1, 0, 6), (1, 2, 6), (1, 9, 9), (0, 3, 3), (2, 0, None)]
    )
    def test_the_later_of_epoch_and_step(self, start_epoch, start_step, started_at):
        callback, seen = ema(start_epoch=start_epoch, start_step=start_step), []

        class Watch(Callback):
            def on_train_batch_end(self, *_):
                seen.append(engine(callback.average).started)

        fit(seeded(), callback, Watch())
        if started_at is None:
            assert not engine(callback.average).started
        else:
            assert engine(callback.average).start_step == started_at
            assert callback.average.num_updates == 2 * BATCHES - started_at

    def test_a_schedule_learns_the_length_of_the_run_from_the_start_on(self):
        callback = ema(decay=Cosine(0.5, 1.0), start_epoch=1)
        fit(seeded(), callback, max_epochs=4)
        assert schedule_of(callback.average) == Cosine(0.5, 1.0, total_steps=3 * BATCHES)

    def test_half_life_in_epochs_and_samples(self):
        for decay, steps in ((HalfLife(epochs=2), 2 * 3), (HalfLife(samples=64), 64 / (8 * 2))):
            callback = ema(decay=decay)
            fit(seeded(), callback, accumulate_grad_batches=2)
            assert schedule_of(callback.average) == HalfLife(steps=steps)

    @pytest.mark.parametrize(
        ("settings", "total"),
        [({"max_steps": 7, "max_epochs": None}, 7), ({"max_steps": 7}, 7), ({"max_steps": 99}, 2 * BATCHES)],
    )
    def test_the_run_ends_with_max_steps_or_max_epochs_whichever_comes_first(self, settings, total):
        callback = ema(decay=Cosine(0.5, 1.0))
        fit(seeded(), callback, **settings)
        assert schedule_of(callback.average).total_steps == total

    def test_a_run_without_an_end_is_refused_where_its_length_is_needed(self):
        with pytest.raises(
            ValueError, match=r"Cosine\(.*needs the total number of steps, which this run does not know"
        ):
            fit(seeded(), ema(decay=Cosine(0.5, 1.0)), max_epochs=-1)


class TestLogging:
    def logged(self, tmp_path, *callbacks, **kwargs):
        logger = CSVLogger(tmp_path)
        this = fit(seeded(), *callbacks, logger=logger, log_every_n_steps=3, **kwargs)
        return this, logger

    def test_decay_updates_and_distance_are_logged_when_lightning_logs(self, tmp_path, monkeypatch):
        distances = []
        distance = Tracker.distance

        def kept(self, place):
            distances.append(distance(self, place))
            return distances[-1]

        monkeypatch.setattr(Tracker, "distance", kept)
        self.logged(tmp_path, EMACallback(Warmup(0.999)))
        rows = [line.split(",") for line in next(tmp_path.rglob("metrics.csv")).read_text().splitlines()]
        header = rows[0]
        table = [dict(zip(header, row, strict=True)) for row in rows[1:]]
        table = [row for row in table if row["ema/decay"]]
        assert [int(row["step"]) for row in table] == [2, 5, 8, 11]
        assert [float(row["ema/updates"]) for row in table] == [3, 6, 9, 12]
        assert [float(row["ema/decay"]) for row in table] == pytest.approx([4 / 13, 7 / 16, 10 / 19, 13 / 22])
        assert [float(row["ema/distance"]) for row in table] == pytest.approx(distances[:4])
        assert len(distances) == 5  # not computed in between; the last one is for the report at the end

    def test_nothing_reaches_the_progress_bar_and_names_keep_callbacks_apart(self, tmp_path):
        this, _ = self.logged(tmp_path, ema(), ema(name="slow", evaluate="live"))
        assert this.progress_bar_metrics == {}
        assert {"ema/decay", "slow/decay", "ema/distance", "slow/updates"} <= set(this.logged_metrics)

    def test_without_a_logger_one_distance_is_measured_at_the_end(self, monkeypatch):
        steps = []
        distance = Tracker.distance

        def noted(self, place):
            steps.append(self.num_steps)
            return distance(self, place)

        monkeypatch.setattr(Tracker, "distance", noted)
        fit(seeded(), ema(), log_every_n_steps=1)
        assert steps == [12]

    def test_the_first_fit_says_what_is_averaged_and_that_a_number_is_warmed_up(self, caplog):
        with caplog.at_level("INFO"):
            fit(seeded(), EMACallback(0.9))
        assert "averaging 8 tensors of 81 elements with Warmup(0.9)" in caplog.text
        assert "a plain number is warmed up; Constant(decay) is not" in caplog.text
        assert "every decay of 0.5909 and above gives the same average" in caplog.text  # (1 + 12) / (10 + 12)

    def test_a_horizon_longer_than_the_run_warns_with_the_numbers(self):
        this = trainer(EMACallback(0.9999))
        with pytest.warns(UserWarning, match=r"10,000 steps, longer than the whole run of 12 steps"):
            this.fit(seeded(), loader(), loader(1))


class Diverges(Regression):
    def on_before_zero_grad(self, optimizer):
        if self.global_step == 9:
            with torch.no_grad():
                self.net[4].bias.fill_(float("nan"))


class TestNonFinite:
    def test_skip_counts_and_warns_once(self):
        callback = ema(on_nonfinite="skip", after_fit="live")
        with pytest.warns(UserWarning, match="live weights are not finite at step") as caught:
            fit(seeded(Diverges, norm=False), callback)
        assert len([w for w in caught if "not finite" in str(w.message)]) == 1
        assert engine(callback.average).num_skipped > 1
        assert engine(callback.average).num_skipped + callback.average.num_updates == 2 * BATCHES
        assert all(tensor.isfinite().all() for _, tensor in callback.average.named_tensors())

    def test_raise_names_the_tensor(self):
        with pytest.raises(FloatingPointError, match=r"net\.\d\.(weight|bias)"):
            fit(seeded(Diverges, norm=False), ema(on_nonfinite="raise"))


class TestRefusals:
    @pytest.mark.parametrize("argument", ["include", "exclude"])
    def test_a_pattern_that_matches_nothing(self, argument):
        with pytest.raises(ValueError, match=r"'encoder\.\*' matches no tensor of Regression"):
            fit(seeded(), ema(**{argument: ["encoder.*"]}))

    @pytest.mark.parametrize("tensors", [{}, {"include": ["net.0.*"]}], ids=["of the same patterns", "of a part"])
    def test_two_that_would_both_evaluate(self, tensors):
        message = (
            r"the EMACallbacks 'a' and 'b' both evaluate an average of the same tensors, .*evaluate='live' in one of "
            "them, or choose tensors apart by include"
        )
        with pytest.raises(ValueError, match=message):
            fit(seeded(), ema(name="a"), ema(name="b", **tensors))

    @pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
    def test_strategies(self, strategy, monkeypatch):
        class Kind(SingleDeviceStrategy): ...

        Kind.__name__ = strategy
        mine = type("Mine", (Kind,), {})  # a user's subclass is refused like its parent
        with pytest.raises(ValueError, match=f"does not work with {strategy}: .*strategy='ddp'"):
            fit(seeded(), ema(), strategy=mine(torch.device("cpu")))

    @needs_weight_averaging
    def test_lightnings_own_average_beside_ours(self):
        with pytest.raises(ValueError, match=r"does not work beside WeightAveraging: .*Keep one of them"):
            fit(seeded(), ema(), EMAWeightAveraging())

    def test_pruning_beside_ours(self):
        with pytest.raises(ValueError, match=r"does not work beside ModelPruning: .*Prune the averaged model"):
            fit(seeded(), ema(), ModelPruning("l1_unstructured", amount=0.5))

    @pytest.mark.parametrize("order", [1, -1])
    @pytest.mark.parametrize(
        "tuner",
        [lambda: LearningRateFinder(num_training_steps=4), lambda: BatchSizeFinder(steps_per_trial=2, max_trials=2)],
        ids=["learning rate", "batch size"],
    )
    def test_tuners_leave_no_trace_in_the_average(self, tuner, order, tmp_path, monkeypatch):
        class Tuned(Regression):
            def __init__(self):
                super().__init__()
                self.lr, self.batch_size = 0.01, 2

            def train_dataloader(self):
                return loader()

            def val_dataloader(self):
                return loader(1)

        monkeypatch.chdir(tmp_path)
        callback, module = EMACallback(Constant(0.9)), seeded(Tuned)
        start, states = clones(module.state_dict()), []

        class Watch(Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                states.append(clones(pl_module.state_dict()))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            this = trainer(*[callback, tuner()][::order], Watch(), max_epochs=1)
            this.fit(module)
        expected = start["net.0.weight"]
        for state in states[-this.global_step :]:
            expected = 0.9 * expected + 0.1 * state["net.0.weight"]
        assert callback.average.num_steps == this.global_step > 0
        torch.testing.assert_close(dict(callback.average.named_tensors())["net.0.weight"], expected)

    def test_training_and_strategies_without_the_callback_are_left_alone(self):
        module = seeded()
        fit(module)
        assert "on_save_checkpoint" not in vars(module)


class TestSeveral:
    def test_followers_are_stored_beside_the_one_that_evaluates(self, tmp_path):
        make = lambda: (ema(), EMACallback(Constant(0.99), name="slow", evaluate="live", every_n_steps=2))  # noqa: E731
        evaluating, follower = make()
        whole = fit(
            seeded(),
            evaluating,
            follower,
            ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"),
            max_epochs=4,
            enable_checkpointing=True,
        )
        assert whole.global_step == 4 * BATCHES
        evaluating2, follower2 = make()
        fit(seeded(), evaluating2, follower2, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
        for first, second in ((evaluating, evaluating2), (follower, follower2)):
            assert equal(first.average.named_tensors(), second.average.named_tensors())
            assert first.average.num_updates == second.average.num_updates
        assert not equal(evaluating.average.named_tensors(), follower.average.named_tensors())


class TestAcrossRuns:
    def test_the_callback_pickles_and_copies_before_and_after_a_fit(self):
        callback = ema(decay=Cosine(0.5, 1.0), include=["net.*"])
        assert settings_of(pickle.loads(pickle.dumps(callback))) == settings_of(callback)
        fit(seeded(), callback)
        assert equal(copy.deepcopy(callback).average.named_tensors(), callback.average.named_tensors())

    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
    )
    def test_a_copied_module_saves_its_own_weights(self, duplicate, tmp_path):
        module = seeded()
        fit(module, ema(after_fit="live"))
        module.trainer = None
        twin = duplicate(module)
        with torch.no_grad():
            twin.net[0].weight.zero_()
        this = trainer()
        this.strategy.connect(twin)
        twin.trainer = this
        this.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
        assert torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]["net.0.weight"].eq(0).all()

    def test_a_modules_own_save_hook_still_runs_on_the_average(self, tmp_path):
        class Renames(Regression):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["state_dict"] = {f"old.{k}": v for k, v in checkpoint["state_dict"].items()}

        callback, module = ema(), seeded(Renames)
        this = fit(module, callback)
        for weights_only in (False, True):
            this.save_checkpoint(tmp_path / "x.ckpt", weights_only)
            state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
            assert all(torch.equal(state[f"old.{n}"], t) for n, t in callback.average.named_tensors())

    def test_no_hooks_are_left_behind(self):
        from torch.optim import optimizer

        before = len(optimizer._global_optimizer_post_hooks), len(optimizer._global_optimizer_pre_hooks)
        fit(seeded(), ema())
        with pytest.raises(ZeroDivisionError):
            fit(seeded(Raises, where="on_train_batch_end"), ema())
        assert (len(optimizer._global_optimizer_post_hooks), len(optimizer._global_optimizer_pre_hooks)) == before


PLACES = [
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "validation_step",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
]


class Raises(Regression):
    def __init__(self, where, error=ZeroDivisionError):
        super().__init__()
        self.calls = 0
        original = getattr(self, where)

        def fail(*args, **kwargs):
            if self.trainer.sanity_checking:
                return original(*args, **kwargs)
            raise error

        setattr(self, where, fail)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("fn", ["fit", "validate"])
@pytest.mark.parametrize("where", PLACES)
def test_an_error_anywhere_in_an_evaluation_leaves_the_live_weights(where, fn, error):
    callback, module = ema(after_fit="live"), seeded(Raises, where=where, error=error)
    if fn == "validate":
        hook = vars(module).pop(where)
        this = fit(module, callback)
        setattr(module, where, hook)
        expected = clones(module.state_dict())
        with pytest.raises((error, SystemExit)):
            this.validate(module, loader(1), verbose=False)
        assert equal(module.state_dict(), expected)
    else:
        with pytest.raises((error, SystemExit)):
            fit(module, callback)
    live, average = dict(engine(callback.average).named_live()), dict(callback.average.named_tensors())
    assert not engine(callback.average).weights.held
    assert equal({name: module.state_dict()[name] for name in live}, live)
    assert not equal(live, average)


def test_an_evaluation_that_writes_to_the_weights_is_told_so():
    class Adapts(Regression):
        def validation_step(self, batch, batch_idx):
            with torch.no_grad():
                self.net[4].bias.add_(1)

    with pytest.raises(RuntimeError, match=r"net.4.bias: written to while the module carried the average"):
        fit(seeded(Adapts), ema())


def test_pytorch_lightning_under_its_other_name(tmp_path):
    import pytorch_lightning as pl

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def run(callback, module, **kwargs):
        saving = pl.callbacks.ModelCheckpoint(
            tmp_path / str(id(callback)), monitor="val_loss", save_top_k=-1, filename="{epoch}"
        )
        this = pl.Trainer(
            accelerator="cpu",
            max_epochs=4,
            logger=CSVLogger(tmp_path),
            log_every_n_steps=2,
            callbacks=[callback, saving],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            this.fit(module, loader(), loader(2), **kwargs)
        return saving, this

    whole, again = ema(), ema()
    torch.manual_seed(0)
    saving, this = run(whole, Model())
    assert "ema/decay" in this.logged_metrics
    file = torch.load(saving.dirpath + "/epoch=3.ckpt", weights_only=True)
    assert equal({n: file["state_dict"][n] for n, _ in whole.average.named_tensors()}, whole.average.named_tensors())
    resumed = Model()
    run(again, resumed, ckpt_path=saving.dirpath + "/epoch=1.ckpt")
    assert equal(again.average.named_tensors(), whole.average.named_tensors())
    assert equal(engine(again.average).named_live(), engine(whole.average).named_live())
    run(again, Model())
    assert "on_save_checkpoint" not in vars(resumed)


def test_what_is_private_in_lightning_is_still_there(tmp_path):
    from lightning_ema.trainer import facts

    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(facts.logs_this_step(trainer))
            assert facts.trainer_of(pl_module) is trainer
            assert facts.is_fitting(trainer)

    fit(seeded(), Watch(), logger=CSVLogger(tmp_path), log_every_n_steps=4, max_epochs=1)
    assert seen == [False, False, False, True, False, False]


def test_the_class_is_exported_under_its_own_name():
    assert EMACallback is Implementation
