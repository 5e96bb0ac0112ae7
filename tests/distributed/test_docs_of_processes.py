"""The scripts of docs/how-to/distributed.md run by the page's own commands, in its order, in one folder."""

import re
import shlex
from pathlib import Path
from runpy import run_path

import pytest
import torch
from two_processes import python

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "distributed.md"
SCRIPT = re.compile(r"^```python\n(# (\w+\.py)\n.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    text = PAGE.read_text()
    for script, name in SCRIPT.findall(text):
        (folder / name).write_text(script)
    for command in "".join(COMMANDS.findall(text)).splitlines():
        program, *arguments = shlex.split(command)
        assert program == "python"
        ran = python(*arguments, cwd=folder)
        assert ran.returncode == 0, f"{arguments}: {ran.stderr[-3000:]}"
        (folder / f"{arguments[0]}.out").write_text(ran.stdout)
    return folder


def test_every_script_is_run():
    text = PAGE.read_text()
    run = {word for commands in COMMANDS.findall(text) for word in shlex.split(commands) if word.endswith(".py")}
    assert run == {name for _, name in SCRIPT.findall(text)}
    assert text.count("```python") == len(SCRIPT.findall(text))


def test_each_leaves_a_checkpoint_of_the_steps_it_took(folder):
    steps = {}
    for name in ("ddp.ckpt", "fsdp.ckpt.consolidated", "two_dimensions.ckpt/meta.pt", "teacher.ckpt/meta.pt"):
        (entry,) = (
            e for e in torch.load(folder / name, weights_only=False)["callbacks"].values() if "num_updates" in e
        )
        steps[name.split(".")[0]] = entry["num_updates"]
    # 1,024 samples in batches of 32, by the number of data-parallel processes
    assert steps == {"ddp": 3 * 16, "fsdp": 2 * 16 + 32, "two_dimensions": 16, "teacher": 2 * 16}


@pytest.mark.filterwarnings("ignore")
def test_what_was_scored_under_ddp_is_what_was_saved_after_fit(folder):
    script = run_path(str(folder / "ddp.py"))
    module = script["Model"].load_from_checkpoint(folder / "ddp.ckpt").eval()
    with torch.no_grad():  # BatchNorm statistics too, of which each process had its own
        losses = [module.loss(batch).item() for batch in script["data"](256)]
    said = re.findall(r"val_loss: ([\d.e-]+)", (folder / "ddp.py.out").read_text())
    assert [float(each) for each in said] == pytest.approx([sum(losses) / len(losses)] * 2, rel=1e-5)
