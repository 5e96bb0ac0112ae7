"""Processes that the main one spawns or forks, and to whose memory it has no access afterwards."""

import json

import pytest
from two_processes import HERE, python, run


@pytest.mark.parametrize("start_method", [pytest.param("spawn", marks=pytest.mark.slow), "fork"])
def test_the_average_returns_in_the_module_and_nowhere_else(start_method, tmp_path):
    if start_method == "fork":
        ended = run("ddp_spawn.py", tmp_path, start_method)
    else:  # what is spawned imports the script anew, under its own name
        ended = python(HERE / "ddp_spawn.py", tmp_path, start_method)
    assert ended.returncode == 0, ended.stderr
    seen = json.loads((tmp_path / f"{start_method}.json").read_text())
    (said,) = seen.pop("said")
    assert "no average to resume from" in said
    assert seen.pop("steps") == ([3, 6] if start_method == "fork" else [3])
    assert all(seen.values()), seen
