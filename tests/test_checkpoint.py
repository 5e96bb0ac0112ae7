import pytest
import torch

from lightning_ema.checkpoint import find, pack, unpack

A, B, LIVE_A, LIVE_B = torch.zeros(1), torch.zeros(2), torch.ones(1), torch.ones(2, dtype=torch.bfloat16)
STATE = {
    "format": 1, "num_steps": 5, "num_updates": 4, "num_skipped": 0, "last_update_step": 5, "start_step": 1,
    "started": True, "config": {}, "average": {"a": A, "b": B},
}  # fmt: skip


def test_what_the_state_dict_holds_is_not_stored_twice():
    entry = pack(STATE, {"a": LIVE_A, "b": LIVE_B}, in_state_dict=True)
    assert entry["live"] == {"a": LIVE_A, "b": LIVE_B}
    assert entry["average"] == {"b": B}  # float32, while state_dict holds bfloat16
    assert entry["num_steps"] == 5


def test_an_average_that_state_dict_does_not_hold_is_stored_whole():
    entry = pack(STATE, {"a": LIVE_A, "b": LIVE_B}, in_state_dict=False)
    assert entry["live"] == {}
    assert entry["average"] == {"a": A, "b": B}


def test_unpacking_finds_each_average_where_it_was_put():
    entry = pack(STATE, {"a": LIVE_A, "b": LIVE_B}, in_state_dict=True)
    in_module = {"a": A, "b": B.bfloat16()}
    state, live = unpack(entry, in_module)
    assert state["average"]["a"] is A and state["average"]["b"] is B
    assert live == {"a": LIVE_A, "b": LIVE_B}


def test_a_tensor_that_the_module_lacks_is_kept_for_the_message():
    state, _ = unpack(pack(STATE, {"a": LIVE_A, "b": LIVE_B}, in_state_dict=True), {"b": B})
    assert set(state["average"]) == {"a", "b"}


def test_finding_the_entry():
    key = "EMACallback{'name': 'ema'}"
    assert find({"callbacks": {key: STATE}}, key) is STATE
    assert find({"callbacks": {"ModelCheckpoint{}": {}}}, key) is None
    assert find({}, key) is None
    with pytest.raises(
        ValueError,
        match=r"no average under EMACallback\{'name': 'ema'\}, but under EMACallback\{'name': 'fast'\}.*name=",
    ):
        find({"callbacks": {"EMACallback{'name': 'fast'}": STATE}}, key)
