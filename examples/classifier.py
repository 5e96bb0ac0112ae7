"""What the semi-supervised examples share: a classifier that learns from labels alone, its training, and the report."""

import argparse
import logging
import math
import warnings
from pathlib import Path

import torch
from digits import Digits, network
from lightning.pytorch import LightningModule, Trainer, seed_everything
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_ema import Annealing, MeanTeacherConfig, MeanTeacherMixin
from lightning_ema.semi_supervised import losses
from lightning_ema.teacher import for_both


class Classifier(MeanTeacherMixin, LightningModule):
    """The supervised baseline: the labeled digits alone. Its teacher is a plain average, which trains nothing."""

    mean_teacher = MeanTeacherConfig(decay=Annealing(0.99, gamma=1))
    lr = 2e-3

    def __init__(self, mean_teacher: MeanTeacherConfig | None = None):
        super().__init__(mean_teacher=mean_teacher)
        self.student = network()
        self.scores = for_both(accuracy=MulticlassAccuracy(10, average="micro"))
        self.curves = {"step": [], "student": [], "teacher": []}  # errors in %

    def training_step(self, batch):
        images, labels = batch["labeled"]
        return nn.functional.cross_entropy(self.student(images), labels)

    def both(self, labeled, unlabeled):
        """Logits for two batches from one pass of the student, which is faster than two."""
        return self.student(torch.cat([labeled, unlabeled])).split([len(labeled), len(unlabeled)])

    def validation_step(self, batch):
        images, labels = batch
        self.log_both(self.scores, labels, lambda network: network(images))

    def on_validation_epoch_end(self):
        self.curves["step"].append(self.global_step)
        for name in ("student", "teacher"):
            accuracy = self.scores[name]["accuracy"].compute().item()
            self.curves[name].append(round(100 * (1 - accuracy), 2))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.student.parameters(), lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: math.cos(7 * math.pi / 16 * step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Alignment(nn.Module):
    """Targets for equally frequent classes: divided by the mean of the targets so far (arXiv 1911.09785)."""

    def __init__(self, classes=10):
        super().__init__()
        self.register_buffer("wanted", torch.full((classes,), 1 / classes))
        self.register_buffer("predicted", torch.full((classes,), 1 / classes))

    @torch.no_grad()
    def forward(self, probabilities):
        self.predicted.lerp_(probabilities.mean(0), 0.01)
        return losses.align_distribution(probabilities, self.wanted, self.predicted)


def train(model, data, steps, checkpoint=None, evaluations=1):
    """Trains for so many steps and gives the errors on the test digits as they developed, in %."""
    every = max(1, steps // evaluations)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    often = {"val_check_interval": every, "check_val_every_n_epoch": None}
    trainer = Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", enable_checkpointing=False, **often, **quiet)
    trainer.fit(model, data)
    if model.curves["step"][-1:] != [steps]:
        trainer.validate(model, data, verbose=False)
    if checkpoint is not None:
        trainer.save_checkpoint(checkpoint)
    return model.curves


def prepared():
    """Quiet, and on one thread: so small a network gains nothing from a second."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for noise in (
        ".*does not have many workers",
        ".*isinstance.treespec, LeafSpec",
        ".*in eval mode at the start",  # the teacher
        ".*have no `validation_step`",
    ):
        warnings.filterwarnings("ignore", noise)


def arguments(description, out):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--labels-per-class", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="how many runs, each with its own labeled images")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("runs") / out, help="folder for checkpoints and the plot")
    return parser


def run_seeds(make, args, labeled_view="strong"):
    """Trains ``make()`` once for each seed; prints the errors and draws how they developed."""
    prepared()
    runs, rows = [], []
    for seed in range(args.seeds):
        seed_everything(seed, verbose=False)
        data = Digits(args.labels_per_class, seed, labeled_view=labeled_view)
        model = make()
        runs.append(train(model, data, args.steps, args.out / f"seed{seed}.ckpt", evaluations=10))
        rows.append([seed, runs[-1]["student"][-1], runs[-1]["teacher"][-1]])
        print("seed {}: student {:.2f}%, teacher {:.2f}%".format(*rows[-1]), flush=True)
        for name, value in model.trainer.callback_metrics.items():
            if name.startswith("pseudo_labels/"):
                print(f"  {name} in the last epoch: {100 * value:.1f}%")
    print("\n" + tabulate(rows, ["seed", "student's error in %", "teacher's"], tablefmt="github", floatfmt=".2f"))

    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    for name, colour in {"student": "tab:orange", "teacher": "tab:blue"}.items():
        errors = torch.tensor([run[name] for run in runs])  # seeds x evaluations
        axes.fill_between(runs[0]["step"], errors.amin(0), errors.amax(0), color=colour, alpha=0.2, linewidth=0)
        axes.plot(runs[0]["step"], errors.mean(0), color=colour, marker=".", label=name)
    axes.set(xlabel="step", ylabel="test error in %", ylim=(0, None))
    axes.legend(title="mean and range over the seeds", frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(args.out / "errors.png", dpi=120)
