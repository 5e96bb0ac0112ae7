import random
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassPrecision, MulticlassRecall
from torchmetrics.wrappers import MetricTracker, MinMaxMetric, Running

from lightning_ema import Constant, WeightAverage
from lightning_ema.evaluation.module_state import ModuleState


class Meter:
    """A running mean as many projects have one of their own."""

    def __init__(self):
        self.sum, self.count, self.window = 0.0, 0, deque(maxlen=2)

    def add(self, value):
        self.sum, self.count = self.sum + value, self.count + 1
        self.window.append(value)


class Holds(nn.Module):
    """A module with one attribute."""

    def __init__(self, value):
        super().__init__()
        self.value = value


def add(name, value):
    def write(module):
        setattr(module, name, value)

    return write


ATTRIBUTES = {
    "number": (lambda: 3, lambda m: add("value", 4)(m), lambda v: v == 3),
    "None": (lambda: None, lambda m: add("value", 4)(m), lambda v: v is None),
    "list": (lambda: [1], lambda m: m.value.append(2), lambda v: v == [1]),
    "list set anew": (lambda: [1], lambda m: add("value", [])(m), lambda v: v == [1]),
    "list of lists": (lambda: [[1], []], lambda m: m.value[1].append(2), lambda v: v == [[1], []]),
    "list in a tuple": (lambda: ([1],), lambda m: m.value[0].append(2), lambda v: v == ([1],)),
    "list beside an optimizer": (
        lambda: ([1], torch.optim.SGD([torch.ones(1)], 0.1)),
        lambda m: m.value[0].append(2),
        lambda v: v[0] == [1],
    ),
    "dict": (lambda: {"a": 1}, lambda m: m.value.update(a=2, b=3), lambda v: v == {"a": 1}),
    "dict of lists": (lambda: {"a": [1]}, lambda m: m.value["a"].clear(), lambda v: v == {"a": [1]}),
    "defaultdict": (lambda: defaultdict(list), lambda m: m.value["a"].append(2), lambda v: v == {}),
    "ordered dict": (
        lambda: OrderedDict(a=1, b=2),
        lambda m: m.value.move_to_end("a"),
        lambda v: list(v) == ["a", "b"],
    ),
    "counter": (lambda: Counter("aab"), lambda m: m.value.update("a"), lambda v: v == Counter("aab")),
    "set": (lambda: {1}, lambda m: m.value.add(2), lambda v: v == {1}),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda m: m.value.append(3), lambda v: list(v) == [1, 2]),
    "tensor": (lambda: torch.ones(2), lambda m: m.value.add_(1), lambda v: v.tolist() == [1, 1]),
    "float8": (
        lambda: torch.ones(2).to(torch.float8_e4m3fn),
        lambda m: m.value.copy_(torch.zeros(2)),
        lambda v: v.float().tolist() == [1, 1],
    ),
    "tensor in a dict": (
        lambda: {"loss": torch.zeros(())},
        lambda m: m.value["loss"].add_(1),
        lambda v: v["loss"] == 0,
    ),
    "tensor in a list": (lambda: [torch.zeros(2)], lambda m: m.value[0].add_(1), lambda v: v[0].tolist() == [0, 0]),
    "tensor with a graph": (
        lambda: torch.ones(2, requires_grad=True) * 1,
        lambda m: m.value.data.add_(1),
        lambda v: v.tolist() == [1, 1] and v.grad_fn is not None,
    ),
    "array": (lambda: np.zeros((2, 2)), lambda m: m.value.__iadd__(1), lambda v: v.sum() == 0),
    "array of tensors": (
        lambda: np.array([torch.ones(2), None], dtype=object),
        lambda m: m.value.__setitem__(1, 3),
        lambda v: v[1] is None,
    ),
    "torch's generator": (
        lambda: torch.Generator().manual_seed(1),
        lambda m: torch.rand(1, generator=m.value),
        lambda v: torch.equal(v.get_state(), torch.Generator().manual_seed(1).get_state()),
    ),
    "NumPy's generator": (
        lambda: np.random.default_rng(1),
        lambda m: m.value.random(),
        lambda v: v.random() == np.random.default_rng(1).random(),
    ),
    "NumPy's old generator": (
        lambda: np.random.RandomState(1),
        lambda m: m.value.rand(),
        lambda v: v.rand() == np.random.RandomState(1).rand(),
    ),
    "Python's generator": (
        lambda: random.Random(1),
        lambda m: m.value.random(),
        lambda v: v.random() == random.Random(1).random(),
    ),
    "meter": (Meter, lambda m: m.value.add(2.0), lambda v: (v.sum, v.count, list(v.window)) == (0.0, 0, [])),
    "namespace": (lambda: SimpleNamespace(n=1), lambda m: add("n", 2)(m.value), lambda v: v.n == 1),
    "meters in a dict": (
        lambda: {"a": Meter()},
        lambda m: m.value["a"].add(2.0),
        lambda v: v["a"].count == 0,
    ),
    "a module in a list": (
        lambda: [nn.BatchNorm1d(2)],
        lambda m: m.value[0](torch.ones(4, 2)),
        lambda v: v[0].running_mean.tolist() == [0, 0] and v[0].num_batches_tracked == 0,
    ),
    "a metric in a dict": (
        lambda: {"mean": MeanMetric()},
        lambda m: m.value["mean"].update(2.0),
        lambda v: v["mean"].update_count == 0 and v["mean"].mean_value == 0,
    ),
}


