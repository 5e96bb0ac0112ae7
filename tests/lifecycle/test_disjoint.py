"""Two callbacks that evaluate averages of tensors apart, as the two networks of a GAN: each owns its own names."""

import copy

import pytest
import torch
from helpers import BATCHES, Regression, clones, engine, equal, fit, loader, seeded, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_ema import Constant, EMACallback

pytestmark = pytest.mark.filterwarnings("ignore")
DECAYS = {"g": 0.5, "d": 0.75}


class Pair(Regression):
    """Two networks, both with statistics of their own."""

    def __init__(self, lr=0.05):
        super().__init__(lr=lr)
        self.g, self.d, self.net = self.net, copy.deepcopy(self.net), nn.Identity()

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.g(x), y) + nn.functional.l1_loss(self.d(x), y)


class Seen(Callback):
    """The live weights at the end of each step, the averages by hand, and what a validation sees."""

    def __init__(self):
        self.seen = None

    def on_train_start(self, trainer, pl_module):
        self.start = clones(pl_module.state_dict())
        self.average = clones(pl_module.state_dict())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.live = clones(pl_module.state_dict())
        for name, live in self.live.items():
            decay = DECAYS[name[0]]
            self.average[name] = (
                live if not live.is_floating_point() else decay * self.average[name] + (1 - decay) * live
            )

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.seen = clones(pl_module.state_dict())


def of_both(**kwargs):
    return [EMACallback(Constant(decay), include=[f"{n}.*"], name=n, **kwargs) for n, decay in DECAYS.items()]


def held(callbacks):
    """Both averages by name."""
    return {name: tensor for callback in callbacks for name, tensor in callback.average.named_tensors()}


def live_of(callbacks):
    return {name: tensor for callback in callbacks for name, tensor in engine(callback.average).named_live()}


def close(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-6)


def test_a_validation_sees_both_and_training_neither():
    callbacks, seen, module = of_both(after_fit="live"), Seen(), seeded(Pair)
    fit(module, *callbacks, seen, max_epochs=3)
    close(seen.seen, seen.average)
    assert equal(module.state_dict(), seen.live)
    plain = seeded(Pair)
    fit(plain, max_epochs=3)
    assert equal(plain.state_dict(), module.state_dict())
    assert {name[0] for name, _ in callbacks[0].average.named_tensors()} == {"g"}
    assert {name[0] for name, _ in callbacks[1].average.named_tensors()} == {"d"}


@pytest.mark.parametrize("entry_point", ["validate", "test"])
@pytest.mark.parametrize("after_fit", ["average", "live"])
def test_alone_after_a_fit(after_fit, entry_point):
    callbacks, seen, module = of_both(after_fit=after_fit), Seen(), seeded(Pair)
    this = fit(module, *callbacks, seen)
    before = clones(module.state_dict())
    close(before, seen.average if after_fit == "average" else seen.live)
    seen.on_test_batch_start = seen.on_validation_batch_start
    getattr(this, entry_point)(module, loader(1), verbose=False)
    close(seen.seen, seen.average)
    assert equal(module.state_dict(), before)


@pytest.mark.parametrize("after_fit", ["average", "live"])
@pytest.mark.parametrize("weights_only", [True, False])
def test_files_hold_both_averages(weights_only, after_fit, tmp_path):
    callbacks, seen, module = of_both(after_fit=after_fit), Seen(), seeded(Pair)
    saving = ModelCheckpoint(tmp_path, monitor="val_loss", save_weights_only=weights_only, filename="best")
    this = fit(module, *callbacks, seen, saving, enable_checkpointing=True, max_epochs=1)
    this.save_checkpoint(tmp_path / "after.ckpt", weights_only)
    for name in ("best", "after"):
        file = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        close(file["state_dict"], seen.average)
        assert equal({n: file["state_dict"][n] for n in held(callbacks)}, held(callbacks))
        for callback in callbacks if not weights_only else ():
            entry = file["callbacks"][callback.state_key]
            assert equal(entry["live"], dict(engine(callback.average).named_live()))
            assert entry["average"] == {}  # it is in state_dict
    best = Pair.load_from_checkpoint(saving.best_model_path)
    (score,) = trainer().validate(best, loader(2), verbose=False)
    assert score["val_loss"] == pytest.approx(saving.best_model_score.item(), abs=1e-6)


