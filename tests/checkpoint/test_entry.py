"""One schema of what is stored: what is written is what is read, and anything else is refused as a whole."""

import ast
import copy
import json
import math
import struct
import zlib
from pathlib import Path

import pytest
import torch
from helpers import engine
from tables import rows
from torch import nn

from lightning_ema import Bema, Constant, WeightAverage
from lightning_ema.averaging.state_dict import gather, resume
from lightning_ema.checkpoint.entry import (
    KEYS,
    AverageState,
    CallbackEntry,
    Recalibrated,
    RunEntry,
    add_averages,
    keys_of,
    lacking,
    read,
    stored_average,
    write,
)
from lightning_ema.checkpoint.section import changes, find, foreign
from lightning_ema.modules.named_tensors import Survey

PACKAGE = Path(__file__).parents[2] / "lightning_ema"


def tracked(*decays, values=(8.0, 8.0, 8.0)):
    """Averages of a Linear that begins at 0 and is then, after each step, full of one value."""
    module = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        average = WeightAverage(module, list(decays))
        for value in values:
            for parameter in module.parameters():
                parameter.fill_(value)
            average.step()
    return average


def filled(value):
    return {"weight": torch.full((2, 3), value), "bias": torch.full((2,), value)}


def callback_entry(average):
    """An entry with something under every key."""
    return CallbackEntry(
        **vars(gather(engine(average))),
        steps_before=1,
        pace=(2, 0),
        live=filled(8.0),
        selected=1,
        num_selections=2,
        decay=0.5,
        recalibrated=(Recalibrated(-1, {}), Recalibrated(3, {"bias": torch.zeros(2)})),
        sharded={"slot": "a", "save_id": 3, "processes": 2, "dtypes": {"average": {"weight": "float32"}}},
    )


def same(first, second):
    """Whether two stored values are alike, tensors bit for bit."""
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        alike = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
        return alike and first.dtype == second.dtype and torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


class TestWriting:
    def test_by_hand(self):
        written = write(gather(engine(tracked(Constant(0.5), Constant(0.75)))))
        history = {"run": "", "snapshots": [], "unrecorded_steps": 0, "unrecorded_updates": 0}
        by_hand = {
            "format": 2,
            "num_steps": 3,
            "num_updates": 3,
            "num_skipped": 0,
            "last_update_step": 3,
            "start_step": 0,
            "started": True,
            "config": {
                "decay": "[Constant(0.5), Constant(0.75)]",
                "every_n_steps": 1,
                "start_step": 0,
                "include": "None",
                "exclude": "()",
                "include_frozen": False,
                "buffers": "average",
                "dtype": "None",
                "device": "None",
                "on_nonfinite": "ignore",
            },
            "names": ["weight", "bias"],
            "average": filled(7.0),  # 4, 6, 7
            "further": [filled(4.625)],  # 2, 3.5, 4.625
            "origin": {},
            "histories": [
                {**history, "stretches": [{"decay": f"Constant(decay={decay})", "gaps": [1], "counts": [3]}]}
                for decay in (0.5, 0.75)
            ],
            "biases": [0.0, 0.0],
            "stored": {"average": listed(7.0), "further[0]": listed(4.625), "origin": {}},
        }
        assert written.pop("checksums") == {key: crc(written[key]) for key in written}
        assert written.keys() == by_hand.keys()
        assert [key for key in by_hand if key != "histories" and not loosely(written[key], by_hand[key])] == []
        assert written["histories"] == by_hand["histories"]

    def test_what_a_correcting_average_needs_is_there(self):
        state = write(gather(engine(tracked(Bema(kappa=1.0, eta=2.0, rho=1.0, gamma=1.0)))))
        assert same(state["origin"], filled(0.0))
        assert state["biases"] == [pytest.approx(1 / 16)]  # (1 + 3) ** -2

    def test_all_keys_are_written_and_no_others(self):
        assert write(callback_entry(tracked(Constant(0.5), Bema()))).keys() == KEYS.keys()

    def test_what_there_is_not_is_not_written(self):
        entry = CallbackEntry(**vars(gather(engine(tracked(Constant(0.5))))), live={})
        assert KEYS.keys() - write(entry).keys() == {"decay", "recalibrated", "sharded"}

    def test_what_the_state_dict_holds_is_not_stored_twice(self):
        average, model = filled(1.0), {"weight": torch.zeros(2, 3), "bias": torch.zeros(2, dtype=torch.bfloat16)}
        assert stored_average(average, model).keys() == {"bias"}  # float32, while state_dict holds bfloat16

    def test_what_a_hook_took_out_of_the_state_dict_is_added(self):
        average = tracked(Constant(0.5))
        entry = write(CallbackEntry(**{**vars(gather(engine(average))), "average": {}}, live={}))
        held = {"bias": torch.zeros(2)}
        with pytest.raises(ValueError, match="\n  weight is neither in average nor in state_dict\n"):
            read(entry, CallbackEntry, held)
        assert lacking(entry, ["weight", "bias"]) == ["weight", "bias"]
        add_averages(entry, {"weight": filled(7.0)["weight"]})
        assert lacking(entry, ["weight", "bias"]) == ["bias"]
        assert read(entry, CallbackEntry, held).average.keys() == {"weight"}


