"""Updates on a stream of their own. Streams are stood in for: what they are told, and when, is what counts."""

import copy
import pickle
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from helpers import Regression, TwoOptimizers, ema, engine, equal, fit, seeded
from torch import nn

from lightning_ema import Constant, WeightAverage
from lightning_ema.averaging import update as updates
from lightning_ema.ops import step_hooks as before_step
from lightning_ema.ops.side_stream import SideStream

CPU = torch.device("cpu")


class Streams:
    """Behaves as ``torch.cuda`` does with streams: work on one of them begins only when another waits for it.

    So an update that nothing waits for is never made, and one that is waited for too late sees later weights.
    """

    def __init__(self):
        self.queue = []
        self.told = []
        self.inside = False

    def current_stream(self, device):
        return SimpleNamespace(wait_event=self._wait)

    def Stream(self, device):
        return SimpleNamespace(
            wait_stream=lambda stream: self.told.append("behind training"), record_event=lambda: len(self.queue)
        )

    @contextmanager
    def stream(self, stream):
        self.inside = True
        yield
        self.inside = False

    def _wait(self, event):
        self.told.append("training waits")
        with torch.no_grad():
            for work in self.queue[:event]:
                work()
        self.queue = self.queue[event:]


@pytest.fixture
def streams(monkeypatch):
    """Parameters count as lying on CUDA, updates overlap, and they are put on the stand-in's queue."""
    streams = Streams()
    real = updates.lerp_of

    def queued(averages, lives):
        update = real(averages, lives)
        return lambda rates: streams.queue.append(lambda: update(rates)) if streams.inside else update(rates)

    monkeypatch.setattr(updates, "lerp_of", queued)
    monkeypatch.setattr(updates, "OVERLAP", True)
    monkeypatch.setattr(updates, "has_streams", lambda device: True)
    monkeypatch.setattr(updates, "SideStream", lambda device: SideStream(device, streams))
    return streams


def stored(average):
    """The first tensor of the average as it lies there, whatever is under way."""
    return engine(average).tensors._pairs["0"].averages[0]


def weight(value):
    return nn.Parameter(torch.full((2,), value))


