"""Trains a digit classifier on 10 labels per class and 2,900 images without labels: a mean teacher.

The teacher, the average of the student, looks at weakly changed images; the student learns to say the same of
strongly changed ones (arXiv 1703.01780). ``--method pi`` takes the targets from the student itself (the Pi model,
arXiv 1610.02242), ``--method supervised`` uses the labeled images alone.
"""

import torch
from classifier import Classifier, arguments, run_seeds
from torch import nn

from lightning_ema import Annealing, MeanTeacherConfig, consistency


def settings(steps: int = 2000) -> MeanTeacherConfig:
    """For a run of so many steps."""
    return MeanTeacherConfig(decay=Annealing(0.99, gamma=1), consistency_weight=30.0, ramp_up_steps=2 * steps // 5)


class MeanTeacher(Classifier):
    mean_teacher = settings()

    def training_step(self, batch):
        images, labels = batch["labeled"]
        weak, strong, _ = batch["unlabeled"]
        targets = self.targets(weak)
        labeled, unlabeled = self.both(images, strong)
        supervised = nn.functional.cross_entropy(labeled, labels)
        return supervised + self.consistency_weight() * consistency.mse(unlabeled, targets)

    def targets(self, images):
        with self.teacher_view() as teacher:
            return teacher(images)


class Pi(MeanTeacher):
    @torch.no_grad()
    def targets(self, images):
        return self.student(images)


METHODS = {"supervised": Classifier, "pi": Pi, "mean-teacher": MeanTeacher}


def main():
    parser = arguments(__doc__, "mean_teacher")
    parser.add_argument("--method", choices=METHODS, default="mean-teacher")
    args = parser.parse_args()
    run_seeds(lambda: METHODS[args.method](settings(args.steps)), args)


if __name__ == "__main__":
    main()
