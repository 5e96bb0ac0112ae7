"""Every script in examples/ runs, in a short version, from a directory of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = {"01_quickstart.py": ["--seeds", "1", "--epochs", "1"]}


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("[0-9]*.py")), ids=lambda path: path.name)
def test_runs(script, tmp_path):
    command = [sys.executable, script, *SHORT[script.name], "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (plot,) = (tmp_path / "out").glob("*.png")
    assert plot.stat().st_size > 5000
    assert list((tmp_path / "out").rglob("*.ckpt"))


def test_every_script_is_run():
    assert {path.name for path in EXAMPLES.glob("[0-9]*.py")} == set(SHORT)