def test_an_update_lies_between_two_steps_of_the_optimizer(streams):
    module = nn.ParameterList([weight(1.0)])
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    average = WeightAverage(module, Constant(0.5))
    for expected in (0.5, -0.25, -1.125):  # the weights go 0, -1, -2
        module[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step()
        assert len(streams.queue) == 1  # a forward pass can begin
        module[0].sum().backward()
        optimizer.zero_grad()
        assert len(streams.queue) == 1
        held = stored(average)
        optimizer.register_step_pre_hook(lambda *_: streams.told.append("step"))
        streams.told.clear()
        module[0].grad = torch.zeros(2)
        optimizer.step()  # which moves nothing
        assert streams.told[0] == "training waits"
        assert held.tolist() == [expected] * 2


def test_the_stream_begins_behind_what_training_holds_already(streams):
    side = SideStream(CPU, streams)
    side.submit(lambda: streams.told.append("update"))
    side.finish()
    side.finish()  # nothing is under way
    assert streams.told == ["behind training", "update", "training waits"]


def test_an_update_that_fails_half_way_is_waited_for(streams):
    side = SideStream(CPU, streams)

    def update():
        streams.queue.append(lambda: streams.told.append("first half"))
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        side.submit(update)
    streams.told.clear()
    side.finish()
    assert streams.told == ["training waits", "first half"]


def test_finished_updates_leave_no_work_behind(streams):
    side = SideStream(CPU, streams)
    for _ in range(3):
        side.submit(lambda: None)
    assert len(before_step._works) == 1
    side.finish()
    assert len(before_step._works) == 0


def test_two_averages_wait_before_the_same_step(streams):
    module = nn.ParameterList([weight(1.0)])
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    averages = [WeightAverage(module, Constant(decay)) for decay in (0.5, 0.0)]
    for _ in range(2):  # the weights go 0, -1
        module[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for average in averages:
            average.step()
    assert [dict(average.named_tensors())["0"].tolist() for average in averages] == [[-0.25, -0.25], [-1.0, -1.0]]


@pytest.mark.parametrize("keep", [True, False])
def test_another_average_of_the_module_is_written_to_it_behind_the_update(streams, keep):
    module = nn.ParameterList([weight(0.0)])
    other, average = WeightAverage(module), WeightAverage(module, Constant(0.5))
    with torch.no_grad():
        module[0].fill_(1.0)
    average.step()
    other.apply(keep=keep)
    assert module[0].tolist() == [0.0, 0.0]
    assert dict(average.named_tensors())["0"].tolist() == [0.5, 0.5]


def test_weights_of_several_dtypes_are_averaged_beside_together(streams):
    module = nn.ParameterList([weight(0.0), weight(0.0).bfloat16()])
    average = WeightAverage(module, Constant(0.5))
    with torch.no_grad():
        for parameter in module:
            parameter.fill_(1.0)
    average.step()
    assert streams.told == ["behind training"]  # nothing is waited for
    assert len(streams.queue) == 2
    assert [tensor.tolist() for _, tensor in average.named_tensors()] == [[0.5, 0.5], [0.5, 0.5]]


def test_what_moves_the_module_after_a_fit_comes_behind_the_update(streams):
    module = nn.ParameterList([weight(0.0)])
    average = WeightAverage(module, Constant(0.5))
    with torch.no_grad():
        module[0].fill_(1.0)
    average.step()
    engine(average).release()
    with torch.no_grad():
        module[0].fill_(9.0)
    assert dict(average.named_tensors())["0"].tolist() == [0.5, 0.5]


def swapped(average, module):
    with average.swapped():
        return module[0].detach().clone()


READINGS = {
    "named_tensors": lambda average, module: dict(average.named_tensors())["0"],
    "state_dict": lambda average, module: average.state_dict()["average"]["0"],
    "swapped": swapped,
    "deepcopy": lambda average, module: dict(copy.deepcopy(average).named_tensors())["0"],
    "pickle": lambda average, module: dict(pickle.loads(pickle.dumps(average)).named_tensors())["0"],
    "next update": lambda average, module: (average.step(), dict(average.named_tensors())["0"])[1],
}


@pytest.mark.parametrize("read", READINGS.values(), ids=list(READINGS))
def test_whatever_reads_the_average_comes_behind_the_update(streams, read):
    module = nn.ParameterList([weight(0.0)])
    average = WeightAverage(module, Constant(0.0))
    with torch.no_grad():
        module[0].fill_(3.0)
    average.step()
    assert len(streams.queue) == 1
    assert read(average, module).tolist() == [3.0, 3.0]


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic optimization", "manual optimization"])
def test_in_a_trainer_it_lies_beside_forward_and_backward(streams, automatic, monkeypatch):
    under_way = []

    class Watching(Regression if automatic else TwoOptimizers):
        def loss(self, batch):
            under_way.append(len(streams.queue))
            return super().loss(batch)

        def validation_step(self, batch, batch_idx):
            pass

    expected, got = ema(after_fit="live"), ema(after_fit="live")
    with monkeypatch.context() as without:
        without.setattr(updates, "OVERLAP", False)
        fit(seeded(Regression if automatic else TwoOptimizers), expected, num_sanity_val_steps=0)
    assert streams.told == []
    fit(seeded(Watching), got, num_sanity_val_steps=0)
    of_each_epoch = [0, 1, 1, 1, 1, 1] if automatic else [0, 0, *[1, 0] * 5]  # one update lies beside each first loss
    assert under_way == of_each_epoch * 2
    assert equal(expected.average.named_tensors(), got.average.named_tensors())


def test_the_distance_comes_behind_the_update(streams):
    module = nn.ParameterList([weight(0.0)])
    average = WeightAverage(module, Constant(0.0))
    with torch.no_grad():
        module[0].fill_(3.0)
    average.step()
    assert average.distance() == 0


def test_what_a_forward_pass_writes_to_is_averaged_at_once(streams):
    module = nn.Sequential(nn.Embedding(1, 2, max_norm=1.0), nn.BatchNorm1d(2, momentum=1.0))
    average = WeightAverage(module, Constant(0.0))
    with torch.no_grad():
        module[0].weight.fill_(3.0)
    module[1].running_mean.fill_(5.0)
    average.step()
    module(torch.zeros(4, dtype=torch.long))
    averages = dict(average.named_tensors())
    assert averages["0.weight"].tolist() == [[3.0, 3.0]]
    assert averages["1.running_mean"].tolist() == [5.0, 5.0]


def test_without_a_gpu_nothing_waits(monkeypatch):
    monkeypatch.setattr(updates, "OVERLAP", True)
    module = nn.ParameterList([weight(0.0)])
    average = WeightAverage(module, Constant(0.0))
    with torch.no_grad():
        module[0].fill_(3.0)
    average.step()
    assert stored(average).tolist() == [3.0, 3.0]


def test_until_it_was_measured_nothing_overlaps(monkeypatch):
    monkeypatch.setattr(updates, "has_streams", lambda device: True)
    module = nn.ParameterList([weight(0.0)])
    average = WeightAverage(module, Constant(0.0))
    with torch.no_grad():
        module[0].fill_(3.0)
    average.step()
    assert stored(average).tolist() == [3.0, 3.0]
