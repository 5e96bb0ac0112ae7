import copy

import pytest
import torch
from helpers import Regression, history_of
from torch import nn

from lightning_ema import Constant, Equal, PerUpdate, Power, Schedule, WeightAverage
from lightning_ema.checkpoint.entry import seal
from lightning_ema.schedules.history import History, joined, shortened


def runs(history):
    return [list(zip(s.gaps, s.counts, strict=True)) for s in history.stretches]


def followed(steps, **settings):
    """An average of one number that stepped by each of ``steps``."""
    average = WeightAverage(nn.Linear(1, 1), settings.pop("decay", Equal()), **settings)
    for n in steps:
        average.step(n)
    return average


def test_a_regular_run_takes_one_entry():
    assert runs(history_of(followed([1] * 1000))) == [[(1, 1000)]]
    assert runs(history_of(followed([1] * 1000, every_n_steps=7, start_step=5))) == [[(7, 142)]]


def test_irregular_steps_are_kept_one_by_one():
    average = followed([1, 3, 3, 0, 2], every_n_steps=2)  # after 1: none; at 4, 7 and 9: updates
    assert runs(history_of(average)) == [[(4, 1), (3, 1), (2, 1)]]
    assert history_of(average).num_steps == 9 and history_of(average).last_gap == 2


def test_an_update_left_out_for_nan_widens_the_gap():
    net = nn.Linear(1, 1)
    average = WeightAverage(net, Equal(), on_nonfinite="skip")
    good = net.weight.detach().clone()
    for value in (good, good * float("nan"), good * float("nan"), good):
        net.weight.data.copy_(value)
        average.step()
    assert runs(history_of(average)) == [[(1, 1), (3, 1)]]


def test_start_begins_a_new_history():
    average = followed([1] * 4)
    history_of(average).run = "abc"
    average.start()
    assert runs(history_of(average)) == [] and history_of(average).run == "" and history_of(average).num_steps == 0


def test_it_survives_the_state_dict_and_a_file(tmp_path):
    average = followed([1, 1, 3])
    history_of(average).run, history_of(average).snapshots = "0a1b2c3d", [2, 5]
    torch.save(average.state_dict(), tmp_path / "state.pt")
    other = followed([])
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other.step(3)
    assert runs(history_of(other)) == [[(1, 2), (3, 2)]]
    assert (history_of(other).run, history_of(other).snapshots) == ("0a1b2c3d", [2, 5])
    assert runs(history_of(average)) == [[(1, 2), (3, 1)]], "the state is a copy"


def test_a_file_without_a_history_is_refused_and_nothing_changed():
    state = followed([1, 1, 3]).state_dict()
    del state["histories"]
    other = followed([1])
    with pytest.raises(ValueError, match=r"\n  histories is missing; accepted is a list of histories\n"):
        other.load_state_dict(state)
    assert other.num_updates == 1 and runs(history_of(other)) == [[(1, 1)]]


def test_a_file_that_says_how_much_was_not_recorded_loads_with_an_empty_history():
    state = followed([1, 1, 3]).state_dict()
    state["histories"] = [{**History().state_dict(), "unrecorded_steps": 5, "unrecorded_updates": 3}]
    seal(state)
    other = followed([1])
    other.load_state_dict(state)
    assert other.num_updates == 3 and history_of(other).stretches == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("run"),
        lambda state: state["stretches"][0].pop("decay"),
        lambda state: state["stretches"][0].update(gaps=[0, 3]),
        lambda state: state["stretches"][0].update(counts=[3]),
        lambda state: state.update(stretches=3),
    ],
)
def test_a_damaged_history_is_refused_and_nothing_changed(damage):
    average = followed([1, 1, 3])
    state = copy.deepcopy(average.state_dict())
    state["num_steps"] = 77
    damage(state["histories"][0])
    with pytest.raises(ValueError, match="damaged"):
        average.load_state_dict(state)
    assert average.num_steps == 5 and runs(history_of(average)) == [[(1, 2), (3, 1)]]


def test_another_schedule_after_a_resume_opens_a_stretch_and_the_same_one_does_not():
    state = followed([1, 1], decay=Constant(0.5)).state_dict()
    for decay, stretches in ((Constant(0.5), [[(1, 3)]]), (Constant(0.75), [[(1, 2)], [(1, 1)]])):
        other = followed([], decay=decay)
        other.load_state_dict(state)
        other.step()
        assert runs(history_of(other)) == stretches
    assert [s.decay for s in history_of(other).stretches] == ["Constant(decay=0.5)", "Constant(decay=0.75)"]
    assert runs(history_of(other)) != runs(history_of(followed([1] * 3)))
    assert joined(history_of(other).stretches) == joined(history_of(followed([1] * 3)).stretches)


def test_another_way_of_counting_opens_a_stretch():
    other = followed([], decay=PerUpdate(Constant(0.5)))
    other.load_state_dict(followed([1, 1], decay=Constant(0.5)).state_dict())
    other.step()
    once = "PerUpdate(schedule=Constant(decay=0.5))"
    assert [stretch.decay for stretch in history_of(other).stretches] == ["Constant(decay=0.5)", once]


def test_a_schedule_of_ones_own_is_recorded_under_a_text_that_no_one_reads_as_ours():
    class Power(Schedule):
        def __call__(self, n):
            return 0.5

        def __repr__(self):
            return "Power(sigma_rel=0.1)"

    assert history_of(followed([1], decay=Power())).stretches[0].decay.startswith("test_history.Power")


def test_shortened_is_what_the_history_was_then():
    history, before = History(), {}
    schedules = [Constant(0.5), Power(sigma_rel=0.1)]
    for number, (gap, which) in enumerate([(1, 0), (1, 0), (4, 0), (4, 1), (4, 1), (2, 1)], 1):
        history.record(gap, schedules[which])
        before[number] = copy.deepcopy(history.stretches)
    for number, stretches in before.items():
        assert shortened(history.stretches, number) == stretches
    assert shortened(history.stretches, 0) == []


def test_a_module_under_lightning_records_too():
    average = WeightAverage(Regression(), 0.9)
    clone = copy.deepcopy(average)
    average.step()
    clone.step()
    clone.step()
    assert (runs(history_of(average)), runs(history_of(clone))) == ([[(1, 1)]], [[(1, 2)]])
