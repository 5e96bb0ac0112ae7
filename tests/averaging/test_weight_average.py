"""The engine against averages worked out in float64, one number at a time."""

import copy

import pytest
import torch
from helpers import engine
from torch import nn

from lightning_ema import Constant, Cosine, Equal, PerUpdate, Power, Then, Warmup, WeightAverage
from lightning_ema.averaging import tracked_tensors
from lightning_ema.schedules import Plan


class Numbers(nn.Module):
    """Weights that are set by hand, so that every average can be computed with a pencil."""

    def __init__(self, **values):
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor([float(value)])))

    def set(self, **values):
        with torch.no_grad():
            for name, value in values.items():
                getattr(self, name).fill_(value)


def value(average, name="a"):
    return dict(average.named_tensors())[name].item()


def follow(average, values):
    """Sets the weight to each value in turn, takes a step, and gives the averages."""
    out = []
    for v in values:
        engine(average).module.set(a=v)
        average.step()
        out.append(value(average))
    return out


class TestTheUpdate:
    def test_constant_by_hand(self):
        assert follow(WeightAverage(Numbers(a=8), Constant(0.5)), [0, 4, -4]) == [4, 4, 0]

    def test_warm_up_by_hand(self):
        # decays 2/11, 3/12, 4/13; the first state is 11
        expected = [11 * 2 / 11, 2 * 3 / 12, 0.5 * 4 / 13 + 13 * 9 / 13]
        assert follow(WeightAverage(Numbers(a=11)), [0, 0, 13]) == pytest.approx(expected)

    def test_equal_weights_are_the_mean_of_what_was_seen(self):
        assert follow(WeightAverage(Numbers(a=99), Equal()), [3, 5, 10]) == pytest.approx([3, 4, 6])

    def test_step_says_whether_it_updated(self):
        average = WeightAverage(Numbers(a=1), every_n_steps=2, start_step=1)
        assert [average.step() for _ in range(5)] == [False, False, True, False, True]
        assert (average.num_steps, average.num_updates, engine(average).last_update_step) == (5, 2, 5)

    def test_the_average_is_the_live_weights_up_to_the_start(self):
        average = WeightAverage(Numbers(a=1), Constant(0.5), start_step=2)
        assert not engine(average).started
        assert follow(average, [10, 20, 40]) == [10, 20, 30]
        assert average.num_updates == 1

    def test_nothing_is_stored_before_the_start(self, count_allocations):
        net = nn.Linear(100, 100)
        with count_allocations() as allocated:
            average = WeightAverage(net, start_step=3)
            average.step()
        assert allocated.total == 0
        assert [t.data_ptr() for _, t in average.named_tensors()] == [p.data_ptr() for p in net.parameters()]

    @pytest.mark.filterwarnings("ignore:every_n_steps")
    @pytest.mark.parametrize("every_n_steps", [1, 2, 3, 5])
    @pytest.mark.parametrize("schedule", [Constant(0.9), Warmup(0.99), Equal(), Power(gamma=2.0), Then(0.0, 1, 0.8)])
    def test_an_update_over_several_steps_keeps_the_product_of_their_decays(self, schedule, every_n_steps):
        average = WeightAverage(Numbers(a=7), schedule, every_n_steps=every_n_steps, start_step=2)
        states = [3.0, -1.0, 4.0, 1.5, -5.0, 9.0, 2.0, 6.0, -3.0, 5.0, 8.0, -7.0]
        expected, share = states[1], 1.0
        for n, state in enumerate(states[2:], start=1):
            share *= schedule(n)
            if n % every_n_steps == 0:
                expected, share = share * expected + (1 - share) * state, 1.0
        assert follow(average, states)[-1] == pytest.approx(expected, abs=1e-6)

    def test_per_update_reads_the_schedule_once_at_the_current_step(self):
        average = WeightAverage(Numbers(a=0), PerUpdate(Cosine(0.0, 1.0, total_steps=4)), every_n_steps=2)
        # decays 0.5 at step 2 and 1.0 at step 4
        assert follow(average, [9, 8, 9, 100]) == pytest.approx([0, 4, 4, 4])

    @pytest.mark.filterwarnings("ignore:every_n_steps")
    def test_several_steps_at_once_count_as_what_they_are(self):
        average = WeightAverage(Numbers(a=0), Constant(0.5), every_n_steps=3)
        engine(average).module.set(a=1)
        assert [average.step(n) for n in (2, 2, 1, 0, 4)] == [False, True, False, False, True]
        # 1 - 0.5 ** 9 after nine steps; the last update came at the ninth
        assert value(average) == pytest.approx(1 - 0.5**9)

    def test_steps_that_run_past_the_start_set_the_average_where_they_end(self):
        average = WeightAverage(Numbers(a=1), Constant(0.5), start_step=3)
        engine(average).module.set(a=5)
        assert average.step(5) is False
        assert (value(average), engine(average).start_step, average.num_updates) == (5, 5, 0)

    def test_negative_steps_are_refused(self):
        with pytest.raises(ValueError, match=r"step\(-1\): the number of steps since the last call is a whole number"):
            WeightAverage(Numbers(a=1)).step(-1)

    def test_a_schedule_that_lacks_the_run_says_so_at_the_first_step(self):
        average = WeightAverage(Numbers(a=1), Cosine(0.9, 1.0))
        with pytest.raises(ValueError, match=r"Write Cosine\(0.9, 1.0, total_steps=...\)"):
            average.step()
        engine(average).bind(Plan(total_steps=2))
        assert average.decay == pytest.approx(0.95)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_weights_are_averaged_in_float32_and_move(self, dtype):
        net = Numbers(a=0).to(dtype)
        average = WeightAverage(net, Constant(0.9999))
        net.set(a=1)
        for _ in range(2000):
            average.step()
        assert value(average) == pytest.approx(1 - 0.9999**2000, rel=1e-3)  # 0.181; in bfloat16 it stays at 0.0003
        assert dict(average.named_tensors())["a"].dtype == torch.float32

    def test_swaps_and_applying_never_round_the_average(self):
        net = Numbers(a=0).bfloat16()
        average = WeightAverage(net, Constant(0.5))
        for live in (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
            net.set(a=live)
            average.step()
            with average.swapped():
                assert net.a.dtype == torch.bfloat16
            average.apply(keep=True)
            average.restore()
            assert net.a.item() == live
        assert value(average) == 1 - 2**-10  # bfloat16 has no number between 1 - 2 ** -8 and 1

    def test_dtype_can_be_chosen_and_complex_stays_complex(self):
        net = nn.Module()
        net.w, net.z = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, dtype=torch.complex64))
        tensors = dict(WeightAverage(net, dtype=torch.float64).named_tensors())
        assert (tensors["w"].dtype, tensors["z"].dtype) == (torch.float64, torch.complex128)


