"""SwitchEMA: the live weights are set to the average now and then; nothing else of the training changes."""

import pytest
import torch
from helpers import BATCHES, Regression, clones, engine, equal, fit, loader, resumes_at_the_last_batch, seeded
from lightning.pytorch import Callback
from torch import nn

from lightning_ema import Constant, EMACallback, SwitchEMA, WeightAverage


class Line(Regression):
    """One weight that each step moves by exactly one."""

    def __init__(self):
        super().__init__(norm=False)
        self.net = nn.Sequential(nn.Linear(4, 1, bias=False))
        nn.init.zeros_(self.net[0].weight)

    def loss(self, batch):
        return -self.net[0].weight[0, 0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


class Path(Callback):
    """The weight at the end of every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(pl_module.net[0].weight[0, 0].item())


def switching(every, decay=None, order=1, after_fit="live", **kwargs):
    """An average and the callback that sets the live weights to it, in either order."""
    callback = EMACallback(Constant(0.5) if decay is None else decay, after_fit=after_fit, **kwargs)
    return [callback, SwitchEMA(every=every, name=kwargs.get("name", "ema"))][::order]


def path(every, order=1, **kwargs):
    seen = Path()
    fit(Line(), *switching(every, order=order, **kwargs), seen, max_epochs=2, num_sanity_val_steps=0)
    return seen.seen


either_order = pytest.mark.parametrize("order", [1, -1], ids=["behind EMACallback", "before it"])


def by_hand(switches, steps, every=1, start=0):
    live = average = 0.0
    seen = []
    for step in range(1, steps + 1):
        live += 1
        n = step - start
        if n <= 0:
            average = live
        elif n % every == 0:
            average = 0.5**every * average + (1 - 0.5**every) * live
        if switches(step) and n >= every:
            live = average
        seen.append(live)
    return seen


@either_order
def test_at_the_end_of_each_epoch(order):
    assert path("epoch", order) == by_hand(lambda step: step % BATCHES == 0, 2 * BATCHES)


@either_order
@pytest.mark.parametrize("k", [1, 4, 5])
def test_at_every_k_steps(k, order):
    assert path(k, order) == by_hand(lambda step: step % k == 0, 2 * BATCHES)


@either_order
@pytest.mark.filterwarnings("ignore:every_n_steps")
def test_steps_count_from_the_start_of_the_average_and_the_last_update_holds(order):
    expected = by_hand(lambda step: (step - 2) % 5 == 0, 2 * BATCHES, every=3, start=2)
    assert path(5, order, start_step=2, every_n_steps=3) == expected


@either_order
@pytest.mark.filterwarnings("ignore:every_n_steps")
def test_an_average_that_was_not_updated_yet_is_not_switched_to(order):
    assert path(2, order, every_n_steps=5)[:4] == [1, 2, 3, 4]


@either_order
def test_gradient_accumulation_counts_steps(order):
    seen = Path()
    fit(Line(), *switching(2, order=order), seen, max_epochs=1, accumulate_grad_batches=2)
    # steps end batches 2, 4, 6: 1; 2 -> average of 0, .5, 1.25 switched in; 2.25
    assert seen.seen == [0.0, 1.0, 1.0, 1.25, 1.25, 2.25]


def test_without_it_the_training_is_untouched_and_nothing_is_said(caplog):
    seen = Path()
    fit(Line(), EMACallback(Constant(0.5), after_fit="live"), seen, num_sanity_val_steps=0)
    assert seen.seen == [float(step) for step in range(1, 2 * BATCHES + 1)]
    assert "SwitchEMA" not in caplog.text


def test_the_log_says_that_training_changes(caplog):
    path("epoch")
    assert "SwitchEMA 'ema': at the end of each epoch the live weights are set to the average" in caplog.text
    caplog.clear()
    path(7)
    assert "SwitchEMA 'ema': at every 7 steps the live weights are set to the average" in caplog.text
    assert "This changes the training" in caplog.text


class Moments(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.states = [clones(state) for state in trainer.optimizers[0].state_dict()["state"].values()]


def test_the_optimizers_state_is_kept():
    moments, module = Moments(), seeded()
    fit(module, *switching(BATCHES, 0.9), moments, max_epochs=1)
    plain, untouched = Moments(), seeded()
    fit(untouched, plain, max_epochs=1)
    assert all(equal(a, b) for a, b in zip(moments.states, plain.states, strict=True))
    assert not equal(module.named_parameters(), untouched.named_parameters())


@either_order
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_live_weights_and_statistics_become_the_average(precision, order):
    callbacks, module = switching("epoch", 0.9, order), seeded()
    fit(module, *callbacks, max_epochs=1, precision=precision)
    callback = callbacks[::order][0]
    averages = dict(callback.average.named_tensors())
    for name, tensor in module.state_dict().items():
        if name in averages:
            assert torch.equal(tensor, averages[name].to(tensor.dtype))


class LeavesEarly(Line):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 4 else None


@either_order
def test_an_epoch_that_ends_early_switches_before_the_next_one(order):
    seen = Path()
    fit(LeavesEarly(), *switching("epoch", order=order), seen, max_epochs=2)
    average = 0.0
    for live in (1, 2, 3, 4):
        average = (average + live) / 2
    assert seen.seen == [1, 2, 3, 4, average + 1, average + 2, average + 3, average + 4]


@either_order
def test_a_second_fit_counts_its_own_epochs(order):
    callbacks, module = switching("epoch", order=order), Line()
    fit(module, *callbacks, max_epochs=2)
    fit(module, *callbacks, max_epochs=1)
    callback = callbacks[::order][0]
    averages = dict(callback.average.named_tensors())
    assert torch.equal(module.net[0].weight, averages["net.0.weight"])


def test_the_loader_is_the_one_that_the_paths_count():
    assert len(loader()) == BATCHES


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "SwitchEMA: every is 0; it must be at least 1"),
        (2.5, TypeError, "SwitchEMA: every is 2.5; it must be a whole number"),
        ("batch", ValueError, "SwitchEMA: every is 'batch'; it must be a number of steps or 'epoch'"),
    ],
)
def test_bad_values_are_refused(value, error, message):
    with pytest.raises(error, match=message):
        SwitchEMA(every=value)


def test_a_diverging_average_of_a_loop_of_ones_own():
    net = nn.Linear(1, 1, bias=False)
    average = WeightAverage(net, Constant(0.5))
    with torch.no_grad():
        net.weight.fill_(4.0)
    before = dict(average.named_tensors())["weight"].item()
    average.step()
    average.apply()
    assert net.weight.item() == pytest.approx((before + 4) / 2)


class Starts(Callback):
    """The weight after the first step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.first = getattr(self, "first", pl_module.net[0].weight[0, 0].item())


@either_order
@pytest.mark.filterwarnings("ignore")
def test_a_resume_with_another_interval_does_not_switch_at_once(order, tmp_path):
    callbacks = switching("epoch", order=order, after_fit="average")
    trained = fit(Line(), *callbacks, max_epochs=1, num_sanity_val_steps=0)
    trained.save_checkpoint(tmp_path / "file.ckpt")
    live = dict(engine(callbacks[::order][0].average).named_live())["net.0.weight"][0, 0].item()
    seen, again = Starts(), switching(BATCHES // 2 + 1, order=order)
    with pytest.warns(UserWarning, match="SwitchEMA 'ema': .*every: epoch in the file, 4 now"):
        fit(Line(), seen, *again, max_epochs=2, num_sanity_val_steps=0, ckpt_path=tmp_path / "file.ckpt")
    assert seen.first == live + 1


class Saves(Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@resumes_at_the_last_batch
@either_order
@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize(("every", "saved_at"), [("epoch", BATCHES), (4, BATCHES), (4, 2 * BATCHES), (3, BATCHES)])
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_switches_where_the_whole_one_does(every, saved_at, place, order, tmp_path):
    """Also where the file was written between a step and the switch that was due at it."""

    def run(*callbacks, **kwargs):
        seen = Path()
        fit(Line(), *callbacks, seen, max_epochs=4, num_sanity_val_steps=0, **kwargs)
        return seen.seen

    callbacks, saves = switching(every, order=order), Saves(tmp_path / "x.ckpt", saved_at)
    whole = run(*([saves, *callbacks] if place == "first" else [*callbacks, saves]))
    assert whole == by_hand(lambda step: step % (BATCHES if every == "epoch" else every) == 0, 4 * BATCHES)
    assert run(*switching(every, order=order), ckpt_path=tmp_path / "x.ckpt") == whole[saved_at:]


@either_order
def test_it_goes_by_the_name_of_the_average(order):
    seen = Path()
    follower = EMACallback(Constant(0.9), evaluate="live")
    fit(Line(), follower, *switching("epoch", order=order, name="mine"), seen, num_sanity_val_steps=0)
    assert seen.seen == by_hand(lambda step: step % BATCHES == 0, 2 * BATCHES)


@pytest.mark.parametrize(
    ("callbacks", "there_is"),
    [([], "none"), ([EMACallback(name="a"), EMACallback(name="b", evaluate="live")], "'a', 'b'")],
)
def test_an_average_that_is_not_there_is_named(callbacks, there_is):
    message = rf"SwitchEMA\(name='ema'\): the trainer has no EMACallback of this name, but {there_is}\. Add EMACallback"
    with pytest.raises(ValueError, match=message):
        fit(Line(), *callbacks, SwitchEMA())


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_averages_the_first_is_switched_to(order):
    seen = Path()
    several = switching("epoch", decay=[Constant(0.5), Constant(0.9)], order=order)
    fit(Line(), *several, seen, num_sanity_val_steps=0)
    assert seen.seen == by_hand(lambda step: step % BATCHES == 0, 2 * BATCHES)
