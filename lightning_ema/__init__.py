"""Weight averaging for PyTorch Lightning."""

from lightning_ema.average import WeightAverage
from lightning_ema.callback import EMACallback
from lightning_ema.compositions import Bema, CopyFirst, Debiased, Equal, Power, Scaled, Then
from lightning_ema.export import export_average
from lightning_ema.loan import Loan
from lightning_ema.schedules import (
    Annealing,
    Constant,
    Cosine,
    ExponentialAnnealing,
    HalfLife,
    InversePower,
    Plan,
    Ramp,
    Schedule,
    Warmup,
)
from lightning_ema.semi_supervised_data import SemiSupervisedDataModule
from lightning_ema.splits import split_by_class
from lightning_ema.views import PerSample, Views

__version__ = "0.1.0"

__all__ = [
    "Annealing",
    "Bema",
    "Constant",
    "CopyFirst",
    "Cosine",
    "Debiased",
    "EMACallback",
    "Equal",
    "ExponentialAnnealing",
    "HalfLife",
    "InversePower",
    "Loan",
    "PerSample",
    "Plan",
    "Power",
    "Ramp",
    "Scaled",
    "Schedule",
    "SemiSupervisedDataModule",
    "Then",
    "Views",
    "Warmup",
    "WeightAverage",
    "export_average",
    "split_by_class",
]
