"""Run by test_engine_on_shards: checks of the engine on sharded weights, in 2 and in 4 processes without a Trainer.

Each process writes to ``<folder>/<processes>-<rank>.json`` how each check ended: "" or what was raised.
"""

import copy
import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from helpers import engine
from sharded import ended, fully_shard, network, quiet, same, whole, whole_of, write
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_ema import Bema, Constant, Warmup, WeightAverage
from lightning_ema.distributed.base import local
from lightning_ema.distributed.dtensor import DTensor

try:
    from torch.distributed.fsdp import MixedPrecisionPolicy
except ImportError:  # before torch 2.6
    from torch.distributed._composable.fsdp import MixedPrecisionPolicy

CHECKS = {2: {}, 4: {}}


def check(processes):
    def note(function):
        CHECKS[processes][function.__name__] = function
        return function

    return note


class Net(nn.Module):
    """The LayerNorm and ``scale`` belong to the outermost group; of the last layer's one row a process has nothing."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = network(), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.net(x) * self.scale


def mesh(shape=None, names=("data",)):
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)


def sharded(module=None, over=None, **arguments):
    module = Net() if module is None else module
    for part in (module.net[0], module.net[3], module):
        fully_shard(part, mesh=over or mesh(), **arguments)
    return module


def batches(count=6):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 4, generator=generator) for _ in range(count)]


def own(batch, rank=None, parts=None):
    parts = dist.get_world_size() if parts is None else parts
    return batch.chunk(parts)[dist.get_rank() if rank is None else rank]


def train(module, *averages, each=batches, part=own, after=lambda: None, optimizer=None):
    optimizer = optimizer or torch.optim.Adam(module.parameters(), 0.05)
    for batch in each():
        x = part(batch)
        optimizer.zero_grad()
        (module(x).float() - x.sum(1, keepdim=True).sin()).square().mean().backward()
        optimizer.step()
        for average in averages:
            average.step()
        after()
    return module


def mirrored(module, **settings):
    """An average of a sharded module, and one of a plain module that is given the same weights at each step."""
    twin = copy_of(module)
    average, mirror = WeightAverage(module, **settings), WeightAverage(twin, **settings)

    def follow():
        give(twin, module)
        mirror.step()

    return average, mirror, follow


def give(twin, module):
    """Writes the weights of a sharded module into a plain one."""
    live = whole_of(engine(WeightAverage(module, 0.5, include_frozen=True)).named_live())
    with torch.no_grad():
        for name, tensor in twin.state_dict(keep_vars=True).items():
            tensor.copy_(live[name])


def copy_of(module):
    twin = Net().to(next(module.parameters()).dtype)
    give(twin, module)
    for (_, mine), (_, of_twin) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
        of_twin.requires_grad_(mine.requires_grad)
    return twin


def outputs(module):
    with torch.no_grad():
        return module(batches(1)[0])


# --- FSDP2 ----------------------------------------------------------------------------------------------------------


@check(2)
def averages_are_those_of_an_unsharded_module():
    decays = [Constant(0.9), Warmup(0.99), Bema(0.5)]
    for settings in ({"decay": decays}, {"decay": Constant(0.9), "every_n_steps": 2}, {"decay": 0.9, "start_step": 3}):
        module = sharded()
        average, mirror, follow = mirrored(module, **settings)
        train(module, average, after=follow)
        for one, other in zip(average.averages, mirror.averages, strict=True):
            same(one.named_tensors(), other.named_tensors(), 3e-7)
        assert average.num_updates == mirror.num_updates > 0

        alone = Net()
        of_alone = WeightAverage(alone, **settings)
        train(alone, of_alone, part=lambda batch: batch)
        for one, other in zip(average.averages, of_alone.averages, strict=True):
            same(one.named_tensors(), other.named_tensors(), 1e-6)


@check(2)
def shards_are_uneven_and_empty_and_each_process_holds_no_more():
    module = sharded()
    average = WeightAverage(module, Constant(0.9))
    train(module, average)
    sizes = {name: local(tensor).numel() for name, tensor in average.named_tensors()}
    rank = dist.get_rank()
    expected = {"net.0.weight": (16, 12), "net.0.bias": (4, 3), "net.1.weight": (4, 3), "net.1.bias": (4, 3)}
    expected |= {"net.3.weight": (7, 0), "net.3.bias": (1, 0), "scale": (1, 0)}
    assert sizes == {name: of_ranks[rank] for name, of_ranks in expected.items()}
    assert all(isinstance(tensor, DTensor) for _, tensor in average.named_tensors())


@check(2)
def an_update_from_weights_that_are_nan_in_one_process_is_skipped_in_all():
    for place in (0, 1):
        for action in ("skip", "raise"):
            module = sharded()
            average = WeightAverage(module, Constant(0.5), on_nonfinite=action)
            average.step()
            before = whole_of(average.named_tensors())
            weight = dict(engine(average).named_live())["net.0.weight"]
            if dist.get_rank() == place:
                local(weight)[0, 0] = float("nan")
            if action == "skip":
                assert average.step() is False and engine(average).num_skipped == 1
            else:
                with pytest.raises(FloatingPointError, match="step 2: the live weights are not finite"):
                    average.step()
            same(before, average.named_tensors())


@check(2)
def distance_is_that_of_the_whole():
    module = sharded()
    average, mirror, follow = mirrored(module, decay=[Constant(0.9), Constant(0.5)])
    train(module, average, after=follow)
    for one, other in zip(average.averages, mirror.averages, strict=True):
        assert one.distance() == pytest.approx(other.distance(), rel=1e-6) and one.distance() > 0
    with average.swapped():
        assert average.distance() == pytest.approx(mirror.distance(), rel=1e-6)


@check(2)
def include_and_exclude_choose_by_name():
    module = sharded()
    average, mirror, follow = mirrored(module, decay=Constant(0.9), include=["net.*"], exclude=["*.bias"])
    train(module, average, after=follow)
    assert [name for name, _ in average.named_tensors()] == ["net.0.weight", "net.1.weight", "net.3.weight"]
    same(average.named_tensors(), mirror.named_tensors(), 3e-7)


@check(2)
def a_parameter_unfrozen_later_joins_with_its_value():
    module = Net()
    module.net[0].requires_grad_(False)
    sharded(module)
    average, mirror, follow = mirrored(module, decay=Constant(0.9))
    train(module, average, after=follow)
    assert "net.0.weight" not in dict(average.named_tensors())
    module.net[0].requires_grad_(True)
    engine(mirror).module.net[0].requires_grad_(True)
    train(module, average, after=follow)
    assert "net.0.weight" in dict(average.named_tensors())
    same(average.named_tensors(), mirror.named_tensors(), 3e-7)


@check(2)
def forward_passes_before_and_inside_a_swap_see_what_they_should():
    module = sharded()
    average = WeightAverage(module, Constant(0.9))
    train(module, average)
    live, averaged = Net(), Net()
    live.load_state_dict(whole_of(engine(average).named_live()))
    averaged.load_state_dict(whole_of(average.named_tensors()))
    for _ in range(2):
        torch.testing.assert_close(outputs(module), outputs(live), rtol=0, atol=1e-6)
        with average.swapped() as carrying:
            torch.testing.assert_close(outputs(carrying), outputs(averaged), rtol=0, atol=1e-6)
        torch.testing.assert_close(outputs(module), outputs(live), rtol=0, atol=1e-6)
        assert (outputs(live) - outputs(averaged)).abs().max() > 0.01


@check(2)
def training_is_the_same_with_and_without_swaps():
    for arguments in ({}, {"reshard_after_forward": False}):
        plain, beside = sharded(**arguments), sharded(**arguments)
        train(plain)
        average = WeightAverage(beside, [Constant(0.9), Constant(0.5)])
        train(beside, average, after=lambda of=average: evaluate(of.averages[of.num_steps % 2]))
        same(dict(plain.named_parameters()), dict(beside.named_parameters()))


def evaluate(average):
    for copied in (False, True):
        outputs(engine(average).module)
        with average.swapped(copied):
            outputs(engine(average).module)
            engine(average).module.state_dict()


@check(2)
def a_write_during_the_swap_is_refused_by_name_and_the_live_weights_are_back():
    for change in (lambda p: p.mul_(2.0), lambda p: local(p).mul_(2.0)):
        module = sharded()
        average = WeightAverage(module, Constant(0.9))
        train(module, average)
        live = whole_of(engine(average).named_live())
        average.swap_in()
        outputs(module)
        module.reshard()
        with torch.no_grad():
            change(module.net[1].weight)
        with pytest.raises(RuntimeError, match=r"net\.1\.weight: written to"):
            average.swap_out()
        same(live, engine(average).named_live())
        with torch.no_grad(), average.swapped(copy=True):
            module.net[1].weight.mul_(2.0)


@check(2)
def a_paused_swap_shows_the_live_weights_and_goes_on():
    module = sharded()
    average = WeightAverage(module, [Constant(0.9), Constant(0.5)])
    train(module, average)
    live, first, second = (
        whole_of(n) for n in (engine(average).named_live(), *(a.named_tensors() for a in average.averages))
    )
    with average.swapped():
        outputs(module)
        with engine(average).holds.instead(None):
            same(live, shown(module))
            outputs(module)
            with average.averages[1].swapped():
                same(second, shown(module))
                outputs(module)
        same(first, shown(module))
        same(live, engine(average).named_live())
    same(live, shown(module))
    same(second, average.averages[1].named_tensors())


def shown(module):
    for each in module.modules():
        if hasattr(each, "reshard"):
            each.reshard()
    return dict(module.named_parameters())


@check(2)
def an_applied_average_is_restored():
    module = sharded()
    average = WeightAverage(module, [Constant(0.9), Constant(0.5)])
    train(module, average)
    live, first, second = (
        whole_of(n) for n in (engine(average).named_live(), *(a.named_tensors() for a in average.averages))
    )
    average.apply(keep=True)
    same(first, module.state_dict())
    outputs(module)
    same(first, average.named_tensors())
    same(live, engine(average).named_live())
    with average.averages[1].swapped():
        outputs(module)
        same(second, shown(module))
    same(first, shown(module))
    average.restore()
    same(live, shown(module))
    train(module, average)
    average.apply()
    same(average.named_tensors(), shown(module))


@check(2)
def under_mixed_precision_the_average_follows_the_float32_shards():
    module = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    average, mirror, follow = mirrored(module, decay=Constant(0.9))

    def then():
        follow()
        with average.swapped():
            assert outputs(module).dtype == torch.bfloat16

    train(module, average, after=then, part=lambda batch: own(batch).bfloat16())
    assert {tensor.dtype for _, tensor in average.named_tensors()} == {torch.float32}
    same(average.named_tensors(), mirror.named_tensors(), 3e-7)


@check(2)
def bf16_weights_have_a_float32_average():
    module = sharded(Net().bfloat16())
    average, mirror, follow = mirrored(module, decay=[Constant(0.9), Constant(0.99)])

    def then():
        follow()
        live = whole_of(engine(average).named_live())
        with average.swapped():
            module(batches(1)[0].bfloat16())
            rounded = {name: tensor.bfloat16() for name, tensor in whole_of(average.named_tensors()).items()}
            same(rounded, shown(module))
        same(live, shown(module))

    train(module, average, after=then, part=lambda batch: own(batch).bfloat16())
    assert {tensor.dtype for _, tensor in average.named_tensors()} == {torch.float32}
    for one, other in zip(average.averages, mirror.averages, strict=True):
        same(one.named_tensors(), other.named_tensors(), 3e-7)


@check(2)
def a_state_goes_on_where_it_was_taken():
    decays = [Constant(0.9), Bema(0.5)]
    module = sharded()
    average = WeightAverage(module, decays)
    train(module, average)
    state = average.state_dict()
    assert all(isinstance(tensor, DTensor) for tensor in state["average"].values())
    plain = {
        **state,
        "average": whole_of(state["average"]),
        "further": [whole_of(other) for other in state["further"]],
        "origin": whole_of(state["origin"]),
    }
    for given in (state, plain):
        again = sharded()
        of_again = WeightAverage(again, decays)
        of_again.load_state_dict(copy.deepcopy(given))
        with torch.no_grad():
            for (_, mine), (_, new) in zip(module.named_parameters(), again.named_parameters(), strict=True):
                local(new).copy_(local(mine))
        for one, other in zip(average.averages, of_again.averages, strict=True):
            same(one.named_tensors(), other.named_tensors())
        assert of_again.num_updates == average.num_updates
        bad = {**given, "average": {**given["average"], "scale": torch.ones(2)}}
        with pytest.raises(ValueError, match=r"scale.*shape \(2,\)"):
            of_again.load_state_dict(bad)


@check(2)
def a_whole_state_is_loaded_as_shards_of_unlike_sizes():
    module = sharded()
    average = WeightAverage(module, Constant(0.9))
    alone = Net()
    of_alone = WeightAverage(alone, Constant(0.9))
    train(alone, of_alone, part=lambda batch: batch)
    average.load_state_dict(of_alone.state_dict())
    same(average.named_tensors(), of_alone.named_tensors())


@check(2)
def into_a_teacher_that_is_sharded_alike():
    student, teacher = sharded(), sharded()
    teacher.requires_grad_(False)
    average = WeightAverage(student, Constant(0.9), into=teacher)
    _, mirror, follow = mirrored(student, decay=Constant(0.9))

    def look():
        follow()
        averaged = Net()
        averaged.load_state_dict(whole_of(mirror.named_tensors()))
        torch.testing.assert_close(outputs(teacher), outputs(averaged), rtol=0, atol=1e-6)

    train(student, average, after=look)
    same(mirror.named_tensors(), shown(teacher), 3e-7)
    with pytest.raises(ValueError, match="into: scale is sharded in another way"):
        WeightAverage(sharded(), Constant(0.9), into=Net())
    with pytest.raises(ValueError, match="into: scale is sharded in another way"):
        WeightAverage(Net(), Constant(0.9), into=sharded())


@check(2)
def a_tied_weight_counts_once():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.net[3] = nn.Linear(7, 1, bias=False)
            self.net[0] = nn.Linear(4, 7, bias=False)
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return super().forward(self.second(self.first(x)))

    module = sharded(Tied())
    average = WeightAverage(module, Constant(0.9))
    names = [name for name, _ in average.named_tensors()]
    assert "first.weight" in names and "second.weight" not in names
    expected = whole_of(engine(average).named_live())

    def evaluate():
        with torch.no_grad():
            for name, live in engine(average).named_live():
                expected[name].lerp_(whole(live), 0.1)
        outputs(module)
        with average.swapped():
            averaged = Tied()
            averaged.load_state_dict({**whole_of(average.named_tensors()), "second.weight": expected["first.weight"]})
            torch.testing.assert_close(outputs(module), outputs(averaged), rtol=0, atol=1e-6)

    plain = sharded(Tied())
    train(plain)
    train(module, average, after=evaluate)
    same(average.named_tensors(), expected, 3e-7)
    same(dict(plain.named_parameters()), shown(module))


@check(2)
def an_average_of_shards_lies_beside_them():
    with pytest.raises(ValueError, match="Leave device out"):
        WeightAverage(sharded(), Constant(0.9), device="cuda")
    WeightAverage(sharded(), Constant(0.9), device="cpu")


# --- tensor parallel, and 2-D ---------------------------------------------------------------------------------------

PLAN = {"net.0": ColwiseParallel(), "net.3": RowwiseParallel()}


class Even(nn.Module):
    """The norm and the last layer are left out of a tensor parallel plan: their tensors stay plain."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.norm, self.last, self.scale = nn.LayerNorm(4), nn.Linear(3, 1), nn.Parameter(torch.ones(1))
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Identity(), nn.Linear(8, 3))

    def forward(self, x):
        return self.last(self.net(self.norm(x))) * self.scale


