"""Averages split among three processes, without any process: each part by hand. With processes: shared_average.py."""

import pickle

import pytest
import torch
from torch import nn

from lightning_ema.distributed.base import cut_of
from lightning_ema.distributed.partition import Partition, can_be_partitioned, partitions


def of_process(rank, *sizes, processes=3):
    return list(partitions([torch.zeros(size) for size in sizes], rank, processes))


def test_tensors_laid_end_to_end_are_cut_into_equal_parts():
    # 4 + 5 + 2 = 11 elements, 4 to a process: aaaa | bbbb | b cc
    first, second, third = of_process(1, 4, 5, 2)
    assert first == Partition(rank=1, bounds=(0, 4, 4, 4), stride=(1,))
    assert second == Partition(rank=1, bounds=(0, 0, 4, 5), stride=(1,))
    assert third == Partition(rank=1, bounds=(0, 0, 0, 2), stride=(1,))


def test_more_processes_than_elements_leave_some_with_none():
    (only,) = of_process(2, 2)
    assert only.bounds == (0, 1, 2, 2)
    assert only.beside(torch.zeros(2)).tolist() == []
    (empty,) = of_process(0, 0)
    assert empty.bounds == (0, 0, 0, 0)


@pytest.mark.parametrize(("rank", "kept"), [(0, [0.0, 1.0]), (1, [2.0, 3.0]), (2, [4.0, 5.0])])
def test_a_process_keeps_elements_in_their_order_in_memory(rank, kept):
    live = torch.arange(6.0).view(2, 3)
    (cut,) = partitions([live], rank, 3)
    part = cut.beside(live)
    assert part.tolist() == kept and cut.local(part) is part
    live += 1
    assert part.tolist() == [value + 1 for value in kept]  # a view


def test_a_tensor_that_lies_otherwise_is_cut_as_the_live_one_is():
    live = torch.zeros(3, 2).t()  # (2, 3), column by column
    (cut,) = partitions([live], 0, 3)
    value = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert cut.beside(value).tolist() == [1.0, 4.0]
    stored = torch.zeros(2)
    cut.write(stored, value)
    assert stored.tolist() == [1.0, 4.0]


def test_the_whole_is_put_together_from_what_each_process_sends(monkeypatch):
    live = torch.zeros(3, 2).t()
    (cut,) = partitions([live], 1, 3)
    sent = {0: [1.0, 4.0], 1: None, 2: [3.0, 6.0]}

    def broadcast(elements, src):
        if sent[src] is not None:
            elements.copy_(torch.tensor(sent[src]))

    monkeypatch.setattr("torch.distributed.broadcast", broadcast)
    whole = cut.whole(torch.tensor([2.0, 5.0]), live)
    assert whole.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert whole.stride() == live.stride()


def test_it_is_no_form_that_a_module_could_carry_and_survives_a_pickle():
    (cut,) = of_process(0, 3)
    assert not cut.stored_as_live and not cut.sharded
    assert pickle.loads(pickle.dumps(cut)) == cut


def test_another_memory_format_is_refused_by_name():
    live = torch.zeros(2, 3)
    (cut,) = partitions([live], 0, 3)
    cut.check("weight", live)
    with pytest.raises(RuntimeError, match=r"weight changed its memory format from strides \(3, 1\) to \(1, 2\)"):
        cut.check("weight", torch.zeros(3, 2).t())


def test_tensors_with_gaps_are_kept_whole():
    assert can_be_partitioned(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last))
    assert not can_be_partitioned(torch.zeros(4, 6)[:, ::2])
    with pytest.raises(ValueError, match="has gaps"):
        Partition(0, (0, 12), (6, 2)).beside(torch.zeros(4, 6)[:, ::2])


def test_only_averages_of_whole_tensors_are_partitioned():
    live = nn.Parameter(torch.zeros(4))
    (partition,) = partitions([live], 0, 2)
    assert cut_of(live, partition) is partition
    assert cut_of(live) is not partition
