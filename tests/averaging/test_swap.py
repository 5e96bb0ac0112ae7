"""The module carries the average and gives it back, whoever else holds its storage."""

import itertools

import pytest
import torch
from helpers import engine
from torch import nn

from lightning_ema import Constant, WeightAverage
from lightning_ema.averaging import swap
from lightning_ema.averaging.swap import Swap


def flat_buffer(net):
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    offset = 0
    for p in net.parameters():
        p.data = flat[offset : offset + p.numel()].view_as(p)
        offset += p.numel()
    return net


def shared_data(net):
    net.register_parameter("twin", nn.Parameter(torch.zeros(0)))
    net.twin.data = net[0].weight.data  # another Parameter on the same storage
    return net


SITUATIONS = {
    "plain": lambda net: net,
    "float64": lambda net: net.double(),
    "bfloat16": lambda net: net.bfloat16(),
    "flat buffer": flat_buffer,
    "shared memory": lambda net: net.share_memory(),
    "two parameters on one storage": shared_data,
    "flat buffer of bfloat16": lambda net: flat_buffer(net.bfloat16()),
    "channels_last": lambda net: nn.Sequential(net, nn.Conv2d(2, 2, 3)).to(memory_format=torch.channels_last),
    "parametrized": lambda net: (nn.utils.parametrizations.weight_norm(net[0]), net)[1],
    "lstm": lambda net: nn.Sequential(net, nn.LSTM(2, 2)),
    "compiled": lambda net: nn.Sequential(torch.compile(net, backend="eager")),
}


def make(situation):
    torch.manual_seed(0)
    return SITUATIONS[situation](nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)))


def perturb(net):
    with torch.no_grad():
        for tensor in itertools.chain(net.parameters(), net.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.5).add_(0.25)