def crc(value):
    """Of what is no tensor, as JSON."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items() if not isinstance(each, torch.Tensor)}
        return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value

    return zlib.crc32(json.dumps(plain(value), sort_keys=True).encode())


def listed(value):
    """What is stored of a weight of shape (2, 3) and a bias of 2: the sum by Python's own numbers."""

    def of(count):
        data = struct.pack(f"<{count}f", *[value] * count)
        words = struct.unpack(f"<{-(-len(data) // 8)}q", data + b"\0" * (-len(data) % 8))
        return (sum(word * (2 * place + 1) for place, word in enumerate(words)) + count + 2**63) % 2**64 - 2**63

    return {"weight": {"dtype": "float32", "sum": of(6)}, "bias": {"dtype": "float32", "sum": of(2)}}


def loosely(written, by_hand):
    """The same in any order of keys."""
    if isinstance(by_hand, dict):
        return written.keys() == by_hand.keys() and all(loosely(written[key], by_hand[key]) for key in by_hand)
    if isinstance(by_hand, list):
        return len(written) == len(by_hand) and all(map(loosely, written, by_hand))
    return same(written, by_hand)


@rows(
    "entry",
    [
        gather(engine(tracked(Constant(0.5), Constant(0.75)))),
        gather(engine(tracked(Bema()))),
        RunEntry(**vars(gather(engine(tracked(Constant(0.5))))), steps_before=2, pace=(None, 1)),
        callback_entry(tracked(Constant(0.5), Bema())),
    ],
)
def test_what_was_written_is_read(entry, tmp_path):
    torch.save(write(entry), tmp_path / "x.pt")
    again = read(torch.load(tmp_path / "x.pt", weights_only=True), type(entry))
    assert type(again) is type(entry) and same(write(again), write(entry))


# --- damage ---------------------------------------------------------------------------------------------------------

WRONG = {
    "None": None,
    "text": "nonsense",
    "bool": True,
    "fraction": 0.5,
    "negative": -7,
    "too large": 2**60,
    "enormous": 10**400,
    "NaN": math.nan,
    "infinite": math.inf,
    "list": [],
    "list of None": [None],
    "list of text": ["x", "x"],
    "dict": {},
    "dict of a list": {"weight": [1.0]},
    "dict with a number for a name": {7: torch.zeros(2)},
    "tensor": torch.zeros(1),
    "bytes": b"x",
    "object": object(),
}
"""What is put in the place of a value, wherever it stands."""

TENSORS = {
    "another shape": torch.zeros(5, 7),
    "one element": torch.zeros(1),
    "no dimension": torch.zeros(()),
    "integers": torch.zeros(2, 3, dtype=torch.int64),
    "bools": torch.zeros(2, 3, dtype=torch.bool),
    "complex numbers": torch.zeros(2, 3, dtype=torch.complex64),
    "no storage": torch.zeros(2, 3, device="meta"),
    "sparse": torch.zeros(2, 3).to_sparse(),
    "not finite": torch.full((2, 3), math.nan),
    "wider": torch.zeros(2, 3, dtype=torch.float64),
}
"""What is put in the place of a tensor of shape (2, 3)."""


