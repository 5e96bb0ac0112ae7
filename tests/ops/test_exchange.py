"""Contents that change places, interrupted at every line."""

import sys

import pytest
import torch
from torch import nn

from lightning_ema import Constant, WeightAverage
from lightning_ema.ops import exchange
from lightning_ema.ops.exchange import Exchange
from lightning_ema.ops.lerp import CHUNK

LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "channels last": lambda tensor: tensor.view(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "strided": lambda tensor: tensor.repeat_interleave(2)[::2],
    "empty": lambda tensor: tensor[:0],
    "a number": lambda tensor: tensor[0],
    "several chunks": lambda tensor: tensor.repeat(CHUNK // tensor.numel() + 1),
}


def special():
    """Numbers of which some are equal without being the same: NaN, zeros of both signs."""
    first = torch.arange(120.0)
    first[:4] = torch.tensor([0.0, torch.nan, -0.0, torch.inf])
    second = -torch.arange(120.0)
    second[:4] = torch.tensor([-0.0, torch.nan, 0.0, torch.nan])
    return first, second


def bits(*tensors):
    return [tensor.detach().contiguous().view(-1).view(torch.int32).tolist() for tensor in tensors]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_contents_change_places_and_back_bit_for_bit(layout):
    first, second = map(LAYOUTS[layout], special())
    before, there = bits(first, second), Exchange(first, second)
    assert not there.exchanged
    there.there()
    assert bits(first, second) == before[::-1] and there.exchanged
    there.there()  # which changes nothing more
    assert bits(first, second) == before[::-1]
    there.back()
    there.back()
    assert bits(first, second) == before and not there.exchanged


class Interrupted:
    """Raises at one of the lines that a file runs, counted from the beginning, and at no other."""

    def __init__(self, file, at):
        self.file, self.at, self.seen = file, at, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *raised):
        sys.settrace(self.before)

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename != self.file:
            return None
        if event in ("line", "return"):
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt
        return self.trace


def interrupted(file, at, work):
    """Whether it was interrupted."""
    try:
        with Interrupted(file, at):
            work()
    except KeyboardInterrupt:
        return True
    return False


def test_an_interruption_at_any_line_leaves_nothing_half_way(monkeypatch):
    monkeypatch.setattr(exchange, "CHUNK", 50)  # three chunks
    first, second = special()
    before, at = bits(first, second), 0
    while True:
        at += 1
        both = Exchange(first, second)
        if not interrupted(exchange.__file__, at, both.there):
            break
        assert bits(first, second) in (before, before[::-1]) or interrupted(exchange.__file__, 0, both.back) is False
        both.back()
        assert bits(first, second) == before
    assert at > 30


def test_an_interruption_on_the_way_back_can_be_taken_up_again(monkeypatch):
    monkeypatch.setattr(exchange, "CHUNK", 50)
    first, second = special()
    before, at = bits(first, second), 0
    while True:
        at += 1
        both = Exchange(first, second)
        both.there()
        if not interrupted(exchange.__file__, at, both.back):
            break
        both.back()
        assert bits(first, second) == before
    assert at > 30


def shared():
    """Two parameters that are views of one buffer: their contents are exchanged in a swap."""
    module, flat = nn.Module(), torch.arange(6.0)
    module.first, module.second = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])
    return module


@pytest.mark.parametrize("way", ["there", pytest.param("back", marks=pytest.mark.slow), "paused"])
def test_a_swap_that_is_interrupted_at_any_line_is_ended_by_swapping_out(way):
    from lightning_ema.averaging import swap

    for file in (exchange.__file__, swap.__file__):
        at = 0
        while True:
            at += 1
            module = shared()
            average = WeightAverage(module, Constant(0.5))
            with torch.no_grad():
                module.first.add_(8.0)
            average.step()
            live, held = bits(*module.parameters()), bits(*(tensor for _, tensor in average.named_tensors()))
            if way == "there":
                stopped = interrupted(file, at, average.swap_in)
            elif way == "back":
                average.swap_in()
                stopped = interrupted(file, at, average.swap_out)
            else:
                average.swap_in()
                stopped = interrupted(file, at, lambda average=average: _paused(average))
            average.swap_out()
            assert bits(*module.parameters()) == live, (file, at)
            assert bits(*(tensor for _, tensor in average.named_tensors())) == held, (file, at)
            if not stopped:
                break
        assert at > 3


def _paused(average):
    with average._tracker.holds.instead(None):
        pass
