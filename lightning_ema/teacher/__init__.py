"""An average that is a module of its own: a teacher beside the student that is trained."""

from lightning_ema.teacher.config import MeanTeacherConfig
from lightning_ema.teacher.mixin import MeanTeacherMixin, for_both

__all__ = ["MeanTeacherConfig", "MeanTeacherMixin", "for_both"]
