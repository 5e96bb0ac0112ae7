"""Trains a digit classifier on 10 labels per class and 2,900 images without labels: FixMatch with an EMA teacher.

Where the network is sure of a weakly changed image, its class is the label of the strongly changed one (arXiv
2001.07685). The pseudo-labels come from the teacher, or with ``--targets-from student`` from the student, as
published; the average is evaluated either way. The labeled images are weakly changed, as published; the threshold is
0.8, which measured better here than the published 0.95. With very few labels, ``--align`` keeps classes from merging.
"""

from typing import Literal

import torch
from classifier import Alignment, Classifier, arguments, run_seeds
from torch import nn
from torchmetrics import MeanMetric

from lightning_ema import MeanTeacherConfig
from lightning_ema.semi_supervised import losses

Source = Literal["teacher", "student"]


class FixMatch(Classifier):
    def __init__(
        self,
        targets_from: Source = "teacher",
        threshold: float = 0.8,
        align: bool = False,
        mean_teacher: MeanTeacherConfig | None = None,
    ):
        super().__init__(mean_teacher=mean_teacher)
        self.save_hyperparameters("targets_from", "threshold", "align")
        self.aligned = Alignment() if align else nn.Identity()
        self.accepted = MeanMetric()
        self.right = MeanMetric()  # of accepted ones; NaN in an epoch without any

    def training_step(self, batch):
        images, labels = batch["labeled"]
        weak, strong, true_labels = batch["unlabeled"]
        if self.hparams.targets_from == "teacher":
            with self.teacher_view() as teacher:
                logits = teacher(weak)
        else:
            with torch.no_grad():
                logits = self.student(weak)
        targets = self.aligned(logits.softmax(1))
        pseudo_labels, mask = losses.pseudo_labels(targets.log(), self.hparams.threshold)
        self.watch(pseudo_labels, mask, true_labels)

        labeled, unlabeled = self.both(images, strong)
        supervised = nn.functional.cross_entropy(labeled, labels)
        return supervised + self.consistency_weight() * losses.cross_entropy(unlabeled, pseudo_labels, mask)

    def watch(self, pseudo_labels, mask, true_labels):
        self.accepted.update(mask)
        self.right.update(pseudo_labels == true_labels, mask)
        self.log("pseudo_labels/accepted", self.accepted, on_step=False, on_epoch=True)
        self.log("pseudo_labels/right", self.right, on_step=False, on_epoch=True)


def main():
    parser = arguments(__doc__, "fixmatch")
    parser.add_argument("--targets-from", choices=["teacher", "student"], default="teacher")
    parser.add_argument("--threshold", type=float, default=0.8, help="how sure the network must be of a pseudo-label")
    parser.add_argument("--align", action="store_true", help="divide the targets by their running distribution")
    args = parser.parse_args()
    run_seeds(lambda: FixMatch(args.targets_from, args.threshold, args.align), args, labeled_view="weak")


if __name__ == "__main__":
    main()
