"""Files written by a thread while training goes on hold what was there when the save was asked for."""

import inspect
import threading

import pytest
import torch
from helpers import clones, ema, engine, equal, fit, seeded
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_ema import Constant

SAVED, OPENED = 2, 5

pytestmark = pytest.mark.skipif(
    "clone" not in inspect.getsource(AsyncCheckpointIO), reason="this Lightning hands the live tensors to the thread"
)


class Late(TorchCheckpointIO):
    """Writes only once training has gone on."""

    def __init__(self):
        self.open = threading.Event()

    def save_checkpoint(self, *args, **kwargs):
        assert self.open.wait(timeout=30)
        super().save_checkpoint(*args, **kwargs)


class Recorder(Callback):
    def __init__(self, average_of, late):
        self.average_of, self.late = average_of, late

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == SAVED:
            self.average = clones(self.average_of.average.named_tensors())
            self.live = clones(engine(self.average_of.average).named_live())
        if trainer.global_step == OPENED:
            assert not equal(self.average, self.average_of.average.named_tensors())
            self.late.open.set()


@pytest.mark.parametrize("tied", [False, True])
def test_a_late_file_holds_the_weights_of_its_step(tmp_path, tied):
    late, callback, module = Late(), ema(decay=Constant(0.5)), seeded(norm=False)
    if tied:  # its average is exchanged in place in a swap
        module.net[0].bias = torch.nn.Parameter(module.net[0].weight.data[:, 0].contiguous())
        module.second = torch.nn.Parameter(module.net[0].bias.data)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1)
    recorder = Recorder(callback, late)
    plugin = AsyncCheckpointIO(late)
    fit(module, callback, recorder, saving, plugins=[plugin], enable_checkpointing=True, max_epochs=1)
    file = torch.load(tmp_path / f"step={SAVED}.ckpt", weights_only=True)
    (entry,) = [entry for key, entry in file["callbacks"].items() if key.startswith("EMACallback")]
    assert all(torch.equal(file["state_dict"][name], value) for name, value in recorder.average.items())
    assert equal(entry["live"], recorder.live)