def alone_at(settings):
    alone = Even()
    average = WeightAverage(alone, **settings)
    train(alone, average, part=lambda batch: batch)
    return average


def parallel(over):
    module = Even()
    parallelize_module(module, over, PLAN)
    return module


def like_one_process(module, part):
    """Trains with swaps in between, and compares with a plain module that is trained alike."""
    settings = {"decay": [Constant(0.9), Constant(0.5)], "on_nonfinite": "raise"}
    average = WeightAverage(module, **settings)

    def evaluate():
        outputs(module)
        for each in average.averages:
            live = whole_of(engine(average).named_live())
            with each.swapped():
                averaged = Even()
                averaged.load_state_dict(whole_of(each.named_tensors()))
                torch.testing.assert_close(outputs(module), outputs(averaged), rtol=0, atol=1e-6)
            same(live, shown(module))

    train(module, average, part=part, after=evaluate)
    alone = alone_at(settings)
    for one, other in zip(average.averages, alone.averages, strict=True):
        same(one.named_tensors(), other.named_tensors(), 1e-6)
        assert one.distance() == pytest.approx(other.distance(), rel=1e-4)
    average.apply(keep=True)
    same(average.named_tensors(), shown(module))
    average.restore()
    state = average.state_dict()
    again = WeightAverage(module, settings["decay"])
    again.load_state_dict(state)
    same(again.named_tensors(), average.named_tensors())
    whole_state = {**state, "average": whole_of(state["average"]), "further": [whole_of(o) for o in state["further"]]}
    again.load_state_dict(whole_state)
    same(again.named_tensors(), average.named_tensors())
    return average


