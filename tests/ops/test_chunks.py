"""Lists cut into chunks: each element once, in order, and never more of them than asked for."""

import pytest
import torch

from lightning_ema.ops.chunks import WORTH_CUTTING, chunks, flat_alike

SIZE = 64


def numbered(shapes):
    """Tensors whose elements are numbered through."""
    tensors, start = [], 0
    for shape in shapes:
        count = torch.Size(shape).numel()
        tensors.append(torch.arange(start, start + count).reshape(shape))
        start += count
    return tensors


def elements(cut, place):
    return [int(element) for chunk in cut for tensor in chunk[place] for element in tensor.flatten()]


@pytest.mark.parametrize(
    "shapes",
    [
        [],
        [()],
        [(0,)],
        [(SIZE,)],
        [(SIZE + 1,)],
        [(SIZE - 1,), (2,), (0,), (3,)],
        [(SIZE,), (3 * SIZE,), (1,)],
        [(10, 13), (), (2, 3), (50,), (9, 9)],
        [(1,)] * (2 * SIZE + 3),
    ],
)
def test_each_element_comes_once_and_in_order(shapes):
    tensors = numbered(shapes)
    cut = list(chunks([tensors, [-tensor for tensor in tensors]], SIZE))
    count = sum(tensor.numel() for tensor in tensors)
    assert elements(cut, 0) == list(range(count))
    assert elements(cut, 1) == [-number for number in range(count)]
    assert all(sum(tensor.numel() for tensor in each) <= SIZE for chunk in cut for each in chunk)


def test_pieces_fill_a_portion_but_small_tensors_are_left_whole():
    worth = SIZE // WORTH_CUTTING + 1
    sizes = lambda *counts: [[t.numel() for t in own] for (own,) in chunks([numbered([(n,) for n in counts])], SIZE)]  # noqa: E731
    assert sizes(10, 2 * SIZE) == [[10, SIZE - 10], [SIZE], [10]]
    assert sizes(SIZE - 1, worth) == [[SIZE - 1, 1], [worth - 1]]
    assert sizes(SIZE - 1, worth - 1) == [[SIZE - 1], [worth - 1]]
    assert sizes(SIZE, 2 * SIZE) == [[SIZE], [SIZE], [SIZE]]


@pytest.mark.parametrize("shape", [(10, 13), (130,), (2, 70, 1), (5, 5, 6)])
def test_tensors_of_different_memory_orders_are_cut_at_the_same_places(shape):
    first = numbered([shape])[0]
    second = torch.empty(tuple(reversed(shape)), dtype=torch.int64).permute(*reversed(range(first.dim()))).copy_(first)
    if first.dim() == 1:
        second = torch.stack([first, first], 1)[:, 0]
    cut = list(chunks([[first], [second]], SIZE))
    assert elements(cut, 0) == elements(cut, 1)
    assert sorted(elements(cut, 0)) == list(range(first.numel()))
    assert all(tensor.numel() <= SIZE for chunk in cut for each in chunk for tensor in each)


def test_portions_are_views():
    tensor = torch.zeros(3 * SIZE)
    for ((part,),) in chunks([[tensor]], SIZE):
        part.add_(1)
    assert tensor.eq(1).all()


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        list(chunks([[torch.ones(1)], []], SIZE))


def test_flat_where_the_memory_has_no_gaps():
    dense = torch.arange(6).reshape(2, 3)
    assert flat_alike(dense.t())[0].tolist() == list(range(6))
    assert flat_alike(dense[:, :2]) is None
    assert flat_alike(dense, dense.t()) is None
    assert flat_alike(torch.ones(1).expand(3)) is None
