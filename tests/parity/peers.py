"""The other systems behind one face: ``begin(module)``, ``update(module)``, ``tensors()``."""

import importlib
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from helpers import EMAWeightAveraging, trainer
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from trajectory import STATES, Net, net


def peer(name):
    """The package, if it is installed. Under REQUIRE_PEERS (set by ``make test-peers``) a missing one is an error."""
    if os.environ.get("REQUIRE_PEERS"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed; `make test-peers` installs it")


def timm_model_ema():
    """timm's ``utils/model_ema.py`` alone: the package itself imports torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        peer("timm")
    file = Path(spec.origin).parent / "utils" / "model_ema.py"
    alone = importlib.util.spec_from_file_location("timm_model_ema", file)
    module = importlib.util.module_from_spec(alone)
    alone.loader.exec_module(module)
    return module


def floats(module):
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


class Mmengine:
    """One of its averaged models, called as its EMAHook does: from ``begin_iter`` on."""

    def __init__(self, name, begin_iter=0, **settings):
        self.name, self.begin_iter, self.settings, self.calls = name, begin_iter, settings, 0

    def begin(self, module):
        self.average = getattr(peer("mmengine.model"), self.name)(module, **self.settings)

    def update(self, module):
        self.calls += 1
        if self.calls >= self.begin_iter:
            self.average.update_parameters(module)

    def tensors(self):
        return floats(self.average.module)


class Timm:
    """``ModelEmaV3``, told the step as in its training script."""

    def __init__(self, **settings):
        self.settings, self.step = settings, 0

    def begin(self, module):
        self.average = timm_model_ema().ModelEmaV3(module, **self.settings)

    def update(self, module):
        self.step += 1
        self.average.update(module, step=self.step)

    def tensors(self):
        return floats(self.average.module)


class EmaPytorch:
    def __init__(self, **settings):
        self.settings = settings

    def begin(self, module):
        self.average = peer("ema_pytorch").EMA(module, include_online_model=False, **self.settings)

    def update(self, module):
        self.average.update()

    def tensors(self):
        return floats(self.average.ema_model)


class TorchEma:
    def __init__(self, **settings):
        self.settings = settings

    def begin(self, module):
        self.names = [name for name, _ in module.named_parameters()]
        self.average = peer("torch_ema").ExponentialMovingAverage(module.parameters(), **self.settings)

    def update(self, module):
        self.average.update()

    def tensors(self):
        return dict(zip(self.names, self.average.shadow_params, strict=True))


class Diffusers:
    def __init__(self, **settings):
        self.settings = settings

    def begin(self, module):
        self.names = [name for name, _ in module.named_parameters()]
        self.average = peer("diffusers.training_utils").EMAModel(module.parameters(), **self.settings)

    def update(self, module):
        self.average.step(module.parameters())

    def tensors(self):
        return dict(zip(self.names, self.average.shadow_params, strict=True))


class Torch:
    """``AveragedModel``, called at step ``first`` and every ``every`` steps after it; without a decay it is SWA."""

    def __init__(self, decay=None, use_buffers=False, first=1, every=1):
        self.multi_avg_fn = None if decay is None else get_ema_multi_avg_fn(decay)
        self.use_buffers, self.first, self.every, self.step = use_buffers, first, every, 0

    def begin(self, module):
        self.average = AveragedModel(module, multi_avg_fn=self.multi_avg_fn, use_buffers=self.use_buffers)

    def update(self, module):
        self.step += 1
        self.called = self.step >= self.first and (self.step - self.first) % self.every == 0
        if self.called:
            self.average.update_parameters(module)

    def tensors(self):
        """Buffers that are copied are as old as the last call: they are compared after a call only."""
        current = self.use_buffers or self.called
        return floats(self.average.module) if current else dict(self.average.module.named_parameters())


class Trained(Net, LightningModule):
    """The same network, trained."""

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return (self.head(self.frozen(self.norm(self.first(x)))) - x.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Lightning(Callback):
    """``EMAWeightAveraging`` in a Trainer: what it held after each batch, and the live weights to go through again."""

    def __init__(self, steps=STATES, **settings):
        self.use_buffers = settings.get("use_buffers", True)
        self.states, self.averages, self.step = [], [], 0
        self.averaging = EMAWeightAveraging(**settings)
        seed_everything(3, verbose=False)
        data = DataLoader(TensorDataset(torch.randn(8 * steps, 3)), batch_size=8)
        trainer(self.averaging, self, max_epochs=1).fit(self.make(), data)

    @staticmethod
    def make():
        module = Trained()
        module.load_state_dict(net().state_dict())
        return module

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.states.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})
        held = self.averaging._average_model.module
        tensors = floats(held) if self.use_buffers else dict(held.named_parameters())
        self.averages.append({name: tensor.detach().clone() for name, tensor in tensors.items()})

    def walk(self, module, states):
        for n, state in enumerate(self.states[:states], start=1):
            module.load_state_dict(state)
            yield n

    def begin(self, module):
        pass

    def update(self, module):
        self.step += 1

    def tensors(self):
        return self.averages[self.step - 1]