def snapshot(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def integers(net):
    return {name: value for name, value in net.state_dict().items() if not value.is_floating_point()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def assert_holds(named, expected):
    expected = {name.replace("_orig_mod.", ""): value for name, value in expected.items()}
    for name, tensor in named:
        assert torch.equal(tensor.to(expected[name].dtype), expected[name]), name


@pytest.mark.parametrize("way", ["swap_in", "copy", "apply"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_module_carries_the_average_and_then_its_live_weights_bit_for_bit(situation, way):
    net = make(situation)
    average = WeightAverage(net, Constant(0.5))
    initial = snapshot(net)
    perturb(net)
    live = snapshot(net)
    if way == "apply":
        average.apply(keep=True)
        give_back = average.restore
    else:
        average.swap_in(copy=way == "copy")
        give_back = average.swap_out
    # the average still is the initial weights: no step was taken
    assert same(snapshot(net), initial)
    assert_holds(engine(average).named_live(), live)
    assert_holds(average.named_tensors(), initial)
    give_back()
    assert same(snapshot(net), live)
    assert_holds(engine(average).named_live(), live)
    assert_holds(average.named_tensors(), initial)


def test_no_bytes_move_where_storage_can_be_exchanged(count_allocations):
    net = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    average = WeightAverage(net)
    live = [p.data_ptr() for p in net.parameters()]
    with count_allocations() as allocated, average.swapped():
        assert [p.data_ptr() for p in net.parameters()] == [t.data_ptr() for _, t in average.named_tensors()]
    assert [p.data_ptr() for p in net.parameters()] == live
    assert allocated.total == 0


def test_a_swap_of_contents_needs_only_a_small_scratch(count_allocations):
    net = nn.Linear(1000, 1000, bias=False).share_memory()
    average = WeightAverage(net)
    with count_allocations() as allocated, average.swapped():
        pass
    assert allocated.peak <= 2 * 4 * 2**18 + 64  # two chunks, of 4 MB of weights


def test_what_is_carried_already_stays_its_owners():
    net = nn.Linear(1, 1)
    average = WeightAverage(net)
    perturb(net)
    live = snapshot(net)
    with average.swapped():
        carried = snapshot(net)
        average.swap_in()
        with average.swapped():
            assert same(snapshot(net), carried)
        assert same(snapshot(net), carried)
    assert same(snapshot(net), live)
    average.swap_in()
    average.swap_out()
    assert same(snapshot(net), live)


@pytest.mark.parametrize("act", ["step", "apply", "start"])
def test_nothing_touches_the_average_during_a_swap(act):
    average = WeightAverage(nn.Linear(1, 1))
    with average.swapped(), pytest.raises(RuntimeError, match=rf"{act}\(\) while the module carries.*swap_out"):
        getattr(average, act)()
    average.apply(keep=True)
    with pytest.raises(RuntimeError, match=rf"{act}\(\) while the module holds .*apply.*restore"):
        getattr(average, act)()


def test_a_swap_of_what_is_applied_changes_nothing():
    net = nn.Linear(1, 1)
    average = WeightAverage(net)
    initial = snapshot(net)
    perturb(net)
    average.apply(keep=True)
    with average.swapped():
        assert same(snapshot(net), initial)
    assert same(snapshot(net), initial)


def test_the_swap_ends_with_the_block_whatever_is_raised():
    net = nn.Linear(1, 1)
    average = WeightAverage(net)
    perturb(net)
    live = snapshot(net)
    with pytest.raises(KeyboardInterrupt), average.swapped():
        raise KeyboardInterrupt
    assert same(snapshot(net), live)
    assert not engine(average).weights.held


def within(average):
    with average.swapped():
        pass


def applied(average):
    average.apply(keep=True)


@pytest.mark.parametrize("act", [WeightAverage.swap_in, within, applied])
def test_a_swap_that_ctrl_c_follows_at_once_is_ended(act, monkeypatch):
    begin = Swap.begin

    def interrupted(swap):
        begin(swap)
        raise KeyboardInterrupt

    net = nn.Linear(1, 1)
    average = WeightAverage(net)
    perturb(net)
    live = snapshot(net)
    monkeypatch.setattr(Swap, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        act(average)
    assert not engine(average).weights.held
    assert same(snapshot(net), live)


@pytest.mark.parametrize("failing", range(4))
def test_a_swap_that_fails_half_way_brings_everything_back(failing, monkeypatch):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).bfloat16()
    average = WeightAverage(net)
    perturb(net)
    live = snapshot(net)
    copy_like, calls = swap._copy_like, iter(range(99))

    def out_of_memory(*tensors):
        if next(calls) == failing:
            raise torch.OutOfMemoryError("no memory")
        return copy_like(*tensors)

    monkeypatch.setattr(swap, "_copy_like", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        average.swap_in()
    assert same(snapshot(net), live)
    assert not engine(average).weights.held


def test_a_write_during_the_swap_is_reported_and_the_live_weights_are_back():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    average = WeightAverage(net)
    perturb(net)
    live = snapshot(net)
    average.swap_in()
    with torch.no_grad():
        net[1].bias.add_(1)
    with pytest.raises(RuntimeError, match=r"1.bias: written to while .*swapped\(copy=True\).*evaluate='live'"):
        average.swap_out()
    assert same(snapshot(net), live)


def test_a_copy_may_be_written_to():
    net = nn.Linear(2, 2)
    average = WeightAverage(net)
    before = {name: tensor.clone() for name, tensor in average.named_tensors()}
    with average.swapped(copy=True), torch.no_grad():
        net.weight.zero_()
    assert same(dict(average.named_tensors()), before)


def test_what_an_evaluation_writes_to_buffers_reaches_neither_average_nor_live():
    net = nn.BatchNorm1d(2)
    average = WeightAverage(net)
    perturb(net)
    live, before = snapshot(net), {name: tensor.clone() for name, tensor in average.named_tensors()}
    with average.swapped():
        net.train()(torch.randn(8, 2))
        net.running_var = torch.full((2,), 9.0)  # assigns, rather than writes
    del live["num_batches_tracked"]  # an integer: the live one stays in place
    assert same({k: v for k, v in snapshot(net).items() if k in live}, live)
    assert same(dict(average.named_tensors()), before)


def test_a_module_moved_or_cast_during_the_swap_comes_back_as_it_was():
    net = nn.Linear(2, 2)
    average = WeightAverage(net)
    perturb(net)
    live = snapshot(net)
    with average.swapped():
        net.half()
    assert same(snapshot(net), live)


def test_an_autograd_graph_survives_a_swap():
    torch.manual_seed(0)
    net, x = nn.Linear(3, 1), torch.randn(4, 3)
    average = WeightAverage(net)
    perturb(net)
    net(x).pow(2).sum().backward()
    expected = net.weight.grad.clone()
    net.zero_grad()
    loss = net(x).pow(2).sum()
    with average.swapped(), torch.no_grad():
        net(x)
    loss.backward()
    assert torch.equal(net.weight.grad, expected)


def test_autocast_does_not_serve_casts_of_the_other_weights():
    net, x = nn.Linear(2, 1, bias=False), torch.ones(1, 2)
    average = WeightAverage(net)  # holds the initial weights
    with torch.no_grad():
        net.weight.fill_(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x).item() == 6
        with average.swapped():
            carried = net(x).item()
        assert net(x).item() == 6
    assert carried != 6


@pytest.mark.parametrize("situation", ["plain", "bfloat16", "flat buffer"])
def test_a_swap_within_inference_mode_can_be_trained_after(situation):
    net = make(situation)
    average = WeightAverage(net)
    with torch.inference_mode(), average.swapped():
        net.eval()(torch.ones(1, 2, dtype=next(net.parameters()).dtype))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net.train()(torch.randn(4, 2).to(next(net.parameters()).dtype)).sum().backward()
    optimizer.step()
    assert average.step()


@pytest.mark.parametrize("situation", ["plain", "bfloat16"])
def test_gradients_can_be_taken_within_an_evaluation_in_inference_mode(situation):
    net = make(situation).eval()
    average = WeightAverage(net)
    with torch.inference_mode(), average.swapped(), torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, 2, dtype=next(net.parameters()).dtype, requires_grad=True)
        (gradient,) = torch.autograd.grad(net(x).sum(), x)
    assert gradient.isfinite().all()


def test_parameters_that_overlap_in_part_come_back():
    net = nn.Linear(2, 3)
    net.register_parameter("part", nn.Parameter(net.weight.data[:2]))
    average = WeightAverage(net, Constant(0.5))
    initial = snapshot(net)
    with torch.no_grad():
        net.weight.add_(1)
    live = snapshot(net)
    average.step()
    for _ in range(2):
        with average.swapped():
            assert same(snapshot(net), {name: (initial[name] + live[name]) / 2 for name in live})
        assert same(snapshot(net), live)


def test_a_second_swap_out_does_nothing():
    net = nn.Linear(1, 1)
    average = WeightAverage(net)
    average.swap_in()
    average.swap_out()
    perturb(net)
    live = snapshot(net)
    average.swap_out()
    assert same(snapshot(net), live)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_paused_swap_goes_on_with_what_was_written_to_it(situation, copy):
    net = make(situation)
    average, other = WeightAverage(net, [Constant(0.5), Constant(0.25)]).averages
    perturb(net)
    average.step()
    live = snapshot(net)
    with other.swapped(copy):
        carried_by_other = snapshot(net)
    average.swap_in(copy)
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.add_(1)  # as an evaluation may
    carried = snapshot(net)
    with engine(average).holds.instead(None):
        assert same(snapshot(net), live)
        with other.swapped(copy):
            assert same(snapshot(net), carried_by_other)
        assert same(snapshot(net), live)
    assert same(snapshot(net), carried)
    with pytest.raises(RuntimeError, match="carries another one of the same tensors"):
        other.swap_in()
    average.swap_out()
    assert same(snapshot(net), live)


@pytest.mark.parametrize("situation", ["plain", "flat buffer", "bfloat16", "flat buffer of bfloat16"])
def test_an_error_while_a_swap_is_paused_leaves_it_to_be_ended(situation):
    net = make(situation)
    average, other = WeightAverage(net, [Constant(0.5), Constant(0.25)]).averages
    perturb(net)
    average.step()
    live, averages = snapshot(net), {name: value.clone() for name, value in average.named_tensors()}

    def evaluation():
        with average.swapped(), engine(average).holds.instead(1):
            dtypes = {name: value.dtype for name, value in net.state_dict().items()}
            assert same(snapshot(net), {n: value.to(dtypes[n]) for n, value in other.named_tensors()} | integers(net))
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        evaluation()
    assert same(snapshot(net), live)
    assert same(dict(average.named_tensors()), averages)


def test_without_a_swap_there_is_nothing_to_pause():
    net = make("plain")
    before = snapshot(net)
    with engine(WeightAverage(net)).holds.instead(None):
        assert same(snapshot(net), before)
