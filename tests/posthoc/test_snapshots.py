import copy
import logging
from pathlib import Path

import pytest
import torch
from helpers import Regression, engine, history_of, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_ema import Constant, HalfLife, Power, Schedule, Snapshots, WeightAverage
from lightning_ema.checkpoint.entry import seal
from lightning_ema.checkpoint.snapshot import load, read
from lightning_ema.posthoc.snapshots import discard_future, files_in, take, thinned, write
from lightning_ema.schedules import Plan


def tracked(net, **settings):
    return [WeightAverage(net, Power(sigma_rel=sigma_rel), **settings) for sigma_rel in (0.05, 0.10)]


def walk(net):
    """A step of training, as far as averages are concerned."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


def train(averages, snapshots, steps, n=1):
    taken = []
    for _ in range(steps):
        walk(engine(averages[0]).module)
        for average in averages:
            average.step(n)
        if path := take(snapshots, averages):
            taken.append(int(path.stem.split("-")[-1]))
    return taken


def steps_left(directory):
    return [[int(path.stem.split("-")[-1]) for path in paths] for paths in files_in(Path(directory)).values()]


class TestWhen:
    def test_at_every_nth_step_after_the_start(self, tmp_path):
        averages = tracked(nn.Linear(2, 1), start_step=3)
        assert train(averages, Snapshots(tmp_path, every_n_steps=5), 20) == [8, 13, 18]

    def test_at_the_first_update_at_or_after_a_multiple(self, tmp_path):
        averages = tracked(nn.Linear(2, 1), every_n_steps=4)
        assert train(averages, Snapshots(tmp_path, every_n_steps=10), 40) == [12, 20, 32, 40]

    def test_several_steps_at_once(self, tmp_path):
        averages = tracked(nn.Linear(2, 1))
        assert train(averages, Snapshots(tmp_path, every_n_steps=2), 4, n=3) == [3, 6, 9, 12]

    def test_a_call_between_two_updates_writes_nothing(self, tmp_path):
        averages = tracked(nn.Linear(2, 1), every_n_steps=2)
        snapshots = Snapshots(tmp_path, every_n_steps=2)
        train(averages, snapshots, 3)
        assert take(snapshots, averages) is None

    def test_only_the_first_process_writes(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
        averages = tracked(nn.Linear(2, 1))
        assert train(averages, Snapshots(tmp_path, every_n_steps=1), 3) == []
        assert write(Snapshots(tmp_path, every_n_steps=1), averages) is None
        assert discard_future(Snapshots(tmp_path, every_n_steps=1), averages) == []
        assert list(tmp_path.iterdir()) == []


class TestLimit:
    def test_by_hand(self, tmp_path):
        snapshots = Snapshots(tmp_path, every_n_steps=10, keep=4)
        averages = tracked(nn.Linear(2, 1))
        left = {}
        for step in range(10, 140, 10):
            train(averages, snapshots, 10)
            (left[step],) = steps_left(tmp_path)
        assert left[40] == [10, 20, 30, 40]
        assert left[50] == [20, 40, 50]  # on the grid of 20, and the newest
        assert left[60] == [20, 40, 50, 60]
        assert left[70] == [20, 40, 60, 70]
        assert left[80] == [20, 40, 60, 80]
        assert left[90] == [40, 80, 90]
        assert left[130] == [40, 80, 120, 130]

    @given(every=st.integers(1, 9), keep=st.integers(2, 12), jumps=st.lists(st.integers(1, 25), max_size=120))
    def test_what_is_left_covers_the_run(self, every, keep, jumps):
        kept, now = [], 0
        for jump in jumps:
            before, now = now, now + jump
            if before // every == now // every:
                continue
            kept = thinned([*kept, now], every, keep)
            assert len(kept) <= keep and kept[-1] == now and kept == sorted(set(kept))
            widest = max(b - a for a, b in zip([0, *kept], kept, strict=False))
            # half of keep on a regular grid, and the jumps may miss its points
            assert widest <= 4 * max(now / keep, every) + 2 * max(jumps) or len(kept) < 3

    def test_a_write_out_of_turn_is_thinned_like_the_others(self, tmp_path):
        snapshots = Snapshots(tmp_path, every_n_steps=10, keep=4)
        averages = tracked(nn.Linear(2, 1))
        train(averages, snapshots, 35)
        write(snapshots, averages)
        assert steps_left(tmp_path) == [[10, 20, 30, 35]]
        train(averages, snapshots, 5)
        assert steps_left(tmp_path) == [[10, 20, 30, 40]]

    def test_files_of_other_runs_and_other_files_stay(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        snapshots = Snapshots(tmp_path, every_n_steps=1, keep=2)
        for _ in range(2):
            train(tracked(nn.Linear(2, 1)), snapshots, 4)
        assert steps_left(tmp_path) == [[2, 4], [2, 4]]
        assert (tmp_path / "notes.txt").read_text() == "mine"


class TestResume:
    def test_it_continues_and_drops_the_future_it_gave_up(self, tmp_path, caplog):
        net = nn.Linear(2, 1)
        averages, snapshots = tracked(net), Snapshots(tmp_path / "here", every_n_steps=10)
        train(averages, snapshots, 25)
        torch.save([a.state_dict() for a in averages], tmp_path / "checkpoint.pt")
        train(averages, snapshots, 24)
        write(snapshots, averages)
        assert steps_left(tmp_path / "here") == [[10, 20, 30, 40, 49]]

        resumed = tracked(net)
        for average, state in zip(resumed, torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True):
            average.load_state_dict(state)
        with caplog.at_level(logging.WARNING):
            assert train(resumed, snapshots, 20) == [30, 40]
        assert steps_left(tmp_path / "here") == [[10, 20, 30, 40]]
        assert "40, 49" in caplog.text

    def test_the_future_can_be_dropped_at_once(self, tmp_path):
        net = nn.Linear(2, 1)
        averages, snapshots = tracked(net), Snapshots(tmp_path, every_n_steps=10)
        train(averages, snapshots, 5)  # before the first snapshot
        states = copy.deepcopy([average.state_dict() for average in averages])
        train(averages, snapshots, 20)
        assert discard_future(snapshots, averages) == []
        for average, state in zip(averages, states, strict=True):
            average.load_state_dict(state)
        assert [path.name[-6:] for path in discard_future(snapshots, averages)] == ["010.pt", "020.pt"]
        assert steps_left(tmp_path) == []

    def test_what_a_killed_process_left_half_written_goes(self, tmp_path):
        averages, snapshots = tracked(nn.Linear(2, 1)), Snapshots(tmp_path, every_n_steps=2)
        train(averages, snapshots, 2)
        half = tmp_path / f"snapshot-{history_of(averages[0]).run}-000000003.pt.tmp"
        half.write_bytes(b"half")
        train(averages, snapshots, 2)
        assert not half.exists() and steps_left(tmp_path) == [[2, 4]]

    def test_snapshots_deleted_by_hand_are_no_trouble(self, tmp_path):
        averages, snapshots = tracked(nn.Linear(2, 1)), Snapshots(tmp_path, every_n_steps=2)
        train(averages, snapshots, 6)
        files_in(tmp_path)[history_of(averages[0]).run][0].unlink()
        train(averages, snapshots, 2)
        assert steps_left(tmp_path) == [[4, 6, 8]] and history_of(averages[0]).snapshots == [4, 6, 8]


class TestFile:
    def test_it_holds_all_averages_and_the_rest_once(self, tmp_path):
        net = seeded(Regression)
        net.net[4].weight.requires_grad_(False)
        averages = tracked(net, every_n_steps=2)
        train(averages, Snapshots(tmp_path, every_n_steps=4), 5)
        (path,) = tmp_path.iterdir()
        content = torch.load(path, weights_only=True)
        assert (content["step"], content["start_step"]) == (4, 0)
        assert [a["stretches"][0]["decay"] for a in content["averages"]] == [
            "Power(sigma_rel=0.05)",
            "Power(sigma_rel=0.1)",
        ]
        assert [(a["stretches"][0]["gaps"], a["stretches"][0]["counts"]) for a in content["averages"]] == [
            ([2], [2])
        ] * 2
        for average, stored in zip(averages, content["averages"], strict=True):
            for name, tensor in average.named_tensors():
                assert torch.equal(stored["tensors"][name], tensor)
        assert set(content["rest"]) == {"net.1.num_batches_tracked", "net.4.weight"}
        assert [key for key, *_ in content["entries"]] == list(net.state_dict())

    def test_it_is_the_same_during_a_swap_and_after_a_delivery(self, tmp_path):
        averages = tracked(seeded(Regression))
        snapshots = Snapshots(tmp_path, every_n_steps=100)
        train(averages, snapshots, 5)
        plain = load(write(snapshots, averages))
        with averages[1].swapped():
            carried = load(write(snapshots, averages))
        averages[0].apply(keep=True)
        applied = load(write(snapshots, averages))
        for other in (carried, applied):
            assert other["entries"] == plain["entries"]
            for one, two in zip(plain["averages"], other["averages"], strict=True):
                assert all(torch.equal(one["tensors"][name], two["tensors"][name]) for name in one["tensors"])

    def test_a_view_is_stored_without_the_buffer_it_is_part_of(self, tmp_path):
        net = nn.Linear(4, 4)
        net.register_buffer("table", torch.zeros(1 << 20, dtype=torch.int64)[:2])
        path = write(Snapshots(tmp_path, every_n_steps=1), tracked(net))
        assert path.stat().st_size < 100_000

    def test_a_renamed_entry_is_found_by_its_memory(self, tmp_path):
        class Renamed(nn.Linear):
            def state_dict(self, *args, **kwargs):
                return {f"model.{key}": value for key, value in super().state_dict(*args, **kwargs).items()}

        path = write(Snapshots(tmp_path, every_n_steps=1), tracked(Renamed(2, 1)))
        assert [(e.key, e.name) for e in read(path).entries] == [("model.weight", "weight"), ("model.bias", "bias")]

    def test_a_renamed_and_converted_entry_is_refused(self, tmp_path):
        class Odd(nn.Linear):
            def state_dict(self, *args, **kwargs):
                return {f"half.{key}": value.half() for key, value in super().state_dict(*args, **kwargs).items()}

        with pytest.raises(ValueError, match=r"no entry for bias, weight.*half.weight"):
            write(Snapshots(tmp_path, every_n_steps=1), tracked(Odd(2, 1)))

    def test_an_entry_that_a_hook_drops_is_left_out(self, tmp_path):
        class Shy(nn.Linear):
            def state_dict(self, *args, **kwargs):
                return {"weight": super().state_dict(*args, **kwargs)["weight"]}

        assert [e.key for e in read(write(Snapshots(tmp_path, every_n_steps=1), tracked(Shy(2, 1)))).entries] == [
            "weight"
        ]

    def test_a_failed_write_leaves_nothing_behind(self, tmp_path, monkeypatch):
        averages, snapshots = tracked(nn.Linear(2, 1)), Snapshots(tmp_path, every_n_steps=1)
        train(averages, snapshots, 1)

        def full(content, path):
            Path(path).write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="disk full"):
            train(averages, snapshots, 1)
        assert [path.name[-6:] for path in tmp_path.iterdir()] == ["001.pt"]

    @pytest.mark.parametrize("damage", ["truncated", "text", "other", "newer", "torn", "average", "rest", "dtype"])
    def test_other_files_are_refused_by_name(self, damage, tmp_path):
        path = write(Snapshots(tmp_path, every_n_steps=1), tracked(nn.Linear(2, 1)))
        content = torch.load(path, weights_only=True)
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:300])
        elif damage == "text":
            path.write_text("no snapshot")
        else:
            content = {"newer": {**content, "format": 2}, "other": {"weight": torch.zeros(1)}}.get(damage, content)
            if damage == "torn":
                content.pop("run")
            elif damage == "average":
                content["averages"][1]["tensors"].pop("bias")
            elif damage == "rest":
                content["entries"].append(["more", "", "int64"])
            elif damage == "dtype":
                content["entries"][0][2] = "load"
            torch.save(content, path)
        with pytest.raises(ValueError, match=path.name):
            read(path)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"every_n_steps": 0}, ValueError),
            ({"every_n_steps": 1.5}, TypeError),
            ({"every_n_steps": 10, "keep": 1}, ValueError),
            ({"every_n_steps": 10, "dirpath": 3}, TypeError),
        ],
    )
    def test_arguments(self, arguments, error):
        with pytest.raises(error, match="Snapshots: "):
            Snapshots(**arguments)

    def test_a_directory_is_needed(self):
        with pytest.raises(ValueError, match="no dirpath"):
            take(Snapshots(every_n_steps=1), tracked(nn.Linear(2, 1)))

    def test_a_schedule_of_ones_own_is_refused_before_the_first_step(self, tmp_path):
        class Mine(Schedule):
            def __call__(self, n):
                return 0.5

        averages = [WeightAverage(nn.Linear(2, 1), Mine())]
        with pytest.raises(ValueError, match=r"Mine.*synthesize\(profile"):
            take(Snapshots(tmp_path, every_n_steps=100), averages)

    def test_averages_that_do_not_go_together(self, tmp_path):
        net, snapshots = nn.Linear(2, 1), Snapshots(tmp_path, every_n_steps=1)
        others = [WeightAverage(copy.deepcopy(net)), WeightAverage(net, start_step=2), WeightAverage(net)]
        others[2].step()
        for other in others:
            with pytest.raises(ValueError, match="different modules, or were not started"):
                take(snapshots, [WeightAverage(net), other])
        with pytest.raises(ValueError, match="no averages"):
            take(snapshots, [])

    def test_an_average_that_has_not_started(self, tmp_path):
        with pytest.raises(ValueError, match="start at step 5"):
            write(Snapshots(tmp_path, every_n_steps=1), tracked(nn.Linear(2, 1), start_step=5))

    def test_an_average_whose_past_is_unknown(self, tmp_path):
        average = WeightAverage(nn.Linear(2, 1), Constant(0.9))
        average.step()
        state = average.state_dict()
        (history,) = state["histories"]
        state["histories"] = [history | {"stretches": [], "unrecorded_steps": 1, "unrecorded_updates": 1}]
        seal(state)
        average.load_state_dict(state)
        average.step()
        with pytest.raises(ValueError, match=r"does not say at which steps.*start\(\)"):
            take(Snapshots(tmp_path, every_n_steps=1), [average])
        average.start()
        average.step()
        assert take(Snapshots(tmp_path, every_n_steps=1), [average]) is not None


def test_it_draws_no_random_number_and_does_not_touch_the_weights(tmp_path):
    averages = tracked(seeded(Regression))
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in engine(averages[0]).module.state_dict().items()}
    write(Snapshots(tmp_path, every_n_steps=1), averages)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in engine(averages[0]).module.state_dict().items())


def test_bound_schedules_are_stored_as_bound(tmp_path):
    average = WeightAverage(nn.Linear(2, 1), HalfLife(epochs=2))
    engine(average).bind(Plan(steps_per_epoch=5.5))
    average.step()
    path = write(Snapshots(tmp_path, every_n_steps=1), [average])
    assert read(path).histories[0][0].decay == "HalfLife(steps=11.0)"
