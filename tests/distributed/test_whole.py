import torch

from lightning_ema.distributed.base import cut_of, same_cut


def test_a_whole_tensor_has_one_form_and_asks_no_process():
    tensor = torch.tensor([1.0, 2.0])
    cut = cut_of(tensor)
    assert not cut.sharded and cut.stored_as_live and cut.groups(tensor) == ()
    assert cut.local(tensor) is tensor and cut.beside(tensor) is tensor
    assert cut.gathered(tensor) is tensor and cut.whole(tensor, torch.zeros(2)) is tensor
    cut.check("weight", tensor.t())


def test_values_are_written_and_writes_are_counted():
    stored = torch.zeros(2, dtype=torch.float64)
    cut = cut_of(stored)
    before = cut.version(stored)
    cut.write(stored, torch.tensor([1.0, 2.0]))
    assert stored.tolist() == [1.0, 2.0]
    assert cut.version(stored) == before + 1


def test_new_tensors_keep_strides_and_take_the_dtype_that_is_asked_for():
    like = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True).t()
    made = cut_of(like).empty_like(like, torch.float32, torch.device("cpu"))
    assert (made.dtype, made.shape, made.stride(), made.requires_grad) == (torch.float32, (3, 2), (1, 3), False)


def test_two_whole_tensors_are_cut_alike():
    assert same_cut(torch.zeros(2), torch.ones(2))
