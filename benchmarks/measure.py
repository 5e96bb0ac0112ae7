"""What all benchmarks share: two candidates take turns, CPU time on one thread counts, medians are reported.

A candidate is built, timed in turns with the reference (A B A B ...) and thrown away before the next one is built. Its
ratio is the median of the ratios within each turn, so that other work on the machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate

RESULTS = Path("runs/bench")

Work = Callable[[], object]
Make = Callable[[], Work | str]
"""Builds a candidate and gives what is timed; a word where it cannot be: "not installed", "refuses"."""


@dataclass
class Table:
    """One measurement.

    Attributes:
        name: in files.
        title: what was measured.
        columns: what the numbers in ``rows`` are.
        rows: numbers, or words where there are none, by candidate.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: dict[str, Sequence[float | str]] = field(default_factory=dict)

    def show(self) -> None:
        body = [[name, *(f"{v:.3g}" if isinstance(v, float) else v for v in row)] for name, row in self.rows.items()]
        print(f"\n{self.title}\n")
        headers = ["", *self.columns]
        if body:
            columns = ("left", *("right",) * len(self.columns))
            print(tabulate(body, headers, "github", disable_numparse=True, colalign=columns))
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=1))


def seconds(work: Work, repeats: int) -> float:
    """CPU time of one call."""
    start = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - start) / repeats


def in_turns(reference: Work, work: Work, rounds: int, at_least: float) -> tuple[float, float]:
    """The median time of one call of ``work``, and of its ratio to ``reference``; each turn lasts ``at_least``."""
    repeats = [max(1, round(at_least / max(seconds(each, 2), 1e-7))) for each in (reference, work)]
    times: list[tuple[float, float]] = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            times.append((seconds(reference, repeats[0]), seconds(work, repeats[1])))
    finally:
        gc.enable()
    return statistics.median(b for _, b in times), statistics.median(b / a for a, b in times)


def compare(
    name: str,
    title: str,
    unit: tuple[str, float],
    reference: tuple[str, Work],
    candidates: dict[str, Make],
    rounds: int,
    at_least: float = 0.05,
) -> Table:
    """Times each candidate beside the reference.

    Args:
        unit: of the times shown, and how many of them are a second.
    """
    table = Table(name, title, [unit[0], f"x {reference[0]}"])
    for candidate, make in candidates.items():
        work = make()
        if isinstance(work, str):
            table.rows[candidate] = [work, ""]
            continue
        median, ratio = in_turns(reference[1], work, rounds, at_least)
        table.rows[candidate] = [unit[1] * median, ratio]
    table.show()
    return table


def arguments(description: str | None) -> int:
    """How many rounds the command line asks for; sets torch to one thread."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each candidate; 2 shows that it runs")
    torch.set_num_threads(1)
    return int(parser.parse_args().rounds)
