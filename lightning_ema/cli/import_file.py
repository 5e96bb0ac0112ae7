"""``python -m lightning_ema import``: the average in another system's file, as weights or as a Lightning checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from lightning_ema.interop.convert import READERS, Form, describe, read, write
from lightning_ema.interop.imported import Imported


def add_to(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    command = commands.add_parser("import", help="convert the average in another system's file")
    command.add_argument("file", help="of mmengine, timm, YOLO, diffusers, NeMo, Lightning's own callbacks, ...")
    command.add_argument(
        "--as",
        dest="form",
        choices=get_args(Form),
        required=True,
        help="weights: the averaged state_dict alone; lightning: a checkpoint with which EMACallback resumes",
    )
    command.add_argument("--out", help="where to (default: <file>-average beside it)")
    command.add_argument(
        "--like",
        "--model-state",
        metavar="FILE",
        help="a state_dict or checkpoint of the model, for its names, their order and what is not averaged",
    )
    command.add_argument("--live", metavar="FILE", help="a state_dict or checkpoint with the live weights")
    command.add_argument(
        "--steps", type=int, help="that the average has seen, where the file does not say: epochs * updates per epoch"
    )
    command.add_argument("--system", choices=READERS, help="which system wrote it, where the file fits several")
    command.add_argument("--name", default="ema", help="of the EMACallback that is to resume (default: ema)")
    command.add_argument("--allow-code", action="store_true", help="let the files run code while they are read")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> str:
    """Runs the command; gives what to print."""
    source = Path(given.file)
    default = source.with_name(source.stem + ("-average.ckpt" if given.form == "lightning" else "-average"))
    target = default if given.out is None else Path(given.out)
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the file that is read, and is not written to. Give another with --out.")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is no folder. Make it, or give another file with --out.")
    imported = read(given.file, like=given.like, live=given.live, system=given.system, allow_code=given.allow_code)
    path = write(imported, target, given.form, steps=given.steps, name=given.name)
    resumes = given.form == "lightning"
    alone = ["training goes on from the average"] if resumes and not imported.live else []
    named = [_names_as_they_are(imported)] if resumes and given.like is None and not imported.checkpoint else []
    return "\n".join([describe(imported, given.steps), *alone, *named, str(path)])


def _names_as_they_are(imported: Imported) -> str:
    """A remark on a file whose names may be those of a network inside the LightningModule."""
    first = next(iter(imported.weights))
    return (
        f"names: {first}, ... as in the file. Where those of the LightningModule have more in front, such as "
        f"net.{first}, add --like FILE, any checkpoint or state_dict of it"
    )
