"""Run by test_shared_average: an average shared among 2 and among 3 processes beside one that each keeps whole.

Each process writes how the checks ended to <folder>/<processes>-<rank>.json.
"""

import copy
import datetime
import math
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
import torch.distributed as dist
from forked import fork, run_checks
from helpers import clones, engine, equal
from torch import nn

from lightning_ema import Bema, Constant, Snapshots, WeightAverage
from lightning_ema.posthoc.snapshots import take, write

DECAY = Constant(0.9)


class Layers(nn.Module):
    """With a tensor of no elements, one of one, a BatchNorm, and 71 elements in all."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 7)
        self.norm = nn.BatchNorm1d(7)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.ones(()))
        self.last = nn.Linear(7, 3, bias=False)

    def forward(self, x):
        return self.last(self.norm(self.first(x))) * self.scale


class Flat(nn.Module):
    """Two parameters that are views of one buffer."""

    def __init__(self):
        super().__init__()
        buffer = torch.randn(11)
        self.first, self.second = nn.Parameter(buffer[:5]), nn.Parameter(buffer[5:].view(2, 3))


class Gaps(nn.Module):
    """A parameter that does not fill its memory, beside one that lies transposed."""

    def __init__(self):
        super().__init__()
        self.gaps = nn.Parameter(torch.randn(6, 8)[:, ::2])
        self.transposed = nn.Parameter(torch.randn(5, 3).t())


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.randn(7, dtype=torch.complex64))


def tied():
    module = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    module[1].weight = module[0].weight
    return module


def seeded(make):
    torch.manual_seed(5)
    return make()


def train(module, steps, *averages, seed=0):
    """The same in every process; BatchNorm statistics are other ones in each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.1)
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    buffer.add_(0.1 * (dist.get_rank() + 1))
        for average in averages:
            average.step()


def held(average):
    """How many elements of parameters this process keeps for one average."""
    pairs = average._tracker.tensors.pairs()
    return sum(pair.averages[0].numel() for pair in pairs if not pair.candidate.is_buffer)


def both(module, decay=DECAY, **kwargs):
    return WeightAverage(module, decay, **kwargs), WeightAverage(module, decay, shard=True, **kwargs)


def assert_alike(whole, shared):
    for one, other in zip(whole.averages, shared.averages, strict=True):
        assert equal(one.named_tensors(), other.named_tensors())


def followed(make, processes, decay=DECAY, steps=3, **kwargs):
    """Trains a module under both averages, which must come out the same, each process keeping its part."""
    module = seeded(make)
    whole, shared = both(module, decay, **kwargs)
    before = clones(module.state_dict())
    train(module, steps, whole, shared)
    assert_alike(whole, shared)
    assert shared.num_updates == steps and not equal(before, module.state_dict())
    pairs = [pair for pair in whole._tracker.tensors.pairs() if not pair.candidate.is_buffer]
    shareable = sum(pair.live.numel() for pair in pairs if pair.name != "gaps")
    part = math.ceil(shareable / processes)
    expected = max(0, min(part, shareable - dist.get_rank() * part))
    assert held(shared) == expected + sum(pair.live.numel() for pair in pairs if pair.name == "gaps")
    return module, whole, shared


# --- equal to the whole average -------------------------------------------------------------------------------------


def check_modules(rank, processes, folder):
    conv = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 1)).to(memory_format=torch.channels_last)  # noqa: E731
    one = lambda: nn.Linear(1, 1, bias=False)  # noqa: E731
    for make in (Layers, conv, Flat, Gaps, tied, Complex, one):
        followed(make, processes)


def check_dtypes(rank, processes, folder):
    followed(lambda: Layers().double(), processes)
    followed(Layers, processes, dtype=torch.float64)
    for half in (torch.bfloat16, torch.float16):
        module, _, shared = followed(lambda half=half: Layers().to(half), processes)
        assert all(tensor.dtype == torch.float32 for _, tensor in shared.named_tensors())
        with shared.swapped():
            assert module.first.weight.dtype == half
            assert torch.equal(module.first.weight, dict(shared.named_tensors())["first.weight"].to(half))


def check_settings(rank, processes, folder):
    followed(Layers, processes, [Constant(0.9), 0.99, Constant(0.0)])
    followed(Layers, processes, Bema(kappa=0.2))
    followed(Layers, processes, [Constant(0.9), Bema(kappa=0.5)])
    followed(Layers, processes, device="cpu")
    followed(Layers, processes, include=["first.*", "scale"])
    followed(Layers, processes, exclude=["first.*"], buffers="copy")


def check_late_start(rank, processes, folder):
    module = seeded(Layers)
    whole, shared = both(module, start_step=2, every_n_steps=2)
    assert equal(shared.named_tensors(), engine(whole).named_live()) and shared.distance() == 0
    train(module, 5, whole, shared)
    assert shared.num_updates == 1
    assert_alike(whole, shared)