class TestWhatIsAveraged:
    def test_batch_norm_statistics_are_averaged_and_their_counter_is_not(self):
        norm = nn.BatchNorm1d(1)
        average = WeightAverage(norm, Constant(0.5))
        norm.running_mean.fill_(4)
        norm.num_batches_tracked.fill_(7)
        average.step()
        assert value(average, "running_mean") == 2
        with average.swapped():
            assert norm.running_mean.item() == 2
            assert norm.num_batches_tracked.item() == 7
        assert "num_batches_tracked" not in dict(average.named_tensors())

    def test_copied_buffers_stay_live(self):
        norm = nn.BatchNorm1d(1)
        average = WeightAverage(norm, Constant(0.5), buffers="copy")
        norm.running_mean.fill_(4)
        average.step()
        with average.swapped():
            assert norm.running_mean.item() == 4

    def test_a_mask_of_infinities_does_not_become_nan(self):
        net = nn.Linear(1, 1)
        net.register_buffer("mask", torch.full((2, 2), -float("inf")).triu(1))
        average = WeightAverage(net, on_nonfinite="raise")
        assert average.step()
        with average.swapped():
            assert net.mask.tolist() == [[0, -float("inf")], [0, 0]]

    def test_include_and_exclude(self):
        net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        average = WeightAverage(net, include=["0.*", "1.bias"], exclude=["*.weight"])
        assert [name for name, _ in average.named_tensors()] == ["0.bias", "1.bias"]

    @pytest.mark.parametrize("pattern", ["encoder.*", "0.weigth"])
    def test_a_pattern_that_matches_nothing(self, pattern):
        for argument in ("include", "exclude"):
            with pytest.raises(ValueError, match="matches no tensor of Sequential"):
                WeightAverage(nn.Sequential(nn.Linear(1, 1)), **{argument: [pattern]})

    def test_a_module_with_nothing_to_average(self):
        for net in (nn.ReLU(), nn.BatchNorm1d(1, affine=False)):
            with pytest.raises(ValueError, match=r"nothing to average: no parameter is left by include=None"):
                WeightAverage(net)
        with pytest.raises(
            ValueError, match=r"no parameter is left by include=\('\*\.weight',\) and exclude=\('0\.\*',\)"
        ):
            WeightAverage(nn.Sequential(nn.Linear(1, 1)), include=["*.weight"], exclude=["0.*"])

    def test_frozen_weights_take_no_part_unless_asked(self):
        net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False))
        assert len(list(WeightAverage(net).named_tensors())) == 2
        assert len(list(WeightAverage(net, include_frozen=True).named_tensors())) == 4

    def test_a_tied_weight_is_updated_once(self):
        net = nn.Module()
        net.a, net.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        net.b.weight = net.a.weight
        nn.init.zeros_(net.a.weight)
        average = WeightAverage(net, Constant(0.9))
        nn.init.ones_(net.a.weight)
        average.step()
        assert value(average, "a.weight") == pytest.approx(0.1)  # and not 0.19
        with average.swapped():
            assert net.b.weight is net.a.weight

    def test_modules_that_cannot_be_copied(self):
        net = Numbers(a=2)
        net.stream = (i for i in range(3))
        with pytest.raises(TypeError):
            copy.deepcopy(net)
        assert follow(WeightAverage(net, Constant(0.5)), [4]) == [3]


