"""The questions of evidence.py: each is a function of a seed and a number of steps, and returns a table of numbers."""

import copy
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from evidence_training import BATCH, RATE, error, network, split, training
from report import shifted
from torch.optim.swa_utils import update_bn

from lightning_ema import Constant, Power, Scaled, Snapshots, Warmup, WeightAverage, synthesize
from lightning_ema.posthoc import take

DECAYS = (0.9, 0.99, 0.998)
LABELS = {"clean labels": 0.0, "40% random labels": 0.4}
POLICIES = ("average", "copy", "recalibrate")
TRACKED, WANTED = (0.05, 0.10), (0.03, 0.075, 0.15, 0.25)
AMOUNTS = (4, 8, 16, 32)


def of_average(average, test):
    with average.swapped() as net:
        return error(net, test)


def live_and_averages(seed, steps, falls):
    """Test error in % by labels: of the live weights, and of averages with three decays, warmed up."""
    rows = {}
    for name, share in LABELS.items():
        train, test = split(seed, share)
        net = network(seed)
        average = WeightAverage(net, list(DECAYS))
        for _ in training(net, train, steps, seed, falls=falls):
            average.step()
        scores = [of_average(each, test) for each in average.averages]
        averages = (f"decay {decay}" for decay in DECAYS)
        rows[name] = {"live": error(net, test), **dict(zip(averages, scores, strict=True))}
    return rows


def constant_rate(seed, steps):
    return live_and_averages(seed, steps, falls=False)


def falling_rate(seed, steps):
    return live_and_averages(seed, steps, falls=True)


def sixteen_bits(seed, steps):
    """Test error in % by schedule, of weights in bfloat16: live, averaged in float32, averaged in bfloat16.

    The package refuses the last as ``dtype``; it is kept by hand: ``average = lerp(average, live, 1 - decay)`` in
    bfloat16.
    """
    schedules = {f"decay {decay}": Warmup(decay) for decay in DECAYS} | {"Constant(0.998)": Constant(0.998)}
    train, test = split(seed, LABELS["40% random labels"])
    net = network(seed).bfloat16()
    average = WeightAverage(net, list(schedules.values()))
    by_hand = [(schedule, copy.deepcopy(net)) for schedule in schedules.values()]
    for n in training(net, train, steps, seed):
        average.step()
        with torch.no_grad():
            for schedule, narrow in by_hand:
                for kept, live in zip(narrow.parameters(), net.parameters(), strict=True):
                    kept.lerp_(live, 1 - schedule(n))
    return {
        name: {
            "live": error(net, test),
            "average in float32": of_average(wide, test),
            "average in bfloat16": error(narrow, test),
        }
        for name, wide, (_, narrow) in zip(schedules, average.averages, by_hand, strict=True)
    }


def batchnorm(seed, steps):
    """Test error in % by schedule and step: with BatchNorm statistics averaged, live ones, and estimated anew."""
    train, test = split(seed)
    net = network(seed, normalized=True)
    schedules = {"Constant(0.999)": Constant(0.999), "Warmup(0.999)": Warmup(0.999)}
    averaged, copied = (WeightAverage(net, list(schedules.values()), buffers=buffers) for buffers in POLICIES[:2])
    rows = {}
    for step in training(net, train, steps, seed):
        averaged.step()
        copied.step()
        if step in (steps // 4, steps):
            live = error(net, test)
            for name, one, other in zip(schedules, averaged.averages, copied.averages, strict=True):
                scores = (of_average(one, test), of_average(other, test), recalibrated(other, train, test, seed))
                rows[f"{name}, step {step:,}"] = {"live": live, **dict(zip(POLICIES, scores, strict=True))}
    return rows


def recalibrated(average, train, test, seed):
    inputs = shifted(train[0], torch.Generator().manual_seed(seed))  # as in training
    with average.swapped() as net:
        averaged = copy.deepcopy(net)
    update_bn(inputs.split(100), averaged)
    return error(averaged, test)


def batch_size(seed, steps):
    """Test error in % by decay: as many digits in batches that are 4 times as large, at 4 times the learning rate."""
    train, test = split(seed, LABELS["40% random labels"])
    rows = {name: {} for name in ("live", "decay 0.99", "decay 0.998")}
    for times, powers in ((1, {"32": 1}), (4, {"128, the same decay": 1, "128, decay scaled": 4})):
        schedules = {
            (decay, column): Scaled(Constant(decay), batch_factor=power)
            for decay in (0.99, 0.998)
            for column, power in powers.items()
        }
        net = network(seed)
        average = WeightAverage(net, list(schedules.values()))
        for _ in training(net, train, steps // times, seed, rate=times * RATE, batch=times * BATCH):
            average.step()
        for (decay, column), each in zip(schedules, average.averages, strict=True):
            rows[f"decay {decay}"][column] = of_average(each, test)
        rows["live"].update(dict.fromkeys(powers, error(net, test)))
    return rows


def post_hoc(seed, steps):
    """How far a synthesis is from the average kept during training, over that one's distance to the live weights.

    By the average wanted: the nearer of the two that were tracked, then syntheses of them from 4 to 32 snapshots. NaN
    where the synthesis is refused.
    """
    train, _ = split(seed, LABELS["40% random labels"])
    net = network(seed)
    average = WeightAverage(net, [Power(sigma_rel=sigma) for sigma in (*TRACKED, *WANTED)])
    tracked, kept = average.averages[: len(TRACKED)], average.averages[len(TRACKED) :]
    with TemporaryDirectory() as folder:
        snapshots = Snapshots(folder, every_n_steps=steps // AMOUNTS[-1])
        for _ in training(net, train, steps, seed):
            average.step()
            take(snapshots, tracked)
        files = sorted(Path(folder).iterdir(), key=lambda path: int(path.stem.rsplit("-", 1)[1]))
        live = flat(net.state_dict())
        rows = {}
        for sigma, each in zip(WANTED, kept, strict=True):
            reference = flat(dict(each.named_tensors()))
            scale = (reference - live).norm()
            nearer = min((flat(dict(one.named_tensors())) - reference).norm() for one in tracked)
            rows[f"sigma_rel {sigma}"] = {"nearer of two": (nearer / scale).item()}
            for amount in AMOUNTS:
                found = synthesized(files[len(files) // amount - 1 :: len(files) // amount], sigma)
                difference = nan if found is None else ((found - reference).norm() / scale).item()
                rows[f"sigma_rel {sigma}"][f"{amount} snapshots"] = difference
    return rows


def synthesized(files, sigma):
    try:
        return flat(synthesize(files, sigma_rel=sigma).weights)
    except ValueError:
        return None


def flat(tensors):
    return torch.cat([tensor.flatten().double() for tensor in tensors.values()])
