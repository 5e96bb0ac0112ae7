"""Schedules as text: ``Then(0.99, at=100, second=0.999)`` to a schedule and back. No code in the text is run."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from numbers import Integral, Real

from lightning_ema.schedules.base import Constant, PerUpdate, Schedule
from lightning_ema.schedules.basic import (
    Annealing,
    Cosine,
    Debiased,
    ExponentialAnnealing,
    HalfLife,
    InversePower,
    Warmup,
)
from lightning_ema.schedules.composed import Scaled, Shifted, Then
from lightning_ema.schedules.growing import Bema, Equal, Power

Value = Schedule | float | None

SCHEDULES: dict[str, type[Schedule]] = {
    kind.__name__: kind
    for kind in (
        Constant,
        Warmup,
        HalfLife,
        Annealing,
        ExponentialAnnealing,
        Cosine,
        InversePower,
        Power,
        Equal,
        Debiased,
        Then,
        Shifted,
        Scaled,
        PerUpdate,
        Bema,
    )
}
"""Every schedule of this package, by name, in the order of the documentation."""


def as_whole(text: str) -> str:
    """A text in which numbers that are whole are written without ``.0``, so that equal settings read the same.

    >>> as_whole("Then(1.0, at=3, second=HalfLife(epochs=10.05))")
    'Then(1, at=3, second=HalfLife(epochs=10.05))'
    """
    return re.sub(r"\b(\d+)\.0\b(?!\.)", r"\1", text)


def write_schedule(schedule: Schedule) -> str:
    """The text from which :func:`read_schedule` makes an equal schedule.

    >>> write_schedule(Then(0.99, at=100, second=Warmup(0.999)))
    'Then(first=0.99, at=100, second=Warmup(decay=0.999, offset=10.0))'

    Raises:
        ValueError: the schedule is not of this package, so that its text would mean nothing to a reader.
    """
    if SCHEDULES.get(type(schedule).__name__) is not type(schedule):
        raise ValueError(
            f"{schedule!r} is of the class {type(schedule).__module__}.{type(schedule).__name__}, which text cannot "
            f"stand for; the schedules that it can stand for are {', '.join(SCHEDULES)}."
        )
    values = ((field.name, getattr(schedule, field.name)) for field in fields(schedule))  # type: ignore[arg-type]
    given = (f"{name}={_write_value(value)}" for name, value in values if value is not None)
    return f"{type(schedule).__name__}({', '.join(given)})"


def read_schedule(text: str) -> Schedule:
    """The schedule that the text stands for; a bare number ``d`` stands for ``Warmup(d)``.

    >>> read_schedule("Then(0.99, at=100, second=Warmup(0.999))").second
    Warmup(0.999)

    Args:
        text: a call of a schedule of this package, whose arguments are numbers, None and such calls.

    Raises:
        ValueError: the text is anything else, or an argument is out of range.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # what ast.parse documents
        raise ValueError(_refusal(text, "it cannot be read")) from error
    value = _read_value(tree, text)
    if isinstance(value, Schedule):
        return value
    if value is None:
        raise ValueError(_refusal(text, "it is no schedule"))
    return _made(Warmup, [float(value)], {}, text)


def _write_value(value: Schedule | Real) -> str:
    if isinstance(value, Schedule):
        return write_schedule(value)
    return repr(int(value) if isinstance(value, Integral) else float(value))  # also of numpy's numbers


def _read_value(node: ast.expr, text: str) -> Value:
    if isinstance(node, ast.Constant) and (node.value is None or type(node.value) in (int, float)):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        value = _read_value(node.operand, text)
        if isinstance(value, (int, float)):
            return -value
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(_refusal(text, f"{ast.unparse(node)!r} is neither a number nor a schedule"))
    if node.func.id not in SCHEDULES:
        raise ValueError(_refusal(text, f"there is no schedule {node.func.id!r}"))
    arguments = [_read_value(argument, text) for argument in node.args]
    keywords = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in keywords:
            raise ValueError(_refusal(text, f"{ast.unparse(node)!r} gives an argument twice or by **"))
        keywords[keyword.arg] = _read_value(keyword.value, text)
    return _made(SCHEDULES[node.func.id], arguments, keywords, text)


def _made(kind: type[Schedule], arguments: list[Value], keywords: dict[str, Value], text: str) -> Schedule:
    try:
        return kind(*arguments, **keywords)
    except TypeError as error:  # a missing, unknown or misshapen argument
        raise ValueError(_refusal(text, str(error))) from error


def _refusal(text: str, reason: str) -> str:
    return (
        f"the schedule {text!r}: {reason}. Write it as in Python, with numbers and schedules as arguments, for "
        f'instance "Then(0.99, at=100, second=0.999)". The schedules are {", ".join(SCHEDULES)}.'
    )
