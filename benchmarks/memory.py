"""How much memory an average adds, as a share of what is averaged.

    python benchmarks/memory.py

Each candidate runs in a process of its own; what it adds is the growth of the process's resident memory over building
the average and one update. The highest point of an update shows its temporaries.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch
from measure import Table, arguments
from models import resnet50, size
from peers import PEERS
from torch import nn


def mostly_frozen() -> nn.Module:
    """The resnet50 with all but its last layers frozen: 90% of its elements."""
    module = resnet50()
    parameters = list(module.parameters())
    elements = sum(p.numel() for p in parameters)
    trained = 0
    for parameter in reversed(parameters):
        trained += parameter.numel()
        parameter.requires_grad_(trained <= elements / 10)
    return module


MODULES = {"all trained": resnet50, "90% frozen": mostly_frozen}


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def highest_so_far() -> int:
    """Of this program. ``getrusage`` would count what its parent held before it was started, too."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def added(name: str, module: nn.Module) -> str:
    """Shares of the bytes of the module: kept, and at the highest point of the second update."""
    whole = sum(p.nbytes for p in module.parameters())
    first = PEERS[name](nn.Linear(64, 64), False)  # so that what is imported and set up once is not counted
    if isinstance(first, str):
        return first
    first.update()
    before = resident()
    peer = PEERS[name](module, False)
    if isinstance(peer, str):
        return peer
    peer.update()
    kept = resident() - before
    peer.update()
    return f"{kept / whole:.3f} {max(kept, highest_so_far() - before) / whole:.3f}"


def measured(name: str, kind: str) -> list[float | str]:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--candidate", name, "--kind", kind],
        capture_output=True,
        text=True,
        check=True,
    )
    words = run.stdout.strip().splitlines()[-1]
    try:
        return [float(word) for word in words.split()]
    except ValueError:
        return [words, ""]


def main(rounds: int) -> list[Table]:
    columns = [f"{kind}: {what}" for kind in MODULES for what in ("kept", "highest")]
    title = f"memory added, x the bytes of the module, resnet50: {size(resnet50())}"
    table = Table("memory", title, columns)
    for name in PEERS:
        table.rows[name] = [value for kind in MODULES for value in measured(name, kind)]
    table.show()
    return [table]


if __name__ == "__main__":
    if "--candidate" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--candidate", choices=PEERS)
        parser.add_argument("--kind", choices=MODULES)
        asked = parser.parse_args()
        torch.set_num_threads(1)
        with torch.no_grad():
            print(added(asked.candidate, MODULES[asked.kind]()))
    else:
        main(arguments(__doc__))
