"""What users do with modules, files and callbacks, each of which once broke a promise."""

import copy
import pickle

import pytest
import torch
from helpers import (
    BATCHES,
    Regression,
    TwoOptimizers,
    clones,
    ema,
    engine,
    equal,
    fit,
    loader,
    schedule_of,
    seed_everything,
    seeded,
    trainer,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_ema import Constant, Cosine, EMACallback, WeightAverage
from lightning_ema.averaging.swap import _Contents, _Storages

pytestmark = pytest.mark.filterwarnings("ignore")


class Start(Callback):
    """The module's weights when training starts, and those at its end."""

    def on_train_start(self, trainer, pl_module):
        self.start = clones(pl_module.state_dict())

    def on_train_end(self, trainer, pl_module):
        self.end = clones(pl_module.state_dict())


class ReturnsParameters(Regression):
    def state_dict(self, *args, **kwargs):
        return dict(self.named_parameters()) | dict(self.named_buffers())


class TakesItsStateAnew(Regression):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {k: v for k, v in self.state_dict().items() if "4" in k or "0" in k}

    @property
    def strict_loading(self):
        return False


class DropsKeys(Regression):
    def on_save_checkpoint(self, checkpoint):
        del checkpoint["state_dict"]["net.0.weight"]

    @property
    def strict_loading(self):
        return False


class StoresHalf(Regression):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {
            k: v.half() if v.is_floating_point() else v for k, v in checkpoint["state_dict"].items()
        }


class Renames(Regression):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"old.{k}": v for k, v in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {k.removeprefix("old."): v for k, v in checkpoint["state_dict"].items()}


@pytest.mark.parametrize("after_fit", ["average", "live"])
@pytest.mark.parametrize("kind", [ReturnsParameters, TakesItsStateAnew, DropsKeys, StoresHalf, Renames])
def test_modules_that_shape_their_own_files(kind, after_fit, tmp_path):
    callback, module = ema(after_fit=after_fit), seeded(kind)
    this = fit(module, callback)
    average, live = clones(callback.average.named_tensors()), clones(engine(callback.average).named_live())
    for weights_only in (True, False):
        this.save_checkpoint(tmp_path / "x.ckpt", weights_only)
        state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
        for key, value in state.items():
            name = key.removeprefix("old.")
            if name in average:
                assert torch.equal(value, average[name].to(value.dtype)), name
    again, start = ema(), Start()
    fit(seeded(kind), again, start, max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert equal({name: start.start[name] for name in live}, live)
    third = EMACallback(Constant(1.0))
    fit(seeded(kind), third, max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert equal(third.average.named_tensors(), average)


@pytest.mark.parametrize("after_fit", ["average", "live"])
def test_a_callback_after_ours_may_shape_the_file_too(after_fit, tmp_path):
    class Drops(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if "0" in k}

    fit(seeded(), ema(after_fit=after_fit), Drops()).save_checkpoint(tmp_path / "x.ckpt")
    file = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(file["state_dict"]) == {"net.0.weight", "net.0.bias"}
    (entry,) = [entry for key, entry in file["callbacks"].items() if "EMA" in key]
    assert set(entry["average"]) == set(entry["names"]) - set(file["state_dict"])


class FailsToConfigure(Regression):
    def configure_optimizers(self):
        raise ZeroDivisionError


def test_a_resume_that_fails_early_leaves_nothing_for_the_next_fit(tmp_path):
    fit(seeded(), ema()).save_checkpoint(tmp_path / "x.ckpt")
    callback, fresh = ema(), seeded(lr=0.01)
    with pytest.raises(ZeroDivisionError):
        fit(seeded(FailsToConfigure), callback, max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
    expected = ema()
    fit(seeded(lr=0.01), expected)
    fit(fresh, callback)
    assert callback.average.num_steps == 2 * BATCHES
    assert equal(callback.average.named_tensors(), expected.average.named_tensors())


def test_edits_count_though_a_fit_failed_before_it_began():
    class FailsInSetup(Callback):
        def setup(self, trainer, pl_module, stage):
            raise ZeroDivisionError

    for first in (True, False):
        callback, module, start = ema(), seeded(), Start()
        fit(module, callback)
        mine = seeded(lr=0.3).state_dict()
        module.load_state_dict(mine)
        with pytest.raises(ZeroDivisionError):
            fit(module, *([FailsInSetup(), callback] if first else [callback, FailsInSetup()]))
        fit(module, callback, start)
        assert equal(start.start, mine)


class Master(torch.optim.SGD):
    """Keeps master weights from its construction on."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.master = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    def step(self, closure=None):
        loss = closure() if closure else None
        with torch.no_grad():
            for group, masters in zip(self.param_groups, self.master, strict=True):
                for p, master in zip(group["params"], masters, strict=True):
                    p.copy_(master.sub_(p.grad, alpha=group["lr"]))
        return loss


class UsesMaster(Regression):
    def configure_optimizers(self):
        self.seen = clones(self.state_dict())
        return Master(self.parameters(), 0.05)


def test_an_optimizer_that_copies_weights_at_its_construction_sees_live_ones(tmp_path):
    finals = []
    for callbacks in ([], [ema()]):
        module, start = seeded(UsesMaster), Start()
        fit(module, *callbacks)
        fit(module, *callbacks, start)
        finals.append(start.end)
    assert equal(*finals)
    callback = ema()
    fit(seeded(UsesMaster), callback).save_checkpoint(tmp_path / "x.ckpt")
    live = clones(engine(callback.average).named_live())
    module = seeded(UsesMaster)
    fit(module, ema(), max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert equal({name: module.seen[name] for name in live}, live)


def test_a_trainer_without_the_callback_saves_the_module_as_it_is(tmp_path):
    module = seeded()
    fit(module, ema(after_fit="live"))
    other = trainer()
    other.validate(module, loader(1), verbose=False)
    for weights_only in (True, False):
        other.save_checkpoint(tmp_path / "x.ckpt", weights_only)
        assert equal(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"], module.state_dict())


def test_a_module_that_brings_the_callback_itself(tmp_path):
    class Brings(Regression):
        def configure_callbacks(self):
            self.callback = ema(after_fit="live")
            return [self.callback]

    module, beside = seeded(Brings), ema(after_fit="live")
    this = fit(module)
    fit(seeded(), beside)
    assert equal(module.callback.average.named_tensors(), beside.average.named_tensors())
    this.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(state[name], tensor) for name, tensor in beside.average.named_tensors())


@pytest.mark.parametrize("after_fit", ["average", "live"])
def test_another_callback_in_a_new_trainer_goes_on_from_what_the_module_holds(after_fit, tmp_path):
    module, first, start = seeded(), ema(after_fit=after_fit), Start()
    fit(module, first)
    left = clones(module.state_dict())
    second = ema(decay=0.5)
    files = ModelCheckpoint(tmp_path)
    fit(module, second, start, files, enable_checkpointing=True)
    assert equal(start.start, left)
    saved = torch.load(files.best_model_path, weights_only=True)["state_dict"]
    assert equal(clones(second.average.named_tensors()), {n: saved[n] for n, _ in second.average.named_tensors()})


def test_a_follower_that_comes_later_starts_from_the_live_weights():
    callback, module = ema(), seeded()
    fit(module, callback)
    live = clones(engine(callback.average).named_live())
    follower = EMACallback(Constant(1.0), name="later", evaluate="live")
    fit(module, follower, callback)
    assert equal(follower.average.named_tensors(), live)


def test_a_checkpoint_restored_by_a_tuner_in_the_middle_of_a_fit(tmp_path):
    class Restores(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch != 1:
                return
            self.live, self.average = clones(pl_module.state_dict()), clones(callback.average.named_tensors())
            trainer.save_checkpoint(tmp_path / "tuner.ckpt")
            with torch.no_grad():
                for p in pl_module.parameters():
                    p.zero_()
            trainer._checkpoint_connector.restore(tmp_path / "tuner.ckpt")  # as Lightning's own tuners do
            self.live_then, self.average_then = clones(pl_module.state_dict()), clones(callback.average.named_tensors())

    callback, restores = ema(decay=Cosine(0.5, 1.0)), Restores()
    this = fit(seeded(), callback, restores, max_epochs=3)
    assert equal(restores.live, restores.live_then)
    assert equal(restores.average, restores.average_then)
    assert callback.average.num_steps == this.global_step
    assert schedule_of(callback.average).total_steps == 3 * BATCHES


def test_a_start_set_by_an_epoch_survives_a_resume_before_it(tmp_path):
    from test_resume_anywhere import Resumable, Saves

    def run(*callbacks, **kwargs):
        seed_everything(3, verbose=False)
        trainer(*callbacks, max_epochs=3).fit(seeded(), Resumable(), loader(1), **kwargs)

    whole = ema(start_epoch=1, start_step=9)
    run(whole, Saves("on_train_batch_end", tmp_path / "x.ckpt", 8))
    again = ema(start_epoch=1, start_step=9)
    run(again, ckpt_path=tmp_path / "x.ckpt")
    assert engine(again.average).start_step == engine(whole.average).start_step == 9
    assert equal(again.average.named_tensors(), whole.average.named_tensors())


def test_a_second_trainer_extends_the_run(tmp_path):
    callback, module = EMACallback(Cosine(0.5, 1.0)), seeded()
    fit(module, callback)
    fit(module, callback).save_checkpoint(tmp_path / "x.ckpt")
    assert schedule_of(callback.average).total_steps == 4 * BATCHES
    resumed = EMACallback(Cosine(0.5, 1.0))
    fit(seeded(), resumed, max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert schedule_of(resumed.average).total_steps == 5 * BATCHES == resumed.average.num_steps


def test_max_steps_of_two_optimizers_that_step_in_turn():
    callback = EMACallback(Cosine(0.5, 1.0))
    fit(seeded(TwoOptimizers), callback, max_steps=12, max_epochs=-1)
    assert callback.average.num_steps == schedule_of(callback.average).total_steps == 6


@pytest.mark.parametrize("interrupted", range(1, 5))
def test_ctrl_c_while_contents_come_back(interrupted, monkeypatch):
    end, calls = _Contents.end, iter(range(1, 10**6))

    def interrupted_once(self):
        if next(calls) == interrupted:
            raise KeyboardInterrupt
        end(self)

    monkeypatch.setattr(_Contents, "end", interrupted_once)
    callback, module = ema(), seeded().share_memory()  # so that contents are exchanged, one tensor after the other
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(module, callback)
    live = clones(engine(callback.average).named_live())
    assert not engine(callback.average).weights.held
    assert equal({name: module.state_dict()[name] for name in live}, live)
    assert not equal(live, callback.average.named_tensors())


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("call", range(1, 5), ids=["swap in", "swap out", "second swap in", "second swap out"])
def test_ctrl_c_while_storages_are_exchanged(call, after, monkeypatch):
    exchange, calls = _Storages._set, iter(range(1, 10**6))

    def interrupted_once(self, storages):
        if next(calls) == call:
            for tensor, storage in zip(self._tensors[:after], storages, strict=False):
                tensor.data = storage
            raise KeyboardInterrupt
        exchange(self, storages)

    monkeypatch.setattr(_Storages, "_set", interrupted_once)
    callback, module = ema(), seeded()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(module, callback, num_sanity_val_steps=0)
    live = clones(engine(callback.average).named_live())
    assert not engine(callback.average).weights.held
    assert equal({name: module.state_dict()[name] for name in live}, live)
    assert not equal(live, callback.average.named_tensors())


def test_a_swap_of_the_users_own_ends_with_an_exception_too():
    class SwapsIn(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            callback.average.swap_in()
            raise ZeroDivisionError

    callback, module = ema(), seeded()
    with pytest.raises(ZeroDivisionError):
        fit(module, SwapsIn(), callback)
    live = clones(engine(callback.average).named_live())
    assert not engine(callback.average).weights.held
    assert equal({name: module.state_dict()[name] for name in live}, live)


class Embeds(Regression):
    def __init__(self):
        super().__init__(norm=False)
        self.embedding = nn.Embedding(4, 4, max_norm=0.5)

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x + self.embedding(torch.arange(len(x)) % 4)), y)


def test_an_embedding_that_writes_to_itself():
    callback, module, start = ema(), seeded(Embeds), Start()
    fit(module, callback)
    live = clones(engine(callback.average).named_live())
    module.eval()
    module.loss(next(iter(loader())))  # renormalizes in place
    fit(module, callback, start)
    assert equal({name: start.start[name] for name in live}, live)
    assert callback.average.num_steps == 4 * BATCHES


@pytest.mark.parametrize("after_fit", ["average", "live"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copied_pair_of_module_and_callback_goes_on(duplicate, after_fit):
    callback, module = ema(after_fit=after_fit), seeded()
    fit(module, callback)
    live = clones(engine(callback.average).named_live())
    module.trainer = None
    twin, twins_callback = duplicate((module, callback))
    start = Start()
    fit(twin, twins_callback, start)
    assert equal({name: start.start[name] for name in live}, live)
    assert twins_callback.average.num_steps == twins_callback.average.num_updates == 4 * BATCHES
    assert callback.average.num_steps == 2 * BATCHES


def test_parameters_that_overlap_are_saved_with_their_live_values(tmp_path):
    class Overlaps(Regression):
        def __init__(self):
            super().__init__(norm=False)
            self.whole = nn.Parameter(torch.randn(8, 4))
            self.turned = nn.Parameter(self.whole.data.t())

        def loss(self, batch):
            return super().loss(batch) + self.whole.square().sum() + self.turned.square().sum()

    callback, module = ema(), seeded(Overlaps)
    this = fit(module, callback)
    live = clones(engine(callback.average).named_live())
    this.save_checkpoint(tmp_path / "x.ckpt")
    start = Start()
    fit(seeded(Overlaps), ema(), start, max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert equal({name: start.start[name] for name in live}, live)
    assert torch.equal(live["whole"].t(), live["turned"])


def test_parameters_replaced_together_with_their_optimizer_go_on_counting():
    class Replaces(Regression):
        def on_train_epoch_start(self):
            for layer in (self.net[0], self.net[4]):
                layer.weight, layer.bias = nn.Parameter(layer.weight.detach()), nn.Parameter(layer.bias.detach())
            self.trainer.strategy.setup_optimizers(self.trainer)

    callback = ema()
    fit(seeded(Replaces, norm=False), callback, limit_val_batches=0, max_epochs=3)
    assert callback.average.num_steps == 3 * BATCHES


@pytest.mark.parametrize("width", [8, 16])
def test_a_layer_replaced_at_the_end_of_an_epoch_is_saved_as_it_is(width, tmp_path):
    class Grows(Regression):
        def on_train_epoch_end(self):
            self.net[0], self.net[4] = nn.Linear(4, width), nn.Linear(width, 1)
            self.trainer.strategy.setup_optimizers(self.trainer)
            self.grown = clones(self.named_parameters())

    module = seeded(Grows, norm=False)
    file = ModelCheckpoint(tmp_path, save_on_train_epoch_end=True)
    fit(module, ema(), file, limit_val_batches=0, max_epochs=1, enable_checkpointing=True)
    resumed = seeded(Grows, norm=False)
    resumed.net[0], resumed.net[4] = nn.Linear(4, width), nn.Linear(width, 1)
    start = Start()
    fit(resumed, ema(), start, limit_val_batches=0, ckpt_path=file.best_model_path)
    assert equal(start.start, module.grown)


def test_files_of_a_subclass_are_files_of_ours(tmp_path):
    class Mine(EMACallback):
        pass

    fit(seeded(), Mine(0.9)).save_checkpoint(tmp_path / "x.ckpt")
    callback = ema()
    fit(seeded(), callback, max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert callback.average.num_steps == 3 * BATCHES


def test_a_float32_file_goes_into_a_bfloat16_run_without_loss(tmp_path):
    first = ema()
    fit(seeded(norm=False), first).save_checkpoint(tmp_path / "x.ckpt")
    expected = clones(first.average.named_tensors())
    second = EMACallback(Constant(1.0))
    fit(seeded(norm=False), second, max_epochs=3, precision="bf16-true", ckpt_path=tmp_path / "x.ckpt")
    assert equal(second.average.named_tensors(), expected)


@pytest.mark.parametrize("after_fit", ["average", "live"])
def test_a_file_that_does_not_load_leaves_everything_as_it_was(after_fit, tmp_path):
    callback, module = ema(after_fit=after_fit), seeded()
    this = fit(module, callback)
    before, live = clones(module.state_dict()), clones(engine(callback.average).named_live())
    torch.save(
        {"state_dict": {"wrong": torch.zeros(1)}, "pytorch-lightning_version": "2.4.0", "loops": {}},
        tmp_path / "x.ckpt",
    )
    with pytest.raises(RuntimeError, match="wrong"):
        this.test(module, loader(1), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert equal(module.state_dict(), before)
    assert equal(engine(callback.average).named_live(), live)


def test_an_exception_in_the_training_of_a_diverged_run_is_the_one_that_is_seen():
    class Diverges(Regression):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            (self.loss(batch) * float("nan")).backward()
            optimizer.step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(seeded(Diverges), ema(on_nonfinite="raise"))


def test_steps_outside_training_batches_are_said(caplog):
    class StepsLater(Regression):
        def on_train_epoch_end(self):
            self.optimizers().optimizer.step()

    with caplog.at_level("INFO"):
        fit(seeded(StepsLater), ema())
    assert "2 steps were taken outside training batches" in caplog.text


def test_an_expanded_parameter_is_refused_by_name():
    module = seeded(norm=False)
    module.register_parameter("wide", nn.Parameter(torch.ones(1).expand(4)))
    with pytest.raises(ValueError, match=r"wide is expanded: .*exclude="):
        fit(module, ema())
    WeightAverage(module, exclude=["wide"])


@pytest.mark.parametrize("decay", [1.5, -0.1, float("nan")])
def test_a_schedule_of_the_users_own_that_leaves_its_range(decay):
    from lightning_ema import Schedule

    class Wrong(Schedule):
        def __call__(self, n):
            return decay

    with pytest.raises(ValueError, match="it must lie in"):
        WeightAverage(nn.Linear(1, 1), Wrong()).step()


@pytest.mark.parametrize("arguments", [{"dtype": torch.float64}, {"device": "cpu"}, {"shard": True}])
def test_a_target_keeps_its_own_dtype_and_device_and_is_whole(arguments):
    with pytest.raises(ValueError, match="leave out dtype, device and shard"):
        WeightAverage(nn.Linear(1, 1), into=nn.Linear(1, 1), **arguments)
    net = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="into takes another module"):
        WeightAverage(net, into=net)


def test_a_callback_made_anew_for_each_fit_goes_on_from_what_the_module_holds(tmp_path):
    module, plain = seeded(), seeded()
    first, second = EMACallback(Constant(0.5)), EMACallback(Constant(0.75))
    fit(module, first, max_epochs=1)
    plain.load_state_dict(module.state_dict())  # the average that the first fit left
    begun = clones(module.state_dict())
    trained = fit(module, second, max_epochs=1)
    fit(plain, max_epochs=1)
    averages = dict(second.average.named_tensors())
    assert equal(engine(second.average).named_live(), {name: plain.state_dict()[name] for name in averages})
    assert equal(averages, {name: module.state_dict()[name] for name in averages})
    trained.save_checkpoint(tmp_path / "file.ckpt")
    file = torch.load(tmp_path / "file.ckpt", weights_only=False)
    assert equal(file["state_dict"], module.state_dict()) and not equal(module.state_dict(), begun)
    fit(module, first, max_epochs=1)  # the first one's average is over: others have trained since
    assert first.average.num_steps == BATCHES