@check(2)
def tensor_parallel_with_plain_modules_beside():
    average = like_one_process(parallel(mesh()), lambda batch: batch)
    kinds = {name: isinstance(tensor, DTensor) for name, tensor in average.named_tensors()}
    assert {name for name, is_cut in kinds.items() if is_cut} == {
        "net.0.weight",
        "net.0.bias",
        "net.3.weight",
        "net.3.bias",
    }
    assert dict(average.named_tensors())["net.0.weight"].to_local().shape == (4, 4)


@check(2)
def under_tensor_parallel_a_nan_in_one_process_is_agreed_on():
    average = WeightAverage(parallel(mesh()), Constant(0.5), on_nonfinite="skip")
    average.step()
    if dist.get_rank() == 1:
        local(dict(engine(average).named_live())["net.3.weight"])[0, 0] = float("inf")
    assert average.step() is False and engine(average).num_skipped == 1


@check(4)
def replicated_and_sharded():
    over = mesh((2, 2), ("replicate", "shard"))
    module = Even()
    sharded(module, over)
    average = like_one_process(module, own)
    assert dict(average.named_tensors())["net.0.weight"].to_local().shape == (4, 4)


@check(4)
def sharded_and_tensor_parallel():
    over = mesh((2, 2), ("data", "tensor"))
    module = parallel(over["tensor"])
    sharded(module, over["data"])
    data = over["data"].get_local_rank()
    average = like_one_process(module, lambda batch: own(batch, data, 2))
    assert dict(average.named_tensors())["net.0.weight"].to_local().shape == (2, 4)


