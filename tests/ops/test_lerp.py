"""Fast paths against the plain reference, and the reference against numbers worked out by hand."""

import pytest
import torch

from lightning_ema.ops import lerp as kernels
from lightning_ema.ops.lerp import (
    STAGED,
    all_finite,
    lerp_,
    lerp_reference_,
    relative_distance,
    squared_norms,
)

SHAPES = [(3, 4), (), (0,), (5,), (2, 3, 4, 4), (STAGED // 2, 3), (4,), (STAGED // 8,)]


def lists(average_dtype, live_dtype, layout=lambda t: t):
    torch.manual_seed(0)
    averages = [layout(torch.randn(shape, dtype=average_dtype)) for shape in SHAPES]
    lives = [layout(torch.randn(shape).to(live_dtype)) for shape in SHAPES]
    return averages, lives


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def strided(tensor):
    return tensor.repeat_interleave(2, 0)[::2] if tensor.dim() == 1 else tensor


def test_reference_by_hand():
    average = [torch.tensor([1.0, 2.0])]
    lerp_reference_(average, [torch.tensor([3.0, -2.0])], 0.25)
    assert average[0].tolist() == [1.5, 1.0]


@pytest.mark.parametrize("rate", [0.0, 1e-4, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("layout", [lambda t: t, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_one_call_for_a_list_equals_the_reference(rate, layout, dtype):
    averages, lives = lists(dtype, dtype, layout)
    expected = [average.clone() for average in averages]
    lerp_(averages, lives, rate)
    lerp_reference_(expected, lives, rate)
    torch.testing.assert_close(averages, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bad_element_is_found(bad, dtype):
    tensors = [torch.randn(50).to(dtype), torch.randn(7, 7).to(dtype)]
    assert all_finite(tensors)
    tensors[1][3, 3] = bad
    assert not all_finite(tensors)


def test_large_finite_numbers_are_finite_though_their_sum_overflows():
    assert all_finite([torch.full((10,), 3e38), torch.full((10,), 6e4, dtype=torch.float16)])
    assert all_finite([])


def test_distance_by_hand():
    assert relative_distance([torch.tensor([3.0, 0.0])], [torch.tensor([0.0, 4.0])]) == pytest.approx(5 / 4)
    assert relative_distance([torch.zeros(2)], [torch.zeros(2)]) == 0


def test_distance_of_mixed_kinds_is_that_of_each_in_its_own_precision():
    averages = [torch.ones(3), torch.full((2,), 1 + 1e-12, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.cfloat)]
    lives = [torch.ones(3).half(), torch.ones(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.cfloat)]
    assert squared_norms(averages, lives)[0].item() == pytest.approx(2e-24, rel=1e-3)
    lives[2] = torch.full((2, 2), 3 + 4j, dtype=torch.cfloat)
    assert squared_norms(averages, lives).tolist() == pytest.approx([100, 105])


def test_the_private_function_of_torch_is_still_there():
    assert callable(torch._foreach_lerp_)
    assert kernels.lerp_.__code__.co_names == ("torch", "_foreach_lerp_")
