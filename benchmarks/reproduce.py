"""Trains every semi-supervised method of examples/ with 10 and 3 labels per class; prints and draws the errors.

Two runs at a time, one thread each. A seed decides which 2,000 digits are for testing, which of the others keep their
labels, the order and the initial weights. No checkpoint is selected: errors are those after the last step.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from tabulate import tabulate

EXAMPLES = Path(__file__).parents[1] / "examples"
METHODS = {
    "supervised": "supervised",
    "pi": "Pi model",
    "mean-teacher": "Mean Teacher",
    "mean-teacher-aligned": "Mean Teacher, aligned",
    "fixmatch-student": "FixMatch, pseudo-labels of the student",
    "fixmatch-teacher": "FixMatch, pseudo-labels of the teacher",
    "fixmatch-teacher-aligned": "FixMatch, pseudo-labels of the teacher, aligned",
}
WEIGHTS = {"student": "last iterate", "teacher": "average"}


def trained(method, labels, seed, steps):
    """The errors of student and teacher in %."""
    sys.path.insert(0, str(EXAMPLES))
    from classifier import prepared, train
    from digits import Digits
    from lightning.pytorch import seed_everything

    prepared()
    seed_everything(seed, verbose=False)
    name, align = method.removesuffix("-aligned"), method.endswith("-aligned")
    if name.startswith("fixmatch-"):
        data = Digits(labels, seed, labeled_view="weak")
        model = import_module("03_fixmatch").FixMatch(name.removeprefix("fixmatch-"), align=align)
    else:
        data = Digits(labels, seed)
        model = import_module("02_mean_teacher").make(name, steps, align)
    curves = train(model, data, steps)
    return {name: curves[name][-1] for name in WEIGHTS}


def all_errors(amounts, seeds, steps):
    """Errors by method, labels per class and seed."""
    jobs = [(method, labels, seed) for seed in range(seeds) for labels in amounts for method in METHODS]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(trained, *job, steps): job for job in jobs}
        errors = {}
        for number, done in enumerate(as_completed(running), 1):
            method, labels, seed = job = running[done]
            errors[job] = done.result()
            scores = ", ".join(f"{WEIGHTS[name]} {error:.2f}%" for name, error in errors[job].items())
            print(
                f"{number:3}/{len(jobs)}  {METHODS[method]}, {labels} labels per class, seed {seed}: {scores}",
                flush=True,
            )
    return errors


def of_seeds(errors, method, labels, weights):
    return [found[weights] for (m, n, _), found in sorted(errors.items()) if (m, n) == (method, labels)]


def with_spread(values):
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def table(errors, amounts):
    cells = [(labels, weights) for labels in amounts for weights in WEIGHTS]
    headers = ["test error in %", *(f"{labels} labels: {WEIGHTS[weights]}" for labels, weights in cells)]
    rows = [[METHODS[m], *(with_spread(of_seeds(errors, m, *cell)) for cell in cells)] for m in METHODS]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def plot(errors, amounts, path):
    figure = Figure((9, 4), layout="constrained")
    several = figure.subplots(1, len(amounts), sharey=True, squeeze=False)[0]
    for axes, labels in zip(several, amounts, strict=True):
        for weights, colour, shift in (("student", "tab:orange", 0.15), ("teacher", "tab:blue", -0.15)):
            for place, method in enumerate(reversed(METHODS)):
                values = of_seeds(errors, method, labels, weights)
                axes.plot(values, [place + shift] * len(values), "o", color=colour, alpha=0.4, markersize=4, mew=0)
                label = WEIGHTS[weights] if place == 0 else None
                axes.plot(mean(values), place + shift, "|", color=colour, markersize=12, mew=2, label=label)
        axes.set(title=f"{labels} labels per class", xlabel="test error in %")
        axes.set_yticks(range(len(METHODS)), list(METHODS.values())[::-1])
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3, axis="x")
    handles, labels = several[-1].get_legend_handles_labels()
    figure.legend(handles, labels, title="dots: seeds, bars: means", loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels-per-class", type=int, nargs="+", default=[10, 3])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    args.out.mkdir(parents=True, exist_ok=True)
    errors = all_errors(args.labels_per_class, args.seeds, args.steps)
    text = table(errors, args.labels_per_class)
    (args.out / "table.md").write_text(text + "\n")
    plot(errors, args.labels_per_class, args.out / "semi_supervised.png")
    print(f"\n{text}\n\nThe plot is in {args.out / 'semi_supervised.png'}.")


if __name__ == "__main__":
    main()
