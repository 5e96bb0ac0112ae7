import inspect

import numpy as np
import pytest
from tables import rows

import lightning_ema
from lightning_ema import Constant, Cosine, Equal, HalfLife, PerUpdate, Power, Scaled, Schedule, Then, Warmup
from lightning_ema.schedules.text import SCHEDULES, read_schedule, write_schedule


def test_every_public_schedule_can_be_spelled():
    public = {name: getattr(lightning_ema, name) for name in lightning_ema.__all__}
    concrete = {n: c for n, c in public.items() if inspect.isclass(c) and issubclass(c, Schedule) and c is not Schedule}
    assert concrete == SCHEDULES


@rows(
    ("text", "schedule"),
    [
        ("Constant(0.9)", Constant(0.9)),
        ("0.99", Warmup(0.99)),
        ("1", Warmup(1.0)),
        (" Cosine(0.9, 1.0, total_steps=10_000) ", Cosine(0.9, 1.0, total_steps=10_000)),
        ("HalfLife(steps=1e3, epochs=None)", HalfLife(steps=1000.0)),
        ("Then(0.0, at=3, second=Scaled(Equal(), 2))", Then(0.0, at=3, second=Scaled(Equal(), batch_factor=2))),
        ("Power(sigma_rel=0.1, gamma=None)", Power(sigma_rel=0.1)),
        ("PerUpdate(Then(0.0, at=3, second=0.9))", PerUpdate(Then(0.0, at=3, second=0.9))),
        ("PerUpdate(0.9)", PerUpdate(0.9)),
    ],
)
def test_text_is_read_as_python_reads_it(text, schedule):
    assert read_schedule(text) == schedule
    assert read_schedule(repr(schedule)) == schedule
    assert read_schedule(write_schedule(schedule)) == schedule


def test_numbers_come_back_to_the_last_bit():
    decay = 1 - 1 / 3e5
    assert read_schedule(write_schedule(Constant(decay))).decay == decay
    assert write_schedule(Constant(np.float64(0.9))) == "Constant(decay=0.9)"


@rows(
    ("text", "complaint"),
    [
        ("__import__('os').getcwd()", "neither a number nor a schedule"),
        ("open('x')", "no schedule 'open'"),
        ("Schedule()", "no schedule 'Schedule'"),
        ("Constant('0.9')", "neither a number"),
        ("Constant(True)", "neither a number"),
        ("Constant([0.9])", "neither a number"),
        ("Constant(decay=0.9, decay=0.8)", "twice"),
        ("Constant(**{})", r"by \*\*"),
        ("Constant(*[0.9])", "neither a number"),
        ("Constant(0.9).product", "neither a number"),
        ("Constant(0.9", "cannot be read"),
        ("", "cannot be read"),
        ("None", "is no schedule"),
        ("Constant(momentum=0.9)", "momentum"),
        ("Then(None, at=3, second=0.9)", "decay is None"),
        ("Constant(1.5)", r"must lie in \[0, 1\]"),
        ("Scaled(PerUpdate(0.9), 2)", "Write it once, outermost"),
        ("-0.5", r"must lie in \[0, 1\]"),
        ("(" * 300 + "1" + ")" * 300, "cannot be read"),
    ],
)
def test_anything_else_is_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_schedule(text)


def test_a_schedule_of_ones_own_cannot_be_spelled_even_under_a_known_name():
    class Power(lightning_ema.Power):
        pass

    with pytest.raises(ValueError, match="text cannot stand for"):
        write_schedule(Power(sigma_rel=0.1))
    with pytest.raises(ValueError, match="text cannot stand for"):
        write_schedule(Then(0.9, at=3, second=Power(sigma_rel=0.1)))
