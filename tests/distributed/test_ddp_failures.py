"""One of 2 processes raises or is killed: the job ends, and the checkpoint before resumes."""

import json

import ddp_failures
import pytest
from two_processes import HERE, python, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp_failures")
    ran = run("ddp_failures.py", folder)
    assert all((folder / name).exists() for name in ("ended.json", "resumed-0.json")), ran.stderr
    return folder


@pytest.fixture(scope="module")
def resumed(folder):
    return json.loads((folder / "resumed-0.json").read_text())


@pytest.mark.parametrize("scenario", ddp_failures.SCENARIOS)
def test_both_processes_end(scenario, folder):
    _, fails = ddp_failures.SCENARIOS[scenario]
    expected = [1, 1]
    if fails.kill:
        expected[fails.rank] = -9
    assert json.loads((folder / "ended.json").read_text())[scenario] == expected


@pytest.mark.parametrize("scenario", ddp_failures.SCENARIOS)
def test_the_checkpoint_before_resumes_bit_for_bit(scenario, resumed):
    assert resumed[scenario] == [True, True, [True, 6], [True, 6]]


@pytest.mark.parametrize("scenario", [name for name, (shard, _) in ddp_failures.SCENARIOS.items() if shard])
def test_a_save_after_an_exception_needs_all_parts_and_is_refused(scenario, folder):
    _, fails = ddp_failures.SCENARIOS[scenario]
    assert not (folder / f"{scenario}.ckpt").exists()
    for rank in range(2):
        said = (folder / f"{scenario}-{rank}.txt").read_text()
        assert ("average is partitioned among processes" in said) == (not fails.kill or rank != fails.rank)


def test_a_whole_average_is_saved_by_the_first_process_alone(resumed):
    assert resumed["saved on the exception"]
    assert resumed["steps after the exception"] == 9


def test_a_script_that_started_its_processes_ends(tmp_path):
    ended = python(HERE / "ddp_failures.py", tmp_path, "launched")
    assert ended.returncode != 0 and "a bug" in ended.stderr
