"""Recommendations for a noisy quadratic, whose best average is found by brute force over all of its states."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pages import all_blocks, what_a_reader_has
from PIL import Image
from torch import nn

from lightning_ema import Constant, Power, Snapshots, WeightAverage, synthesize
from lightning_ema.__main__ import main
from lightning_ema.posthoc.combination import combine, snapshots_of_one_run
from lightning_ema.posthoc.recommendation import SIGMA_RELS, Scored, age_of, best, candidates, conclusions, table
from lightning_ema.posthoc.snapshots import take
from lightning_ema.schedules.profiles import every, profile
from lightning_ema.schedules.text import read_schedule

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "post-hoc.md"
STEPS = 640
CURVATURE = torch.logspace(-1.5, 0, 12, dtype=torch.float64)
PROFILES = ["Power(sigma_rel=0.04)", "Power(sigma_rel=0.08)", "HalfLife(steps=40)", "Power(sigma_rel=0.15)", "Equal()"]
TRACKED = [Power(sigma_rel=0.05), Power(sigma_rel=0.10)]


def loss(weights):
    return 0.5 * (CURVATURE * weights["weight"].square()).sum()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A directory of snapshots, and all states of the run: SGD from afar, with noise in the gradients."""
    directory, noise = tmp_path_factory.mktemp("run"), torch.Generator().manual_seed(1)
    net = nn.Linear(12, 1, bias=False).double()
    net.weight.data.fill_(20.0)
    average, states = WeightAverage(net, TRACKED), [net.weight.detach().clone()]
    for _ in range(STEPS):
        gradient = CURVATURE * net.weight.data + torch.randn(1, 12, generator=noise, dtype=torch.float64)
        net.weight.data.sub_(0.3 * gradient)
        states.append(net.weight.detach().clone())
        average.step()
        take(Snapshots(directory, every_n_steps=20), average.averages)
    return directory, torch.stack(states)


