"""Weight averaging for PyTorch Lightning."""

from lightning_ema import consistency, interop, recipes
from lightning_ema.average import WeightAverage
from lightning_ema.callback import EMACallback
from lightning_ema.compositions import Bema, CopyFirst, Debiased, Equal, Power, Scaled, Shifted, Then
from lightning_ema.export import export_average
from lightning_ema.loan import Loan
from lightning_ema.metrics import (
    PseudoLabelAcceptance,
    PseudoLabelAccuracy,
    RelativeWeightDistance,
    TeacherStudentAgreement,
)
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
from lightning_ema.snapshots import Snapshots
from lightning_ema.splits import split_by_class
from lightning_ema.synthesis import Synthesis, synthesize
from lightning_ema.teacher import MeanTeacherMixin, for_both
from lightning_ema.teacher_config import MeanTeacherConfig
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
    "MeanTeacherConfig",
    "MeanTeacherMixin",
    "PerSample",
    "Plan",
    "Power",
    "PseudoLabelAcceptance",
    "PseudoLabelAccuracy",
    "Ramp",
    "RelativeWeightDistance",
    "Scaled",
    "Schedule",
    "SemiSupervisedDataModule",
    "Shifted",
    "Snapshots",
    "Synthesis",
    "TeacherStudentAgreement",
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
