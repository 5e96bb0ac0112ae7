"""A teacher in two processes on a CPU, under DDP with gloo."""

from two_processes import results


def test_the_teacher_is_the_same_in_both_and_resumes(tmp_path):
    seen = results("teacher_under_ddp.py", tmp_path)
    for rank in seen:
        assert rank["processes"] == 2
        assert rank["by hand"] and rank["resumed"]
        assert rank["steps"] == [6, 9, 9]
    assert seen[0]["teacher"] == seen[1]["teacher"]
