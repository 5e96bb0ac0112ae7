"""The house: its floors, its rooms, and who imports whom; ``make house`` draws docs/images/house.svg from it."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from html import escape
from itertools import combinations, pairwise, permutations
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lightning_ema"
PICTURE = Path(__file__).parent / "images" / "house.svg"
FLOORS = [  # from the ground up; what stands on one floor does not import from its neighbours
    ("ops", "checks", "files"),
    ("schedules", "distributed"),
    ("modules",),
    ("checkpoint", "trainer", "recipes"),
    ("averaging", "semi_supervised"),
    ("interop", "evaluation", "teacher"),
    ("posthoc",),
    ("callback", "cli"),
    ("__init__", "__main__"),
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))

WIDTH, ROOM, ROOM_HEIGHT, ROW, SIDE, LANE = 900, 214, 76, 124, 34, 14
"""In pixels: the picture, a room, its height, a floor with the space to the next, a margin, a way past rooms."""

LINE = 'fill="none" stroke="#4d6c94" stroke-width="1.5" marker-end="url(#tip)"'

Arrow = tuple[str, str]
Node = str | tuple[Arrow, int]
"""A room, or where an arrow passes the rooms of a floor: the arrow, and the floor."""


def name_of(path: Path) -> str:
    """The module of a file, as an import writes it; of a folder's ``__init__.py`` with that ending."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def room_of(module: str) -> str:
    """The folder of a module, or the file where it stands in none."""
    return [*module.split("."), "__init__"][1]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


MODULES = {name_of(path) for path in FILES} | {name_of(path.parent) for path in FILES if path.stem == "__init__"}


