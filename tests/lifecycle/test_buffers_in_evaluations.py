"""What an evaluation writes to buffers while the module carries the average is put back; exclude keeps it."""

import logging

import pytest
import torch
from helpers import Regression, clones, ema, equal, fit, seeded
from torch import nn

from lightning_ema import Constant, WeightAverage


class Writes(Regression):
    """Writes to a buffer in each of its batches, in training and in validation."""

    def __init__(self, first, write, persistent=True):
        super().__init__()
        self.register_buffer("memory", first.clone(), persistent=persistent)
        self.write = write

    def training_step(self, batch, batch_idx):
        self.write(self)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.write(self)
        super().validation_step(batch, batch_idx)


class WritesInHook(Writes):
    def validation_step(self, batch, batch_idx):
        Regression.validation_step(self, batch, batch_idx)

    def on_validation_epoch_end(self):
        self.write(self)


def add(module):
    module.memory += 1


def through_data(module):
    module.memory.data.add_(1)


def assign(module):
    module.memory = module.memory + 1


def grow(module):
    module.memory = torch.cat([module.memory, module.memory[-1:] + 1])


def resize(module):
    module.memory.resize_(module.memory.numel() + 1).fill_(3)


INT, FLOAT, FLAGS = torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), torch.tensor([True, False])
INFINITE, NAN = torch.tensor([float("inf"), 1.0]), torch.tensor([float("nan"), 1.0])
CASES = {
    "an integer counter": (INT, add, {}),
    "through data": (INT, through_data, {}),
    "assigned": (INT, assign, {}),
    "that grows": (INT, grow, {}),
    "resized in place": (INT, resize, {}),
    "flags": (FLAGS, lambda m: m.memory.logical_not_(), {}),
    "infinite": (INFINITE, add, {}),
    "nan": (NAN, add, {}),
    "a copied one": (FLOAT, add, {"buffers": "copy"}),
    "an averaged one": (FLOAT, add, {}),
    "of what is not included": (FLOAT, add, {"include": ["net.*"]}),
    "under both": (INT, add, {"evaluate": "both"}),
    "of several averages": (INT, add, {"decay": [Constant(0.9), Constant(0.5)], "evaluate": "all"}),
}


@pytest.mark.parametrize(
    ("make", "persistent"),
    [
        (Writes, True),
        pytest.param(Writes, False, marks=pytest.mark.slow),
        pytest.param(WritesInHook, True, marks=pytest.mark.slow),
        (WritesInHook, False),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_training_with_evaluations_is_that_without_them(case, persistent, make):
    first, write, settings = CASES[case]
    with_them, without = (seeded(make, first=first, write=write, persistent=persistent) for _ in range(2))
    fit(with_them, ema(**{"decay": Constant(0.9), "after_fit": "live", **settings}), num_sanity_val_steps=0)
    fit(without, limit_val_batches=0)
    assert equal(with_them.named_parameters(), without.named_parameters())
    assert with_them.memory.shape == without.memory.shape
    torch.testing.assert_close(with_them.memory, without.memory, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", ["an integer counter", "assigned", "infinite", "a copied one", "an averaged one"])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("settings", [{"exclude": ["memory"]}, {"exclude": ["mem*"]}, {"evaluate": "live"}])
def test_what_is_excluded_or_evaluated_live_keeps_it(settings, persistent, case):
    first, write, others = CASES[case]
    beside, plain = (seeded(Writes, first=first, write=write, persistent=persistent) for _ in range(2))
    fit(beside, ema(**{"decay": Constant(0.9), "after_fit": "live", **others, **settings}))
    fit(plain)
    torch.testing.assert_close(beside.memory, plain.memory, rtol=0, atol=0, equal_nan=True)


def test_a_buffer_of_ones_own_that_is_put_back_is_named_once(caplog):
    with caplog.at_level(logging.INFO):
        fit(seeded(Writes, first=INT, write=add), ema())
    said = [r.getMessage() for r in caplog.records if "put back" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(
        "EMACallback 'ema': memory: written to while the module carried the average, and put back"
    )
    assert said[0].endswith("exclude=['memory'].")


class TrainsInValidation(Regression):
    """BatchNorm in train mode counts its batches, in integers, also where it is evaluated."""

    def on_validation_start(self):
        self.net[1].train()


@pytest.mark.parametrize("settings", [{}, {"buffers": "copy"}])
def test_counters_and_statistics_of_normalization_layers_are_put_back_without_a_word(settings, caplog):
    with_them, without = seeded(TrainsInValidation), seeded(TrainsInValidation)
    with caplog.at_level(logging.INFO):
        fit(with_them, ema(after_fit="live", **settings), num_sanity_val_steps=0)
    fit(without, limit_val_batches=0)
    assert equal(with_them.state_dict(), without.state_dict())
    assert "put back" not in caplog.text


@pytest.mark.parametrize("how", ["swapped", "swap_in", "copy", "raised"])
def test_in_a_loop_of_ones_own(how):
    module = nn.BatchNorm1d(2)
    average = WeightAverage(module, Constant(0.5), buffers="copy")
    average.step()
    before = clones(module.state_dict())
    batch = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    if how == "swap_in":
        average.swap_in()
        module(batch)
        average.swap_out()
    elif how == "raised":
        with pytest.raises(ValueError, match="expected 2D or 3D input"), average.swapped():
            module(batch).add_(module(batch[0]))
    else:
        with average.swapped(copy=how == "copy"):
            module(batch)
    assert equal(module.state_dict(), before)


def test_a_buffer_registered_in_an_evaluation_stays_there():
    class Registers(Regression):
        def on_validation_epoch_end(self):
            if not hasattr(self, "late"):
                self.register_buffer("late", torch.ones(1))

    module = seeded(Registers)
    fit(module, ema(after_fit="live"), max_epochs=1)
    assert torch.equal(module.late, torch.ones(1))


def test_what_autograd_keeps_is_not_written_to():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 2)
            self.register_buffer("positions", torch.arange(3))

        def forward(self):
            return self.table(self.positions)

    module = Positions()
    average = WeightAverage(module, Constant(0.5))
    average.step()
    loss = module().square().sum()
    with average.swapped():
        pass
    loss.backward()
    assert module.table.weight.grad is not None
