import copy

import pytest
import torch
from helpers import Regression, engine, history_of, seeded
from torch import nn

from lightning_ema import (
    Bema,
    Constant,
    Debiased,
    Equal,
    HalfLife,
    PerUpdate,
    Power,
    Schedule,
    Snapshots,
    Then,
    WeightAverage,
    synthesize,
)
from lightning_ema.checkpoint.snapshot import load, read, save, seal
from lightning_ema.posthoc.snapshots import files_in, take, write
from lightning_ema.posthoc.solver import solve
from lightning_ema.schedules import profiles as profiles_module
from lightning_ema.schedules.profiles import Timeline, profile

TRACKED = (Power(sigma_rel=0.05), Power(sigma_rel=0.10))


def train(net, directory, direct, steps, snapshot_every, seed=0, tracked=TRACKED, step=lambda i: 1, **settings):
    """Noisy training of a small network, followed by tracked averages with snapshots and by others directly."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(net.parameters()).dtype
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.05)
    averages = [WeightAverage(net, schedule, **settings) for schedule in tracked]
    others = [WeightAverage(net, schedule, **settings) for schedule in direct]
    snapshots = Snapshots(directory, every_n_steps=snapshot_every, keep=1000)
    for i in range(steps):
        x = torch.randn(4, 4, generator=generator)
        y = x.sum(1, keepdim=True).sin() + 0.5 * torch.randn(4, 1, generator=generator)
        loss = nn.functional.mse_loss(net(x.to(dtype)), y.to(dtype))
        for parameter, gradient in zip(
            optimizer.param_groups[0]["params"],
            torch.autograd.grad(loss, optimizer.param_groups[0]["params"]),
            strict=True,
        ):
            parameter.grad = gradient
        optimizer.step()
        for average in (*averages, *others):
            average.step(step(i))
        take(snapshots, averages)
    return averages, others


def small(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


def miss(weights, average):
    """The distance to the average followed directly, over that average's distance to the live weights."""
    direct = {name: tensor.double() for name, tensor in average.named_tensors()}
    live = {name: tensor.double() for name, tensor in engine(average).named_live()}
    error = sum(((weights[name].double() - tensor) ** 2).sum() for name, tensor in direct.items())
    return float((error / sum(((live[name] - tensor) ** 2).sum() for name, tensor in direct.items())) ** 0.5)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """2,048 steps with 32 snapshots; every other of them makes 16."""
    directory = tmp_path_factory.mktemp("snapshots")
    wanted = [Power(sigma_rel=0.075), HalfLife(steps=100), Then(0.0, at=1024, second=Equal())]
    _, direct = train(small(), directory, wanted, 2048, 64)
    (paths,) = files_in(directory).values()
    assert len(paths) == 32
    return paths, dict(zip(wanted, direct, strict=True))


class TestQuality:
    def test_sigma_rel_from_16_snapshots(self, long_run):
        paths, direct = long_run
        made = synthesize(paths[1::2], sigma_rel=0.075)
        assert miss(made.weights, direct[Power(sigma_rel=0.075)]) < 1e-3
        assert 1e-3 < made.residual < 5e-3

    @pytest.mark.parametrize(
        ("wanted", "at_most"),
        [(Power(sigma_rel=0.075), 2e-4), (HalfLife(steps=100), 1e-4), (Then(0.0, at=1024, second=Equal()), 1e-3)],
        ids=repr,
    )
    def test_any_profile_from_32_snapshots(self, wanted, at_most, long_run):
        paths, direct = long_run
        made = synthesize(paths, profile=wanted)
        assert miss(made.weights, direct[wanted]) < at_most

    def test_what_was_tracked_comes_back_to_the_last_digits(self, long_run):
        paths, _ = long_run
        made = synthesize(paths, sigma_rel=0.10)
        stored = load(paths[-1])["averages"][1]["tensors"]
        assert made.residual < 1e-12
        assert all(torch.allclose(made.weights[name], tensor, rtol=0, atol=1e-12) for name, tensor in stored.items())
        (largest,) = [c for c in made.coefficients if abs(c.value) > 1e-6]
        assert (largest.step, largest.decay) == (2048, "Power(sigma_rel=0.1)") and largest.value == pytest.approx(1)

    @pytest.mark.parametrize("wanted", [TRACKED[0], Power(sigma_rel=0.075)], ids=repr)
    def test_at_an_earlier_step(self, wanted, long_run):
        paths, _ = long_run
        made = synthesize(paths, profile=wanted, at_step=1024)
        assert made.step == 1024
        if wanted == TRACKED[0]:
            stored = load(paths[15])["averages"][0]["tensors"]
            assert all(torch.allclose(made.weights[n], tensor, rtol=0, atol=1e-9) for n, tensor in stored.items())
        assert made.residual < 5e-3

    def test_the_order_of_the_files_and_doubles_do_not_matter(self, long_run):
        paths, _ = long_run
        one, two = (synthesize(some, sigma_rel=0.075) for some in (paths, [*reversed(paths), paths[3]]))
        assert one.coefficients == two.coefficients