def imported(path: Path) -> Iterator[str]:
    """What a file imports: modules of the package as far as they are ones, names of others as they are written."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: write imports in full"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from sorted(inside & MODULES) or [str(node.module)]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def arrows() -> list[Arrow]:
    """Each import of each file: the importing module, and what it imports."""
    return [(name_of(path), name) for path in FILES for name in imported(path)]


def arrows_between_rooms() -> set[Arrow]:
    """The same between rooms of the package."""
    inside = ((room_of(path), room_of(name)) for path, name in arrows() if name.split(".")[0] == PACKAGE.name)
    return {(upper, lower) for upper, lower in inside if upper != lower}


def arrows_down() -> set[Arrow]:
    """Those that the picture shows; tests/project/test_imports.py refuses all others."""
    return {(upper, lower) for upper, lower in arrows_between_rooms() if FLOOR[upper] > FLOOR[lower]}


def described() -> str:
    """What the picture is drawn from, which it holds as its description: each room, what it is for and imports."""
    rooms = [room for floor in reversed(FLOORS) for room in floor]
    below = {room: ", ".join(sorted(lower for upper, lower in arrows_down() if upper == room)) for room in rooms}
    return "".join(f"{room}: {sentence(room)} Imports {below[room] or 'nothing'}.\n" for room in rooms)


def sentence(room: str) -> str:
    """What a room is for: the first line of its docstring, up to a colon."""
    file = PACKAGE / f"{room}.py"
    path = file if file.is_file() else PACKAGE / room / "__init__.py"
    first = (ast.get_docstring(tree(path)) or "").partition("\n")[0]
    return first.partition(":")[0].rstrip(".") + "."


def without_shortcuts(all_arrows: Iterable[Arrow]) -> set[Arrow]:
    """The arrows that do not follow from others: what a room reaches by way of another needs none of its own."""
    below: dict[str, set[str]] = {}
    for upper, lower in all_arrows:
        below.setdefault(upper, set()).add(lower)

    @cache
    def reached(room: str) -> frozenset[str]:
        return frozenset(x for lower in below.get(room, ()) for x in {lower, *reached(lower)})

    return {(a, b) for a, lowers in below.items() for b in lowers if not any(b in reached(c) for c in lowers)}


def ways(drawn: Iterable[Arrow]) -> dict[Arrow, list[Node]]:
    """The nodes on the way of each arrow: two rooms, and a place to pass on each floor between them."""
    between = {arrow: range(FLOOR[arrow[0]] - 1, FLOOR[arrow[1]], -1) for arrow in sorted(drawn)}
    return {arrow: [arrow[0], *((arrow, floor) for floor in floors), arrow[1]] for arrow, floors in between.items()}


def places(routes: Iterable[list[Node]]) -> dict[Node, float]:
    """The middle of each node, so that few arrows cross and all are short.

    Nodes of a floor are moved in their row as long as that makes the picture better.
    """
    steps = [step for route in routes for step in pairwise(route)]
    rows: list[list[Node]] = [list(rooms) for rooms in FLOORS]
    for node in dict.fromkeys(node for step in steps for node in step if not isinstance(node, str)):
        rows[node[1]].append(node)
    beside: dict[Node, list[Node]] = {node: [] for row in rows for node in row}
    for upper, lower in steps:
        beside[upper].append(lower)
        beside[lower].append(upper)

    def spread() -> dict[Node, float]:
        middles = dict.fromkeys(beside, WIDTH / 2)
        for _ in range(8):
            for row in [*rows, *reversed(rows)]:
                wanted = [sum(middles[other] for other in beside[node]) / len(beside[node]) for node in row]
                middles |= zip(row, apart(wanted, [width(node) for node in row]), strict=True)
        return middles

    def cost() -> float:
        middles = spread()
        length = sum(abs(middles[upper] - middles[lower]) for upper, lower in steps)
        tops = {(a, b): (middles[a], middles[b], floor_of(a)) for a, b in steps}
        crossings = sum(
            one[2] == other[2] and (one[0] - other[0]) * (one[1] - other[1]) < 0
            for one, other in combinations(tops.values(), 2)
        )
        return 300 * crossings + length

    best, better = cost(), True
    while better:
        better = False
        for row in rows:
            for i, j in permutations(range(len(row)), 2):
                row.insert(j, row.pop(i))
                if (now := cost()) < best - 1e-6:
                    best, better = now, True
                else:
                    row.insert(i, row.pop(j))
    middles = spread()
    edges = [middles[node] + side * width(node) / 2 for node in middles for side in (-1, 1)]
    return {node: middle + (SIDE + WIDTH - 8 - min(edges) - max(edges)) / 2 for node, middle in middles.items()}


def floor_of(node: Node) -> int:
    return FLOOR[node] if isinstance(node, str) else node[1]


def width(node: Node) -> int:
    return ROOM if isinstance(node, str) else LANE


def apart(wanted: list[float], widths: list[int], gap: int = 16) -> list[float]:
    """Middles near those wanted, in their order, of things that neither overlap nor leave the picture."""
    reach = [(a + b) / 2 + gap for a, b in pairwise(widths)]
    right = list(wanted)
    right[0] = max(right[0], SIDE + widths[0] / 2)
    for i, step in enumerate(reach):
        right[i + 1] = max(right[i + 1], right[i] + step)
    left = list(wanted)
    left[-1] = min(left[-1], WIDTH - 8 - widths[-1] / 2)
    for i, step in reversed(list(enumerate(reach))):
        left[i] = min(left[i], left[i + 1] - step)
    middles = [(a + b) / 2 for a, b in zip(right, left, strict=True)]
    middles[0] = max(middles[0], SIDE + widths[0] / 2)
    for i, step in enumerate(reach):
        middles[i + 1] = max(middles[i + 1], middles[i] + step)
    middles[-1] = min(middles[-1], WIDTH - 8 - widths[-1] / 2)
    for i, step in reversed(list(enumerate(reach))):
        middles[i] = min(middles[i], middles[i + 1] - step)
    return middles


def top(node: Node) -> int:
    return 12 + ROW * (len(FLOORS) - 1 - floor_of(node))


def picture() -> str:
    """The house as SVG."""
    routes = ways(without_shortcuts(arrows_down()))
    middles = places(routes.values())
    height = ROW * (len(FLOORS) - 1) + ROOM_HEIGHT + 24
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        "<title>The rooms of lightning_ema, and which of them imports which</title>",
        f"<desc>\n{escape(described(), quote=False)}</desc>",
        '<marker id="tip" markerWidth="7" markerHeight="6" refX="6" refY="3" orient="auto">'
        '<path d="M0,0 L7,3 L0,6 z" fill="#4d6c94"/></marker>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for number, rooms in enumerate(FLOORS):
        y = top(rooms[0])
        lines.append(f'<rect y="{y - 8}" width="{WIDTH}" height="{ROOM_HEIGHT + 16}" fill="#f1f4f8"/>')
        lines.append(f'<text x="12" y="{y + 42}" font-size="14" fill="#7a8794">{number}</text>')
    for route in routes.values():
        lines.append(f'<path d="{path_of(route, routes.values(), middles)}" {LINE}/>')
    for room in FLOOR:
        lines += drawn_room(room, middles[room])
    return "\n".join([*lines, "</svg>", ""])


def path_of(route: list[Node], routes: Iterable[list[Node]], middles: dict[Node, float]) -> str:
    """An arrow: straight down past rooms, in curves between floors, its ends beside those of others."""

    def end(at: int, neighbour: int) -> float:
        others = sorted(middles[r[neighbour]] for r in routes if r[at] == route[at])
        place = others.index(middles[route[neighbour]])
        return middles[route[at]] + (place - (len(others) - 1) / 2) * min(26, (ROOM - 40) / len(others))

    xs = [end(0, 1), *(middles[node] for node in route[1:-1]), end(-1, -2)]
    parts = [f"M{xs[0]:.0f},{top(route[0]) + ROOM_HEIGHT}"]
    for (upper, lower), (x, to) in zip(pairwise(route), pairwise(xs), strict=True):
        start, stop = top(upper) + ROOM_HEIGHT, top(lower)
        middle = (start + stop) // 2
        parts.append(f"C{x:.0f},{middle} {to:.0f},{middle} {to:.0f},{stop}")
        if not isinstance(lower, str):
            parts.append(f"V{stop + ROOM_HEIGHT}")
    return " ".join(parts)


def drawn_room(room: str, middle: float) -> list[str]:
    """A room with its name and its sentence."""
    x, y = middle - ROOM / 2, top(room)
    name = f"{room}/" if (PACKAGE / room).is_dir() else f"{room}.py"
    said = textwrap.wrap(sentence(room), 28, max_lines=3, placeholder=" ...")
    box = f'<rect x="{x:.0f}" y="{y}" width="{ROOM}" height="{ROOM_HEIGHT}" rx="5" fill="#ffffff" stroke="#4d6c94"/>'
    heading = f'<text x="{x + 10:.0f}" y="{y + 21}" font-size="15" font-weight="bold" fill="#1d2b3a">{name}</text>'
    body = f'<text x="{x + 10:.0f}" font-size="12.5" fill="#33414f"'
    text = [f'{body} y="{y + 39 + 15 * i}">{escape(line, quote=False)}</text>' for i, line in enumerate(said)]
    return [box, heading, *text]


if __name__ == "__main__":
    PICTURE.write_text(picture())
    print(PICTURE)
