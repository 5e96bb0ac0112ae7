"""Writes the list in docs/messages.md from the source: what the package raises, warns of and logs.

The build of the site puts the list into the page; ``python docs/message_page.py`` prints it.

A message stands in ``raise Kind(...)``, in a function that returns the error, in a call of one of ``SAID_BY``, or in a
function that returns a sentence. What it fills in is written ``<...>``, what it may leave out ``[...]``, and of
``(this | that)`` it says one.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import house

PLACE = "<!-- the list stands here -->"
SAID_BY = {
    "warn": "warning",
    "warning": "warning",
    "rank_zero_warn": "warning",
    "info": "log line",
    "say": "log line",
    "rank_zero_info": "log line",
}
"""How a function says its first argument."""

OF = {"device", "dtype", "ndim", "shape", "stride"}
"""Attributes that say nothing without what they are of."""

LIKE_THEIR_ARGUMENT = {*dir(builtins), "kind", "label"}
"""Functions whose value is called what their last argument is called."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Values = dict[str, list[ast.expr]]


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        text: what it says, in one or several lines.
        kind: the exception's name, "warning" or "log line"; several where one sentence is said in several ways.
        place: the function in which it stands, after its class.
        when: of a function that returns a sentence, what its docstring says.
    """

    text: str
    kind: str
    place: str
    when: str = ""


# --- what stands where ----------------------------------------------------------------------------------------------


def functions(node: ast.AST, around: str = "") -> Iterator[tuple[str, Function]]:
    """All functions of a file with their names, each after that of its class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            name = f"{around}.{child.name}" if around else child.name
            if isinstance(child, Function):
                yield name, child
            yield from functions(child, name if isinstance(child, ast.ClassDef) else around)
        else:
            yield from functions(child, around)


