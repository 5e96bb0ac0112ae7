"""Modules with a teacher, for the tests of the mixin, and what is seen of both networks in a run."""

import torch
from helpers import clones, fit, seeded
from lightning.pytorch import Callback, LightningModule
from torch import nn

from lightning_ema import Constant, MeanTeacherConfig, MeanTeacherMixin
from lightning_ema.semi_supervised import losses


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1))


class Taught(MeanTeacherMixin, LightningModule):
    """A regression with a consistency loss: nothing here is a class or a logit."""

    mean_teacher = MeanTeacherConfig(decay=Constant(0.5))

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.student = network()

    def training_step(self, batch, batch_idx):
        x, y = batch
        with self.teacher_view() as teacher:
            targets = teacher(x)
        outputs = self.student(x)
        supervised = nn.functional.mse_loss(outputs, y)
        return supervised + self.consistency_weight() * losses.mse_outputs(outputs, targets)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), 0.02)


class Manual(Taught):
    """Manual optimization with two optimizers, which step in turn in every batch."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        parts = [self.student[0].parameters(), self.student[4].parameters()]
        return [torch.optim.Adam(part, 0.01) for part in parts]


class Path(Callback):
    """The student's state after each batch, and the teacher's."""

    def __init__(self):
        self.students, self.teachers = [], []

    def on_train_start(self, trainer, pl_module):
        self.students.append(clones(pl_module.student.state_dict()))
        self.teachers.append(clones(pl_module.teacher.state_dict()))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(self.students) > 1:
            self.teachers.append(clones(pl_module.teacher.state_dict()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.students.append(clones(pl_module.student.state_dict()))

    def on_train_end(self, trainer, pl_module):
        self.teachers.append(clones(pl_module.teacher.state_dict()))


def path(config, make=Taught, **kwargs):
    module, seen = seeded(make), Path()
    module.mean_teacher = config
    fit(module, seen, **kwargs)
    return module, seen