@check(4)
def a_nan_in_one_of_four_is_agreed_on_by_all():
    over = mesh((2, 2), ("data", "tensor"))
    module = parallel(over["tensor"])
    sharded(module, over["data"])
    for place in range(4):
        average = WeightAverage(module, Constant(0.5), on_nonfinite="skip")
        weight = local(dict(engine(average).named_live())["net.3.weight"])
        kept = weight.clone()
        if dist.get_rank() == place:
            weight.fill_(float("nan"))
        assert average.step() is False and engine(average).num_skipped == 1
        weight.copy_(kept)
        assert average.step() is True


@check(4)
def more_processes_than_rows():
    module = sharded()
    average, mirror, follow = mirrored(module, decay=[Constant(0.9), Bema(0.5)], on_nonfinite="raise")
    train(module, average, after=follow)
    for one, other in zip(average.averages, mirror.averages, strict=True):
        same(one.named_tensors(), other.named_tensors(), 3e-7)
    assert average.distance() == pytest.approx(mirror.distance(), rel=1e-6)


# --- running them ---------------------------------------------------------------------------------------------------


def process(rank, processes, folder):
    quiet()
    where = f"file://{folder}/store-{processes}"
    dist.init_process_group("gloo", where, timedelta(seconds=60), world_size=processes, rank=rank)
    wanted = set(sys.argv[2:])
    checks = {name: function for name, function in CHECKS[processes].items() if not wanted or name in wanted}
    write(folder, f"{processes}-{rank}", ended(checks))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    for processes in CHECKS:
        multiprocessing.start_processes(process, (processes, sys.argv[1]), processes, start_method="fork")
