"""Two processes on a CPU, under DDP with gloo."""

import pytest
from two_processes import results


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each process saw."""
    return results("second_pass_under_ddp.py", tmp_path_factory.mktemp("ddp"))


def test_the_second_pass_is_a_separate_evaluation_of_the_same_weights_in_each_process(seen):
    for rank in seen:
        assert rank["wrapped"] == "DistributedDataParallel"
        assert rank["second"] == rank["alone"]
        assert {name: value for name, value in rank["both"].items() if name.endswith("_live")} == {
            f"{name}_live": value for name, value in rank["alone"].items()
        }


def test_training_and_first_pass_are_those_of_a_run_without(seen):
    for rank in seen:
        assert rank["same training"]
        assert rank["plain"] == {name: value for name, value in rank["both"].items() if not name.endswith("_live")}


def test_what_is_the_same_in_both_processes_and_what_is_not(seen):
    first, second = (rank["second"] for rank in seen)
    for name in ("accuracy", "synced", "highest", "gathered"):
        assert first[name] == second[name]
    assert first["local"] != second["local"]
    assert first["first"] == 8.0
    assert "first" not in second and "first_live" not in seen[1]["both"]
