import pytest
import torch
from tables import rows

from lightning_ema.checkpoint.entry import changes, find, foreign, pack, unpack

A, B, LIVE_A, LIVE_B = torch.zeros(1), torch.zeros(2), torch.ones(1), torch.ones(2, dtype=torch.bfloat16)
STATE = {
    "format": 1,
    "num_steps": 5,
    "num_updates": 4,
    "num_skipped": 0,
    "last_update_step": 5,
    "start_step": 1,
    "started": True,
    "config": {"decay": "Warmup(0.9)", "every_n_steps": 1},
    "average": {"a": A, "b": B},
}
LIVE = {"a": LIVE_A, "b": LIVE_B}


def test_what_the_state_dict_holds_is_not_stored_twice():
    entry = pack(STATE, LIVE, LIVE, in_state_dict=True)
    assert entry["live"] == LIVE
    assert entry["names"] == ["a", "b"]
    assert entry["average"] == {"b": B}  # float32, while state_dict holds bfloat16
    assert entry["num_steps"] == 5


def test_an_average_that_state_dict_does_not_hold_is_stored_whole():
    entry = pack(STATE, {}, LIVE, in_state_dict=False)
    assert entry["live"] == {}
    assert entry["average"] == {"a": A, "b": B}


def test_unpacking_finds_each_average_where_it_was_put():
    loaded = {"a": A, "b": B.bfloat16(), "frozen": torch.zeros(3)}
    state, live = unpack(pack(STATE, LIVE, LIVE, in_state_dict=True), loaded)
    assert state["average"]["a"] is A
    assert state["average"]["b"] is B
    assert live == LIVE


def test_all_that_does_not_fit_the_module_is_listed():
    entry = pack(STATE, LIVE, LIVE, in_state_dict=True)
    with pytest.raises(ValueError, match="does not fit the module") as error:
        unpack(entry, {"b": torch.zeros(3)})
    assert "a: not in the module" in str(error.value)
    assert "b: shape (2,) in the checkpoint, (3,) in the module" in str(error.value)


@rows("name", ["num_steps", "started", "average", "names", "live", "config"])
@rows("damage", [None, "nonsense", 0.5])
def test_a_damaged_entry_is_refused_by_name(name, damage):
    entry = {**pack(STATE, LIVE, LIVE, in_state_dict=True), name: damage}
    with pytest.raises(ValueError, match=f"damaged.*{name}"):
        unpack(entry, LIVE)


def test_what_changed_in_the_settings():
    assert changes(STATE, {"decay": "Warmup(0.99)", "every_n_steps": 1, "new": 3}) == [
        "decay: Warmup(0.9) in the file, Warmup(0.99) now"
    ]


def test_an_update_that_reads_its_schedule_otherwise_is_a_change():
    assert changes(STATE, {"decay": "PerUpdate(Warmup(0.9))"}) == [
        "decay: Warmup(0.9) in the file, PerUpdate(Warmup(0.9)) now"
    ]


def test_where_the_average_lies_does_not_change_it():
    entry = {**STATE, "config": {"device": "cpu", "overlap": False, "buffers": "copy"}}
    now = {"device": "None", "overlap": True, "buffers": "average"}
    assert changes(entry, now) == ["buffers: copy in the file, average now"]


def test_a_setting_from_python_is_the_one_from_yaml():
    entry = {"config": {"decay": "[HalfLife(epochs=1.0), ExponentialAnnealing(0.99, 10.0)]", "every_n_steps": 1}}
    assert changes(entry, {"decay": "[HalfLife(epochs=1), ExponentialAnnealing(0.99, 10)]", "every_n_steps": 1}) == []
    assert (
        changes(entry, {"decay": "[HalfLife(epochs=1.05), ExponentialAnnealing(0.99, 10)]", "every_n_steps": 10}) != []
    )


def test_a_file_of_lightnings_own_callback():
    live = {"w": LIVE_A}
    file = {
        "current_model_state": live,
        "averaging_state": {"n_averaged": torch.tensor(7)},
        "callbacks": {"EMAWeightAveraging": {"latest_update_step": 9}, "ModelCheckpoint{}": {}},
    }
    assert foreign(file) == (9, 7, live)
    assert foreign({"state_dict": {}}) is None


def test_finding_the_entry():
    key = "EMACallback{'name': 'ema'}"
    assert find({"callbacks": {key: STATE}}, key) is STATE
    assert find({"callbacks": {"ModelCheckpoint{}": {}}}, key) is None
    assert find({}, key) is None
    with pytest.raises(ValueError, match=r"no average under EMACallback\{'name': 'ema'\}, but under .*'fast'.*name="):
        find({"callbacks": {"EMACallback{'name': 'fast'}": STATE}}, key)
