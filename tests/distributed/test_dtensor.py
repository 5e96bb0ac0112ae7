"""DTensors on a mesh of one process. Of several: engine_on_shards.py."""

import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import Linear

from lightning_ema.distributed.base import cut_of, local, reshards_of, same_cut
from lightning_ema.distributed.dtensor import DTensor, Replicate, Shard, one_of_each_process
from lightning_ema.distributed.partition import partitions

VALUES = [[1.0, 2.0], [3.0, 4.0]]


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data",))
    dist.destroy_process_group()


@pytest.fixture
def sharded(mesh):
    return DTensor.from_local(torch.tensor(VALUES), mesh, [Shard(0)])


def test_the_shard_is_what_arithmetic_reads_and_writes(sharded):
    cut = cut_of(sharded)
    assert cut.sharded and cut.stored_as_live
    shard = cut.local(cut.beside(sharded))
    assert type(shard) is torch.Tensor and shard is local(sharded)  # the same at each call
    shard += 1
    assert sharded.full_tensor().tolist() == [[2.0, 3.0], [4.0, 5.0]]


def test_a_module_carries_it_as_it_is_and_a_file_the_whole(sharded):
    cut = cut_of(sharded)
    assert cut.whole(sharded, sharded) is sharded
    whole = cut.gathered(sharded)
    assert type(whole) is torch.Tensor and whole.tolist() == VALUES


def test_groups_are_those_of_the_dimensions_along_which_it_is_cut(mesh, sharded):
    replicated = DTensor.from_local(torch.zeros(2), mesh, [Replicate()])
    assert cut_of(sharded).groups(sharded) == (mesh.get_group(0),)
    assert cut_of(replicated).sharded and cut_of(replicated).groups(replicated) == ()


@pytest.mark.parametrize("form", ["whole", "sharded"])
def test_values_are_written_in_either_form(sharded, form):
    cut = cut_of(sharded)
    stored = cut.empty_like(sharded, torch.float64, torch.device("cpu"))
    assert isinstance(stored, DTensor) and stored.placements == sharded.placements and stored.dtype == torch.float64
    cut.write(stored, torch.tensor(VALUES) if form == "whole" else sharded)
    assert local(stored).tolist() == VALUES


def test_an_average_lies_beside_its_shards(sharded):
    with pytest.raises(ValueError, match=r"device='meta' for weights whose shards lie on 'cpu'.*Leave device out"):
        cut_of(sharded).empty_like(sharded, torch.float32, torch.device("meta"))


def test_writes_to_the_shard_are_counted_too(sharded):
    cut = cut_of(sharded)
    before = cut.version(sharded)
    local(sharded).mul_(2)
    between = cut.version(sharded)
    with torch.no_grad():
        sharded.mul_(2)
    assert before < between < cut.version(sharded)


def test_tensors_are_alike_that_are_cut_along_the_same_dimensions(mesh, sharded):
    other = DTensor.from_local(torch.tensor(VALUES), mesh, [Shard(1)])
    assert same_cut(sharded, DTensor.from_local(torch.zeros(2, 2), mesh, [Shard(0)]))
    assert not same_cut(sharded, other)
    assert not same_cut(sharded, torch.zeros(2, 2))
    assert not same_cut(torch.zeros(2, 2), sharded)


def test_what_is_sharded_is_not_partitioned_as_well(sharded):
    (partition,) = partitions([torch.zeros(2, 2)], 0, 1)
    assert cut_of(sharded, partition) is cut_of(sharded)
    pickle.dumps(cut_of(sharded))  # it holds no process group


def test_the_stamp_of_a_save_holds_one_number_for_each_process(sharded):
    stamp = one_of_each_process(7, [sharded])
    assert isinstance(stamp, DTensor) and stamp.full_tensor().tolist() == [7]


def test_a_module_that_always_shows_its_own_tensors_need_not_be_resharded():
    assert reshards_of(Linear(1, 1)) == []