def damages(clean):
    """Each damage to an entry: where, of what kind, and the entry."""

    def damaged(path, kind, change):
        entry = copy.deepcopy(clean)
        *parents, last = path
        inside = entry
        for part in parents:
            inside = inside[part]
        change(inside, last)
        return path, kind, entry

    def put(value):
        return lambda inside, last: inside.__setitem__(last, value)

    def delete(inside, last):
        del inside[last]

    for path, value in places(clean):
        if isinstance(path[-1], str):
            yield damaged(path, "missing", delete)
        for kind, wrong in WRONG.items():
            if not same(wrong, value):
                yield damaged(path, kind, put(wrong))
        if isinstance(value, torch.Tensor) and value.shape == (2, 3):
            for kind, wrong in TENSORS.items():
                yield damaged(path, kind, put(wrong))
        if isinstance(value, dict) and path[0] not in ("config", "stored"):
            yield damaged((*path, "unknown"), "unknown tensor", put(torch.zeros(2)))
    yield damaged(("unknown",), "unknown key", put(1))
    yield damaged((7,), "unknown key", put(1))


def places(value, path=()):
    """Every place in an entry, with what stands there."""
    if path:
        yield path, value
    if isinstance(value, dict) and path[:1] != ("config",):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    if isinstance(value, list) and path[:1] != ("stored",):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


def take(average, kind):
    """How an entry of a class gets into an average."""
    if kind is AverageState:
        return average.load_state_dict
    tensors = Survey(engine(average).module).tensors
    return lambda entry: resume(engine(average), read(entry, kind, {}), tensors)


@pytest.mark.parametrize(
    ("kind", "tried"),
    [(CallbackEntry, 2543), (AverageState, 1677)],
    ids=["callback, 2543 of 2543", "average, 1677 of 1677"],
)
def test_every_damage_to_an_entry_is_refused_by_its_key_and_changes_nothing(kind, tried):
    full = tracked(Constant(0.5), Bema())
    clean = write(callback_entry(full) if kind is CallbackEntry else gather(engine(full)))
    table = list(damages(clean))
    assert {path[0] for path, damage, _ in table if damage in ("missing", "text")} == keys_of(kind).keys()

    def target():
        average = tracked(Constant(0.5), Bema(), values=(1.0,))
        return average, full_state(average), take(average, kind)

    average, before, load = target()
    said, accepted = [], []
    for path, damage, entry in table:
        place = (".".join(map(str, path)), damage)
        try:
            load(entry)
        except ValueError as error:
            said.append((path[0], str(error)))
        else:
            accepted.append(place)
            average, before, load = target()
            continue
        assert same(full_state(average), before), place
    assert accepted == []
    assert [(key, message) for key, message in said if str(key) not in message] == []
    assert len(table) == len(said) == tried
    load(clean)  # which was not damaged by all this
    assert same(average.state_dict()["average"], filled(7.0)) and average.num_steps == 3


def full_state(average):
    """Everything of an average and of its module, tensors copied."""
    return copy.deepcopy({"state": average.state_dict(), "module": dict(engine(average).module.state_dict())})


@rows(
    ("found", "message"),
    [
        (1, "format 1, which versions before the first release wrote; .* reads format 2. Begin a new run"),
        (3, "format 3; .* reads format 2. Update lightning_ema to read files that a newer one wrote"),
        (0, "\\n  format is 0; accepted is 2\\n"),
        (2.5, "\\n  format is 2.5; accepted is 2\\n"),
        (True, "\\n  format is True; accepted is 2\\n"),
        ("2", "\\n  format is '2'; accepted is 2\\n"),
    ],
)
def test_another_format_is_refused_by_its_number(found, message):
    state = {**tracked(Constant(0.5)).state_dict(), "format": found, "num_steps": None}
    with pytest.raises(ValueError, match=message):
        tracked(Constant(0.5)).load_state_dict(state)


@rows("stored", [None, 3, "text", [], torch.zeros(2)])
def test_what_is_no_dictionary_is_refused(stored):
    with pytest.raises(ValueError, match=r"damaged.*\n  it is .*; accepted is a dictionary\n"):
        read(stored, AverageState)