class TestAModuleThatChanges:
    def test_a_frozen_parameter_joins_with_its_value_when_it_is_unfrozen(self):
        net = Numbers(a=0, b=8)
        net.b.requires_grad_(False)
        average = WeightAverage(net, Constant(0.5))
        net.set(a=1)
        average.step()
        assert "b" not in dict(average.named_tensors())
        net.b.requires_grad_(True)
        engine(average).refresh()  # before its first step, as the callback does
        net.set(b=0)
        average.step()
        assert value(average, "b") == 4

    def test_freezing_again_does_not_leave_the_average(self):
        net = Numbers(a=0, b=8)
        average = WeightAverage(net, Constant(0.5))
        net.b.requires_grad_(False)
        net.c = nn.Linear(1, 1)  # makes it look at everything anew
        net.set(b=0)
        average.step()
        assert value(average, "b") == 4

    def test_lazy_parameters_join_when_they_exist(self):
        net = nn.Sequential(nn.LazyLinear(1, bias=False))
        average = WeightAverage(net, Constant(0.5))
        net(torch.ones(1, 2))
        engine(average).refresh()
        start = net[0].weight.detach().clone()
        with torch.no_grad():
            net[0].weight.add_(2)
        average.step()
        assert torch.allclose(dict(average.named_tensors())["0.weight"], start + 1)

    def test_a_replaced_parameter_goes_on_under_its_name(self):
        net = Numbers(a=0)
        average = WeightAverage(net, Constant(0.5))
        net.a = nn.Parameter(torch.tensor([4.0]))
        assert average.step()
        assert value(average) == 2
        assert engine(average).owns(torch.optim.SGD(net.parameters(), 0.1))

    def test_a_replaced_layer_of_another_shape_starts_again_and_says_so(self):
        net = nn.Sequential(nn.Linear(1, 1, bias=False))
        average = WeightAverage(net, Constant(0.5))
        net[0] = nn.Linear(3, 1, bias=False)
        with pytest.warns(UserWarning, match=r"0.weight changed its shape from \(1, 1\) to \(1, 3\)"):
            average.step()
        assert torch.equal(dict(average.named_tensors())["0.weight"], net[0].weight)

    def test_what_changes_between_two_looks_without_a_step_joins_with_its_value_before_the_step(self):
        net = nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 1))
        net[0].requires_grad_(False)
        average = WeightAverage(net, Constant(0.5))
        engine(average).refresh()  # a batch whose gradients are accumulated: no step follows
        net[0].requires_grad_(True)
        net.append(nn.Linear(2, 1))
        engine(average).refresh()
        before = {name: value.detach().clone() for name, value in net.named_parameters()}
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(1)
        average.step()
        averages = dict(average.named_tensors())
        assert averages.keys() == before.keys()
        assert all(torch.allclose(averages[name], start + 0.5) for name, start in before.items())

    def test_a_layer_replaced_after_a_look_that_no_step_followed_is_carried_and_kept(self):
        net = nn.Sequential(nn.Linear(1, 1, bias=False))
        average = WeightAverage(net, Constant(0.5))
        initial = net[0].weight.detach().clone()
        engine(average).refresh()  # a batch whose gradients are accumulated
        net[0] = nn.Linear(1, 1, bias=False)
        live = net[0].weight.detach().clone()
        with average.swapped():
            assert torch.equal(net[0].weight, initial)
        assert torch.equal(net[0].weight, live)
        engine(average).refresh()
        net[0] = nn.Linear(1, 1, bias=False)
        average.state_dict()
        assert torch.equal(dict(engine(average).named_live())["0.weight"], net[0].weight)

    def test_an_added_layer_joins_and_a_removed_one_leaves(self):
        net = nn.Sequential(nn.Linear(1, 1, bias=False))
        average = WeightAverage(net)
        net.append(nn.Linear(1, 1, bias=False))
        average.step()
        assert [name for name, _ in average.named_tensors()] == ["0.weight", "1.weight"]
        del net[0]
        average.step()
        assert [name for name, _ in average.named_tensors()] == ["0.weight"]

    def test_data_exchanged_or_cast_under_the_parameter(self):
        net = Numbers(a=0)
        average = WeightAverage(net, Constant(0.5))
        net.a.data = torch.tensor([4.0])
        average.step()
        assert value(average) == 2
        net.double()
        net.set(a=4)
        average.step()
        assert value(average) == 3
        assert dict(average.named_tensors())["a"].dtype == torch.float64
        net.half()
        average.step()
        assert dict(average.named_tensors())["a"].dtype == torch.float32

    def test_a_buffer_assigned_anew_does_not_mean_a_new_walk_over_the_module(self, monkeypatch):

        net = Numbers(a=0)
        net.register_buffer("center", torch.zeros(1))
        average = WeightAverage(net, Constant(0.5))
        monkeypatch.setattr(tracked_tensors, "Survey", None)
        net.center = torch.tensor([4.0])
        assert average.step()

    def test_a_buffer_assigned_anew_at_every_step(self):
        net = Numbers(a=0)
        net.register_buffer("center", torch.zeros(1))
        average = WeightAverage(net, Constant(0.5))
        for expected in (2, 3):
            net.center = torch.tensor([4.0])
            average.step()
            assert value(average, "center") == expected
        center = net.center
        with average.swapped():
            assert net.center.item() == 3
        assert net.center is center
        assert net.center.item() == 4


