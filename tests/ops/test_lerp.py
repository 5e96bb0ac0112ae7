"""Fast paths against the plain reference, and the reference against numbers worked out by hand."""

import pytest
import torch

from lightning_ema.ops import lerp as kernels
from lightning_ema.ops.lerp import (
    CHUNK,
    STAGED,
    CastLerp,
    all_finite,
    exchange_,
    lerp_,
    lerp_alike_,
    lerp_cast_,
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
    update = lerp_alike_ if live_dtype == torch.float32 else lerp_cast_
    update(several, lives, rates)
    for averages, rate in zip(expected, rates, strict=True):
        lerp_reference_(averages, lives, rate)
    torch.testing.assert_close(several, expected, rtol=1e-6, atol=1e-7)


def test_cast_between_different_memory_orders():
    average, live = torch.zeros(2, 3), torch.arange(6.0).reshape(3, 2).t().bfloat16()
    lerp_cast_([[average]], [live], [0.5])
    assert average.tolist() == [[0, 1, 2], [0.5, 1.5, 2.5]]


def test_one_cutting_serves_many_updates_of_tensors_that_change():
    averages, lives = lists(torch.float32, torch.bfloat16)
    expected = [average.clone() for average in averages]
    update = CastLerp([averages], lives)
    for rate in (0.5, 0.25, 1.0, 0.125):
        for live in lives:
            live.mul_(2)
        update([rate])
        lerp_reference_(expected, lives, rate)
    assert all(torch.equal(a, b) for a, b in zip(averages, expected, strict=True))


def transposed(tensor):
    return tensor.view(-1, STAGED).t().contiguous().t()


@pytest.mark.parametrize("layout", [lambda t: t, transposed], ids=["one vector", "of another memory order"])
def test_cast_needs_no_full_size_temporary(count_allocations, layout):
    averages = [torch.zeros(5 * STAGED).view(-1, STAGED) for _ in range(2)]
    live = layout(torch.arange(5.0 * STAGED).bfloat16()).view(-1, STAGED)
    with count_allocations() as allocated:
        lerp_cast_([averages, averages], [live, live], [0.5, 0.0])
    assert 0 < allocated.total <= 2 << 20
    assert averages[1].equal(0.5 * live.float())


@pytest.mark.parametrize("live_dtype", [torch.float32, torch.bfloat16])
def test_distances_need_a_scratch_of_one_megabyte(count_allocations, live_dtype):
    averages = [torch.zeros(5 * CHUNK), torch.zeros(9)]
    lives = [torch.ones_like(average, dtype=live_dtype) for average in averages]
    with count_allocations() as allocated:
        squares = squared_norms(averages, lives)
    assert squares.tolist() == [5 * CHUNK + 9, 5 * CHUNK + 9]
    assert allocated.peak <= (1 << 20) + 4096


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


@pytest.mark.parametrize("after_the_copy", [False, True])
@pytest.mark.parametrize("interrupted_at", range(8))
def test_an_interrupted_exchange_leaves_both_as_they_were(monkeypatch, interrupted_at, after_the_copy):
    first, second = torch.full((3 * CHUNK,), torch.nan), torch.ones(3 * CHUNK)
    calls = 0
    copy_ = torch.Tensor.copy_

    def copy_once_interrupted(self, source):
        nonlocal calls
        calls += 1
        if calls == interrupted_at and not after_the_copy:
            raise KeyboardInterrupt
        copy_(self, source)
        if calls == interrupted_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "copy_", copy_once_interrupted)
    if 0 < interrupted_at <= 6:
        with pytest.raises(KeyboardInterrupt):
            exchange_(first, second)
        assert first.isnan().all() and second.eq(1).all()
    else:
        exchange_(first, second)
        assert first.eq(1).all() and second.isnan().all()


@pytest.mark.parametrize("interrupted_at", [1, 2])
def test_an_interrupted_exchange_keeps_the_sign_of_a_zero(monkeypatch, interrupted_at):
    first, second = torch.tensor([0.0, torch.nan]), torch.tensor([-0.0, torch.nan])
    copy_ = torch.Tensor.copy_
    sources = []

    def interrupted(self, source):
        copy_(self, source)
        sources.append(source)
        if len(sources) == interrupted_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exchange_(first, second)
    assert not first[0].signbit() and second[0].signbit()


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
