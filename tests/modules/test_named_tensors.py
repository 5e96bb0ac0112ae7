import pytest
import torch
import torchmetrics
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_ema.modules.named_tensors import (
    Survey,
    check_patterns,
    joins,
    tables_of,
    transient_buffers,
)


def names(module):
    return [candidate.name for candidate in Survey(module).candidates]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embedding.weight


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("flags", torch.tensor([True]))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("absent", None)
        self.accuracy = torchmetrics.Accuracy("binary")
        self.metric_with_weights = MetricWithWeights()


class MetricWithWeights(torchmetrics.Metric):
    def __init__(self):
        super().__init__()
        self.network = nn.Linear(2, 2)

    def update(self): ...
    def compute(self): ...


def test_names_are_the_qualified_ones_in_the_order_of_the_module():
    assert names(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))) == [
        "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var",
    ]  # fmt: skip


def test_a_tied_tensor_counts_once_under_its_first_name_and_answers_to_both():
    (candidate,) = Survey(Tied()).candidates
    assert candidate.names == ("embedding.weight", "head.weight")
    assert candidate.matches(["head.*"], ()) and candidate.matches(["embedding.*"], ())
    assert not candidate.matches(None, ["head.*"])


def test_only_floating_point_buffers_of_the_state_dict_count_and_no_metrics():
    assert names(Buffers()) == ["mean"]


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        checkpoint_wrapper,
        nn.DataParallel,
        lambda net: torch.compile(checkpoint_wrapper(net)),
    ],
)
def test_wrappers_leave_no_trace_in_names(wrap):
    inner = nn.Sequential(nn.Linear(1, 1))
    outer = nn.Module()
    outer.net = wrap(inner)
    assert names(outer) == ["net.0.weight", "net.0.bias"]


def test_a_users_own_attribute_called_module_is_no_wrapper():
    outer = nn.Module()
    outer.module = nn.Linear(1, 1)
    outer.weight = nn.Parameter(torch.zeros(1))
    assert names(outer) == ["weight", "module.weight", "module.bias"]


def test_names_that_other_systems_confuse_stay_apart():
    outer = nn.Module()
    outer.a, outer.a_b = nn.Module(), nn.Module()
    outer.a.b_c, outer.a_b.c = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    assert names(outer) == ["a.b_c", "a_b.c"]


def test_a_pattern_without_a_match_is_named_together_with_what_there_is():
    survey = Survey(nn.Linear(1, 1))
    check_patterns(survey, ["w*"], ["b?as"])
    with pytest.raises(
        ValueError, match=r"include=\['encoder.\*'\]: 'encoder.\*' matches no tensor of Linear.* weight, bias"
    ):
        check_patterns(survey, ["encoder.*"], ())
    with pytest.raises(ValueError, match=r"exclude=\['bias', 'hed'\]: 'hed' matches"):
        check_patterns(survey, None, ["bias", "hed"])


def test_frozen_and_lazy_parameters_wait():
    frozen = nn.Linear(1, 1).requires_grad_(False)
    assert [joins(c, False) for c in Survey(frozen).candidates] == [False, False]
    assert [joins(c, True) for c in Survey(frozen).candidates] == [True, True]
    lazy = nn.LazyLinear(2)
    weight = Survey(lazy).candidates[0]
    assert not joins(weight, True)
    lazy(torch.zeros(1, 3))
    assert joins(weight, False)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "2", nn.Linear(1, 1)),
        lambda net: net.append(nn.ReLU()),
        lambda net: net.register_buffer("scale", torch.ones(1)),
        lambda net: net[0].register_parameter("extra", nn.Parameter(torch.ones(1))),
        lambda net: net.__delitem__(1),
        lambda net: net[0].__delattr__("bias"),
    ],
)
def test_a_changed_structure_is_noticed(change):
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    survey = Survey(net)
    assert survey.holds()
    change(net)
    assert not survey.holds()


def test_private_tables_of_torch_are_where_we_look_for_them():
    layer = nn.BatchNorm1d(2)
    parameters, buffers, children = tables_of(layer)
    assert parameters["weight"] is layer.weight and buffers["running_mean"] is layer.running_mean and children == {}
    assert transient_buffers(Buffers()) == {"cache"}
