"""What an average costs on a CUDA device: the update beside a copy of its bytes, and a training step with and without.

    python benchmarks/gpu.py

Without a device it says so. Device time is that between two events, with nothing waited for in between.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from measure import Table, Work, arguments
from models import gpt2
from torch import nn

from lightning_ema import Constant, WeightAverage
from lightning_ema.averaging import update
from lightning_ema.ops.lerp import CastLerp

DECAYS = [Constant(0.999), Constant(0.99), Constant(0.9999)]
ON_A_STREAM = "update on a stream of its own"
"""Off in the engine until this has been measured: ``update.OVERLAP``."""


def device_ms(work: Work, repeats: int = 50) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    work()
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def copying(count: int) -> Work:
    """A copy from device to device that reads and writes so many bytes together."""
    source = torch.empty(count // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def updates(rounds: int) -> Table:
    """Each update beside a copy of the bytes that it must read and write, in turns."""
    table = Table("cuda_update", "update on a CUDA device, gpt2", ["ms", "x a copy of its bytes"])

    def row(name: str, work: Work, bytes_an_element: int, elements: int) -> None:
        copy = copying(bytes_an_element * elements)
        pairs = [(device_ms(copy), device_ms(work)) for _ in range(rounds)]
        table.rows[name] = [statistics.median(b for _, b in pairs), statistics.median(b / a for a, b in pairs)]

    for dtype, live_bytes in ((torch.float32, 4), (torch.bfloat16, 2)):
        module = gpt2().to("cuda", dtype)
        elements = sum(p.numel() for p in module.parameters())
        word = str(dtype).removeprefix("torch.")
        for count in (1, 2, 3):
            average = WeightAverage(module, DECAYS[:count])
            row(f"{word} weights, {count} float32 averages", average.step, live_bytes + 8 * count, elements)
    lives = [p.detach() for p in module.parameters()]
    chunks = CastLerp([[live.float() for live in lives]], lives)
    with torch.no_grad():
        row("bfloat16 weights, 1 float32 average, in chunks", lambda: chunks([1e-3]), 10, elements)
    return table


def steps(rounds: int) -> Table:
    """Training steps of a bfloat16 transformer, the same network with and without an average, in turns."""
    table = Table("cuda_step", "training step of a bfloat16 transformer on a CUDA device", ["ms", "x without"])
    network = nn.TransformerEncoder(nn.TransformerEncoderLayer(1024, 16, 4096, 0.0, batch_first=True), 12)
    network.to("cuda", torch.bfloat16)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
    batch = torch.randn(16, 512, 1024, device="cuda", dtype=torch.bfloat16)

    def stepping(average: Callable[[], object]) -> Work:
        def step() -> None:
            optimizer.zero_grad()
            network(batch).pow(2).mean().backward()
            optimizer.step()
            average()

        return step

    def nothing() -> None:
        pass

    without = stepping(nothing)
    for name, settings in {
        "none": None,
        "update here": {},
        ON_A_STREAM: {},
        'device="cpu"': {"device": "cpu"},
        'device="cpu", every_n_steps=10': {"device": "cpu", "every_n_steps": 10},
    }.items():
        update.OVERLAP = name == ON_A_STREAM
        average = None if settings is None else WeightAverage(network, Constant(0.999), **settings)
        with_it = without if average is None else stepping(average.step)
        pairs = [(device_ms(without, 10), device_ms(with_it, 10)) for _ in range(rounds)]
        table.rows[name] = [statistics.median(b for _, b in pairs), statistics.median(b / a for a, b in pairs)]
    update.OVERLAP = False
    return table


def main(rounds: int) -> list[Table]:
    tables = []
    for measure, name in ((updates, "cuda_update"), (steps, "cuda_step")):
        if torch.cuda.is_available():
            tables.append(measure(rounds))
        else:
            tables.append(Table(name, f"{name.replace('_', ', ')}: no CUDA device here, not measured", []))
        tables[-1].show()
    return tables


if __name__ == "__main__":
    main(arguments(__doc__))