@pytest.fixture
def scoring(tmp_path, monkeypatch):
    """Writes a module with the user's function, and gives what --score is to be."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(body="return loss(weights).item()", module="how_good"):
        (tmp_path / f"{module}.py").write_text(
            f"from test_recommend import loss\n\n\ndef score(weights):\n    {body}\n"
        )
        monkeypatch.delitem(sys.modules, module, raising=False)
        return f"{module}:score"

    return write


def by_brute_force(states, text):
    """The loss of an average of all states, each with its weight in the profile."""
    weights = profile(read_schedule(text), every(1, STEPS))
    return loss({"weight": torch.einsum("s,sij->ij", weights, states)}).item()


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_the_best_is_that_of_brute_force_and_so_are_all_scores(run, scoring, capsys):
    directory, states = run
    widths = [f"Power(sigma_rel={sigma_rel})" for sigma_rel in SIGMA_RELS]
    wanted = {text: by_brute_force(states, text) for text in widths}
    assert main(["recommend", str(directory), "--score", scoring()]) == 0
    said = lines(capsys)
    rows = {line.split("  ")[0]: line.split() for line in said if line.startswith("Power(")}
    assert {*rows} >= {*widths[3:]}
    for text, (_, _, residual, score, *_) in rows.items():
        assert float(score) == pytest.approx(wanted[text], rel=1e-2 if float(residual) < 5e-3 else 0.1)
    winner = min(rows, key=wanted.get)
    assert winner in list(rows)[1:-1]  # a known optimum inside of the grid
    assert [line for line in said if "<- best" in line] == [next(line for line in said if line.startswith(winner))]
    assert f"best: {winner}, the lowest score of {rows[winner][3]}" in said
    assert f"to train with it: EMACallback(decay={winner})" in said
    assert "cannot be put together from these snapshots: Power(sigma_rel=0.01)" in "\n".join(said)
    ages = [float(row[1]) for row in rows.values()]
    assert ages == sorted(ages)


def test_named_profiles_and_the_highest_score(run, scoring, capsys):
    directory, states = run
    names = [*PROFILES[:4]]
    wanted = {text: by_brute_force(states, text) for text in names}
    arguments = ["--score", scoring("return -loss(weights)"), "--mode", "max", "--profiles", *names, names[0]]
    assert main(["recommend", str(directory), *arguments]) == 0
    said = lines(capsys)
    assert len([line for line in said if line.startswith(("Power", "HalfLife"))]) == 4
    winner = min(wanted, key=wanted.get)
    assert any(line.startswith(f"best: {winner}, the highest score of -") for line in said)


def test_at_an_earlier_step(run, scoring, capsys):
    directory, states = run
    assert main(["recommend", str(directory), "--score", scoring(), "--at-step", "320", "--profiles", PROFILES[1]]) == 0
    weights = profile(read_schedule(PROFILES[1]), every(1, 320))
    wanted = loss({"weight": torch.einsum("s,sij->ij", weights, states[:321])}).item()
    row = next(line for line in lines(capsys) if line.startswith(PROFILES[1])).split()
    assert float(row[3]) == pytest.approx(wanted, rel=1e-2)
    combination = combine(snapshots_of_one_run(directory), read_schedule(PROFILES[1]), 320)
    assert age_of(combination) == pytest.approx(float(weights @ torch.arange(320, -1, -1, dtype=torch.float64)))


def test_each_call_has_the_weights_of_a_synthesis_for_itself(run, scoring, capsys):
    """A function that spoils what it is given spoils nothing else."""
    directory, _ = run
    body = "number = loss(weights).item(); weights['weight'].zero_(); weights.clear(); return number"
    names = ["Power(sigma_rel=0.06)", "Power(sigma_rel=0.07)"]
    assert main(["recommend", str(directory), "--score", scoring(body), "--profiles", *names]) == 0
    rows = [line.split() for line in lines(capsys) if line.startswith("Power")]
    for name, row in zip(names, rows, strict=True):
        assert row[0] == name
        assert float(row[3]) == pytest.approx(
            loss(synthesize(directory, profile=read_schedule(name)).weights).item(), rel=1e-5
        )


def test_a_file_is_scored_from_listed_snapshots_with_a_picture(run, scoring, tmp_path, capsys, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **kw: (figures.append(figure), save(figure, *a, **kw)))
    out = tmp_path / "curve.png"
    files = [str(path) for path in sorted(run[0].iterdir())]
    assert main(["recommend", *files, "--score", scoring(), "--profiles", *PROFILES[:4], "--plot", str(out)]) == 0
    said = lines(capsys)
    rows = [line.split() for line in said if line.startswith(("Power", "HalfLife"))]
    (axes,) = figures[0].axes
    curve, point = axes.lines
    assert curve.get_xdata() == pytest.approx([float(row[1]) for row in rows], rel=1e-2)
    assert curve.get_ydata() == pytest.approx([float(row[3]) for row in rows], rel=1e-4)
    assert point.get_ydata() == [min(curve.get_ydata())]
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "how_good:score"
    assert np.asarray(Image.open(out).convert("L")).std() > 10 and said[-1] == f"the curve: {out}"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--score", "how_good"], "write it as module:function"),
        (["--score", "nowhere_to_be_found:score"], "No module named 'nowhere_to_be_found'"),
        (["--score", "how_good:nothing"], "how_good has no function nothing"),
        (
            ["--score", "how_good:score", "--profiles", "HalfLife(steps=1)"],
            "none of these averages can be put together",
        ),
        (["--score", "how_good:score", "--profiles", "Bema()"], "corrects its average by the live weights"),
        (["--score", "how_good:score", "--profiles", "print(1)"], "no schedule 'print'"),
        (["--score", "how_good:score", "--at-step", "9999"], "at_step is 9999"),
        (["--score", "how_good:score", "--plot", "a.xyz"], "a.xyz: pictures cannot be written as 'xyz'"),
    ],
)
def test_refusals_before_anything_is_scored(arguments, complaint, run, scoring, capsys):
    scoring("raise AssertionError('scored')")
    assert main(["recommend", str(run[0]), *arguments]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and complaint in said.err and not said.out


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("return None", "gave None; it must give one number"),
        ("return weights['weight']", "it must give one number"),
        ("return float('nan')", "no score is a finite number"),
    ],
)
def test_scores_that_are_none(body, complaint, run, scoring, capsys):
    assert main(["recommend", str(run[0]), "--score", scoring(body), "--profiles", PROFILES[0]]) == 1
    assert complaint in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_the_command_of_the_documentation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    blocks, namespace = all_blocks(PAGE, "python"), what_a_reader_has()
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)
    (module,) = [block for block in blocks if block.startswith("# score.py")]
    (tmp_path / "score.py").write_text(module)
    (command,) = re.findall(r"^python -m lightning_ema (recommend .*)$", PAGE.read_text(), re.MULTILINE)
    assert main(command.split()) == 0
    assert "<- best" in capsys.readouterr().out and (tmp_path / "curve.png").exists()


def scored(*pairs):
    return [Scored(Constant(1 - 1 / (age + 1)), age, 0.0, score) for age, score in pairs]


class TestPure:
    def test_best(self):
        some = scored((9, 2.0), (99, 1.0), (4, 1.0), (2, float("nan")), (1, float("-inf")))
        assert best(some, "min").mean_age == 4  # of equal ones the shortest
        assert best(some, "max").mean_age == 9
        with pytest.raises(ValueError, match="mode is 'most'"):
            best(some, "most")

    def test_table(self):
        some = scored((9, 2.0), (4, 10.25))
        assert table(some, some[0]) == [
            "average        mean age  residual  score",
            "Constant(0.8)       4.0         0  10.25",
            "Constant(0.9)       9.0         0      2  <- best",
        ]

    def test_candidates_are_those_tracked_and_widths_around(self, run):
        found = snapshots_of_one_run(run[0])
        assert candidates(found)[:2] == TRACKED
        assert len(candidates(found)) == len(SIGMA_RELS)
        assert {Power(sigma_rel=0.01), Power(sigma_rel=0.25)} < {*candidates(found)}

    def test_conclusions(self, run):
        newest = snapshots_of_one_run(run[0])[-1]
        middle = scored((4, 2.0), (9, 1.0), (19, 3.0))
        assert conclusions(middle, middle[1], "min", newest, 200) == [
            "best: Constant(0.9), the lowest score of 1",
            "to train with it: EMACallback(decay=Constant(0.9))",
            "or, with the same mean age at the end of 200 steps: EMACallback(decay=0.9)",
        ]
        assert len(conclusions(middle, middle[1], "min", newest, 199)) == 2  # too short to warm up
        assert conclusions(middle, middle[0], "max", newest, 10)[-1].startswith("It is the shortest scored.")
        assert conclusions(middle, middle[2], "max", newest, 10)[-1].startswith("It is the longest scored.")
        assert len(conclusions(middle[:1], middle[0], "max", newest, 10)) == 2
        other = replace(newest, start_step=50, config={"every_n_steps": 5})
        assert (
            "(decay=Constant(0.9), start_step=50, every_n_steps=5)"
            in conclusions(middle, middle[1], "min", other, 249)[1]
        )

    def test_the_plain_number_has_the_mean_age_that_it_is_offered_for(self, run):
        newest = snapshots_of_one_run(run[0])[-1]
        (chosen,) = scored((30.9, 1.0))
        text = conclusions([chosen], chosen, "min", newest, 640)[-1]
        number = text.split("decay=")[1].rstrip(")")
        assert number == "0.9687"
        weights = profile(read_schedule(number), every(1, 640))
        assert float(weights @ torch.arange(640, -1, -1, dtype=torch.float64)) == pytest.approx(30.9, rel=0.01)
