"""Runs on sharded weights that are cut short, in two processes on a CPU, with gloo."""

import json
import shutil

import pytest
from sharded_failures import CHECKS, CUTS
from two_processes import run

from lightning_ema import export_average


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    ran = run("sharded_failures.py", folder)
    assert (folder / "1.json").exists(), ran.stderr
    return folder


@pytest.fixture(scope="module")
def cut(folder):
    return json.loads((folder / "cut.json").read_text())


@pytest.mark.parametrize("how", CUTS)
def test_the_run_ends(cut, how):
    assert all(cut[how]), f"{cut[how]}: None did not end, 0 noticed nothing"


@pytest.mark.parametrize("how", ["raise", "kill", "raise after a step"])
def test_after_an_exception_nobody_is_waited_for_and_a_save_is_refused(folder, cut, how):
    assert (folder / how / "refused-1").exists()
    assert not (folder / how / "waited").exists()


@pytest.mark.parametrize("name", CHECKS)
def test_afterwards(folder, name):
    seen = [json.loads((folder / f"{rank}.json").read_text())[name] for rank in range(2)]
    assert seen == ["", ""]


def test_the_command_line_refuses_them_too(folder, tmp_path):
    with pytest.raises(ValueError, match=r"the checkpoint holds shards of two saves"):
        export_average(folder / "mixed.ckpt", tmp_path / "out.pt")
    with pytest.raises(ValueError, match=r"is no complete checkpoint: \.metadata missing"):
        export_average(folder / "without_metadata.ckpt", tmp_path / "out.pt")
    with pytest.raises(ValueError, match=r"is no complete checkpoint: meta\.pt missing"):
        export_average(folder / "without_meta.ckpt", tmp_path / "out.pt")
    empty = shutil.copytree(folder / "without_meta.ckpt", tmp_path / "empty", ignore=lambda *_: [".metadata"])
    with pytest.raises(ValueError, match=r"\.metadata and meta\.pt missing\. Either its save did not end"):
        export_average(empty, tmp_path / "out.pt")
