"""Updates in a thread of their own. Without an accelerator the weights lie in host memory too, all else is the same."""

import copy
import pickle
import threading

import pytest
import torch
from helpers import BATCHES, Regression, ema, fit, seeded

from lightning_ema import Constant, WeightAverage
from lightning_ema.averaging import update as updates
from lightning_ema.ops import offload as module_under_test
from lightning_ema.ops.lerp import CHUNK, lerp_reference_
from lightning_ema.ops.offload import Offload, Update, update_through_buffers_


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (), (0, 4), (CHUNK - 1,), (2, CHUNK + 5), (4, 3, 5, 5)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made[-1] = made[-1].to(memory_format=torch.channels_last)
    gaps = [torch.randn(shape, generator=generator).to(dtype)[:, ::2] for shape in [(6, 6), (700, 1000)]]
    return [*made, *gaps]


def empty(lives):
    return [torch.zeros_like(live, dtype=torch.float32) for live in lives]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_through_buffers_is_the_plain_update(dtype):
    lives = tensors(dtype)
    got, expected = [empty(lives), empty(lives)], [empty(lives), empty(lives)]
    update_through_buffers_(Update(got, lives, [0.25, 0.5]))
    for averages, rate in zip(expected, [0.25, 0.5], strict=True):
        lerp_reference_(averages, lives, rate)
    for one, other in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Gate:
    """Holds the thread's update back until it is opened."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        real = update_through_buffers_

        def held(update, ready=None):
            assert self.open.wait(timeout=30)
            real(update, ready)

        monkeypatch.setattr(module_under_test, "update_through_buffers_", held)


def parameter(value):
    return torch.nn.Parameter(torch.full((3,), value))


def test_training_goes_on_meanwhile_and_the_next_optimizer_step_waits(monkeypatch):
    gate = Gate(monkeypatch)
    live, average = parameter(1.0), torch.zeros(3)
    optimizer = torch.optim.SGD([live], lr=1.0)
    offload = Offload()
    offload.submit([Update([[average]], [live], [0.5])])
    live.sum().backward()  # a forward and a backward pass go on
    assert average.tolist() == [0, 0, 0]

    join = offload._thread.join
    offload._thread.join = lambda: (gate.open.set(), join())
    optimizer.step()  # live becomes 0; the update is to see 1
    assert gate.open.is_set()
    assert average.tolist() == [0.5, 0.5, 0.5]
    assert live.tolist() == [0, 0, 0]
    assert offload.waits == 1
    optimizer.step()
    assert offload.waits == 1  # nothing is under way any more


def test_an_error_in_the_thread_reaches_training():
    offload = Offload()
    offload.submit([Update([[torch.zeros(4)]], [parameter(1.0)], [0.5])])
    with pytest.raises(RuntimeError, match="size"):
        offload.finish()
    offload.finish()  # once


def test_a_thread_that_cannot_be_started_is_not_waited_for(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    offload, average = Offload(), torch.zeros(3)
    with monkeypatch.context() as no_threads:
        no_threads.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start"):
            offload.submit([Update([[average]], [parameter(1.0)], [0.5])])
    offload.submit([Update([[average]], [parameter(1.0)], [0.5])])
    offload.finish()
    assert average.tolist() == [0.5, 0.5, 0.5]


def test_copies_have_no_thread(monkeypatch):
    gate = Gate(monkeypatch)
    average = torch.zeros(3)
    offload = Offload()
    offload.submit([Update([[average]], [parameter(1.0)], [0.5])])
    gate.open.set()
    for twin in (pickle.loads(pickle.dumps(offload)), copy.deepcopy(offload)):
        twin.finish()
    assert average.tolist() == [0.5, 0.5, 0.5]


@pytest.fixture
def offloaded(monkeypatch):
    """An average whose pairs count as lying on another device."""
    real = updates.Group
    monkeypatch.setattr(updates, "Group", lambda averages, stretch, where: real(averages, stretch, "thread"))


def test_whatever_reads_the_average_waits_for_it(offloaded, monkeypatch):
    network = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(0.0)
    average = WeightAverage(network, Constant(0.5))
    readings = {
        "named_tensors": lambda: dict(average.named_tensors())["weight"],
        "state_dict": lambda: average.state_dict()["average"]["weight"],
        "swapped": lambda: swapped(average, network),
        "distance": lambda: torch.tensor([[average.distance()]]),
    }
    expected, value = 0.0, 1.0
    for name, read in readings.items():
        gate = Gate(monkeypatch)
        with torch.no_grad():
            network.weight.fill_(value)
        average.step()
        expected = (expected + value) / 2
        threading.Timer(0.0, gate.open.set).start()
        got = read().item()
        assert got == pytest.approx(expected if name != "distance" else (value - expected) / value), name
        value += 1


def test_a_swap_of_another_average_waits_for_it(offloaded, monkeypatch):
    network = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(0.0)
    other, average = WeightAverage(network), WeightAverage(network, Constant(0.5))
    gate = Gate(monkeypatch)
    with torch.no_grad():
        network.weight.fill_(1.0)
    average.step()
    thread = average._tracker.tensors._updater._offload._thread
    join = thread.join
    thread.join = lambda: (gate.open.set(), join())
    with other.swapped():
        gate.open.set()
        assert network.weight.item() == 0
        assert dict(average.named_tensors())["weight"].item() == 0.5


def test_what_the_next_forward_pass_writes_to_is_averaged_as_it_was_at_the_step(offloaded, monkeypatch):
    network = torch.nn.Sequential(torch.nn.Embedding(1, 2, max_norm=1.0), torch.nn.BatchNorm1d(2, momentum=1.0))
    average = WeightAverage(network, Constant(0.0))
    with torch.no_grad():
        network[0].weight.fill_(3.0)
    network[1].running_mean.fill_(5.0)
    gate = Gate(monkeypatch)
    average.step()
    network(torch.zeros(4, dtype=torch.long))
    assert network[0].weight.norm() < 1.01
    assert network[1].running_mean.max() < 1
    gate.open.set()
    averages = dict(average.named_tensors())
    assert averages["0.weight"].tolist() == [[3.0, 3.0]]
    assert averages["1.running_mean"].tolist() == [5.0, 5.0]


def swapped(average, network):
    with average.swapped():
        return network.weight.detach().clone()


def test_in_a_trainer_it_goes_on_during_the_next_forward_pass(offloaded, monkeypatch):
    begun, during = threading.Event(), []

    def held(update, ready=None):
        during.append(begun.wait(timeout=30))
        begun.clear()
        update_through_buffers_(update, ready)

    class Beginning(Regression):
        def training_step(self, batch, batch_idx):
            begun.set()
            return super().training_step(batch, batch_idx)

        def on_train_end(self):
            begun.set()

    monkeypatch.setattr(module_under_test, "update_through_buffers_", held)
    callback = ema()
    fit(seeded(lambda: Beginning(norm=False)), callback, max_epochs=1, limit_val_batches=0)
    assert during == [True] * BATCHES
    assert callback.average.num_updates == BATCHES