@pytest.mark.parametrize("kind", ATTRIBUTES)
@pytest.mark.parametrize("inference", [False, True])
def test_an_attribute_is_put_back(kind, inference):
    make, write, is_as_before = ATTRIBUTES[kind]
    module = Holds(make())
    value = module.value
    with torch.inference_mode(inference):
        aside = ModuleState(module)
        write(module)
    aside.put_back()
    assert module.value is value
    assert is_as_before(value)


def test_what_was_not_there_is_gone_and_what_was_deleted_is_back():
    module = Holds(1)
    aside = ModuleState(module)
    module.new, module.training = 2, False
    del module.value
    aside.put_back()
    assert (module.value, module.training, hasattr(module, "new")) == (1, True, False)


def test_the_block_begins_as_it_began_and_ends_as_it_was():
    class Gathers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.tensor(0))
            self.outputs, self.mean, self.total = [], MeanMetric(), torch.zeros(())

        def step(self, value):
            self.count += 1
            self.outputs.append(value)
            self.mean.update(value)
            self.total += value

        def all(self):
            return int(self.count), list(self.outputs), float(self.mean.compute()), float(self.total)

    module = Gathers()
    outputs, count = module.outputs, module.count
    begun = ModuleState(module)
    module.step(1.0)
    module.step(3.0)
    assert module.all() == (2, [1.0, 3.0], 2.0, 4.0)
    for _ in range(2):
        with begun.again():
            assert (module.outputs, module.mean.update_count) == ([], 0)
            module.step(10.0)
            assert module.all() == (1, [10.0], 10.0, 10.0)
            module.outputs = None
        assert module.all() == (2, [1.0, 3.0], 2.0, 4.0)
    assert module.outputs is outputs and module.count is count


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_is_raised_inside(error):
    module = Holds([1])
    begun = ModuleState(module)
    module.value.append(2)

    def fails():
        with begun.again():
            module.value.append(3)
            raise error

    with pytest.raises(error):
        fails()
    assert module.value == [1, 2]


def test_a_buffer_that_was_replaced_or_added():
    module = nn.BatchNorm1d(2)
    mean = module.running_mean
    aside = ModuleState(module)
    mean.add_(5)
    module.running_mean = torch.full((2,), 7.0)
    module.register_buffer("other", torch.ones(1), persistent=False)
    aside.put_back()
    assert module.running_mean is mean and mean.tolist() == [0, 0]
    assert set(module.state_dict()) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert not hasattr(module, "other")


