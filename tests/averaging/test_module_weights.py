"""What one module holds, where swaps meet: within one another, over what is applied, of two averages and of a part."""

import pytest
import torch
from helpers import clones, engine, equal
from torch import nn

from lightning_ema import Constant, WeightAverage
from lightning_ema.averaging.module_weights import ModuleWeights
from lightning_ema.averaging.tensor_set import Estimate


def network(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).to(dtype)


def walk(net):
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape).to(tensor.dtype) / 4)


def trained(*averages, steps=3):
    """Goes on with the module of these averages."""
    for _ in range(steps):
        walk(engine(averages[0]).module)
        for average in averages:
            average.step()


def shared(net):
    return net.share_memory()  # contents are exchanged, rather than storage


def plain(net):
    return net


SITUATIONS = pytest.mark.parametrize(
    ("prepare", "dtype"),
    [(plain, torch.float32), (plain, torch.bfloat16), (shared, torch.float32), (shared, torch.bfloat16)],
    ids=["plain", "bfloat16", "shared memory", "shared memory of bfloat16"],
)


def holds(net, average):
    """Whether the module holds this average, rounded to its own dtype."""
    state = net.state_dict()
    return all(torch.equal(state[name], tensor.to(state[name].dtype)) for name, tensor in average.items())


def several(net, *decays):
    """Averages of one module, each an object of its own, and copies of what they are."""
    averages = [WeightAverage(net, Constant(decay)) for decay in decays]
    trained(*averages)
    return [*averages, *(clones(average.named_tensors()) for average in averages)]


# --- a swap inside a swap of the same average ---------------------------------------------------------------------


@SITUATIONS
def test_a_block_inside_a_swap_leaves_it_to_its_owner(prepare, dtype):
    net = prepare(network(dtype))
    average, values = several(net, 0.5)
    live = clones(net.state_dict())
    average.swap_in()
    for _ in range(2):
        with average.swapped() as module:
            assert module is net
            assert holds(net, values)
        assert holds(net, values)
    with pytest.raises(ZeroDivisionError), average.swapped():
        raise ZeroDivisionError
    assert holds(net, values)
    average.swap_out()
    assert equal(net.state_dict(), live)


@SITUATIONS
def test_a_copy_inside_a_swap_is_carried_for_the_block_alone(prepare, dtype):
    net = prepare(network(dtype))
    average, values = several(net, 0.5)
    live = clones(net.state_dict())
    average.swap_in()
    with average.swapped(copy=True), torch.no_grad():
        assert holds(net, values)
        for parameter in net.parameters():
            parameter.zero_()  # as adaptation at test time
        assert not holds(net, values)
        assert equal(average.named_tensors(), values)
    assert holds(net, values)
    average.swap_out()  # which finds nothing written
    assert equal(net.state_dict(), live)
    assert equal(average.named_tensors(), values)


def test_a_copy_inside_what_is_applied_is_carried_for_the_block_alone():
    net = network()
    average, values = several(net, 0.5)
    live = clones(net.state_dict())
    average.apply(keep=True)
    with average.swapped(copy=True), torch.no_grad():
        net[0].weight.zero_()
    assert holds(net, values)
    assert equal(average.named_tensors(), values)
    average.restore()
    assert equal(net.state_dict(), live)


def test_a_swap_out_inside_a_block_ends_the_owners_swap():
    net = network()
    average, _ = several(net, 0.5)
    live = clones(net.state_dict())
    average.swap_in()
    with average.swapped():
        average.swap_out()
        assert equal(net.state_dict(), live)
    assert equal(net.state_dict(), live)


# --- over what is applied ---------------------------------------------------------------------------------------------


