"""All measurements of cost, a table each, and a picture of the ratios: python benchmarks/bench.py (some 10 minutes).

What they show, and how to read them, is in docs/explanation/performance.md.
"""

from __future__ import annotations

import platform

import callback
import distance
import gpu
import memory
import swap
import torch
import update
from matplotlib.figure import Figure
from measure import RESULTS, Table, arguments
from peers import OURS

DRAWN = "update_resnet50", "update_gpt2", "update_resnet50_bf16", "update_buffers", "update_tiny_float32", "swap"


def draw(tables: list[Table]) -> None:
    """The last column of some tables."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for panel, table in zip(panels, [table for table in tables if table.name in DRAWN], strict=False):
        rows = {name: row[-1] for name, row in table.rows.items() if isinstance(row[-1], float)}
        colors = ["C0" if name.startswith(OURS) else "0.7" for name in rows]
        names = [name.split(" (")[0] for name in rows]
        panel.bar_label(
            panel.barh(names, [float(value) for value in rows.values()], color=colors), fmt="%.2f", fontsize=7
        )
        panel.margins(x=0.15)
        panel.invert_yaxis()
        panel.set_title(table.name.replace("_", ", "), fontsize=9)
        panel.set_xlabel(table.columns[-1], fontsize=8)
        panel.tick_params(labelsize=7)
    figure.savefig(RESULTS / "bench.png", dpi=120)
    print(f"\ntables and picture are in {RESULTS}/")


def main() -> None:
    rounds = arguments(__doc__)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread")
    tables = [table for script in (update, swap, memory, distance, callback, gpu) for table in script.main(rounds)]
    draw(tables)


if __name__ == "__main__":
    main()