@pytest.mark.parametrize("after_fit", ["average", "live"])
@pytest.mark.parametrize("saved", ["epoch=1", "after fit"])
def test_resuming_is_bit_for_bit(saved, after_fit, tmp_path):
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    whole, module = of_both(), seeded(Pair)
    fit(module, *whole, saving, max_epochs=4, enable_checkpointing=True)
    path = tmp_path / "epoch=1.ckpt"
    if saved == "after fit":
        path = tmp_path / "after.ckpt"
        fit(seeded(Pair), *of_both(after_fit=after_fit)).save_checkpoint(path)
    for order in (1, -1):
        again, resumed = of_both(), seeded(Pair)
        fit(resumed, *again[::order], max_epochs=4, ckpt_path=path)
        assert equal(held(again), held(whole))
        assert equal(live_of(again), live_of(whole))
        assert equal(resumed.state_dict(), module.state_dict())
        assert [each.average.num_updates for each in again] == [4 * BATCHES] * 2


@pytest.mark.parametrize("after_fit", ["average", "live"])
@pytest.mark.parametrize("between", ["nothing", "an evaluation", "a file under test"])
def test_a_second_fit_begins_with_all_live_weights(between, after_fit, tmp_path):
    callbacks, first, second, module = of_both(after_fit=after_fit), Seen(), Seen(), seeded(Pair)
    this = fit(module, *callbacks, first)
    this.save_checkpoint(tmp_path / "x.ckpt")
    if between == "an evaluation":
        this.validate(module, loader(1), verbose=False)
    elif between == "a file under test":
        this.test(module, loader(1), ckpt_path=tmp_path / "x.ckpt", verbose=False)
        close(clones(module.state_dict()), first.average)
    fit(module, *callbacks, second)
    assert equal(second.start, first.live)
    assert [each.average.num_updates for each in callbacks] == [4 * BATCHES] * 2


class Fails(Pair):
    def validation_step(self, batch, batch_idx):
        if self.trainer.current_epoch == 1:
            raise ZeroDivisionError


def test_an_error_in_a_validation_leaves_all_live_weights():
    callbacks, seen, module = of_both(), Seen(), seeded(Fails)
    with pytest.raises(ZeroDivisionError):
        fit(module, *callbacks, seen, max_epochs=3)
    assert equal(module.state_dict(), seen.live)
    assert not engine(callbacks[0].average).weights.held


def test_each_may_be_left_in_another_way():
    g, _ = of_both(after_fit="average")
    _, d = of_both(after_fit="live")
    seen, module = Seen(), seeded(Pair)
    fit(module, g, d, seen)
    expected = {name: seen.average[name] if name[0] == "g" else seen.live[name] for name in seen.live}
    close(clones(module.state_dict()), expected)


def test_one_that_only_follows_everything_may_stand_beside():
    callbacks, seen, module = of_both(after_fit="live"), Seen(), seeded(Pair)
    follower = EMACallback(Constant(0.5), name="all", evaluate="live")
    fit(module, *callbacks, follower, seen)
    close(seen.seen, seen.average)
    followed = dict(follower.average.named_tensors())
    assert equal({name: t for name, t in followed.items() if name[0] == "g"}, callbacks[0].average.named_tensors())


@pytest.mark.parametrize("include", [["d.*"], ["*.0.*"], None], ids=["the same", "some of the same", "all"])
def test_those_of_the_same_tensors_are_refused(include):
    other = EMACallback(Constant(0.5), include=include, name="other")
    with pytest.raises(ValueError, match=r"'(d|other)' and '(d|other)' both evaluate an average of the same tensors"):
        fit(seeded(Pair), of_both()[1], other)
