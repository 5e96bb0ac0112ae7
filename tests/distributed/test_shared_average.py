"""An average shared among 2 and among 3 processes on a CPU, beside one that each keeps whole."""

import pytest
import shared_average
from forked import ended_well
from two_processes import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared_average")
    ran = run("shared_average.py", folder)
    assert all((folder / name).exists() for name in ("2-1.json", "3-2.json")), ran.stderr
    return folder


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("check", [check.__name__ for check in shared_average.CHECKS])
def test_in_every_process(check, processes, folder):
    ended_well(check, processes, folder)
