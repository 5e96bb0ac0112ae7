"""The house stands: a folder imports only from floors below its own, in no circle; private names stay at home."""

import ast
import html
import re
from graphlib import TopologicalSorter

import house
import lightning.pytorch as lightning
from house import FILES, FLOOR, MODULES, arrows, imported, name_of, room_of, tree
from torch import nn

import lightning_ema

LINES = 400
KNOW_LIGHTNING = {"trainer", "evaluation", "teacher", "callback", "semi_supervised"}
"""Rooms that may import Lightning; all others know torch alone."""


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
    waits = "lightning_ema.checkpoint.shard_files"  # imports the first of these, and is imported late itself
    late, found = ("torch.distributed.checkpoint", "matplotlib", "tabulate", waits), []
    for path in FILES:
        for node in tree(path).body:  # torch.distributed.checkpoint brings servers and process pools
            if name_of(path) == waits:
                continue
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{name_of(path)} imports {name}" for name in named if name.startswith(late)]
    assert found == []


def test_all_public_names_are_there_and_documented():
    assert [name for name in lightning_ema.__all__ if not getattr(lightning_ema, name).__doc__] == []


def test_the_picture_is_of_the_house_as_it_stands():
    drawn = re.search(r"<desc>\n(.*)</desc>", house.PICTURE.read_text(), re.DOTALL)[1]
    assert html.unescape(drawn) == house.described()  # `make house` draws it anew


def test_the_picture_leaves_out_what_follows_from_other_arrows():
    arrows = {("c", "b"), ("b", "a"), ("c", "a"), ("d", "a"), ("d", "c"), ("e", "a")}
    assert house.without_shortcuts(arrows) == {("c", "b"), ("b", "a"), ("d", "c"), ("e", "a")}


def test_no_arrow_of_the_picture_crosses_a_room():
    picture = house.PICTURE.read_text()
    boxes = re.findall(r'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)" rx', picture)
    rooms = [(int(x), int(y), int(x) + int(w), int(y) + int(h)) for x, y, w, h in boxes]
    assert len(rooms) == len(FLOOR)
    for path in re.findall(r'<path d="(M[^"]+)" fill="none"', picture):
        x, y = map(int, re.match(r"M(\d+),(\d+)", path).groups())
        for curve, bend_x, bend, after, again, to_x, to, down in re.findall(
            r"(C)(\d+),(\d+) (\d+),(\d+) (\d+),(\d+)|V(\d+)", path
        ):
            if curve:  # its ends and bends lie between two floors, and so does all of it
                assert (int(bend_x), bend, after) == (x, again, to_x) and y < int(bend) < int(to)
                assert not any(top < int(to) and y < bottom for _, top, _, bottom in rooms)
                x, y = int(to_x), int(to)
            else:
                assert not any(
                    left <= x <= right and top < int(down) and y < bottom for left, top, right, bottom in rooms
                )
                y = int(down)
        assert any(left < x < right and y == top for left, top, right, _ in rooms)


def test_rooms_stand_beside_each_other_and_in_the_picture():
    wanted, widths = [0, 10, 12, 890], [200, 14, 200, 200]
    middles = house.apart(wanted, widths)
    edges = [edge for middle, w in zip(middles, widths, strict=True) for edge in (middle - w / 2, middle + w / 2)]
    assert edges == sorted(edges) and edges[0] >= house.SIDE and edges[-1] <= house.WIDTH
    assert house.apart([300, 600], [200, 200]) == [300, 600]
