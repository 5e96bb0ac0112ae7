"""The update in one launch: in Triton's interpreter, which needs no GPU, and compiled for GPUs that are not there."""

import importlib
import re
import sys
import warnings

import pytest
import torch
from helpers import engine, seeded
from torch import nn

from lightning_ema import Constant, WeightAverage
from lightning_ema.averaging import update as updates
from lightning_ema.ops.fused import BLOCK, TOGETHER, FusedLerp, fits, lerp_of
from lightning_ema.ops.lerp import AlikeLerp, CastLerp, lerp_reference_

triton = pytest.importorskip("triton", reason="Triton has no release for this system")

SHAPES = [(3, 5), (), (0, 4), (BLOCK,), (2 * BLOCK + 1,), (4, 3, 8, 8), (7,)]


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel runs on tensors of the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "lightning_ema.ops.triton_lerp", raising=False)
    module = importlib.import_module("lightning_ema.ops.triton_lerp")
    monkeypatch.setitem(sys.modules, "lightning_ema.ops.triton_lerp", module)


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, "lightning_ema.ops.triton_lerp", raising=False)
    return importlib.import_module("lightning_ema.ops.triton_lerp")


def lists(count, dtype, shapes=SHAPES):
    torch.manual_seed(0)
    lives = [torch.randn(shape).to(dtype) for shape in shapes]
    lives = [live.to(memory_format=torch.channels_last) if live.dim() == 4 else live for live in lives]
    return [[torch.randn_like(live, dtype=torch.float32) for live in lives] for _ in range(count)], lives


@pytest.mark.parametrize("rates", [[0.0], [1e-4], [0.3], [0.7], [1.0], [0.1, 0.9], [0.5, 1e-3, 0.25, 1.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_launch_is_the_plain_update(interpreted, dtype, rates):
    averages, lives = lists(len(rates), dtype)
    expected = [[average.clone() for average in each] for each in averages]
    assert fits(averages, lives)
    FusedLerp(averages, lives, None)(rates)
    for each, rate in zip(expected, rates, strict=True):
        lerp_reference_(each, lives, rate)
    torch.testing.assert_close(averages, expected, rtol=1e-6, atol=1e-7)
    if rates == [1.0]:
        assert all(torch.equal(average, live.float()) for average, live in zip(averages[0], lives, strict=True))


def test_a_launch_writes_nothing_beyond_its_tensors(interpreted):
    memory = torch.zeros(3, BLOCK + 3)
    averages = [[memory[1, 1 : BLOCK + 2]]]  # an address that is no multiple of 16
    FusedLerp(averages, [torch.ones(BLOCK + 1)], None)([0.25])
    expected = torch.zeros_like(memory)
    expected[1, 1 : BLOCK + 2] = 0.25
    assert torch.equal(memory, expected)


def test_a_list_without_elements(interpreted):
    FusedLerp([[torch.zeros(0)]], [torch.zeros(0)], None)([0.5])


@pytest.mark.parametrize(
    ("averages", "live"),
    [
        ([torch.zeros(2, dtype=torch.float64)], torch.zeros(2)),
        ([torch.zeros(2)], torch.zeros(2, dtype=torch.float64)),
        ([torch.zeros(2)], torch.zeros(4)[::2]),
        ([torch.zeros(2, 3)], torch.zeros(3, 2).T),
        ([torch.zeros(2)] * (TOGETHER + 1), torch.zeros(2)),
        ([torch.zeros(2)], torch.zeros(2, device="meta")),
    ],
    ids=["float64 average", "float64 weights", "gaps", "another order", "five averages", "another device"],
)
def test_lists_that_it_leaves_to_the_portions(averages, live):
    assert not fits([[average] for average in averages], [live])


def test_without_a_gpu_updates_are_eager():
    averages, lives = lists(1, torch.bfloat16)
    assert type(lerp_of(averages, lives)) is CastLerp
    averages, lives = lists(2, torch.float32)
    assert type(lerp_of(averages, lives)) is AlikeLerp


def test_where_the_kernel_cannot_be_built_the_update_is_made_in_portions(compiled):
    averages, lives = lists(1, torch.bfloat16)
    expected = [average.clone() for average in averages[0]]
    update = FusedLerp(averages, lives, CastLerp)
    with pytest.warns(UserWarning, match="could not be built .*made in chunks instead"):
        update([0.25])  # no GPU for Triton to build for
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        update([0.5])
    for rate in (0.25, 0.5):
        lerp_reference_(expected, lives, rate)
    torch.testing.assert_close(averages[0], expected, rtol=1e-6, atol=1e-7)


def test_an_error_after_a_launch_is_not_taken_for_a_failed_build(interpreted, monkeypatch):
    averages, lives = lists(1, torch.bfloat16)
    update = FusedLerp(averages, lives, CastLerp)
    update([0.25])

    def broken(rates):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(update, "_launch", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        update([0.25])


def test_an_average_through_the_kernel_while_the_module_changes(interpreted, monkeypatch):
    made = []

    def fused(averages, lives):
        made.append(FusedLerp(averages, lives, None))
        return made[-1]

    monkeypatch.setattr(updates, "lerp_of", fused)
    network = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).bfloat16()
    average = WeightAverage(network, [Constant(0.9), Constant(0.5)])
    expected = [{n: t.detach().double() for n, t in one.named_tensors()} for one in average.averages]
    for step in range(6):
        if step == 3:
            network.half()  # other storage: the addresses are no longer theirs
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_()
        average.step()
        live = {name: tensor.double() for name, tensor in engine(average).named_live()}
        for decay, tensors in zip([0.9, 0.5], expected, strict=True):
            for name, tensor in tensors.items():
                tensor.lerp_(live[name], 1 - decay)
    assert len(made) == 2
    for one, tensors in zip(average.averages, expected, strict=True):
        for name, tensor in one.named_tensors():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor.double(), tensors[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiled_for_a_gpu_it_reads_and_writes_16_bytes_at_a_time(compiled, capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rates = {f"rate_{number}": "fp32" for number in range(TOGETHER)}
    constants = {"COUNT": 161, "AVERAGES": 1, "LIVE": triton.language.bfloat16, "ALIGNED": True, "BLOCK": BLOCK}
    signature = {"blocks": "*i32", "tensors": "*i64", **rates, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(compiled.lerp_lists, signature, constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    instructions = re.findall(r"(?:ld|st)\.global[\w.]*|\.local", built.asm["ptx"])
    # of 4,096 elements each of 256 threads has 16: 32 bytes of bfloat16 and 64 of float32
    assert instructions.count("ld.global.v4.b32") == 2 + 4
    assert instructions.count("st.global.v4.b32") == 4
    assert ".local" not in instructions  # nothing is spilled from registers