@SITUATIONS
@pytest.mark.parametrize("apart", [False, True], ids=["one object", "two objects"])
def test_any_average_is_swapped_in_over_what_is_applied(apart, prepare, dtype):
    net = prepare(network(dtype))
    if apart:
        first, second, *values = several(net, 0.5, 0.75)
    else:
        first, second = WeightAverage(net, [Constant(0.5), Constant(0.75)]).averages
        trained(first)
        values = [clones(first.named_tensors()), clones(second.named_tensors())]
    live = clones(net.state_dict())
    first.apply(keep=True)
    applied = clones(net.state_dict())
    assert holds(net, values[0])
    for average, expected in zip((second, first, second), (values[1], values[0], values[1]), strict=True):
        with average.swapped():
            assert holds(net, expected)
            assert equal(engine(first).named_live(), {name: live[name] for name in expected})
        assert equal(net.state_dict(), applied)
    second.swap_in()
    with pytest.raises(RuntimeError, match=r"restore\(\) while the module carries an average. Call swap_out\(\) first"):
        first.restore()
    assert holds(net, values[1])
    second.swap_out()
    assert equal(net.state_dict(), applied)
    first.restore()
    assert equal(net.state_dict(), live)
    assert equal(first.named_tensors(), values[0])
    assert equal(second.named_tensors(), values[1])


def test_a_swap_over_what_is_applied_ends_with_an_error_too():
    net = network()
    first, second, *values = several(net, 0.5, 0.75)
    live = clones(net.state_dict())
    first.apply(keep=True)
    with pytest.raises(KeyboardInterrupt), second.swapped():
        raise KeyboardInterrupt
    assert holds(net, values[0])
    first.restore()
    assert equal(net.state_dict(), live)


def test_applied_twice_is_applied_once():
    net = network()
    average, values = several(net, 0.5)
    live = clones(net.state_dict())
    average.apply(keep=True)
    average.apply(keep=True)
    assert holds(net, values)
    average.restore()
    assert equal(net.state_dict(), live)
    average.restore()  # does nothing
    assert equal(net.state_dict(), live)


# --- two averages of one module ---------------------------------------------------------------------------------------


@SITUATIONS
def test_another_average_inside_a_running_swap_is_refused(prepare, dtype):
    net = prepare(network(dtype))
    first, second, *values = several(net, 0.5, 0.75)
    live = clones(net.state_dict())
    with first.swapped():
        for copy in (False, True):
            with pytest.raises(RuntimeError, match=r"carries another one of the same tensors\. Call swap_out\(\)"):
                second.swap_in(copy)
        with pytest.raises(RuntimeError, match="another one of the same tensors"), second.swapped():
            pass
        for act in (second.apply, second.step, lambda: second.apply(keep=True)):
            with pytest.raises(RuntimeError, match=r"while the module carries an average\. Call swap_out\(\) first"):
                act()
        second.swap_out()  # has no swap
        assert holds(net, values[0])
    assert equal(net.state_dict(), live)
    with second.swapped():
        assert holds(net, values[1])
    assert equal(net.state_dict(), live)


def test_averages_of_disjoint_tensors_are_swapped_apart():
    net = network()
    first = WeightAverage(net, Constant(0.5), include=["0.*"])
    second = WeightAverage(net, Constant(0.75), include=["2.*"])
    trained(first, second)
    live, values = clones(net.state_dict()), [clones(first.named_tensors()), clones(second.named_tensors())]
    assert [set(each) for each in values] == [{"0.weight", "0.bias"}, {"2.weight", "2.bias"}]
    with first.swapped(), second.swapped():
        assert equal(net.state_dict(), {**live, **values[0], **values[1]})
        first.swap_out()  # in either order
        assert equal(net.state_dict(), {**live, **values[1]})
    assert equal(net.state_dict(), live)
    first.apply(keep=True)
    second.swap_in()
    first.restore()
    assert equal(net.state_dict(), {**live, **values[1]})
    second.swap_out()
    assert equal(net.state_dict(), live)


def test_averages_that_share_some_tensors_meet():
    net = network()
    first = WeightAverage(net, Constant(0.5), include=["0.*", "2.weight"])
    second = WeightAverage(net, Constant(0.75), include=["2.*"])
    trained(first, second)
    live, values = clones(net.state_dict()), [clones(first.named_tensors()), clones(second.named_tensors())]
    with first.swapped(), pytest.raises(RuntimeError, match="another one of the same tensors"):
        second.swap_in()
    first.apply(keep=True)
    with second.swapped():
        assert holds(net, values[1])
        assert equal(engine(second).named_live(), {name: live[name] for name in values[1]})
    assert holds(net, values[0])
    assert torch.equal(net[2].bias, live["2.bias"])
    first.restore()
    assert equal(net.state_dict(), live)


