"""Buffers that are infinite at first, resized in place or made late; quantisation-aware training."""

import warnings

import pytest
import torch
from helpers import BATCHES, Regression, ema, equal, fit, seeded
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from taught import Taught, network
from torch import nn

from lightning_ema import Constant


class Infinite(Regression):
    """A buffer that holds an infinity until the first step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("best", torch.tensor([float("inf"), 1.0]))

    def training_step(self, batch, batch_idx):
        self.best[0] = 1.0 + self.global_step
        return super().training_step(batch, batch_idx)


class Resized(Regression):
    """A buffer that grows in place, and one that shrinks."""

    def __init__(self):
        super().__init__()
        self.register_buffer("grows", torch.zeros(1))
        self.register_buffer("shrinks", torch.zeros(4))

    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            self.grows.resize_(3).fill_(5.0)
            self.shrinks.resize_(2).fill_(5.0)
        return super().training_step(batch, batch_idx)


class Lazy(Regression):
    def __init__(self):
        super().__init__(norm=False)
        self.norm = nn.LazyBatchNorm1d()

    def loss(self, batch):
        return super().loss([self.norm(batch[0]), batch[1]])

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.05)


def quantised(net):
    net.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(net.train())


class Quantised(Regression):
    """torch's default quantisation-aware training: one observer for each channel, which resizes its buffers."""

    def __init__(self):
        super().__init__(norm=False)
        self.net = quantised(self.net)


class TeachesQuantised(Taught):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.student, self.teacher = quantised(network()), quantised(network())


pytestmark = pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated", "ignore:.*reduce_range")


@pytest.mark.parametrize("make", [Infinite, Resized, Lazy, Quantised])
def test_it_trains_is_evaluated_and_resumes_bit_for_bit(make, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        whole = ema(decay=Constant(0.5), after_fit="live")
        module = seeded(make)
        fit(module, whole, first, enable_checkpointing=True, num_sanity_val_steps=0)
        again, resumed = ema(decay=Constant(0.5), after_fit="live"), seeded(make)
        if make is Lazy:
            resumed.norm(torch.zeros(2, 4))  # Lightning itself loads no lazy layer
        if make is Quantised:
            resumed.net(torch.zeros(2, 4))
        if make is Resized:
            resumed.grows, resumed.shrinks = torch.zeros(3), torch.zeros(2)
        fit(resumed, again, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert whole.average.num_updates == again.average.num_updates == 2 * BATCHES
    assert equal(whole.average.named_tensors(), again.average.named_tensors())
    assert equal(module.state_dict(), resumed.state_dict())


def test_a_teacher_of_a_quantised_student_follows():
    module = seeded(TeachesQuantised)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module)
    assert module.teacher_callback.average.num_updates == 2 * BATCHES


@pytest.mark.parametrize(("step", "told"), [(0, False), (2, True)])
def test_a_resized_buffer_begins_anew_and_is_named_where_it_had_an_average(step, told, recwarn):
    module, callback = seeded(Resized), ema(decay=Constant(0.5), after_fit="live")
    module.training_step = lambda batch, batch_idx: resize(module, step) or module.loss(batch)
    fit(module, callback, max_epochs=1)
    assert [float(t.unique()) for n, t in callback.average.named_tensors() if n == "grows"] == [5.0]
    assert [" changed its shape" in str(w.message) for w in recwarn if "grows" in str(w.message)] == [True] * told


def resize(module, step):
    if module.global_step == step:
        module.grows.resize_(3).fill_(5.0)


@pytest.mark.parametrize("values", [(float("inf"), 1.0), (1.0, float("inf")), (float("nan"), 1.0)])
def test_the_names_of_the_file_decide_whether_a_buffer_is_averaged(values, tmp_path):
    class Changes(Infinite):
        def __init__(self, first=values[0]):
            super().__init__()
            self.best[0] = first

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    class Sets(Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.best[0] = values[1]
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    callback = ema(evaluate="live")
    fit(seeded(Changes), callback, Sets(), max_epochs=1)
    had = "best" in dict(callback.average.named_tensors())
    again = ema(evaluate="live")
    fit(seeded(Changes), again, ckpt_path=tmp_path / "end.ckpt")
    assert ("best" in dict(again.average.named_tensors())) == had == torch.tensor(values[0]).isfinite().item()
