"""Weight averaging for PyTorch Lightning."""

from lightning_ema.average import WeightAverage
from lightning_ema.callback import EMACallback
from lightning_ema.compositions import CopyFirst, Debiased, Equal, Power, Scaled, Then
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
from lightning_ema.snapshots import Snapshots
from lightning_ema.synthesis import Synthesis, synthesize

__version__ = "0.1.0"

__all__ = [
    "Annealing",
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
    "Plan",
    "Power",
    "Ramp",
    "Scaled",
    "Schedule",
    "Snapshots",
    "Synthesis",
    "Then",
    "Warmup",
    "WeightAverage",
    "export_average",
    "synthesize",
]