def test_parameters_are_left_alone_under_whatever_name():
    module = nn.Sequential(nn.Linear(2, 2, bias=False))
    module.flat = module[0].weight.data.view(-1)
    module.register_buffer("alias", module[0].weight.data)
    module.listed = [module[0].weight]
    aside = ModuleState(module)
    with torch.no_grad():
        module[0].weight.fill_(3)
    aside.put_back()
    assert module[0].weight.eq(3).all()


def test_a_buffer_given_another_storage_keeps_what_it_was_given():
    module = nn.BatchNorm1d(2)
    begun = ModuleState(module)
    live = module.running_mean.data
    module.num_batches_tracked += 4
    module.running_mean.data = torch.full((2,), 7.0)
    with begun.again():
        assert module.running_mean.tolist() == [7, 7] and module.num_batches_tracked == 0
        module.running_mean.add_(1)
    assert module.running_mean.tolist() == [7, 7] and module.num_batches_tracked == 4
    module.running_mean.data = live
    begun.put_back()
    assert module.running_mean.tolist() == [0, 0]


def test_optimizers_open_files_and_users_objects_with_such_are_left_alone(tmp_path):
    class Writer:
        def __init__(self):
            self.file, self.lines = (tmp_path / "log").open("w"), 0

    module = nn.Linear(2, 2)
    module.optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module.writer = Writer()
    aside = ModuleState(module)
    module.optimizer.param_groups[0]["lr"] = 0.5
    module.writer.lines = 3
    aside.put_back()
    assert module.optimizer.param_groups[0]["lr"] == 0.5
    assert module.writer.lines == 3
    module.writer.file.close()


def test_an_average_that_the_module_holds_is_left_alone(count_allocations):
    module = nn.Linear(10, 10, bias=False)
    module.average = WeightAverage(module, decay=Constant(0.5))
    module.average.step()
    with count_allocations() as counted:
        aside = ModuleState(module)
    assert counted.total == 0
    module.average.step()
    aside.put_back()
    assert module.average.num_steps == 2


def test_one_thing_that_cannot_be_put_back_does_not_keep_the_others():
    module = Holds(torch.ones(1).expand(3))
    module.after = [1]
    aside = ModuleState(module)
    module.value.data.untyped_storage().copy_(torch.full((1,), 2.0).untyped_storage())
    module.after.append(2)
    with pytest.raises(RuntimeError, match="single memory location"):
        aside.put_back()
    assert module.after == [1]


def test_a_container_that_did_not_change_is_not_written_to():
    module = Holds(OrderedDict(a=1, b=2))  # says so when it is written to while it is read
    aside = ModuleState(module)
    reading = iter(module.value)
    next(reading)
    aside.put_back()
    assert next(reading) == "b"


def test_a_list_that_hangs_on_the_class():
    class Shared(nn.Module):
        outputs = []  # noqa: RUF012

    module = Shared()
    aside = ModuleState(module)
    module.outputs.append(1)
    aside.put_back()
    assert Shared.outputs == []


class ReadOnly(OrderedDict):
    """As the outputs of some libraries' models are."""

    def update(self, *args, **kwargs):
        raise TypeError("read only")

    clear = pop = __delitem__ = update


def test_containers_that_forbid_being_written_to():
    module = Holds(ReadOnly(a=1, b=[2]))
    aside = ModuleState(module)
    module.value["b"].append(3)
    module.value["c"] = 4
    aside.put_back()
    assert list(module.value.items()) == [("a", 1), ("b", [2])]


def test_names_to_leave():
    module = Holds([1])
    aside = ModuleState(module, leave={"value", "later"})
    module.value.append(2)
    module.later = 3
    aside.put_back()
    assert (module.value, module.later) == ([1, 2], 3)