def test_one_message_names_all_that_was_found():
    state = {**tracked(Constant(0.5)).state_dict(), "num_steps": -1, "names": "weight", "other": 1}
    del state["started"]
    with pytest.raises(ValueError, match="the state is damaged") as error:
        read(state, AverageState)
    assert [line.split()[0] for line in str(error.value).splitlines()[1:-1]] == [
        "num_steps",
        "started",
        "names",
        "'other'",
    ]


@rows(
    ("change", "message"),
    [
        ({"num_updates": 2}, "num_updates is 2"),
        ({"num_skipped": 1}, "num_updates, 3, and num_skipped, 1, are more than num_steps, 3"),
        ({"last_update_step": 4}, "last_update_step is 4; accepted is a step from start_step, 0, to num_steps, 3"),
        ({"start_step": 1}, "counts 3 steps, while it is 2 from start_step to last_update_step"),
        ({"started": False}, "num_updates is 3, but started is False"),
        ({"names": ["weight"]}, r"average\['bias'\] is not among names"),
        ({"biases": [0.0, 0.0]}, "biases has 2 items, where there are 1 averages"),
    ],
)
def test_what_cannot_be_true_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read({**tracked(Constant(0.5)).state_dict(), **change}, AverageState)


# --- the one place --------------------------------------------------------------------------------------------------

COMMON = {
    "average": "a way to treat buffers, to evaluate and to leave a module",
    "live": "a way to evaluate and to leave a module",
    "decay": "an argument, a setting and a logged value",
    "start_step": "an argument and a setting",
    "config": "an argument that a callback gives to its entry",
    "num_updates": "a key of files that others wrote",
}
"""Keys that stand for something else, too, outside the folder of files."""


def test_keys_are_written_out_in_the_folder_of_files_and_nowhere_else():
    written = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] != "checkpoint":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in KEYS:
                    written.setdefault(node.value, []).append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert {key: where for key, where in written.items() if key not in COMMON} == {}
    assert written.keys() == COMMON.keys()  # no exception is left over


# --- in a checkpoint ------------------------------------------------------------------------------------------------


def test_what_changed_in_the_settings():
    then = {"decay": "Warmup(0.9)", "every_n_steps": 1}
    assert changes(then, {"decay": "Warmup(0.99)", "every_n_steps": 1, "new": 3}) == [
        "decay: Warmup(0.9) in the file, Warmup(0.99) now"
    ]


def test_an_update_that_reads_its_schedule_otherwise_is_a_change():
    assert changes({"decay": "Warmup(0.9)"}, {"decay": "PerUpdate(Warmup(0.9))"}) == [
        "decay: Warmup(0.9) in the file, PerUpdate(Warmup(0.9)) now"
    ]


def test_where_the_average_lies_does_not_change_it():
    then, now = {"device": "cpu", "buffers": "copy"}, {"device": "None", "buffers": "average"}
    assert changes(then, now) == ["buffers: copy in the file, average now"]


def test_a_setting_from_python_is_the_one_from_yaml():
    then = {"decay": "[HalfLife(epochs=1.0), ExponentialAnnealing(0.99, 10.0)]", "every_n_steps": 1}
    assert changes(then, {"decay": "[HalfLife(epochs=1), ExponentialAnnealing(0.99, 10)]", "every_n_steps": 1}) == []
    assert (
        changes(then, {"decay": "[HalfLife(epochs=1.05), ExponentialAnnealing(0.99, 10)]", "every_n_steps": 10}) != []
    )


def test_a_file_of_lightnings_own_callback():
    live = {"w": torch.ones(1)}
    file = {
        "current_model_state": live,
        "averaging_state": {"n_averaged": torch.tensor(7)},
        "callbacks": {"EMAWeightAveraging": {"latest_update_step": 9}, "ModelCheckpoint{}": {}},
    }
    assert foreign(file) == (9, 7, live)
    assert foreign({"state_dict": {}}) is None


def test_finding_the_entry():
    key, entry = "EMACallback{'name': 'ema'}", {"num_steps": 5}
    assert find({"callbacks": {key: entry}}, key) is entry
    assert find({"callbacks": {"ModelCheckpoint{}": {}}}, key) is None
    assert find({}, key) is None
    with pytest.raises(ValueError, match=r"no average under EMACallback\{'name': 'ema'\}, but under .*'fast'.*name="):
        find({"callbacks": {"EMACallback{'name': 'fast'}": entry}}, key)