def check_values_by_hand(rank, processes, folder):
    module = nn.Linear(5, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.arange(5.0))
    shared = WeightAverage(module, Constant(0.5), shard=True)
    for add in (4.0, 8.0):
        with torch.no_grad():
            module.weight.add_(add)
        shared.step()
    # with w at the start: 0.5 * (0.5 * w + 0.5 * (w + 4)) + 0.5 * (w + 12) = w + 7
    part = math.ceil(5 / processes)
    kept = next(iter(shared._tracker.tensors.pairs())).averages[0]
    assert kept.tolist() == [7.0, 8.0, 9.0, 10.0, 11.0][rank * part : (rank + 1) * part]
    ((_, gathered),) = shared.named_tensors()
    assert gathered.tolist() == [[7.0, 8.0, 9.0, 10.0, 11.0]]


def check_unfrozen_later(rank, processes, folder):
    module = seeded(Layers)
    module.first.requires_grad_(False)
    whole, shared = both(module, [Constant(0.9), Constant(0.5)])
    train(module, 2, whole, shared)
    module.first.requires_grad_(True)
    engine(whole).refresh()
    engine(shared).refresh()
    train(module, 2, whole, shared)
    assert_alike(whole, shared)
    assert {"first.weight", "first.bias"} <= dict(shared.named_tensors()).keys()


def check_module_changes(rank, processes, folder):
    module = seeded(Layers)
    whole, shared = both(module)
    train(module, 2, whole, shared)
    module.last.weight = nn.Parameter(module.last.weight.detach().clone())  # replaced
    module.first.weight.data = module.first.weight.data.clone()  # moved
    train(module, 2, whole, shared)
    assert_alike(whole, shared)
    module.double()  # the averages follow
    train(module, 2, whole, shared)
    assert_alike(whole, shared)
    assert dict(shared.named_tensors())["first.weight"].dtype == torch.float64
    module.last.weight = nn.Parameter(torch.ones(4, 7, dtype=torch.float64))  # another shape: it begins again
    train(module, 2, whole, shared)
    assert_alike(whole, shared)


def check_memory_format_changed(rank, processes, folder):
    module = seeded(lambda: nn.Conv2d(3, 4, 3))
    shared = WeightAverage(module, Constant(0.9), shard=True)
    train(module, 1, shared)
    module.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="weight changed its memory format"):
        shared.step()


def check_forgotten_and_started_again(rank, processes, folder):
    """A file from before the start is loaded into an average that has started."""
    module = seeded(Layers)
    whole, shared = both(module, start_step=1)
    early = [copy.deepcopy(each.state_dict()) for each in (whole, shared)]
    train(module, 3, whole, shared)
    for each, state in zip((whole, shared), early, strict=True):
        each.load_state_dict(state)
        assert not engine(each).started
    assert shared.distance() == 0
    train(module, 3, whole, shared)
    assert_alike(whole, shared)


# --- the swap -------------------------------------------------------------------------------------------------------


def check_swap(rank, processes, folder):
    for make in (Layers, Flat, Gaps, tied, lambda: Layers().bfloat16()):
        module, whole, shared = followed(make, processes)
        live, expected = clones(module.state_dict()), clones(whole.named_tensors())
        with shared.swapped():
            carried = dict(module.named_parameters())
            assert all(torch.equal(carried[n], expected[n].to(carried[n].dtype)) for n in carried)
            with engine(shared).holds.instead(None):
                assert equal(module.state_dict(), live)
            assert all(torch.equal(carried[n], expected[n].to(carried[n].dtype)) for n in carried)
            assert equal(engine(shared).named_live(), {n: live[n] for n in dict(engine(shared).named_live())})
            with pytest.raises(RuntimeError, match="while the module carries"):
                shared.step()
        assert equal(module.state_dict(), live) and equal(shared.named_tensors(), expected)


def check_swapping_out_needs_no_other(rank, processes, folder):
    module, _, shared = followed(Layers, processes)
    live, expected = clones(module.state_dict()), clones(shared.named_tensors())
    shared.swap_in()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in module.named_parameters())
    if rank == 0:
        shared.swap_out()
        assert equal(module.state_dict(), live)
    dist.barrier()  # the others have not swapped out, and do so later
    if rank > 0:
        shared.swap_out()
        assert equal(module.state_dict(), live)


def check_writes_during_the_swap(rank, processes, folder):
    """What is carried was gathered for the swap: a write reaches neither the average nor the live weights."""
    for make in (Layers, Flat):
        module, _, shared = followed(make, processes)
        live, expected = clones(module.state_dict()), clones(shared.named_tensors())
        with shared.swapped(), torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
        assert equal(module.state_dict(), live) and equal(shared.named_tensors(), expected)


