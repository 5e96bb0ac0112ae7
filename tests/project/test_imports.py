"""The house stands: a folder imports only from floors below its own, in no circle; private names stay at home."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import lightning.pytorch as lightning
from torch import nn

import lightning_ema

ROOT = Path(lightning_ema.__file__).parent
FLOORS = [  # what stands on one floor does not import from its neighbours
    {"ops", "checks"},
    {"schedules", "distributed"},
    {"modules"},
    {"checkpoint", "trainer", "recipes"},
    {"averaging", "semi_supervised"},
    {"interop", "evaluation", "teacher"},
    {"posthoc"},
    {"callback", "cli"},
    {"__init__", "__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))
LINES = 400
KNOW_LIGHTNING = {"trainer", "evaluation", "teacher", "callback", "semi_supervised"}
"""Rooms that may import Lightning; all others know torch alone."""


def name_of(path):
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)


def room_of(module):
    return (module.split(".") + ["__init__"])[1]


@cache
def tree(path):
    return ast.parse(path.read_text())


MODULES = {name_of(path) for path in FILES} | {name_of(path.parent) for path in FILES if path.stem == "__init__"}


def imported(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: write imports in full"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (inside & MODULES) or {node.module}
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def arrows():
    return [(name_of(path), name) for path in FILES for name in imported(path)]


def test_every_room_has_a_floor():
    assert {room_of(name_of(path)) for path in FILES} == FLOOR.keys()


def test_a_room_imports_only_from_floors_below():
    inside = [(path, name) for path, name in arrows() if name.split(".")[0] == "lightning_ema"]
    assert [
        f"{path} imports {name}"
        for path, name in inside
        if room_of(path) != room_of(name) and FLOOR[room_of(name)] >= FLOOR[room_of(path)]
    ] == []


def test_the_lower_floors_know_torch_alone():
    outside = [(path, name) for path, name in arrows() if name.split(".")[0] in ("lightning", "pytorch_lightning")]
    assert [f"{path} imports {name}" for path, name in outside if room_of(path) not in KNOW_LIGHTNING] == []


def test_no_file_imports_itself_by_way_of_others():
    graph = {name_of(path): {n for n in imported(path) if n in MODULES and n != name_of(path)} for path in FILES}
    list(TopologicalSorter(graph).static_order())


def test_no_file_is_long():
    lines = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > LINES} == {}


def private_names_of_lightning():
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    objects = [trainer, lightning.LightningModule(), trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.strategy]
    objects += [trainer.validate_loop, trainer._logger_connector, trainer._data_connector]
    kinds = [kind for each in objects for kind in type(each).__mro__ if kind.__module__.startswith("lightning")]
    names = {name for each in [*objects, *kinds] for name in vars(each)}
    names -= vars(nn.Module()).keys() | vars(nn.Module).keys()
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def own_names(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_private_names_of_lightning_are_used_in_trainer_alone():
    private, found = private_names_of_lightning(), []
    assert "_logger_connector" in private and "_trainer" in private and "_current_fx_name" in private
    for path in FILES:
        if room_of(name_of(path)) != "trainer":
            used = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
            found += [f"{name_of(path)} uses {name}" for name in used & (private - set(own_names(path)))]
    assert found == []


def test_what_takes_long_to_import_waits_until_it_is_needed():
    late, found = ("torch.distributed.checkpoint", "matplotlib", "tabulate"), []
    for path in FILES:
        for node in tree(path).body:  # torch.distributed.checkpoint brings servers and process pools
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{name_of(path)} imports {name}" for name in named if name.startswith(late)]
    assert found == []


def test_all_public_names_are_there_and_documented():
    assert [name for name in lightning_ema.__all__ if not getattr(lightning_ema, name).__doc__] == []
