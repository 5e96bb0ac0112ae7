"""The EMA scaling rule inside a mean teacher (arXiv 2307.13813): a batch k times as large, 1/k of the steps.

The learning rate is multiplied by the square root of k, as usual for Adam. Two runs at a time, one thread each; a seed
decides what it does in reproduce.py.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib import import_module
from itertools import product
from math import sqrt
from multiprocessing import get_context
from pathlib import Path

from reproduce import EXAMPLES, WEIGHTS, with_spread
from tabulate import tabulate

VARIANTS = {  # by how much the batch grows, and by how much the decay is scaled for it
    "32 + 96 digits, 2,000 steps": (1, 1),
    "128 + 384 digits, 500 steps, the same decay": (4, 1),
    "128 + 384 digits, 500 steps, decay scaled": (4, 4),
}


def trained(variant, seed, labels=10, steps=2000):
    """The errors of student and teacher in %."""
    sys.path.insert(0, str(EXAMPLES))
    from classifier import prepared, train
    from digits import Digits
    from lightning.pytorch import seed_everything

    from lightning_ema import Scaled

    batch, decay = VARIANTS[variant]
    prepared()
    seed_everything(seed, verbose=False)
    data = Digits(labels, seed, labeled_batch_size=32 * batch, unlabeled_batch_size=96 * batch)
    example = import_module("02_mean_teacher")
    settings = example.settings(steps // batch)
    model = example.MeanTeacher(replace(settings, decay=Scaled(settings.decay, batch_factor=decay)))
    model.lr *= sqrt(batch)
    curves = train(model, data, steps // batch)
    return [curves[name][-1] for name in WEIGHTS]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    jobs = list(product(VARIANTS, range(args.seeds)))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        errors = dict(zip(jobs, pool.map(trained, *zip(*jobs, strict=True)), strict=True))
    rows = [
        [variant, *(with_spread([errors[variant, seed][i] for seed in range(args.seeds)]) for i in range(len(WEIGHTS)))]
        for variant in VARIANTS
    ]
    text = tabulate(rows, ["test error in %", *WEIGHTS.values()], tablefmt="github", disable_numparse=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
