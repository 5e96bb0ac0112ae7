"""Weight averaging for PyTorch Lightning."""

from lightning_ema import interop, recipes
from lightning_ema.averaging.settings import Recalibrate
from lightning_ema.averaging.weight_average import WeightAverage
from lightning_ema.callback.ema_callback import EMACallback
from lightning_ema.callback.switch import SwitchEMA
from lightning_ema.evaluation.settings import Select
from lightning_ema.interop.export import export_average
from lightning_ema.posthoc.snapshots import Snapshots
from lightning_ema.posthoc.synthesis import Synthesis, synthesize
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
    Plan,
    Power,
    Scaled,
    Schedule,
    Shifted,
    Then,
    Warmup,
)
from lightning_ema.semi_supervised import losses as consistency
from lightning_ema.semi_supervised.datamodule import SemiSupervisedDataModule
from lightning_ema.semi_supervised.splits import split_by_class
from lightning_ema.semi_supervised.views import PerSample, Views
from lightning_ema.teacher.config import MeanTeacherConfig
from lightning_ema.teacher.mixin import MeanTeacherMixin, for_both

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
    "PerSample",
    "PerUpdate",
    "Plan",
    "Power",
    "Recalibrate",
    "Scaled",
    "Schedule",
    "Select",
    "SemiSupervisedDataModule",
    "Shifted",
    "Snapshots",
    "SwitchEMA",
    "Synthesis",
    "Then",
    "Views",
    "Warmup",
    "WeightAverage",
    "consistency",
    "export_average",
    "for_both",
    "interop",
    "recipes",
    "split_by_class",
    "synthesize",
]
