"""The settings of a teacher in a YAML file of LightningCLI."""

import pytest
import yaml
from helpers import loader
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from taught import Taught

from lightning_ema import Constant, MeanTeacherConfig, PerUpdate, Then

pytestmark = pytest.mark.filterwarnings("ignore")


class PassesOn(Taught):
    """Takes the settings through ``**kwargs``."""


class Names(Taught):
    """Names them in its own signature."""

    def __init__(self, width: int = 8, mean_teacher: MeanTeacherConfig | None = None):
        super().__init__(mean_teacher=mean_teacher)
        self.width = width


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(2)


CONSTANT = {"class_path": "lightning_ema.Constant", "init_args": {"decay": 0.9}}
THEN = {"class_path": "lightning_ema.Then", "init_args": {"first": 0.5, "at": 3, "second": CONSTANT}}
ALL = {
    "decay": {"class_path": "lightning_ema.PerUpdate", "init_args": {"schedule": THEN}},
    "every_n_steps": 1,
    "burn_in_steps": 2,
    "buffers": "copy",
    "teacher_mode": "train",
    "predict_on": "student",
    "consistency_weight": 3.0,
    "ramp_up_steps": 5,
    "ramp": "cosine",
    "on_nonfinite": "skip",
}


@pytest.mark.parametrize("kind", [PassesOn, Names])
def test_all_settings_are_reachable_and_it_trains(kind, tmp_path):
    config = {
        "model": {"mean_teacher": ALL},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    made = LightningCLI(kind, Data, args=["fit", f"--config={tmp_path / 'config.yaml'}"], save_config_callback=None)
    expected = {**ALL, "decay": PerUpdate(Then(0.5, at=3, second=Constant(0.9)))}
    assert made.model.mean_teacher == MeanTeacherConfig(**expected)
    assert made.model.teacher_callback.num_steps == 12
    assert set(ALL) == set(vars(MeanTeacherConfig()))


def test_nothing_given_leaves_the_settings_of_the_class(tmp_path):
    made = LightningCLI(PassesOn, Data, args=["--trainer.logger=false"], run=False, save_config_callback=None)
    assert made.model.mean_teacher == Taught.mean_teacher == MeanTeacherConfig(decay=Constant(0.5))
