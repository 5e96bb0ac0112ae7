"""Several decays in one average, and the correction of BEMA, against reference loops of their own."""

import copy
import warnings

import pytest
import torch
from helpers import clones, engine, equal, schedule_of
from torch import nn

from lightning_ema import Bema, Constant, Cosine, Equal, Power, Scaled, Then, WeightAverage

DECAYS = [Constant(0.9), Equal(), Bema(kappa=0.6, eta=0.3, rho=4.0, gamma=2.0), Power(gamma=3.0)]


def network(dtype=torch.float32):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def walk(net):
    """One random step of all floating-point tensors."""
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape).to(tensor.dtype) / 4)


def floats(net):
    return {name: t.detach().clone().float() for name, t in net.state_dict().items() if t.is_floating_point()}


@pytest.mark.filterwarnings("ignore:every_n_steps")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("every", "start"), [(1, 0), (3, 0), (2, 5)])
def test_each_average_follows_its_own_decay(dtype, every, start):
    net = network(dtype)
    average = WeightAverage(net, DECAYS, every_n_steps=every, start_step=start)
    expected, origin = [floats(net) for _ in DECAYS], floats(net)
    for step in range(1, 25):
        walk(net)
        average.step()
        n = step - start
        if n <= 0:
            expected, origin = [floats(net) for _ in DECAYS], floats(net)
        elif n % every == 0:
            for schedule, values in zip(DECAYS, expected, strict=True):
                kept = 1.0
                for m in range(n - every + 1, n + 1):
                    kept *= schedule(m)
                for name, live in floats(net).items():
                    values[name] = kept * values[name] + (1 - kept) * live
        for each, schedule, values in zip(average.averages, DECAYS, expected, strict=True):
            bias = (4 + 2 * max(1, n // every * every)) ** -0.3 if isinstance(schedule, Bema) else 0
            for name, value in each.named_tensors():
                corrected = 0 if "running" in name else bias * (floats(net)[name] - origin[name])
                want = values[name] + corrected if n > 0 else floats(net)[name]
                torch.testing.assert_close(value.float(), want, rtol=0, atol=5e-6, msg=f"{schedule} {step} {name}")


def test_each_is_swapped_in_and_out():
    net = network()
    first = WeightAverage(net, DECAYS)
    for _ in range(9):
        walk(net)
        first.step()
    live, all_of_them = clones(net.state_dict()), [clones(each.named_tensors()) for each in first.averages]
    assert first.averages[0] is first
    for each, values in zip(first.averages, all_of_them, strict=True):
        for carrying in ("swapped in", "applied"):
            if carrying == "swapped in":
                each.swap_in()
            else:
                each.apply(keep=True)
            assert equal({name: net.state_dict()[name] for name in values}, values)
            for other, others in zip(first.averages, all_of_them, strict=True):
                assert equal(other.named_tensors(), others)
                assert equal(engine(other).named_live(), {name: live[name] for name in others})
                if carrying == "swapped in" and other is not each:
                    with pytest.raises(RuntimeError, match=r"another one of the same tensors\. Call swap_out\(\)"):
                        other.swap_in()
            each.swap_out() if carrying == "swapped in" else each.restore()
            assert equal(net.state_dict(), live)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_is_swapped_in_while_the_module_holds_another(dtype):
    net = network(dtype)
    first = WeightAverage(net, DECAYS)
    for _ in range(9):
        walk(net)
        first.step()
    live, all_of_them = clones(net.state_dict()), [clones(each.named_tensors()) for each in first.averages]
    first.apply(keep=True)
    held = clones(net.state_dict())
    for each, values in zip(first.averages, all_of_them, strict=True):
        with each.swapped():
            assert equal({name: net.state_dict()[name] for name in values}, {n: v.to(dtype) for n, v in values.items()})
            assert equal(engine(first).named_live(), {name: live[name] for name in values})
        assert equal(net.state_dict(), held)
    with pytest.raises(RuntimeError, match=r"apply\(keep=True\) while the module holds the average .* restore\(\)"):
        first.averages[1].apply(keep=True)
    assert equal(net.state_dict(), held)
    first.restore()
    assert equal(net.state_dict(), live)


def test_the_state_of_one_of_several_is_not_taken_for_that_of_all():
    net = network()
    first = WeightAverage(net, [Constant(0.9), Constant(0.5)])
    walk(net)
    first.step()
    before = clones(first.named_tensors())
    with pytest.raises(RuntimeError, match="Call it on the first"):
        first.averages[1].load_state_dict(first.averages[1].state_dict())
    assert equal(first.named_tensors(), before)


def test_counters_are_shared_and_any_of_them_may_count():
    net = network()
    first, second = WeightAverage(net, [Constant(0.5), Constant(0.75)]).averages
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.zero_()
        first.start()
        net[0].weight.fill_(1)
    second.step()
    assert first.num_steps == second.num_steps == first.num_updates == engine(second).last_update_step == 1
    assert dict(first.named_tensors())["0.weight"].eq(0.5).all()
    assert dict(second.named_tensors())["0.weight"].eq(0.25).all()
    assert second.averages == [second]


def test_a_state_resumes_all_of_them_bit_for_bit(tmp_path):
    net = network()
    whole = WeightAverage(net, DECAYS, every_n_steps=1)
    for _ in range(5):
        walk(net)
        whole.step()
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.zero_()  # what the average is built on must not matter
    again = WeightAverage(twin, DECAYS)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    twin.load_state_dict(net.state_dict())
    for _ in range(4):
        walk(net)
        twin.load_state_dict(net.state_dict())
        whole.step()
        again.step()
    for one, other in zip(whole.averages, again.averages, strict=True):
        assert equal(one.named_tensors(), other.named_tensors())


def test_states_that_do_not_fit_are_refused():
    net = network()
    three = WeightAverage(net, [0.9, 0.99, 0.999])
    message = r"written without Bema\(\) and does not hold the weights at the start.* Go on with decay=Warmup\(0.999\)"
    with pytest.raises(ValueError, match=message):
        WeightAverage(net, Bema()).load_state_dict(WeightAverage(net).state_dict())
    damaged = WeightAverage(net, Bema()).state_dict()
    del damaged["origin"]["0.weight"]
    with pytest.raises(ValueError, match=r"origin\['0\.weight'\] is missing"):
        WeightAverage(net, Bema()).load_state_dict(damaged)
    state = three.state_dict()
    state["further"][1] = {**state["further"][1], "0.weight": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"further\[1\]\['0.weight'\] is .* \(7,\), while average.*\(4, 3\)"):
        three.load_state_dict(state)
    state["further"][1] = {"0.weight": 3}
    with pytest.raises(ValueError, match=r"damaged.*\n *further\[1\]\['0.weight'\] is 3; accepted is a tensor"):
        three.load_state_dict(state)


class TestBema:
    def test_by_hand(self):
        net = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            net.weight.fill_(2.0)
        average = WeightAverage(net, Bema(kappa=1.0, eta=2.0, rho=1.0, gamma=1.0))
        with torch.no_grad():
            net.weight.fill_(6.0)
        average.step()  # decay 1 - 1/2, bias 1/4: 2 + 0.5 * 4 = 4, and 0.25 * (6 - 2) on top
        assert dict(average.named_tensors())["weight"].item() == 5.0
        assert average.state_dict()["average"]["weight"].item() == 4.0
        assert average.distance() == pytest.approx(1 / 6)
        average.apply()
        assert net.weight.item() == 5.0

    def test_a_layer_that_joins_later_starts_from_where_it_is(self):
        net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).requires_grad_(False)
        net[0].requires_grad_(True)
        average = WeightAverage(net, Bema(kappa=1.0, eta=1.0, rho=1.0, gamma=1.0))
        average.step()
        with torch.no_grad():
            net[1].weight.fill_(10.0)
        net[1].requires_grad_(True)
        engine(average).refresh()
        with torch.no_grad():
            net[1].weight.fill_(16.0)
        average.step()  # decay 1 - 1/3, bias 1/3: 10 + 6/3 = 12, and (16 - 10) / 3 on top
        assert dict(average.named_tensors())["1.weight"].item() == pytest.approx(14.0)
        state = average.state_dict()
        assert state["origin"]["1.weight"].item() == 10.0

    def test_the_correction_moves_weight_from_the_start_to_the_live_weights(self):
        states = torch.eye(31, dtype=torch.float64)
        net = nn.Linear(31, 1, bias=False).double()
        with torch.no_grad():
            net.weight.copy_(states[0])
        average = WeightAverage(net, Bema())
        for state in states[1:]:
            with torch.no_grad():
                net.weight.copy_(state)
            average.step()
        profile = dict(average.named_tensors())["weight"][0]
        plain = average.state_dict()["average"]["weight"][0]
        assert profile.sum().item() == pytest.approx(1, abs=1e-12)
        bias = 40**-0.4
        expected = plain + bias * (states[30] - states[0])
        torch.testing.assert_close(profile, expected, rtol=0, atol=1e-12)

    def test_a_new_start_is_a_new_origin(self):
        net = nn.Linear(1, 1, bias=False)
        average = WeightAverage(net, Bema(kappa=1.0, eta=2.0, rho=1.0, gamma=1.0))
        with torch.no_grad():
            net.weight.fill_(2.0)
        average.start()
        with torch.no_grad():
            net.weight.fill_(6.0)
        average.step()
        assert dict(average.named_tensors())["weight"].item() == 5.0

    def test_updates_left_out_do_not_keep_live_weights_out(self):
        with pytest.raises(ValueError, match=r"on_nonfinite='skip' cannot protect Bema\(\).*Use 'raise' or 'ignore'"):
            WeightAverage(network(), [0.9, Bema()], on_nonfinite="skip")

    def test_buffers_are_not_corrected(self):
        net = network()
        average = WeightAverage(net, [Bema(), Constant(1.0)])
        assert set(average.state_dict()["origin"]) == dict(net.named_parameters()).keys()

    @pytest.mark.parametrize("wrap", [lambda s: Then(s, 5, 0.9), lambda s: Then(0.0, 1, s), lambda s: Scaled(s, 2)])
    def test_it_is_no_part_of_another_schedule(self, wrap):
        with pytest.raises(ValueError, match=r"Bema\(.*cannot be part of another schedule"):
            wrap(Bema())

    @pytest.mark.parametrize(("argument", "value"), [("kappa", 0), ("eta", -1), ("rho", 0.5), ("gamma", 0)])
    def test_arguments_are_checked(self, argument, value):
        with pytest.raises(ValueError, match=f"{argument} is {value}"):
            Bema(**{argument: value})


@pytest.mark.parametrize("decay", [[0.9, 0.99], Bema()])
def test_a_target_holds_one_average_as_it_is(decay):
    with pytest.raises(ValueError, match=r"into takes one average, as it is; .* Leave into out, or write one decay"):
        WeightAverage(network(), decay, into=network())


def test_what_the_run_knows_reaches_every_schedule():
    from lightning_ema.schedules import Plan

    average = WeightAverage(network(), [Cosine(0.5, 1.0), 0.9, Cosine(0.9, 1.0)])
    engine(average).bind(Plan(total_steps=40))
    assert [schedule_of(each) for each in average.averages][::2] == [Cosine(0.5, 1.0, 40), Cosine(0.9, 1.0, 40)]


def test_half_precision_casts_the_live_weights_once(count_allocations):
    net = nn.Linear(600, 600).bfloat16()
    average = WeightAverage(net, [0.9, 0.99, 0.999])
    average.step()
    with count_allocations() as allocated, warnings.catch_warnings():
        average.step()
    assert allocated.total <= 4 * 2**19
