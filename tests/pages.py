"""The pages of README and docs: their fenced blocks, and what their reader is taken to have."""

import re
from pathlib import Path

import torch
from helpers import Regression, loader
from torch import nn
from torch.utils.data import TensorDataset

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
