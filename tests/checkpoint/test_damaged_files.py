"""Damaged files through every command that reads them: refused by the key, and nothing is written or trained."""

import copy
import math

import pytest
import torch
from helpers import ema, fit, loader, seeded, trainer, widest

from lightning_ema import Constant, export_average
from lightning_ema.__main__ import main
from lightning_ema.checkpoint.entry import KEYS

DAMAGES = {
    "missing": None,
    "None": lambda value: None,
    "text": lambda value: "nonsense",
    "number": lambda value: -7 if value != -7 else -8,
    "NaN": lambda value: math.nan,
    "list": lambda value: [value],
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "file.ckpt"
    callback = ema(decay=[Constant(0.9), Constant(0.5)], buffers="recalibrate", dtype=torch.float64)
    fit(seeded(Recalibrates), callback, max_epochs=1).save_checkpoint(path)
    return torch.load(path, weights_only=True), callback.state_key


class Recalibrates(type(seeded())):
    def forward(self, x):
        return self.net(x)


def said_by(command):
    """What a command line refuses with."""

    def run(path, tmp_path, capsys):
        assert main([*command, str(path), *([str(tmp_path / "out.pt")] if command == ["export"] else [])]) != 0
        assert not (tmp_path / "out.pt").exists()
        return capsys.readouterr().err

    return run


def refusal(work):
    def run(path, tmp_path, capsys):
        with pytest.raises(ValueError, match=r"damaged|format") as error:
            work(path, tmp_path)
        return str(error.value)

    return run


def resume(path, tmp_path):
    module = seeded(Recalibrates)
    module.training_step = lambda *args: pytest.fail("training has begun")
    callback = ema(decay=[Constant(0.9), Constant(0.5)], buffers="recalibrate", dtype=torch.float64)
    fit(module, callback, max_epochs=2, ckpt_path=path)


def test(path, tmp_path):
    trainer(ema(decay=[Constant(0.9), Constant(0.5)])).test(seeded(Recalibrates), loader(1), ckpt_path=path)


test.__test__ = False

COMMANDS = {
    "inspect": said_by(["inspect"]),
    "export": said_by(["export"]),
    "export_average": refusal(lambda path, tmp_path: export_average(path, tmp_path / "out.pt")),
    "fit": refusal(resume),
    "test": refusal(test),
}


@pytest.mark.parametrize("command", [pytest.param(c, marks=widest(c in ("inspect", "fit"))) for c in COMMANDS])
def test_every_key_is_believed_by_no_command_when_it_is_damaged(command, file, tmp_path, capsys):
    """Tried: each key that the file has with each of the damages; refused with the key's name: all of them."""
    clean, state_key = file
    tried = refused = 0
    for key in clean["callbacks"][state_key].keys() & KEYS.keys():
        for damage in DAMAGES:
            content = copy.deepcopy(clean)
            entry = content["callbacks"][state_key]
            if damage == "missing":
                del entry[key]
            else:
                entry[key] = DAMAGES[damage](entry[key])
            torch.save(content, tmp_path / "damaged.ckpt")
            tried += 1
            refused += key in COMMANDS[command](tmp_path / "damaged.ckpt", tmp_path, capsys)
    assert (tried, refused) == (6 * len(clean["callbacks"][state_key]), tried)


SECTIONS = {"None": None, "a list": [], "text": "x", "a number": 3, "another list": [1, 2]}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("section", SECTIONS)
def test_an_entry_that_is_no_dictionary_is_refused(section, command, file, tmp_path, capsys):
    clean, state_key = file
    content = copy.deepcopy(clean)
    content["callbacks"][state_key] = SECTIONS[section]
    torch.save(content, tmp_path / "damaged.ckpt")
    assert "accepted is a dictionary" in COMMANDS[command](tmp_path / "damaged.ckpt", tmp_path, capsys)
