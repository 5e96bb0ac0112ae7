"""The real LightningCLI with a module and data of its own."""

from helpers import Regression, loader
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI


class Model(Regression):
    def __init__(self, lr: float = 0.05):
        super().__init__(lr=lr)


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(2)


def cli(*arguments, run=True):
    return LightningCLI(Model, Data, args=list(arguments), run=run, save_config_callback=None)