class TestExactness:
    """Coefficients and residual against the plain problem: all profiles in full, one lstsq."""

    @pytest.mark.parametrize("chunk", [7, 1 << 16])
    @pytest.mark.parametrize(
        ("tracked_once", "wanted_once", "settings", "step"),
        [
            (False, False, {}, lambda i: 1),
            (False, False, {"every_n_steps": 5}, lambda i: 1),
            (True, True, {"every_n_steps": 3, "start_step": 11}, lambda i: 1),
            (True, False, {"every_n_steps": 3, "start_step": 11}, lambda i: 1),
            (False, False, {}, lambda i: (1, 4, 2, 7, 7)[i % 5]),
        ],
        ids=["every step", "interval", "per update", "the tracked ones per update", "irregular"],
    )
    @pytest.mark.parametrize(
        "wanted", [Power(sigma_rel=0.08), Debiased(0.99), Then(0.5, at=70, second=Equal())], ids=repr
    )
    def test_against_full_profiles(
        self, wanted, tracked_once, wanted_once, settings, step, chunk, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("lightning_ema.posthoc.combination.LARGEST_RESIDUAL", 10.0)
        wanted = PerUpdate(wanted) if wanted_once else wanted
        tracked = [PerUpdate(schedule) for schedule in TRACKED] if tracked_once else TRACKED
        (average, _), (direct,) = train(small(), tmp_path, [wanted], 120, 21, 0, tracked, step, **settings)
        write(Snapshots(tmp_path, every_n_steps=21, keep=1000), [average, _])
        (paths,) = files_in(tmp_path).values()
        whole = profile(wanted, Timeline(history_of(average).stretches))
        columns = []
        for path in paths:
            for history in read(path).histories:
                decays = Timeline(history)
                column = torch.zeros(len(whole), dtype=torch.float64)
                column[0] = 1
                for number, decay in enumerate(decays.decays(0, decays.num_updates).tolist(), 1):
                    column *= decay
                    column[number] = 1 - decay
                columns.append(column)
        system = torch.stack(columns, 1)
        differences = system[:, 1:] - system[:, :1]  # the constraint by leaving out the first coefficient
        rest = torch.linalg.lstsq(differences, (whole - system[:, 0])[:, None], driver="gelsd").solution[:, 0]
        reached = system[:, 0] + differences @ rest
        monkeypatch.setattr(profiles_module, "CHUNK", chunk)
        made = synthesize(tmp_path, profile=wanted)
        values = torch.tensor([c.value for c in made.coefficients], dtype=torch.float64)
        assert torch.allclose(system @ values, reached, rtol=0, atol=1e-9)
        assert made.residual == pytest.approx(float((reached - whole).norm() / whole.norm()), rel=1e-6, abs=1e-10)
        assert float(values.sum()) == pytest.approx(1, abs=1e-12)
        assert miss(made.weights, direct) < 2 * made.residual + 1e-9

    def test_a_changed_schedule_is_followed(self, tmp_path):
        net = small()
        (first,), _ = train(net, tmp_path, [], 60, 20, tracked=[Constant(0.9)])
        second = WeightAverage(net, Constant(0.97))
        second.load_state_dict(first.state_dict())
        for _ in range(60):
            for parameter in net.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
            second.step()
            take(Snapshots(tmp_path, every_n_steps=20), [second])
        made = synthesize(tmp_path, profile=Then(0.9, at=60, second=0.97))
        assert made.residual < 1e-12
        assert miss(made.weights, second) < 1e-12
        assert {c.decay for c in made.coefficients} == {"Constant(decay=0.9)", "Constant(decay=0.97)"}

    def test_a_snapshot_of_the_start_holds_the_start(self, tmp_path, monkeypatch):
        net = small()
        average, snapshots = WeightAverage(net, Equal()), Snapshots(tmp_path, every_n_steps=1)
        write(snapshots, [average])
        start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        for _ in range(2):
            for parameter in net.parameters():
                parameter.data.add_(1.0)
            average.step()
            take(snapshots, [average])
        made = synthesize(tmp_path, profile=Constant(0.5))  # 1/4 of the start, 1/4 and 1/2 of the two steps
        assert made.residual < 1e-12
        assert all(torch.allclose(made.weights[name], tensor + 1.25) for name, tensor in start.items())

    def test_averages_that_hardly_differ_are_told_apart_in_float64(self, tmp_path):
        """A condition number of 5e6: a solution by normal equations in float32 would be lost."""
        net = nn.Linear(5, 1).double()
        averages = [WeightAverage(net, Power(sigma_rel=sigma_rel)) for sigma_rel in (0.1, 0.1001, 0.075)]
        for _ in range(512):
            for parameter in net.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
            for average in averages:
                average.step()
            take(Snapshots(tmp_path, every_n_steps=4, keep=1000), averages[:2])
        made = synthesize(tmp_path, sigma_rel=0.075)
        assert made.residual < 1e-4 and miss(made.weights, averages[2]) < 1e-4
        assert (
            made.amplification == pytest.approx(sum(abs(c.value) for c in made.coefficients))
            and made.amplification > 500
        )


class TestModules:
    def test_half_precision_is_rounded_once(self, tmp_path):
        _, (direct,) = train(small(torch.bfloat16), tmp_path, [Power(sigma_rel=0.075)], 320, 20)
        made = synthesize(tmp_path, sigma_rel=0.075)
        for name, tensor in direct.named_tensors():
            assert tensor.dtype == torch.float32 and made.weights[name].dtype == torch.bfloat16
            difference = (made.weights[name].float() - tensor).abs()
            assert (difference <= tensor.abs() * 2**-8 + 1e-4).all()

    def test_single_precision(self, tmp_path):
        _, (direct,) = train(small(torch.float32), tmp_path, [Power(sigma_rel=0.075)], 384, 12)
        made = synthesize(tmp_path, sigma_rel=0.075)
        assert miss(made.weights, direct) < 2e-4
        assert all(tensor.dtype == torch.float32 for tensor in made.weights.values())

    def test_batchnorm_with_integers_and_a_frozen_layer(self, tmp_path):
        net = seeded(Regression).net
        net[0].weight.requires_grad_(False)
        (average, _), (direct,) = train(net, tmp_path, [Power(sigma_rel=0.075)], 320, 10)
        made = synthesize(tmp_path, sigma_rel=0.075)
        assert list(made.weights) == list(net.state_dict())
        assert made.weights["1.num_batches_tracked"].item() == 320
        assert torch.equal(made.weights["0.weight"], net[0].weight)
        assert miss(made.weights, direct) < 1e-3
        assert {"1.running_mean", "1.running_var"} <= dict(average.named_tensors()).keys()
        copy.deepcopy(net).load_state_dict(made.weights)

    def test_a_layer_unfrozen_on_the_way(self, tmp_path):
        net = small()
        net[0].weight.requires_grad_(False)
        averages = [WeightAverage(net, schedule) for schedule in (*TRACKED, Power(sigma_rel=0.075))]
        for step in range(320):
            if step == 150:
                net[0].weight.requires_grad_(True)
                for average in averages:
                    engine(average).refresh()
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
            for average in averages:
                average.step()
            take(Snapshots(tmp_path, every_n_steps=20), averages[:2])
        assert miss(synthesize(tmp_path, sigma_rel=0.075).weights, averages[2]) < 1e-3

    def test_tied_weights_and_wrappers(self, tmp_path):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)).double()
        net[1].weight = net[0].weight
        _, (direct,) = train(torch.compile(net, backend="eager"), tmp_path, [Power(sigma_rel=0.075)], 160, 10)
        made = synthesize(tmp_path, sigma_rel=0.075)
        weights = {key.removeprefix("_orig_mod."): value for key, value in made.weights.items()}
        assert len(weights) == len(net.state_dict())
        assert torch.equal(weights["0.weight"], weights["1.weight"])
        assert miss(weights, direct) < 1e-3

    def test_complex_weights(self, tmp_path):
        net = nn.Module()
        net.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        averages = [WeightAverage(net, schedule) for schedule in (*TRACKED, Power(sigma_rel=0.075))]
        for _ in range(160):
            net.phase.data.add_(torch.randn_like(net.phase))
            for average in averages:
                average.step()
            take(Snapshots(tmp_path, every_n_steps=10), averages[:2])
        ((_, direct),) = averages[2].named_tensors()
        assert (synthesize(tmp_path, sigma_rel=0.075).weights["phase"] - direct).abs().max() < 1e-3 * direct.abs().max()

    def test_files_are_read_one_at_a_time(self, tmp_path, count_allocations):
        net = nn.Linear(1000, 100)
        averages = [WeightAverage(net, schedule) for schedule in TRACKED]
        for _ in range(32):
            for average in averages:
                average.step()
            take(Snapshots(tmp_path, every_n_steps=2), averages)
        model = 8 * 100_100
        with count_allocations() as allocations:
            synthesize(tmp_path, sigma_rel=0.075)
        # the sums, one tensor in float64, one product and a few rows of a checksum; the files stay on the disk
        assert allocations.peak < 3.5 * model


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            ({}, "exactly one"),
            ({"sigma_rel": 0.075, "profile": Equal()}, "exactly one"),
            ({"sigma_rel": 0.3}, r"must lie in \(0, 0.2887\]"),
            ({"sigma_rel": 0.0}, "positive"),
            ({"sigma_rel": 0.005}, r"cannot be put together.*residual.*0\.1 is accepted"),
            ({"profile": Bema()}, "Bema.* corrects its average by the live weights, which snapshots do not hold"),
            ({"profile": HalfLife(epochs=1)}, r"HalfLife\(steps="),
            ({"sigma_rel": 0.075, "at_step": 0}, "from step 1 to step 2048"),
            ({"sigma_rel": 0.075, "at_step": 2049}, "from step 1 to step 2048"),
        ],
    )
    def test_arguments(self, arguments, complaint, long_run):
        with pytest.raises(ValueError, match=complaint):
            synthesize(long_run[0], **arguments)
        with pytest.raises(TypeError, match="must be a Schedule"):
            synthesize(long_run[0], profile=0.99)

    def test_rounding_errors_that_would_show(self, tmp_path):
        train(small(torch.float32), tmp_path, [], 256, 8, tracked=[Power(sigma_rel=0.1), Power(sigma_rel=0.100001)])
        with pytest.raises(ValueError, match=r"absolute values sum to .*track averages that differ more"):
            synthesize(tmp_path, sigma_rel=0.075)

    def test_a_hopeless_one_is_refused_before_any_weight_is_read(self, long_run, monkeypatch):
        monkeypatch.setattr("lightning_ema.posthoc.synthesis.tensors_of", None)
        with pytest.raises(ValueError, match="cannot be put together"):
            synthesize(long_run[0], profile=HalfLife(steps=2))

    def test_a_schedule_of_ones_own_can_be_wanted(self, long_run):
        class Mine(Schedule):
            def __call__(self, n):
                return TRACKED[0](n)

        assert synthesize(long_run[0], profile=Mine()).residual < 1e-12

    def test_there_must_be_files(self, tmp_path):
        with pytest.raises(ValueError, match="holds no snapshots"):
            synthesize(tmp_path, sigma_rel=0.075)
        with pytest.raises(ValueError, match="no files"):
            synthesize([], sigma_rel=0.075)
        with pytest.raises(FileNotFoundError):
            synthesize(tmp_path / "missing", sigma_rel=0.075)
        write(Snapshots(tmp_path, every_n_steps=1), [WeightAverage(nn.Linear(2, 1))])
        with pytest.raises(ValueError, match="before the first update"):
            synthesize(tmp_path, sigma_rel=0.075)

    def test_two_runs_in_one_directory(self, tmp_path):
        for _ in range(2):
            train(small(), tmp_path, [], 40, 10)
        first, second = files_in(tmp_path).values()
        with pytest.raises(ValueError, match=r"2 runs .*4 files until .*glob\('snapshot-"):
            synthesize(tmp_path, sigma_rel=0.075)
        with pytest.raises(ValueError, match=r"do not belong together.*\n.*of the run"):
            synthesize([first[0], second[-1]], sigma_rel=0.075)
        with pytest.raises(ValueError, match="of the run"):
            synthesize([first[-1], second[-1]], sigma_rel=0.075)
        assert synthesize(second, sigma_rel=0.075).step == 40

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            (lambda c: c["averages"].pop(), "1 averages, not 2"),
            (lambda c: c.update(start_step=3), "start at step 3, not 0"),
            (
                lambda c: c["averages"][1]["stretches"][0].update(decay="Equal()"),
                r"average 2 follows Equal\(\), not Power",
            ),
            (lambda c: c["averages"][0]["stretches"][0].update(gaps=[5], counts=[2]), "average 1 was updated at other"),
            (lambda c: c["averages"][0]["config"].update(buffers="copy"), "buffers: copy, not average"),
            (lambda c: c["entries"].pop(0), "has no 0.weight"),
            (lambda c: c["entries"].append(["extra", "0.bias", "float64"]), "has extra"),
            (
                lambda c: c["averages"][0]["tensors"].update({"0.bias": torch.zeros(9)}),
                r"0.bias of shape \(9,\), not \(6,\)",
            ),
        ],
    )
    def test_what_differs_is_said(self, change, complaint, tmp_path):
        train(small(), tmp_path, [], 40, 10)
        (paths,) = files_in(tmp_path).values()
        content = torch.load(paths[0], weights_only=True)
        change(content)
        seal(content)
        save(content, paths[0])
        with pytest.raises(ValueError, match=complaint) as error:
            synthesize(tmp_path, sigma_rel=0.075)
        assert paths[0].name in str(error.value)


