"""Losses, ramps and data of semi-supervised training, for a mean teacher or for methods of one's own."""

from lightning_ema.semi_supervised import losses
from lightning_ema.semi_supervised.datamodule import SemiSupervisedDataModule
from lightning_ema.semi_supervised.ramps import cosine_ramp, linear_ramp, sigmoid_ramp
from lightning_ema.semi_supervised.splits import split_by_class
from lightning_ema.semi_supervised.views import PerSample, Views

__all__ = [
    "PerSample",
    "SemiSupervisedDataModule",
    "Views",
    "cosine_ramp",
    "linear_ramp",
    "losses",
    "sigmoid_ramp",
    "split_by_class",
]
