"""Counted work, not time: a slow machine cannot fail these tests, and what costs more cannot pass them."""

import sys
from collections import Counter

import pytest
import torch
from helpers import EMAWeightAveraging, Regression, ema, fit, needs_weight_averaging, seeded
from lightning.pytorch import Callback
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ema import Constant, WeightAverage
from lightning_ema.callback.ema_callback import holder_of
from lightning_ema.ops.lerp import STAGED

VIEWS = {"detach", "as_strided", "slice", "split_with_sizes", "view", "_unsafe_view", "alias", "unbind"}


class _Operators(TorchDispatchMode):
    """Counts the calls of operators that touch elements."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def operators(work):
    with _Operators() as counted:
        work()
    return dict(counted.calls)


def many(dtype=torch.float32, count=161):
    """As many parameters as a ResNet-50 has, of 9 elements each."""
    return nn.ParameterList([nn.Parameter(torch.randn(3, 3, dtype=dtype)) for _ in range(count)])


def test_an_update_of_a_list_is_one_operator():
    average = WeightAverage(many(), Constant(0.9))
    assert operators(average.step) == {"_foreach_lerp_": 1}


def test_several_decays_are_one_operator_for_each():
    average = WeightAverage(many(), [Constant(0.9), Constant(0.99), Constant(0.999)])
    assert operators(average.step) == {"_foreach_lerp_": 3}


def test_small_tensors_of_16_bits_are_cast_together():
    average = WeightAverage(many(torch.bfloat16), [Constant(0.9), Constant(0.99)])
    average.step()
    counted = operators(average.step)
    assert counted.pop("empty", 1) == 1  # where the portions are not kept from one update to the next
    assert counted == {"_foreach_copy_": 1, "_foreach_lerp_": 2}


def test_a_large_tensor_of_16_bits_is_cast_in_full_portions():
    average = WeightAverage(nn.Linear(STAGED, 5, bias=False).bfloat16(), Constant(0.9))
    counted = operators(average.step)
    assert counted.pop("empty", 1) == 1  # where the portions are not kept from one update to the next
    assert counted == {"_foreach_copy_": 5, "_foreach_lerp_": 5}


@pytest.mark.parametrize(("dtype", "scratch"), [(torch.float32, 0), (torch.bfloat16, 2 << 20)])
def test_an_update_allocates_at_most_its_scratch(count_allocations, dtype, scratch):
    average = WeightAverage(nn.Linear(STAGED, 5).to(dtype), Constant(0.9))  # 10 MiB in float32
    with count_allocations() as allocated:
        average.step()
    assert allocated.total <= scratch


def test_steps_without_an_update_call_no_operator():
    later = WeightAverage(many(), start_step=100)
    seldom = WeightAverage(many(), every_n_steps=100)
    assert operators(later.step) == operators(seldom.step) == {}


def test_a_swap_writes_and_copies_nothing(count_allocations):
    average = WeightAverage(many())

    def swap():
        with average.swapped():
            pass

    with count_allocations() as allocated:
        counted = operators(swap)
    assert allocated.total == 0
    assert not counted.keys() & {"copy_", "clone", "_to_copy", "_foreach_copy_"}


# --- calls of Python functions --------------------------------------------------------------------------------------


def count_calls(work, *args):
    """What ``work`` gives, and how often functions written in Python were called, those of torch included."""
    calls = 0

    def called(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        return work(*args), calls
    finally:
        sys.setprofile(before)


class _Counted:
    """Wraps hooks; ``steps`` are the calls made in them in each training step."""

    def __init__(self, callback, *inner):
        self.steps = []
        for owner, name in [(callback, "on_train_batch_start"), *inner, (callback, "on_train_batch_end")]:
            setattr(owner, name, self._around(getattr(owner, name), begins=name == "on_train_batch_start"))

    def _around(self, hook, begins):
        def counted(*args):
            result, calls = count_calls(hook, *args)
            if begins:
                self.steps.append(0)
            if self.steps:
                self.steps[-1] += calls
            return result

        return counted


def calls_per_step(callback, hooks=()):
    counted = _Counted(callback, *hooks)
    fit(seeded(Regression), callback)
    return max(counted.steps[2:5])  # the first steps prepare; later ones log or end an epoch


def calls_of_ours(**settings):
    callback = ema(decay=Constant(0.9), **settings)
    return calls_per_step(
        callback, [(holder_of(callback).clock.steps, "_enter"), (holder_of(callback).clock.steps, "_leave")]
    )


@needs_weight_averaging
def test_the_count_sees_what_a_callback_does():
    assert calls_per_step(Callback()) <= 2
    assert calls_per_step(EMAWeightAveraging(decay=0.9)) > 100


def test_the_callbacks_python_calls_in_a_step():
    assert calls_of_ours() <= 45


def test_the_callbacks_python_calls_in_a_step_without_an_update():
    assert calls_of_ours(every_n_steps=10**6) <= 26
    assert calls_of_ours(start_step=10**6) <= 26


@pytest.mark.parametrize("count", [10, 100])
def test_an_update_makes_no_python_call_for_each_tensor(count):
    average = WeightAverage(many(count=count), Constant(0.9))
    average.step()
    _, calls = count_calls(average.step)
    assert calls <= 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_never_waits_for_its_device(dtype):
    with torch.device("meta"):  # where reading a number is an error, as it is a wait elsewhere
        average = WeightAverage(nn.Linear(3, 4).to(dtype), [Constant(0.9), Constant(0.99)])
    average.step()
    with pytest.raises(RuntimeError, match="meta"):
        next(iter(dict(average.named_tensors()).values())).sum().item()
    assert average.num_updates == 1