def bits(path):
    """Some of the bits of a file: from every part of it, all 8 of the octets that are chosen."""
    size = path.stat().st_size
    return [(octet, bit) for octet in range(0, size, max(1, size // 61)) for bit in (0, 3, 7)]


def test_no_flipped_bit_goes_through(tmp_path):
    """Tried: each of the bits above; what is read all the same is what was written."""
    train(small(), tmp_path, [], 40, 10)
    (paths,) = files_in(tmp_path).values()
    whole, good = paths[0].read_bytes(), synthesize(tmp_path, sigma_rel=0.075).weights
    refused = 0
    for octet, bit in bits(paths[0]):
        damaged, made = bytearray(whole), good
        damaged[octet] ^= 1 << bit
        paths[0].write_bytes(damaged)
        try:
            made = synthesize(tmp_path, sigma_rel=0.075).weights
        except ValueError:
            refused += 1
        assert all(torch.equal(made[key], good[key]) for key in good)  # a zip file leaves some of its octets empty
    assert refused > 50


def test_solve_meets_the_constraint_where_columns_depend_on_each_other():
    matrix = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    values, residual = solve(matrix, torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert values.tolist() == pytest.approx([0.125, 0.125, 0.75]) and residual < 1e-15
    values, residual = solve(matrix[:, 2:], torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert values.tolist() == [1.0] and residual == pytest.approx(18**0.5 / 5)
