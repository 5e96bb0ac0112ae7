"""A LightningCLI project with averages: ``python main.py fit --config config.yaml`` in this directory."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_ema  # noqa: F401  with it the short name EMACallback works on the command line


class Classifier(LightningModule):
    def __init__(self, width: int = 64, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.lr = lr

    def forward(self, images):
        return self.layers(images)

    def training_step(self, batch):
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch):  # here the module carries the average
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_accuracy", self.accuracy)

    def predict_step(self, batch):
        return self(batch[0]).argmax(1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Digits(LightningDataModule):
    """The 1,797 digits of 8 x 8 pixels that come with scikit-learn; the last 600 are for validation."""

    def __init__(self, batch_size: int = 32):
        super().__init__()
        self.batch_size = batch_size
        images, labels = load_digits(return_X_y=True)
        images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
        self.train, self.held_out = (
            TensorDataset(images[:-600], labels[:-600]),
            TensorDataset(images[-600:], labels[-600:]),
        )

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.held_out, 200)

    predict_dataloader = val_dataloader


def main(arguments=None):
    LightningCLI(Classifier, Digits, args=arguments)


if __name__ == "__main__":
    main()