class TestNonFinite:
    def diverge(self, how):
        average = WeightAverage(Numbers(a=0, b=0), Constant(0.5), on_nonfinite=how)
        engine(average).module.set(a=4, b=4)
        average.step()
        engine(average).module.set(a=float("nan"))
        return average

    def test_skip_keeps_the_average_and_counts(self):
        average = self.diverge("skip")
        assert average.step() is False
        assert (value(average), value(average, "b")) == (2, 2)
        assert (average.num_steps, average.num_updates, engine(average).num_skipped) == (2, 1, 1)

    def test_the_next_update_covers_the_skipped_steps(self):
        average = self.diverge("skip")
        average.step()
        engine(average).module.set(a=4)
        assert average.step() is True
        assert value(average) == pytest.approx(0.25 * 2 + 0.75 * 4)

    def test_raise_names_the_step_and_the_tensor(self):
        average = self.diverge("raise")
        with pytest.raises(
            FloatingPointError, match=r"step 2: the live weights are not finite: a\. .*on_nonfinite='skip'"
        ):
            average.step()
        assert value(average) == 2

    def test_ignore_does_not_look(self):
        average = self.diverge("ignore")
        assert average.step() is True
        assert value(average) != value(average)


class TestInto:
    def test_the_average_is_written_into_the_given_modules_own_tensors(self):
        student, teacher = Numbers(a=4), Numbers(a=0).requires_grad_(False)
        pointer = teacher.a.data_ptr()
        average = WeightAverage(student, Constant(0.5), into=teacher)
        assert teacher.a.item() == 4
        student.set(a=0)
        average.step()
        assert (teacher.a.item(), teacher.a.data_ptr()) == (2, pointer)
        with average.swapped():
            assert student.a.item() == 2
        assert student.a.item() == 0

    @pytest.mark.parametrize("teacher", [Numbers(b=0), nn.ParameterDict({"a": nn.Parameter(torch.zeros(2))})])
    def test_a_module_that_does_not_fit_is_refused(self, teacher):
        with pytest.raises(
            ValueError, match=r"into: a of shape \(1,\) is averaged, but .* has (no such tensor|shape \(2,\))"
        ):
            WeightAverage(Numbers(a=0), into=teacher)


class TestApplyAndDistance:
    def test_apply_writes_the_average_for_good(self):
        average = WeightAverage(Numbers(a=8), Constant(0.5))
        follow(average, [0])
        average.apply()
        assert engine(average).module.a.item() == 4
        follow(average, [0])
        assert value(average) == 2

    def test_distance_by_hand(self):
        average = WeightAverage(Numbers(a=3, b=0), Constant(1.0))
        engine(average).module.set(a=0, b=4)
        assert average.distance() == pytest.approx(5 / 4)
        with average.swapped():
            assert average.distance() == pytest.approx(5 / 4)