def check_apply_and_restore(rank, processes, folder):
    for make in (Layers, Flat, tied, lambda: Layers().bfloat16()):
        module, whole, shared = followed(make, processes, [Constant(0.9), Constant(0.5)])
        live, expected = clones(module.state_dict()), clones(whole.named_tensors())
        storages = [parameter.data_ptr() for parameter in module.parameters()]
        shared.apply(keep=True)
        carried = dict(module.named_parameters())
        assert all(torch.equal(carried[n], expected[n].to(carried[n].dtype)) for n in carried)
        assert storages == [parameter.data_ptr() for parameter in module.parameters()]
        assert equal(engine(shared).named_live(), {n: live[n] for n in dict(engine(shared).named_live())})
        with shared.averages[1].swapped():
            other = dict(whole.averages[1].named_tensors())
            assert all(torch.equal(carried[n], other[n].to(carried[n].dtype)) for n in carried)
        assert all(torch.equal(carried[n], expected[n].to(carried[n].dtype)) for n in carried)
        if rank == 0:
            shared.restore()  # alone
            assert equal(module.state_dict(), live)
        dist.barrier()
        shared.restore()
        train(module, 2, whole, shared, seed=3)
        assert_alike(whole, shared)


def check_apply(rank, processes, folder):
    _, whole, shared = followed(Layers, processes)
    expected = clones(whole.named_tensors())
    shared.apply()
    assert equal(engine(shared).named_live(), expected) and equal(shared.named_tensors(), expected)


def check_collectives_off(rank, processes, folder):
    """After an exception nothing waits for other processes; here indeed only one process asks."""
    module, _, shared = followed(Layers, processes)
    live = clones(module.state_dict())
    if rank == 0:
        engine(shared).collectives_off = True
        for call in (
            shared.swap_in,
            partial(shared.apply, keep=True),
            shared.apply,
            shared.state_dict,
            lambda: list(shared.named_tensors()),
        ):
            with pytest.raises(RuntimeError, match="partitioned among processes"):
                call()
        assert equal(module.state_dict(), live) and not engine(shared).weights.held
        shared.step()
        engine(shared).collectives_off = False
    else:
        shared.step()
    with shared.swapped():
        assert not equal(module.state_dict(), live)


def check_reconciled_statistics(rank, processes, folder):
    """Step k adds 0.1 * (rank + 1) to statistics that begin at 0 and at 1; the average keeps half at each step."""
    by_rank = [0.1 * (other + 1) * (0.5 * (0.5 * 1) + 0.5 * 2) for other in range(processes)]
    for shard in (False, True):
        module = seeded(Layers)
        average = WeightAverage(module, Constant(0.5), shard=shard)
        train(module, 2, average)
        live, stored = clones(module.state_dict()), clones(average.named_tensors())
        for how, expected in (("first", by_rank[0]), ("mean", sum(by_rank) / processes), (None, by_rank[rank])):
            engine(average).sync_buffers = how
            for carry in (WeightAverage.swapped, applied):
                with carry(average):
                    assert torch.allclose(module.norm.running_mean, torch.full((7,), expected), atol=1e-6)
                    assert torch.allclose(module.norm.running_var, torch.full((7,), 1 + expected), atol=1e-6)
                    assert module.norm.num_batches_tracked.item() == 0
            assert equal(module.state_dict(), live) and equal(average.named_tensors(), stored)


@contextmanager
def applied(average):
    average.apply(keep=True)
    yield
    average.restore()


def check_distance(rank, processes, folder):
    for make, decay in ((Layers, Constant(0.9)), (Layers, Bema(kappa=0.2)), (Flat, [0.9, Constant(0.5)]), (Gaps, 0.9)):
        _, whole, shared = followed(make, processes, decay)
        for one, other in zip(whole.averages, shared.averages, strict=True):
            expected = one.distance()
            assert expected > 0.01 and abs(other.distance() - expected) <= 1e-6 * expected
            with shared.swapped():
                assert abs(other.distance() - expected) <= 1e-6 * expected


def check_nonfinite_is_agreed(rank, processes, folder):
    """Statistics are the one thing that can be infinite in one process alone."""
    module = seeded(Layers)
    skipping = WeightAverage(module, Constant(0.9), shard=True, on_nonfinite="skip")
    raising = WeightAverage(module, Constant(0.9), shard=True, on_nonfinite="raise")
    train(module, 1, skipping, raising)
    kept = clones(skipping.named_tensors())
    if rank == processes - 1:
        module.norm.running_mean.fill_(float("nan"))
    assert not skipping.step() and (skipping.num_updates, engine(skipping).num_skipped) == (1, 1)
    with pytest.raises(FloatingPointError, match="not finite"):
        raising.step()
    assert equal(skipping.named_tensors(), kept)
    module.norm.running_mean.fill_(0.0)
    assert skipping.step()


