import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lightning_ema import Constant, Equal, Then
from lightning_ema.__main__ import main
from lightning_ema.cli.plot import POINTS, plot_schedules
from lightning_ema.schedules.text import SCHEDULES, read_schedule

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **kw: (figures.append(figure), save(figure, *a, **kw)))
    return figures


def test_what_is_drawn(drawn, tmp_path):
    schedules = {"half": Constant(0.5), "mean": Equal()}
    plot_schedules(schedules, 8, tmp_path / "a.png", gap=2)
    left, right = drawn[0].axes
    assert [line.get_xdata().tolist() for line in left.lines] == [[2, 4, 6, 8]] * 2
    assert list(left.lines[0].get_ydata()) == [0.5] * 4
    assert left.lines[1].get_ydata() == pytest.approx([1 / 2, 1 / 4, 1 / 6, 1 / 8])
    # an update covers two steps: its weight is shared between them
    assert np.asarray(right.lines[0].get_ydata()) == pytest.approx([3 / 512, 3 / 128, 3 / 32, 3 / 8])
    assert np.asarray(right.lines[1].get_ydata()) == pytest.approx([1 / 8] * 4)
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    # 3/4 * (0 + 2/4 + 4/16 + 6/64) + 8/256
    assert labels == ["half: mean age 0.6641 steps", "mean: mean age 3 steps"]
    assert (left.get_xlabel(), left.get_ylabel(), left.get_yscale()) == ("step", "1 - decay", "log")
    assert (right.get_xlabel(), right.get_ylabel()) == ("step", "weight per step")
    assert "step 8" in right.get_title()


def test_a_schedule_of_the_runs_length_takes_that_of_the_picture(drawn, tmp_path):
    assert main(["plot-schedule", "Cosine(0.5, 1.0)", "--steps", "4", "--out", str(tmp_path / "a.png")]) == 0
    # 1 - decay = (cos(pi n / 4) + 1) / 4
    assert list(drawn[0].axes[0].lines[0].get_ydata())[:3] == pytest.approx(
        [(1 + 0.5**0.5) / 4, 1 / 4, (1 - 0.5**0.5) / 4]
    )


@pytest.mark.filterwarnings("error")
def test_the_weight_of_the_start_is_said(drawn, tmp_path):
    plot_schedules({"slow": Constant(0.9)}, 10, tmp_path / "a.png")
    assert "35% from before step 1" in drawn[0].legends[0].get_texts()[0].get_text()


def test_a_long_run_is_drawn_with_few_points_from_the_first_to_the_last(drawn, tmp_path):
    plot_schedules({"mean": Equal()}, 100_000, tmp_path / "a.png")
    steps = drawn[0].axes[0].lines[0].get_xdata()
    assert len(steps) == POINTS and (steps[0], steps[-1]) == (1, 100_000)


@pytest.mark.filterwarnings("error")
def test_extremes_can_be_drawn(tmp_path):
    schedules = {"copy": Constant(0.0), "never": Constant(1.0), "tail": Then(0.0, at=3, second=Equal())}
    for text, schedule in schedules.items():
        plot_schedules({text: schedule}, 5, tmp_path / f"{text}.png")
    plot_schedules({"one": Equal()}, 1, tmp_path / "one.png")


def test_the_command(tmp_path, capsys):
    out = tmp_path / "picture.png"
    schedules = ["0.999", "Cosine(0.9, 1.0, total_steps=100)"]
    assert main(["plot-schedule", *schedules, "--steps", "100", "--every", "5", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    image = Image.open(out)
    assert image.size == (900, 360)
    assert np.asarray(image.convert("L")).std() > 10


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["HalfLife(epochs=2)", "--steps", "10"], "needs the steps per epoch, which this run does not know"),
        (["print(1)", "--steps", "10"], "no schedule 'print'"),
        (["0.9", "--steps", "0"], "steps is 0"),
        (["0.9", "--steps", "10", "--every", "11"], "no update in so few steps"),
        (["0.9", "--steps", "10", "--out", "a.xyz"], "xyz"),
    ],
)
def test_refusals(arguments, complaint, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["plot-schedule", *arguments]) == 1
    assert complaint in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot-schedule", "0.9", "--steps", "10", "--out", str(tmp_path / "a.png")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


class TestGallery:
    gallery = runpy.run_path(str(DOCS / "gallery.py"))

    def test_every_schedule_has_a_picture_of_itself_on_the_page(self):
        page = (DOCS / "how-to" / "schedule-gallery.md").read_text()
        assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == list(SCHEDULES)
        assert re.findall(r"\]\(\.\./images/schedules/(\w+)\.png\)", page) == list(SCHEDULES)
        for name, texts in self.gallery["GALLERY"].items():
            assert {type(read_schedule(text)) for text in texts} == {SCHEDULES[name]}
        assert list(self.gallery["GALLERY"]) == list(SCHEDULES)

    @pytest.mark.parametrize("name", SCHEDULES)
    def test_the_pictures_are_small_and_not_empty(self, name):
        path = self.gallery["picture"](name)
        assert path.stat().st_size < 40_000
        assert np.asarray(Image.open(path).convert("L")).std() > 10
