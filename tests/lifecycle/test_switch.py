"""switch_every: the live weights are set to the average now and then; nothing else of the training changes."""

import pytest
import torch
from helpers import BATCHES, Regression, clones, engine, equal, fit, loader, seeded
from lightning.pytorch import Callback
from torch import nn

from lightning_ema import Constant, EMACallback, WeightAverage


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
    """The weight at the end of every batch, and at the start of every validation before the loan."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(pl_module.net[0].weight[0, 0].item())


def path(switch_every, steps=None, **kwargs):
    seen = Path()
    callback = EMACallback(Constant(0.5), switch_every=switch_every, after_fit="live", **kwargs)
    fit(Line(), callback, seen, max_epochs=2, max_steps=steps or -1, num_sanity_val_steps=0)
    return seen.seen


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


def test_at_the_end_of_each_epoch():
    assert path("epoch") == by_hand(lambda step: step % BATCHES == 0, 2 * BATCHES)


@pytest.mark.parametrize("k", [1, 4, 5])
def test_at_every_k_steps(k):
    assert path(k) == by_hand(lambda step: step % k == 0, 2 * BATCHES)


@pytest.mark.filterwarnings("ignore:every_n_steps")
def test_steps_count_from_the_start_of_the_average_and_the_last_update_holds():
    expected = by_hand(lambda step: (step - 2) % 5 == 0, 2 * BATCHES, every=3, start=2)
    assert path(5, start_step=2, every_n_steps=3) == expected


@pytest.mark.filterwarnings("ignore:every_n_steps")
def test_an_average_that_was_not_updated_yet_is_not_switched_to():
    assert path(2, every_n_steps=5)[:4] == [1, 2, 3, 4]


def test_gradient_accumulation_counts_steps():
    seen = Path()
    callback = EMACallback(Constant(0.5), switch_every=2, after_fit="live")
    fit(Line(), callback, seen, max_epochs=1, accumulate_grad_batches=2)
    # steps end batches 2, 4, 6: 1; 2 -> average of 0, .5, 1.25 switched in; 2.25
    assert seen.seen == [0.0, 1.0, 1.0, 1.25, 1.25, 2.25]


def test_without_it_the_training_is_untouched_and_nothing_is_said(caplog):
    assert path(None) == [float(step) for step in range(1, 2 * BATCHES + 1)]
    assert "switch_every" not in caplog.text


def test_the_log_says_that_training_changes(caplog):
    path("epoch")
    assert "switch_every='epoch': at the end of each epoch the live weights are set to the average" in caplog.text
    caplog.clear()
    path(7)
    assert "switch_every=7: at every 7 steps the live weights are set to the average" in caplog.text
    assert "This changes the training" in caplog.text


class Moments(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.states = [clones(state) for state in trainer.optimizers[0].state_dict()["state"].values()]


def test_the_optimizers_state_is_kept():
    moments, module = Moments(), seeded()
    fit(module, EMACallback(0.9, switch_every=BATCHES, after_fit="live"), moments, max_epochs=1)
    plain, untouched = Moments(), seeded()
    fit(untouched, plain, max_epochs=1)
    assert all(equal(a, b) for a, b in zip(moments.states, plain.states, strict=True))
    assert not equal(module.named_parameters(), untouched.named_parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_live_weights_and_statistics_become_the_average(precision):
    callback, module = EMACallback(0.9, switch_every="epoch", after_fit="live"), seeded()
    fit(module, callback, max_epochs=1, precision=precision)
    averages = dict(callback.average.named_tensors())
    for name, tensor in module.state_dict().items():
        if name in averages:
            assert torch.equal(tensor, averages[name].to(tensor.dtype))


class LeavesEarly(Line):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 4 else None


def test_an_epoch_that_ends_early_switches_before_the_next_one():
    seen = Path()
    fit(LeavesEarly(), EMACallback(Constant(0.5), switch_every="epoch", after_fit="live"), seen, max_epochs=2)
    average = 0.0
    for live in (1, 2, 3, 4):
        average = (average + live) / 2
    assert seen.seen == [1, 2, 3, 4, average + 1, average + 2, average + 3, average + 4]


def test_a_second_fit_counts_its_own_epochs():
    callback, module = EMACallback(Constant(0.5), switch_every="epoch", after_fit="live"), Line()
    fit(module, callback, max_epochs=2)
    fit(module, callback, max_epochs=1)
    averages = dict(callback.average.named_tensors())
    assert torch.equal(module.net[0].weight, averages["net.0.weight"])


def test_the_loader_is_the_one_that_the_paths_count():
    assert len(loader()) == BATCHES


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [(0, ValueError, "switch_every is 0"), ("batch", TypeError, "switch_every is 'batch'; it must be a whole number")],
)
def test_bad_values_are_refused(value, error, message):
    with pytest.raises(error, match=message):
        EMACallback(switch_every=value)


def test_a_diverging_average_of_a_loop_of_ones_own():
    net = nn.Linear(1, 1, bias=False)
    average = WeightAverage(net, Constant(0.5))
    with torch.no_grad():
        net.weight.fill_(4.0)
    before = dict(average.named_tensors())["weight"].item()
    average.step()
    average.apply()
    assert net.weight.item() == pytest.approx((before + 4) / 2)


@pytest.mark.filterwarnings("ignore")
def test_a_resume_with_another_interval_does_not_switch_at_once(tmp_path):
    class Starts(Callback):
        """The weight after the first step."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.first = getattr(self, "first", pl_module.net[0].weight[0, 0].item())

    first = EMACallback(Constant(0.5), switch_every="epoch")
    trained = fit(Line(), first, max_epochs=1, num_sanity_val_steps=0)
    trained.save_checkpoint(tmp_path / "file.ckpt")
    seen, callback = Starts(), EMACallback(Constant(0.5), switch_every=len(loader()) // 2 + 1)
    live = dict(engine(first.average).named_live())["net.0.weight"][0, 0].item()
    with pytest.warns(UserWarning, match="switch_every: epoch in the file"):
        fit(Line(), seen, callback, max_epochs=2, num_sanity_val_steps=0, ckpt_path=tmp_path / "file.ckpt")
    assert seen.first == live + 1
