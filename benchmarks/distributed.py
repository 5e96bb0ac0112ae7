"""What an average costs on each of several processes: bytes held, and the time of an update beside a whole one.

    python benchmarks/distributed.py       # about two minutes

Processes of a CPU with gloo, one thread each. Bytes are those of all tensors alive in a process, counted before and
after the average is built, and again while the module carries it: nothing is taken from the averages themselves. Time
is CPU time; in each process a whole average of a copy of the model takes turns with the one that is measured, and
ratios count.
"""

import argparse
import gc
import os
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_ema import Constant, WeightAverage

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6
    from torch.distributed._composable.fsdp import fully_shard

WORLD_SIZES = (1, 2, 4)
KINDS = ("DDP", "DDP, shard=True", "FSDP2")
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Cost:
    """Of one process, in bytes per element of the whole model; the time as a share of that of a whole average."""

    held: float
    swapped_in: float
    update: float


def transformer(width: int, blocks: int) -> nn.Module:
    """12 * width**2 elements a block, and a few."""
    layers = [nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True) for _ in range(blocks)]
    return nn.Sequential(*layers)


def bytes_alive() -> int:
    """Of all tensors of this process; memory that several share counts once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # objects that are asked for their class
        tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    sizes = {}
    for tensor in tensors:
        own = getattr(tensor, "_local_tensor", tensor)
        storage = own.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measured(kind: str, dtype: torch.dtype, width: int, rounds: int) -> Cost:
    plain, model = (transformer(width, 4).to(dtype) for _ in range(2))
    elements = sum(parameter.numel() for parameter in model.parameters())
    if kind == "FSDP2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
    whole = WeightAverage(plain, Constant(0.999))
    before = bytes_alive()
    average = WeightAverage(model, Constant(0.999), shard=kind == "DDP, shard=True")
    average.step()
    held = bytes_alive() - before
    with average.swapped():
        swapped_in = bytes_alive() - before
    whole.step()
    ratios = []
    for _ in range(rounds):
        one, other = cpu_seconds(average.step), cpu_seconds(whole.step)
        ratios.append(one / other)
    return Cost(held / elements, swapped_in / elements, statistics.median(ratios))


def process(rank: int, world: int, port: int, width: int, rounds: int, results: SimpleQueue) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {(kind, dtype): measured(kind, dtype, width, rounds) for dtype in DTYPES for kind in KINDS}
    everyones: list[dict[tuple[str, torch.dtype], Cost]] = [{} for _ in range(world)]
    dist.all_gather_object(everyones, found)
    if rank == 0:
        results.put(everyones)
    dist.barrier()
    dist.destroy_process_group()


def in_processes(world: int, width: int, rounds: int) -> list[dict[tuple[str, torch.dtype], Cost]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(process, (world, port, width, rounds, results), nprocs=world)
    return results.get()


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds, to see that it runs")
    quick = parser.parse_args().quick
    width, rounds = (32, 3) if quick else (512, 15)
    elements = sum(parameter.numel() for parameter in transformer(width, 4).parameters())
    print(f"torch {torch.__version__}, gloo, one thread a process; {elements / 1e6:.3g} million elements")
    print("The most that any process holds, in bytes per element of the whole model; a whole average takes 1.00 x.\n")
    print("| weights  | average          | processes | held  | swapped | update |")
    print("|----------|------------------|-----------|-------|---------|--------|")
    per_element: dict[tuple[str, torch.dtype], float] = {}
    for world in WORLD_SIZES:
        processes = in_processes(world, width, rounds)
        for kind, dtype in processes[0]:
            costs = [each[kind, dtype] for each in processes]
            held, swapped_in = max(cost.held for cost in costs), max(cost.swapped_in for cost in costs)
            update = statistics.median(cost.update for cost in costs)
            name = str(dtype).removeprefix("torch.")
            print(f"| {name:8} | {kind:16} | {world:9} | {held:5.2f} | {swapped_in:7.2f} | {update:4.2f} x |")
            per_element[kind, dtype] = held if kind == "DDP" else held * world
    print("\nWhat that means for one average, kept in float32 of float32 and of bfloat16 weights alike: per process,")
    print(
        f"from the bytes measured at {WORLD_SIZES[-1]} processes. (Under DDP each process holds the weights as well.)\n"
    )
    print("| model | average          | 8 processes | 64 processes | 512 processes |")
    print("|-------|------------------|-------------|--------------|---------------|")
    for billions in (7, 70):
        for kind in KINDS:
            bytes_ = max(per_element[kind, dtype] for dtype in DTYPES)
            sizes = [gigabytes(billions * 1e9 * bytes_ / (1 if kind == "DDP" else ranks)) for ranks in (8, 64, 512)]
            print(f"| {billions:>3}B  | {kind:16} | {sizes[0]:>11} | {sizes[1]:>12} | {sizes[2]:>13} |")


if __name__ == "__main__":
    main()
