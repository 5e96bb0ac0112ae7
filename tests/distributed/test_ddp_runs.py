"""Whole runs under DDP in 2 processes on a CPU, and their files in 1 and 4 processes."""

import ddp_runs
import pytest
from forked import ended_well
from two_processes import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp_runs")
    ran = run("ddp_runs.py", folder)
    assert all((folder / name).exists() for name in ("2-1.json", "4-3.json")), ran.stderr
    return folder


@pytest.mark.parametrize("check", [check.__name__ for check in ddp_runs.IN_TWO])
def test_in_both_processes(check, folder):
    ended_well(check, 2, folder)


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("check", [check.__name__ for check in ddp_runs.ELSEWHERE])
def test_in_other_numbers_of_processes(check, processes, folder):
    ended_well(check, processes, folder)
