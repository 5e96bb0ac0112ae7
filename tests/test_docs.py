"""Every fenced Python block in README and docs runs, in the order of its page; YAML goes through LightningCLI."""

import re
from pathlib import Path

import pytest
import torch
from helpers import Regression, loader
from test_cli import cli
from torch import nn
from torch.utils.data import TensorDataset

from lightning_ema import EMACallback, recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"# \w+\.py\n")  # one of several processes: distributed/test_docs_of_processes.py runs it


def blocks(page, language):
    return [text for text in all_blocks(page, language) if not SCRIPT.match(text)]


def all_blocks(page, language):
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def what_a_reader_has():
    net = nn.Linear(4, 1)
    images = TensorDataset(torch.rand(200, 1, 4, 4), torch.arange(200) % 10)
    return {
        "model": Regression(),
        "train_loader": loader(),
        "val_loader": loader(2),
        "net": net,
        "Net": lambda: Regression().net,
        "optimizer": torch.optim.SGD(net.parameters(), 0.1),
        "loss_fn": nn.functional.mse_loss,
        "evaluate": lambda net: None,
        "make_network": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 10)),
        "train_set": images,
        "val_set": images,
        "shifted": lambda images: images.roll(1, -1),
        "distorted": lambda images: images.flip(-1),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = what_a_reader_has()
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda p: p.name)
def test_yaml_blocks_run(page, tmp_path):
    for block in blocks(page, "yaml"):
        (tmp_path / "config.yaml").write_text(block)
        made = cli("fit", f"--config={tmp_path / 'config.yaml'}", f"--trainer.default_root_dir={tmp_path}")
        assert any(isinstance(callback, EMACallback) for callback in made.trainer.callbacks)


@pytest.mark.filterwarnings("ignore")
def test_a_recipe_in_yaml_gives_the_arguments_of_the_recipe(tmp_path):
    page = ROOT / "docs" / "how-to" / "lightning-cli.md"
    (block,) = (block for block in blocks(page, "yaml") if "# recipes." in block)
    recipe = eval(re.search(r"# (recipes\..*)", block)[1], {"recipes": recipes})
    assert str(recipe) in page.read_text()  # as print shows it
    (tmp_path / "config.yaml").write_text(block)
    made = cli(f"--config={tmp_path / 'config.yaml'}", "--trainer.logger=false", run=False)
    (callback,) = (c for c in made.trainer.callbacks if isinstance(c, EMACallback))
    assert callback.settings == EMACallback(**recipe).settings


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