def test_memory_mapped_and_read_only_arrays_are_neither_read_nor_written(tmp_path):
    class Mapped(np.memmap):
        def copy(self, order="C"):
            raise AssertionError("read")

    module = Holds(Mapped(tmp_path / "values", mode="w+", shape=(3,)))
    module.frozen = np.array([np.nan])  # which does not equal itself
    module.frozen.flags.writeable = False
    ModuleState(module).put_back()


def test_what_was_made_in_inference_mode_is_put_back_outside_of_it():
    with torch.inference_mode():
        module = Holds(torch.zeros(2))
        aside = ModuleState(module)
        module.value += 1
    aside.put_back()
    assert module.value.tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_modules_lazy_and_sparse_buffers():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scripted = torch.jit.script(nn.BatchNorm1d(2))
            self.lazy = nn.LazyBatchNorm1d()
            self.register_buffer("sparse", torch.eye(2).to_sparse())
            self.register_buffer("nowhere", torch.ones(2, device="meta"))

    module = Odd()
    aside = ModuleState(module)
    module.scripted(torch.ones(4, 2))
    assert module.scripted.num_batches_tracked == 1
    aside.put_back()
    assert module.scripted.num_batches_tracked == 0
    assert module.scripted.running_mean.tolist() == [0, 0]


def metrics():
    torch.manual_seed(0)
    groups = {
        name: kind(3, average="macro")
        for name, kind in [("a", MulticlassAccuracy), ("p", MulticlassPrecision), ("r", MulticlassRecall)]
    }
    return {
        "mean": MeanMetric(),
        "accuracy": MulticlassAccuracy(3),
        "lists": MulticlassAUROC(3),
        "compute groups": MetricCollection(groups),
        "no compute groups": MetricCollection(groups, compute_groups=False),
        "lowest and highest": MinMaxMetric(MulticlassAccuracy(3)),
        "window": Running(MulticlassAccuracy(3), window=2),
        "tracker": MetricTracker(MulticlassAccuracy(3)),
    }


def inputs(seed):
    torch.manual_seed(seed)
    return (torch.rand(8),) if seed < 0 else (torch.randn(8, 3).softmax(1), torch.randint(3, (8,)))


@pytest.mark.parametrize("kind", metrics())
@pytest.mark.parametrize("computed_before", [False, True])
def test_metrics(kind, computed_before):
    """Each pass gives what a metric gives that saw nothing else, and the first can be gone on with."""

    def update(metric, seed):
        scores, targets = inputs(seed)
        metric.update(scores) if kind == "mean" else metric.update(scores, targets)

    def fresh(*seeds):
        metric = metrics()[kind]
        if kind == "tracker":
            metric.increment()
        for seed in seeds:
            update(metric, seed)
        return metric.compute()

    module = Holds(metrics()[kind])
    with torch.inference_mode():
        begun = ModuleState(module)
        if kind == "tracker":
            module.value.increment()
        update(module.value, 1)
        update(module.value, 2)
        first = module.value.compute() if computed_before else None
        with begun.again():
            if kind == "tracker":
                module.value.increment()
            update(module.value, 3)
            torch.testing.assert_close(module.value.compute(), fresh(3), rtol=0, atol=0)
            module.value.reset()
        if computed_before:
            torch.testing.assert_close(module.value.compute(), first, rtol=0, atol=0)
        elif kind != "lowest and highest":  # it remembers what it computed
            torch.testing.assert_close(module.value.compute(), fresh(1, 2), rtol=0, atol=0)
        update(module.value, 4)
        if kind != "lowest and highest" or not computed_before:
            torch.testing.assert_close(module.value.compute(), fresh(1, 2, 4), rtol=0, atol=0)


def test_what_the_first_pass_gathers_is_not_copied(count_allocations):
    module = Holds([])
    begun = ModuleState(module)
    module.value.append(torch.ones(1000))
    with count_allocations() as counted, begun.again():
        pass
    assert counted.total == 0