def test_one_module_has_one_owner_of_what_it_holds():
    net, other = network(), network()
    first, second = WeightAverage(net), WeightAverage(net, include=["0.*"])
    assert engine(first).weights is engine(second).weights is ModuleWeights.of(net)
    assert ModuleWeights.of(other) is not ModuleWeights.of(net)


def test_statistics_are_estimated_anew_as_long_as_an_average_of_the_present_fit_has_them():
    net = network()
    average = WeightAverage(net, buffers="copy")
    weights, tensors = engine(average).weights, engine(average).holds
    assert not weights.recalibrates
    tensors.estimates = [Estimate()]
    assert weights.recalibrates
    weights.drop(tensors)  # as when a callback gives its average up
    assert not weights.recalibrates


# --- an average of a module and one of its part -----------------------------------------------------------------------


@SITUATIONS
def test_an_average_of_a_part_inside_a_swap_of_the_whole_is_refused(prepare, dtype):
    net = prepare(network(dtype))
    whole, part = WeightAverage(net, Constant(0.5)), WeightAverage(net[0], Constant(0.75))
    trained(whole, part)
    live, of_whole, of_part = clones(net.state_dict()), clones(whole.named_tensors()), clones(part.named_tensors())
    for outer, inner in ((whole, part), (part, whole)):
        with outer.swapped():
            with pytest.raises(RuntimeError, match="another one of the same tensors"):
                inner.swap_in()
            with pytest.raises(RuntimeError, match=r"step\(\) while the module carries an average"):
                inner.step()
            assert holds(*((net, of_whole) if outer is whole else (net[0], of_part)))
        assert equal(net.state_dict(), live)


@SITUATIONS
def test_an_average_of_a_part_is_swapped_in_over_what_is_applied_to_the_whole(prepare, dtype):
    net = prepare(network(dtype))
    whole, part = WeightAverage(net, Constant(0.5)), WeightAverage(net[0], Constant(0.75))
    trained(whole, part)
    live, of_whole, of_part = clones(net.state_dict()), clones(whole.named_tensors()), clones(part.named_tensors())
    whole.apply(keep=True)
    applied = clones(net.state_dict())
    with part.swapped():
        assert holds(net[0], of_part)
    assert equal(net.state_dict(), applied)
    assert holds(net, of_whole)
    whole.restore()
    assert equal(net.state_dict(), live)
    part.apply(keep=True)
    with whole.swapped():
        assert holds(net, of_whole)
    assert holds(net[0], of_part)
    assert torch.equal(net[2].weight, live["2.weight"])
    part.restore()
    assert equal(net.state_dict(), live)
    assert equal(whole.named_tensors(), of_whole)
    assert equal(part.named_tensors(), of_part)


def test_averages_of_two_parts_are_swapped_apart():
    net = network()
    first, second = WeightAverage(net[0], Constant(0.5)), WeightAverage(net[2], Constant(0.75))
    for _ in range(3):
        walk(net)
        first.step()
        second.step()
    live, values = clones(net.state_dict()), [clones(first.named_tensors()), clones(second.named_tensors())]
    with first.swapped(), second.swapped():
        assert holds(net[0], values[0])
        assert holds(net[2], values[1])
    assert equal(net.state_dict(), live)


def test_live_weights_of_a_part_are_found_while_the_whole_is_swapped_in():
    net = network()
    whole, part = WeightAverage(net, Constant(0.5)), WeightAverage(net[0], Constant(0.75))
    trained(whole, part)
    live, distance = clones(net[0].state_dict()), part.distance()
    for carrying in (whole.swapped, lambda: applied(whole)):
        with carrying():
            assert equal(engine(part).named_live(), live)
            assert part.distance() == distance
            assert equal(part.named_tensors(), dict(part.state_dict()["average"]))


class applied:
    def __init__(self, average):
        self.average = average

    def __enter__(self):
        self.average.apply(keep=True)

    def __exit__(self, *_):
        self.average.restore()