class TestState:
    def reload(self, state, tmp_path):
        torch.save(state, tmp_path / "state.pt")
        return torch.load(tmp_path / "state.pt", weights_only=True)

    @pytest.mark.parametrize(
        "arguments", [{}, {"every_n_steps": 3}, {"start_step": 4}, {"start_step": 9}, {"decay": Equal()}]
    )
    def test_a_loaded_average_goes_on_as_if_nothing_had_happened(self, arguments, tmp_path):
        values = [3.0, -1.0, 4.0, 1.5, -5.0, 9.0, 2.0, 6.0, -3.0, 5.0, 8.0]
        whole = WeightAverage(Numbers(a=1), **arguments)
        follow(whole, values)
        for cut in range(len(values) + 1):
            first = WeightAverage(Numbers(a=1), **arguments)
            follow(first, values[:cut])
            second = WeightAverage(Numbers(a=engine(first).module.a.item()), **arguments)
            second.load_state_dict(self.reload(first.state_dict(), tmp_path))
            follow(second, values[cut:])
            assert value(second) == value(whole)
            assert second.state_dict() == {**whole.state_dict(), "average": dict(second.named_tensors())}

    def test_the_state_holds_no_copies(self):
        average = WeightAverage(nn.Linear(100, 100))
        held = {name: tensor.data_ptr() for name, tensor in average.named_tensors()}
        assert {name: tensor.data_ptr() for name, tensor in average.state_dict()["average"].items()} == held

    def test_a_state_that_does_not_fit_is_refused_with_all_differences_and_changes_nothing(self):
        source = WeightAverage(nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(2, 1)}))
        target = WeightAverage(nn.ModuleDict({"b": nn.Linear(3, 1), "c": nn.Linear(1, 1)}))
        before = {name: tensor.clone() for name, tensor in target.named_tensors()}
        source.step()
        with pytest.raises(ValueError, match="does not fit ModuleDict") as error:
            target.load_state_dict(source.state_dict())
        for line in (
            "a.weight: not in the module",
            "c.bias: not in the state",
            r"b.weight: shape (1, 2) in the state, (1, 3)",
        ):
            assert line in str(error.value)
        assert target.num_steps == 0
        assert all(torch.equal(tensor, before[name]) for name, tensor in target.named_tensors())

    def test_a_newer_or_damaged_state_is_refused(self):
        average = WeightAverage(Numbers(a=1))
        with pytest.raises(ValueError, match=r"format 3; this version of lightning_ema reads format 2\. Update"):
            average.load_state_dict({**average.state_dict(), "format": 3})
        for name in ("num_steps", "average", "started"):
            damaged = average.state_dict()
            del damaged[name]
            with pytest.raises(ValueError, match=rf"the state is damaged[^:]*:\n  {name} is missing; accepted is "):
                average.load_state_dict(damaged)
        with pytest.raises(
            ValueError, match=r"\n  average\['a'\] is a list of length 1; accepted is a tensor of float"
        ):
            average.load_state_dict({**average.state_dict(), "average": {"a": [1.0]}})

    def test_an_averaged_buffer_is_taken_up_though_the_live_one_has_diverged(self):
        source, diverged = WeightAverage(nn.BatchNorm1d(1)), nn.BatchNorm1d(1)
        diverged.running_var.fill_(float("inf"))
        target = WeightAverage(diverged)
        target.load_state_dict(source.state_dict())
        assert value(target, "running_var") == 1

    def test_what_is_in_the_state_joins_though_it_is_frozen_now(self):
        source = WeightAverage(Numbers(a=1, b=2))
        net = Numbers(a=1, b=5)
        net.b.requires_grad_(False)
        target = WeightAverage(net)
        target.load_state_dict(source.state_dict())
        assert value(target, "b") == 2


def test_half_precision_tensors_that_are_replaced_at_each_step():
    """The cast update keeps views of the tensors: it must notice other ones."""
    net = nn.Linear(2, 1, bias=False).bfloat16()
    net.register_buffer("count", torch.zeros(3, dtype=torch.bfloat16))
    average = WeightAverage(net, Constant(0.5))
    expected = {"weight": net.weight.detach().float(), "count": torch.zeros(3)}
    for step in range(1, 5):
        net.count = torch.full((3,), float(step), dtype=torch.bfloat16)
        net.weight.data = torch.full((1, 2), 2.0 * step, dtype=torch.bfloat16)
        average.step()
        live = {"weight": torch.full((1, 2), 2.0 * step), "count": torch.full((3,), float(step))}
        expected = {name: (value + live[name]) / 2 for name, value in expected.items()}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in average.named_tensors())
