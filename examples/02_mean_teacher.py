"""Trains a digit classifier on 10 labels per class and 2,900 images without labels: a mean teacher.

The teacher, the average of the student, looks at weakly changed images; the student learns to say the same of
strongly changed ones (arXiv 1703.01780). ``--method pi`` takes the targets from the student itself (the Pi model,
arXiv 1610.02242), ``--method supervised`` uses the labeled images alone. With very few labels, ``--align`` keeps
classes from merging.
"""

import torch
from classifier import Alignment, Classifier, arguments, run_seeds
from torch import nn

from lightning_ema import Annealing, MeanTeacherConfig
from lightning_ema.semi_supervised import losses


def settings(steps: int = 2000) -> MeanTeacherConfig:
    """For a run of so many steps."""
    return MeanTeacherConfig(decay=Annealing(0.99, gamma=1), consistency_weight=30.0, ramp_up_steps=2 * steps // 5)


class MeanTeacher(Classifier):
    mean_teacher = settings()

    def __init__(self, mean_teacher: MeanTeacherConfig | None = None, align: bool = False):
        super().__init__(mean_teacher=mean_teacher)
        self.aligned = Alignment() if align else nn.Identity()

    def training_step(self, batch):
        images, labels = batch["labeled"]
        weak, strong, _ = batch["unlabeled"]
        targets = self.aligned(self.targets(weak).softmax(1))
        labeled, unlabeled = self.both(images, strong)
        supervised = nn.functional.cross_entropy(labeled, labels)
        return supervised + self.consistency_weight() * losses.mse_outputs(unlabeled.softmax(1), targets)

    def targets(self, images):
        with self.teacher_view() as teacher:
            return teacher(images)


class Pi(MeanTeacher):
    @torch.no_grad()
    def targets(self, images):
        return self.student(images)


METHODS = {"supervised": Classifier, "pi": Pi, "mean-teacher": MeanTeacher}


def make(method: str, steps: int = 2000, align: bool = False):
    """The module of a method, for a run of so many steps."""
    return METHODS[method](settings(steps), **({"align": True} if align else {}))


def main():
    parser = arguments(__doc__, "mean_teacher")
    parser.add_argument("--method", choices=METHODS, default="mean-teacher")
    parser.add_argument("--align", action="store_true", help="divide the targets by their running distribution")
    args = parser.parse_args()
    if args.align and args.method == "supervised":
        parser.error("--align is of no use to --method supervised, which has no targets. Leave it out.")
    run_seeds(lambda: make(args.method, args.steps, args.align), args)


if __name__ == "__main__":
    main()
