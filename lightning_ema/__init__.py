"""Weight averaging for PyTorch Lightning.

The rest stands in wings: ``schedules``, ``recipes``, ``interop``, ``posthoc``, ``semi_supervised``, ``teacher``.
"""

from lightning_ema import interop, posthoc, recipes, schedules, semi_supervised, teacher
from lightning_ema.averaging.settings import Recalibrate
from lightning_ema.averaging.weight_average import WeightAverage
from lightning_ema.callback.ema_callback import EMACallback
from lightning_ema.callback.switch import SwitchEMA
from lightning_ema.evaluation.settings import Select
from lightning_ema.interop.export import export_average
from lightning_ema.posthoc.snapshots import Snapshots
from lightning_ema.posthoc.synthesis import synthesize
from lightning_ema.schedules import (
    Annealing,
    Bema,
    Constant,
    Cosine,
    Debiased,
    Equal,
    ExponentialAnnealing,
    HalfLife,
    InversePower,
    PerUpdate,
    Power,
    Scaled,
    Schedule,
    Shifted,
    Then,
    Warmup,
)
from lightning_ema.teacher.config import MeanTeacherConfig
from lightning_ema.teacher.mixin import MeanTeacherMixin

__version__ = "0.1.0"

__all__ = [
    "Annealing",
    "Bema",
    "Constant",
    "Cosine",
    "Debiased",
    "EMACallback",
    "Equal",
    "ExponentialAnnealing",
    "HalfLife",
    "InversePower",
    "MeanTeacherConfig",
    "MeanTeacherMixin",
    "PerUpdate",
    "Power",
    "Recalibrate",
    "Scaled",
    "Schedule",
    "Select",
    "Shifted",
    "Snapshots",
    "SwitchEMA",
    "Then",
    "Warmup",
    "WeightAverage",
    "export_average",
    "interop",
    "posthoc",
    "recipes",
    "schedules",
    "semi_supervised",
    "synthesize",
    "teacher",
]
