import torch
from torch import nn

from lightning_ema.modules.memory import is_expanded, memory_of, overlapping, owns_storage, storage_of


def test_storage_that_something_else_uses_is_not_our_own():
    flat = torch.zeros(6)
    assert owns_storage(nn.Parameter(torch.zeros(2, 3)))
    assert owns_storage(nn.Parameter(torch.zeros(2, 3).t()))
    assert not owns_storage(nn.Parameter(flat[:4].view(2, 2)))
    assert not owns_storage(nn.Parameter(torch.zeros(2)).share_memory_())


def test_tensors_on_the_same_memory_are_the_same_only_in_the_same_shape():
    tensor = torch.zeros(2, 3)
    assert memory_of(tensor) == memory_of(tensor.detach())
    assert memory_of(tensor) != memory_of(tensor.view(3, 2))
    assert memory_of(tensor) != memory_of(torch.zeros(2, 3))
    assert memory_of(torch.zeros(0)) != memory_of(torch.zeros(0))  # both lie nowhere


def test_views_of_one_buffer_have_one_storage():
    flat = torch.zeros(6)
    assert storage_of(flat[:2]) == storage_of(flat[2:]) != storage_of(torch.zeros(6))
    first, second = torch.zeros(0), torch.zeros(0)
    assert storage_of(first) != storage_of(second)


def test_an_expanded_tensor_holds_fewer_numbers_than_elements():
    assert is_expanded(torch.zeros(3, 1).expand(3, 2))
    assert not is_expanded(torch.zeros(1, 3).expand(1, 3))
    assert not is_expanded(torch.zeros(3, 2).t())


def test_overlapping_tensors_are_found_whichever_lies_between():
    flat = torch.zeros(12)
    all_of_it, left, right = flat[:10], flat[1:3], flat[5:7]
    apart, elsewhere = flat[10:], torch.zeros(4)
    found = overlapping([apart, right, all_of_it, elsewhere, left])
    assert found == {id(all_of_it), id(left), id(right)}
    every_other, between = flat[::2], flat[1::2]  # which share no element, but the span of memory
    assert overlapping([every_other, between]) == {id(every_other), id(between)}