def inside(node: ast.AST) -> Iterator[ast.AST]:
    """What stands in a function and not in a function inside of it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.ClassDef):
            yield child
            yield from inside(child)


def values(nodes: Iterable[ast.AST]) -> Values:
    """All that is assigned, added or appended to each name."""
    found: Values = {}
    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=given)):
                pairs = list(zip(targets, given, strict=False))
            case ast.Assign(targets=targets, value=value):
                pairs = [(target, value) for target in targets]
            case ast.AugAssign(target=target, value=value) | ast.NamedExpr(target=target, value=value):
                pairs = [(target, value)]
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                pairs = [(target, value)]
            case ast.Call(func=ast.Attribute(value=target, attr="append"), args=[value]):
                pairs = [(target, value)]
            case _:
                continue
        for target, value in pairs:
            if isinstance(target, ast.Name):
                found.setdefault(target.id, []).append(value)
    return found


def name_of(function: ast.expr) -> str:
    """The name of a function in a call, without what stands before its last dot."""
    return getattr(function, "attr", getattr(function, "id", ""))


def said(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    """What is raised or said: how, and the text."""
    for node in nodes:
        match node:
            case ast.Raise(exc=ast.Call(func=kind, args=[ast.List(elts=texts)])):  # the lines of a longer message
                yield from ((name_of(kind), text) for text in texts)
            case ast.Raise(exc=ast.Call(func=kind, args=[text, *_])):
                yield name_of(kind), text
            case ast.Return(value=ast.Call(func=kind, args=[text, *_])) if name_of(kind).endswith("Error"):
                yield name_of(kind), text
            case ast.Call(func=function, args=[text, *rest]) if name_of(function) in SAID_BY:
                yield SAID_BY[name_of(function)], ast.BinOp(text, ast.Mod(), ast.Tuple(rest)) if rest else text


# --- an expression as text ------------------------------------------------------------------------------------------


def named(node: ast.AST) -> str:
    """What to call the value of an expression."""
    match node:
        case ast.Name(id=name):
            return name.strip("_")
        case ast.Attribute(value=value, attr="__name__"):
            return named(value)
        case ast.Attribute(value=value, attr=name) | ast.Call(func=ast.Attribute(value=value, attr=name)) if name in OF:
            return f"{name} of {named(value)}"
        case ast.Attribute(attr=name):
            return name.strip("_")
        case ast.Subscript(slice=ast.Constant(value=str(key))):
            return key
        case ast.Call(func=ast.Attribute(attr="get" | "pop"), args=[ast.Constant(value=str(key)), *_]):
            return key
        case ast.Call(func=ast.Name(id="len"), args=[value]):
            return f"number of {named(value)}"
        case ast.Call(func=ast.Name(id="type"), args=[value]):
            return f"type of {named(value)}"
        case ast.Call(func=ast.Name(id=name)) if not (name.startswith("_") or name in LIKE_THEIR_ARGUMENT):
            return name
        case ast.Call(func=ast.Name(id=name), args=[value, *_]) if name.startswith("_"):
            return named(value)
        case ast.Call(args=[*_, value]):
            return named(value)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name)):
            return name.strip("_")
        case ast.Call(func=ast.Attribute(value=value)):
            return named(value)
        case ast.Subscript(value=value) | ast.Starred(value=value) | ast.NamedExpr(target=value):
            return named(value)
        case ast.GeneratorExp(elt=value) | ast.ListComp(elt=value) | ast.IfExp(body=value):
            return named(value)
        case ast.BoolOp(values=[value, *_]):
            return named(value)
        case ast.BinOp() if len(ast.unparse(node)) <= 20:
            return ast.unparse(node)
        case ast.BinOp():
            return "number"
    return "value"


def gap(node: ast.AST) -> str:
    return f"<{named(node)}>"


def alternatives(texts: Iterable[str]) -> str:
    """``(this | that)``, in brackets where nothing is one of them."""
    different = list(dict.fromkeys(texts))
    told = [text for text in different if text]
    one = told[0] if len(told) == 1 else f"({' | '.join(told)})" if told else ""
    if not one or "" not in different:
        return one
    bare = one.lstrip()
    return f"{one.removesuffix(bare)}[{bare}]"


def wording(text: str) -> str:
    """A message without what it fills in."""
    return re.sub(r"<[^<>]*>", "", text)


@dataclass
class Reader:
    """Reads expressions where certain names are known."""

    known: Values

    def text(self, node: ast.AST) -> str:
        """An expression as the text of a message."""
        match node:
            case ast.Constant(value=value):
                return str(value)
            case ast.JoinedStr(values=parts):
                return "".join(map(self.text, parts))
            case ast.FormattedValue(value=value):
                return self.text(value)
            case ast.BinOp(left=left, op=ast.Add(), right=right) if self.speaks(left) or self.speaks(right):
                return self.text(left) + self.text(right)
            case ast.BinOp(left=ast.Constant(value=str(template)), op=ast.Mod(), right=ast.Tuple(elts=given)):
                gaps = map(gap, given)
                return re.sub("%[a-z]", lambda _: next(gaps), template)
            case ast.BinOp(left=text, op=ast.Mod()):  # warnings.warn(text, category)
                return self.text(text)
            case ast.IfExp(body=one, orelse=other) if self.speaks(one) or self.speaks(other):
                return alternatives([self.text(one), self.text(other)])
            case ast.BoolOp(op=ast.Or(), values=[*_, ast.Constant()] as either):
                return alternatives(map(self.text, either))
            case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(between)), attr="join"), args=[listed]):
                return f"{alternatives(map(self.text, self.listed(listed))) or gap(listed)}{between}…"
            case ast.Name(id=name) if (found := self.known.get(name)) and all(map(self.speaks, found)):
                return alternatives(map(self.without(name).text, found))
            case ast.Subscript(value=ast.Name(id=name)) if (found := self.known.get(name)) and self.speaks(found[0]):
                return self.text(found[0])
            case ast.Dict(values=one):
                return alternatives(map(self.text, one))
        return gap(node)

    def speaks(self, node: ast.AST) -> bool:
        """Whether an expression is text of its own, more than a value with a sign before it."""
        match node:
            case ast.Constant(value=str(text)):
                return text == "" or re.search(r"[A-Za-z]{2}", text) is not None
            case ast.JoinedStr(values=parts):
                return any(self.speaks(part) for part in parts)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self.speaks(left) or self.speaks(right)
            case ast.IfExp(body=one, orelse=other):
                return self.speaks(one) and self.speaks(other)
            case ast.Dict(values=one):
                return all(map(self.speaks, one))
            case ast.FormattedValue(value=ast.Name(id=name)) if found := self.known.get(name):
                return all(map(self.without(name).speaks, found))
        return False

    def listed(self, node: ast.AST) -> list[ast.AST]:
        """The texts in a list."""
        match node:
            case ast.GeneratorExp(elt=text) | ast.ListComp(elt=text):
                found = [text]
            case ast.List(elts=texts) | ast.Tuple(elts=texts):
                found = texts
            case ast.Subscript(value=value) | ast.Call(args=[*_, value]):
                return self.listed(value)
            case ast.Name(id=name):
                inner = self.without(name)
                given = self.known.get(name, [])
                return [text for value in given for text in inner.listed(value) or [value] if self.is_text(text)]
            case _:
                found = []
        return [text for text in found if self.is_text(text)]

    def is_text(self, node: ast.AST) -> bool:
        return isinstance(node, ast.JoinedStr) or self.speaks(node)

    def without(self, name: str) -> Reader:
        return Reader({known: value for known, value in self.known.items() if known != name})


# --- messages -------------------------------------------------------------------------------------------------------


def is_message(text: str) -> bool:
    """Whether there are words in a text, beyond the name of who says what another file wrote."""
    return len(re.findall(r"\b[a-z]{2,}\b", wording(text))) >= 2


def is_sentence(text: str) -> bool:
    return is_message(text) and re.search(r"[.?]\W*$", wording(text)) is not None


def returned(function: Function) -> list[ast.expr]:
    """What a function returns that returns text and nothing else; none for others."""
    if function.returns is None or ast.unparse(function.returns) not in ("str", "str | None"):
        return []
    return [node.value for node in inside(function) if isinstance(node, ast.Return) and node.value is not None]


class Package:
    """The files of a package, read together: a sentence of one is said by others."""

    def __init__(self, files: Iterable[Path]):
        self.trees = {path: ast.parse(path.read_text()) for path in files}
        shared = {name: v for tree in self.trees.values() for name, v in values(tree.body).items() if name.isupper()}
        self._constants = {path: shared | values(tree.body) for path, tree in self.trees.items()}
        self._calls: dict[str, list[ast.Call]] = {}
        for node in (node for tree in self.trees.values() for node in ast.walk(tree) if isinstance(node, ast.Call)):
            self._calls.setdefault(name_of(node.func), []).append(node)
        given = (function for tree in self.trees.values() for _, function in functions(tree) if function.returns)
        self._errors = {f.name: ast.unparse(f.returns) for f in given if ast.unparse(f.returns).endswith("Error")}
        self._kinds = self._kinds_of_sentences()

    def messages(self, path: Path) -> list[Message]:
        """The messages that stand in a file."""
        found: list[Message] = []
        for place, function in functions(self.trees[path]):
            reader = Reader(self._constants[path] | self._arguments(function) | values(inside(function)))
            sentences = [text for node in returned(function) for text in self._each(reader, node)]
            spoken = [(self._errors.get(kind, kind), node) for kind, node in said(inside(function))]
            texts = [(kind, text) for kind, node in spoken for text in self._each(reader, node)]
            when = ""
            if any(map(is_sentence, sentences)) and function.name in self._kinds:
                texts += [(", ".join(sorted(self._kinds[function.name])), text) for text in sentences]
                when = (ast.get_docstring(function) or "").partition("\n")[0]
            owner = place.partition(".")[0]
            found += [
                Message(re.sub("<(type of )?self>", f"<{owner}>", text), kind, place, when)
                for kind, text in texts
                if is_message(text)
            ]
        return list(dict.fromkeys(found))

    def _each(self, reader: Reader, node: ast.expr) -> Iterator[str]:
        """The messages of an expression: two where a condition chooses between them."""
        if isinstance(node, ast.IfExp):
            yield from self._each(reader, node.body)
            yield from self._each(reader, node.orelse)
        else:
            yield reader.text(node)

    def _arguments(self, function: Function) -> Values:
        """The texts that calls of a function give to its parameters."""
        found: Values = {}
        names = [argument.arg for argument in function.args.args if argument.arg not in ("self", "cls")]
        for call in self._calls.get(function.name, []) if returned(function) else []:
            for name, value in zip(names, call.args, strict=False):
                if isinstance(value, ast.JoinedStr | ast.Constant):
                    found.setdefault(name, []).append(value)
        return found

    def _kinds_of_sentences(self) -> dict[str, set[str]]:
        """How each function's sentence is said, by the function's name; of those, too, whose sentence it passes on."""
        kinds: dict[str, set[str]] = {}
        passed: dict[str, set[str]] = {}
        for tree in self.trees.values():
            for _, function in functions(tree):
                known = values(inside(function))
                for kind, node in said(inside(function)):
                    for name in self._called(node, known):
                        kinds.setdefault(name, set()).add(kind)
                for node in returned(function):
                    passed.setdefault(function.name, set()).update(self._called(node, known))
        unread = list(kinds)
        while unread:
            name = unread.pop()
            for inner in passed.get(name, ()):
                if not kinds[name] <= kinds.setdefault(inner, set()):
                    kinds[inner] |= kinds[name]
                    unread.append(inner)
        return kinds

    def _called(self, node: ast.AST, known: Values) -> set[str]:
        """The functions that an expression calls, itself or by way of a variable."""
        parts = list(ast.walk(node))
        parts += [p for n in parts if isinstance(n, ast.Name) for value in known.get(n.id, ()) for p in ast.walk(value)]
        return {name_of(part.func) for part in parts if isinstance(part, ast.Call)}


# --- the page -------------------------------------------------------------------------------------------------------


def entry(message: Message) -> str:
    """A message as an entry of the page."""
    fence = "``" if "`" in message.text else "`"
    lines = [line.strip() for line in message.text.splitlines() if line.strip()]
    shown = "<br>\n  ".join(f"{fence}{line}{fence}" for line in lines)
    when = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"`\1`", message.when).replace("``", "`")
    return f"- {shown}<br>\n  {message.kind} · `{message.place}`{f'. {when}' if when else ''}\n"


def listed(files: Iterable[Path] = house.FILES, root: Path = house.PACKAGE) -> str:
    """The list of all messages of a package: its rooms from the top floor to the ground, a section for each file."""
    package, rooms = Package(files), [room for floor in reversed(house.FLOORS) for room in floor]
    by_room = sorted(package.trees, key=lambda path: rooms.index(path.relative_to(root).with_suffix("").parts[0]))
    sections = [(path.relative_to(root).as_posix(), package.messages(path)) for path in by_room]
    return "\n".join(f"## {path}\n\n" + "\n".join(map(entry, found)) for path, found in sections if found)


def filled(page: str) -> str:
    """The page with the list in its place."""
    before, place, after = page.partition(PLACE)
    if not place:
        raise LookupError(f"docs/messages.md has no line {PLACE}")
    return before + listed() + after


if __name__ == "__main__":
    print(listed())
