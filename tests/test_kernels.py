"""Fast paths against the plain reference, and the reference against numbers worked out by hand."""

import pytest
import torch

from lightning_ema import kernels
from lightning_ema.kernels import (
    CHUNK,
    all_finite,
    exchange_,
    lerp_,
    lerp_cast_,
    lerp_reference_,
    lerp_several_,
    relative_distance,
    stretches,
)

SHAPES = [(3, 4), (), (0,), (5,), (2, 3, 4, 4), (CHUNK + 7,)]


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


@pytest.mark.parametrize(
    "layout", [lambda t: t, channels_last, strided], ids=["contiguous", "channels_last", "strided"]
)
@pytest.mark.parametrize("live_dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_cast_in_chunks_equals_the_reference(layout, live_dtype):
    averages, lives = lists(torch.float32, live_dtype, layout)
    expected = [average.clone() for average in averages]
    lerp_cast_([averages], lives, [0.3])
    lerp_reference_(expected, lives, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(averages, expected, strict=True))


@pytest.mark.parametrize(
    "layout", [lambda t: t, channels_last, strided], ids=["contiguous", "channels_last", "strided"]
)
@pytest.mark.parametrize("live_dtype", [torch.float32, torch.bfloat16])
def test_several_averages_in_one_pass_equal_the_reference_on_each(layout, live_dtype):
    rates, several = [0.3, 0.0, 1.0, 1e-3], []
    for shift in range(len(rates)):
        averages, lives = lists(torch.float32, live_dtype, layout)
        several.append([average + shift for average in averages])
    expected = [[average.clone() for average in averages] for averages in several]
    update = lerp_several_ if live_dtype == torch.float32 else lerp_cast_
    update(several, lives, rates)
    for averages, rate in zip(expected, rates, strict=True):
        lerp_reference_(averages, lives, rate)
    torch.testing.assert_close(several, expected, rtol=1e-6, atol=1e-7)


def test_stretches_hold_at_most_a_chunk_or_one_tensor():
    half = CHUNK // 2
    cuts = stretches([half, half, 1, 3 * CHUNK, 2, 3])
    assert cuts == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)]
    assert stretches([]) == [slice(0, 0)]


def test_cast_between_different_memory_orders():
    average, live = torch.zeros(2, 3), torch.arange(6.0).reshape(3, 2).t().bfloat16()
    lerp_cast_([[average]], [live], [0.5])
    assert average.tolist() == [[0, 1, 2], [0.5, 1.5, 2.5]]


def test_cast_needs_no_full_size_temporary(count_allocations):
    average, live = torch.zeros(20 * CHUNK), torch.ones(20 * CHUNK, dtype=torch.bfloat16)
    with count_allocations() as allocated:
        lerp_cast_([[average]], [live], [0.5])
    assert 0 < allocated.total <= 2 * CHUNK * 4
    assert average.eq(0.5).all()


@pytest.mark.parametrize(
    "layout", [lambda t: t, channels_last, strided], ids=["contiguous", "channels_last", "strided"]
)
def test_exchange_changes_places_bit_for_bit(layout):
    firsts, seconds = lists(torch.float32, torch.float32, layout)
    kept_firsts, kept_seconds = [t.clone() for t in firsts], [t.clone() for t in seconds]
    for first, second in zip(firsts, seconds, strict=True):
        exchange_(first, second)
    assert all(torch.equal(a, b) for a, b in zip(firsts, kept_seconds, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seconds, kept_firsts, strict=True))


@pytest.mark.parametrize("interrupted_after", range(8))
def test_an_interrupted_exchange_leaves_both_as_they_were(monkeypatch, interrupted_after):
    first, second = torch.zeros(3 * CHUNK), torch.ones(3 * CHUNK)
    calls = 0
    copy_ = torch.Tensor.copy_

    def copy_once_interrupted(self, source):
        nonlocal calls
        calls += 1
        if calls == interrupted_after:
            raise KeyboardInterrupt
        return copy_(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_once_interrupted)
    if 0 < interrupted_after <= 6:
        with pytest.raises(KeyboardInterrupt):
            exchange_(first, second)
        assert first.eq(0).all() and second.eq(1).all()
    else:
        exchange_(first, second)
        assert first.eq(1).all() and second.eq(0).all()


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


def test_the_private_function_of_torch_is_still_there():
    assert callable(torch._foreach_lerp_)
    assert kernels.lerp_.__code__.co_names == ("torch", "_foreach_lerp_")
