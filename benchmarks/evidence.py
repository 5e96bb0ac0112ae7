"""What averaging buys, question by question: trains small networks on digits, prints the tables and draws the plot.

One process, one thread. A seed decides which digits are for testing, the order, the initial weights, and which labels
are random. No checkpoint is selected: all scores are those after the last step, or after the step that is named.
"""

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from statistics import mean, stdev

import evidence_questions as questions
import torch
from evidence_training import digits
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from tabulate import tabulate

STEPS = 2048


@dataclass(frozen=True)
class Question:
    """One table.

    Attributes:
        measured: what a number is.
        answer: the numbers of one seed, by row and column.
        compared: columns whose differences, seed by seed, are printed too.
    """

    title: str
    measured: str
    answer: Callable[[int, int], dict[str, dict[str, float]]]
    compared: tuple[tuple[str, str], ...] = ()
    form: str = ".2f"
    logarithmic: bool = False


ERROR = "test error in %"
GAINS = (("live", "decay 0.99"), ("live", "decay 0.998"))
QUESTIONS = {
    "constant": Question("A constant learning rate", ERROR, questions.constant_rate, GAINS),
    "cosine": Question("A learning rate that falls to 0", ERROR, questions.falling_rate, GAINS),
    "16bit": Question(
        "An average in 16 bits",
        ERROR,
        questions.sixteen_bits,
        (("live", "average in float32"), ("average in bfloat16", "average in float32")),
    ),
    "batchnorm": Question("BatchNorm statistics", ERROR, questions.batchnorm, (("copy", "average"),), logarithmic=True),
    "batch": Question(
        "A batch four times as large",
        ERROR,
        questions.batch_size,
        (("128, the same decay", "32"), ("128, decay scaled", "32")),
    ),
    "post-hoc": Question(
        "An average put together afterwards",
        "distance to the average kept",
        questions.post_hoc,
        form=".2g",
        logarithmic=True,
    ),
}


def with_spread(values, form, sign=""):
    if any(isnan(value) for value in values):
        return "refused"
    return f"{mean(values):{sign}{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def table(question, answers):
    """Means and standard deviations over the seeds."""
    first = answers[0]
    columns = list(next(iter(first.values())))
    rows = []
    for row in first:
        several = [answer[row] for answer in answers]
        cells = [with_spread([found[column] for found in several], question.form) for column in columns]
        differences = [
            with_spread([found[one] - found[other] for found in several], question.form, "+")
            for one, other in question.compared
        ]
        rows.append([row, *cells, *differences])
    headers = [question.measured, *columns, *(f"{one} - {other}" for one, other in question.compared)]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def write_seeds(answers, path):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "row", "column", "seed", "value"])
        for name, found in answers.items():
            for seed, rows in enumerate(found):
                writer.writerows([name, row, column, seed, rows[row][column]] for row in rows for column in rows[row])


def draw(axes, question, answers):
    """A dot for each seed, a bar for the mean; a colour for each column."""
    rows = list(answers[0])[::-1]
    columns = list(answers[0][rows[0]])
    for number, column in enumerate(columns):
        shift = 0.6 * (0.5 - (number + 0.5) / len(columns))
        for place, row in enumerate(rows):
            values = [answer[row][column] for answer in answers]
            colour, label = f"C{number}", column if place == 0 else None
            axes.plot(values, [place + shift] * len(values), "o", color=colour, alpha=0.4, markersize=4, mew=0)
            axes.plot(mean(values), place + shift, "|", color=colour, markersize=10, mew=2, label=label)
    axes.set(title=question.title, xlabel=question.measured)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(alpha=0.3, axis="x")
    if question.logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=5, frameon=False, fontsize="small")


def plot(answers, path):
    """answers: those of all seeds, by question."""
    figure = Figure((13, 4.2 * -(-len(answers) // 2)), layout="constrained")
    several = figure.subplots(-(-len(answers) // 2), min(2, len(answers)), squeeze=False).flat
    for axes in several[len(answers) :]:
        axes.set_visible(False)
    for axes, (name, found) in zip(several, answers.items(), strict=False):
        draw(axes, QUESTIONS[name], found)
    figure.suptitle("dots: seeds, bars: means")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS, help="a multiple of 32, the most snapshots taken")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    args = parser.parse_args()
    if args.seeds < 1 or args.steps < 32 or args.steps % 32:
        given = f"--seeds {args.seeds} --steps {args.steps}"
        parser.error(f"{given}: at least one seed, and steps in a positive multiple of 32 are needed")
    torch.set_num_threads(1)  # so small a network gains nothing from a second
    digits()  # read before any time is taken
    args.out.mkdir(parents=True, exist_ok=True)
    answers, texts = {}, []
    for name in args.questions:
        question, began = QUESTIONS[name], time.perf_counter()
        answers[name] = [question.answer(seed, args.steps) for seed in range(args.seeds)]
        took = time.perf_counter() - began
        head = f"{question.title} (seeds: {args.seeds}, steps: {args.steps:,}, time: {took:.0f} s)"
        texts.append(f"{head}\n\n{table(question, answers[name])}\n")
        print(texts[-1], flush=True)
    (args.out / "tables.md").write_text("\n".join(texts))
    write_seeds(answers, args.out / "seeds.csv")
    plot(answers, args.out / "evidence.png")
    print(f"The plot is in {args.out / 'evidence.png'}.")


if __name__ == "__main__":
    main()
