"""The evidence: its command in a tiny version, its tables against numbers by hand, and what is trained and averaged."""

import os
import subprocess
import sys
from importlib import import_module
from math import nan
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_ema import Constant, WeightAverage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch):
    """Imports a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module


@pytest.mark.slow
def test_every_question_is_answered_printed_and_drawn(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "evidence.py", "--seeds", "1", "--steps", "32"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=one_thread)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "runs" / "evidence"
    tables = (out / "tables.md").read_text()
    assert tables.count("(seeds: 1, steps: 32, time: ") == 6
    for row in ("40% random labels", "decay 0.998", "Warmup(0.999), step 8", "live", "sigma_rel 0.075"):
        assert f"| {row} " in tables
    assert all(line in done.stdout for line in tables.splitlines())
    assert (out / "evidence.png").stat().st_size > 50_000
    assert len((out / "seeds.csv").read_text().splitlines()) == 1 + 8 + 8 + 12 + 16 + 9 + 20


@pytest.mark.parametrize(("seeds", "steps"), [("1", "100"), ("0", "32"), ("1", "0")])
def test_numbers_that_no_table_can_be_made_of_are_refused(module, monkeypatch, capsys, seeds, steps):
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--seeds", seeds, "--steps", steps])
    with pytest.raises(SystemExit):
        module("evidence").main()
    expected = f"--seeds {seeds} --steps {steps}: at least one seed, and steps in a positive multiple of 32 are needed"
    assert expected in capsys.readouterr().err


def test_means_spreads_and_paired_differences_are_those_of_the_seeds(module):
    one = module("evidence")
    question = one.Question("title", "error", None, compared=(("live", "average"),), form=".1f")
    answers = [{"row": {"live": live, "average": average}} for live, average in ((5.0, 4.0), (7.0, 5.0), (9.0, 6.0))]
    text = one.table(question, answers)
    header, row = ([cell.strip() for cell in text.splitlines()[line].split("|")[1:-1]] for line in (0, 2))
    assert header == ["error", "live", "average", "live - average"]
    assert row == ["row", "7.0 ± 2.0", "5.0 ± 1.0", "+2.0 ± 1.0"]


def test_a_synthesis_that_was_refused_is_called_so(module):
    one = module("evidence")
    question = one.QUESTIONS["post-hoc"]
    text = one.table(question, [{"row": {"4 snapshots": nan, "8 snapshots": 0.25}}])
    assert [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]] == ["row", "refused", "0.25"]


def test_the_numbers_of_single_seeds_are_kept(module, tmp_path):
    answers = {"cosine": [{"clean": {"live": 5.0, "decay 0.9": 4.0}}, {"clean": {"live": 3.0, "decay 0.9": nan}}]}
    module("evidence").write_seeds(answers, tmp_path / "seeds.csv")
    lines = (tmp_path / "seeds.csv").read_text().splitlines()
    assert lines[1:3] == ["cosine,clean,live,0,5.0", "cosine,clean,decay 0.9,0,4.0"]
    assert lines[3:] == ["cosine,clean,live,1,3.0", "cosine,clean,decay 0.9,1,nan"]


def test_random_labels_are_only_in_the_training_digits(module):
    split = module("evidence_training").split
    (images, clean), (held_out, true) = split(0)
    (same_images, noisy), (same_held_out, same_true) = split(0, 0.4)
    assert images.shape == (3000, 28, 28) and held_out.shape == (2000, 28, 28)
    assert torch.equal(images, same_images) and torch.equal(held_out, same_held_out) and torch.equal(true, same_true)
    wrong = (clean != noisy).sum().item()
    assert 1000 < wrong < 1160  # of 1,200 replaced labels a tenth is right by chance: 1,080 with a deviation of 10
    assert torch.equal(split(0)[0][1], clean)  # the shared labels were not written to


def test_the_error_is_the_share_of_wrong_answers_in_evaluation_mode(module):
    class Says(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images):
            assert not self.training
            return nn.functional.one_hot(images[:, 0, 0].long(), 10)

    images = torch.zeros(4, 28, 28)
    images[:, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    net = Says()
    assert module("evidence_training").error(net, (images, torch.tensor([1, 2, 3, 9]))) == 25.0
    assert net.training


def test_the_rate_falls_to_nothing_or_stays(module):
    source = module("evidence_training")
    train, _ = source.split(0)
    for falls, least, most in ((True, 0.0, 0.05), (False, 0.2, 5.0)):
        net, moves, before = source.network(0), [], None
        for _ in source.training(net, train, steps=64, seed=0, falls=falls):
            now = net[1].weight.detach().clone()
            moves.append(0.0 if before is None else (now - before).norm().item())
            before = now
        assert least < moves[-1] / max(moves) < most, falls


def test_recalibrated_statistics_are_scored_and_put_back(module):
    source, questions = module("evidence_training"), module("evidence_questions")
    train, test = source.split(0)
    net = source.network(0, normalized=True)
    average = WeightAverage(net, Constant(0.5), buffers="copy")
    for _ in source.training(net, train, steps=40, seed=0):
        average.step()
    live = source.error(net, test)
    statistics = net[2].running_mean
    statistics += 100  # far off: every answer is wrong but a few
    kept = statistics.clone()
    assert questions.of_average(average, test) > 60
    assert questions.recalibrated(average, train, test, seed=0) < live + 10
    assert torch.equal(net[2].running_mean, kept)


def test_snapshots_are_taken_at_even_distances_to_the_end(module, monkeypatch):
    questions, used = module("evidence_questions"), {}
    monkeypatch.setattr(questions, "synthesized", lambda files, sigma: used.update({len(files): files}))
    rows = questions.post_hoc(seed=0, steps=64)
    steps = {amount: [int(path.stem.rsplit("-", 1)[1]) for path in files] for amount, files in used.items()}
    assert steps[4] == [16, 32, 48, 64] and steps[8][:2] == [8, 16] and steps[32] == list(range(2, 65, 2))
    assert all(0 < row["nearer of two"] < 1 for row in rows.values())