# --- state ----------------------------------------------------------------------------------------------------------


def check_state(rank, processes, folder):
    for decay in (Constant(0.9), [Constant(0.9), Bema(kappa=0.5)]):
        module, whole, shared = followed(Layers, processes, decay)
        expected, state = whole.state_dict(), shared.state_dict()
        tensors = [state["average"], state["origin"], *state["further"]]
        if rank > 0:
            assert not any(tensors)
        else:
            assert equal(state["average"], expected["average"]) and equal(state["origin"], expected["origin"])
            assert all(equal(a, b) for a, b in zip(state["further"], expected["further"], strict=True))
            torch.save(state, Path(folder) / f"shared-{processes}.pt")
        rest = set(state) - {
            "average",
            "origin",
            "further",
            "stored",
            "checksums",
        }  # which names what this process was given
        assert all(state[key] == expected[key] for key in rest)
        # a whole state, from one process or from others, is cut anew
        again = WeightAverage(module, decay, shard=True)
        train(module, 1, again, seed=8)
        again.load_state_dict(expected)
        reference = WeightAverage(module, decay)
        reference.load_state_dict(expected)
        assert_alike(reference, again)
        assert held(again) == held(shared)
        train(module, 2, again, reference, seed=9)
        assert_alike(reference, again)


def check_state_of_other_processes(rank, processes, folder):
    """Loads what 2 processes wrote in 3, and in a module whose tensors lie otherwise."""
    state = torch.load(Path(folder) / "shared-2.pt", weights_only=True)
    for turn in (lambda t: t, lambda t: t.t().contiguous().t()):
        module = seeded(Layers)
        module.first.weight.data = turn(module.first.weight.data)
        shared = WeightAverage(module, [Constant(0.9), Bema(kappa=0.5)], shard=True)
        shared.load_state_dict(state)
        pairs = list(shared._tracker.tensors.pairs())
        for pair in pairs:
            assert torch.equal(pair.whole(pair.averages[0]), state["average"][pair.name])
            assert torch.equal(pair.whole(pair.averages[1]), state["further"][0][pair.name])
        bad = {**state, "average": {n: t for n, t in state["average"].items() if n != "scale"}}
        with pytest.raises(ValueError, match=r"average\['scale'\] is missing"):
            shared.load_state_dict(bad)


def check_snapshots(rank, processes, folder):
    module = seeded(Layers)
    directories = [Path(folder) / f"{kind}-{processes}" for kind in ("whole", "shared")]
    averages = both(module, [Constant(0.5), Constant(0.9)])
    for _ in range(4):
        train(module, 1, *averages)
        for average, directory in zip(averages, directories, strict=True):
            take(Snapshots(directory, every_n_steps=2), average.averages)
    paths = [write(Snapshots(d, every_n_steps=2), a.averages) for a, d in zip(averages, directories, strict=True)]
    if rank == 0:
        one, other = ([torch.load(p, weights_only=True) for p in sorted(d.glob("*-00*"))] for d in directories)
        assert len(one) == len(other) == 2
        for a, b in zip(one, other, strict=True):
            assert all(equal(x["tensors"], y["tensors"]) for x, y in zip(a["averages"], b["averages"], strict=True))
            assert equal(a["rest"], b["rest"]) and a["entries"] == b["entries"]
    else:
        assert paths == [None, None]
    dist.barrier()


def check_a_copy_goes_on_by_itself(rank, processes, folder):
    _, whole, shared = followed(Layers, processes)
    twin = copy.deepcopy(shared)
    train(engine(twin).module, 1, twin)
    assert_alike(whole, shared)
    assert not equal(twin.named_tensors(), shared.named_tensors())


def check_updates_need_no_process_group(rank, processes, folder):
    """Neither does pairing again; only what gathers does."""
    module, whole, shared = followed(Layers, processes)
    dist.barrier()
    dist.destroy_process_group()
    module.first.weight.data = module.first.weight.data.clone()
    with torch.no_grad():
        module.first.weight.add_(0.5)
    whole.step()
    shared.step()
    start(rank, processes, folder, "again")
    assert_alike(whole, shared)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def start(rank, processes, folder, name):
    file = Path(folder) / f"{name}-{processes}"
    limit = datetime.timedelta(seconds=20)  # a process that waits for another says so
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=processes, timeout=limit)


def main(rank, processes, folder):
    torch.set_num_threads(1)
    start(rank, processes, folder, "group")
    only = sys.argv[2:]
    run_checks(rank, processes, [c for c in CHECKS if not only or c.__name__ in only], folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    ended = [fork(main, processes, sys.argv[1]) for processes in (2, 3)]
    sys.exit(ended != [[0, 0], [0, 0, 0]])
