"""The other systems behind one face: ``begin(module)``, ``update(module)``, ``tensors()``."""

import copy
import types

import packages
import torch
from helpers import EMAWeightAveraging, clones, trainer
from lightning.pytorch import Callback, LightningModule, seed_everything
from packages import peer
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from trajectory import STATES, Net, net


def floats(module):
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


class Mmengine:
    """One of its averaged models, or mmdetection 3's, called as its EMAHook does: from ``begin_iter`` on."""

    def __init__(self, name, begin_iter=0, **settings):
        self.name, self.begin_iter, self.settings, self.calls = name, begin_iter, settings, 0

    def begin(self, module):
        package = packages.mmdet() if self.name == "ExpMomentumEMA" else peer("mmengine.model")
        self.average = getattr(package, self.name)(module, **self.settings)

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
        self.average = packages.timm_model_ema().ModelEmaV3(module, **self.settings)

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


class InTrainer(Callback):
    """A callback of another system in a Trainer: its averages after each batch, and the live weights they came from."""

    def __init__(self, theirs, held, steps=STATES):
        self.theirs, self.held, self.states, self.averages, self.step = theirs, held, [], [], 0
        seed_everything(3, verbose=False)
        data = DataLoader(TensorDataset(torch.randn(8 * steps, 3)), batch_size=8)
        trainer(theirs, self, max_epochs=1).fit(self.make(), data)

    @staticmethod
    def make():
        module = Trained()
        module.load_state_dict(net().state_dict())
        return module

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.states.append(clones(pl_module.state_dict()))
        self.averages.append(clones(self.held(trainer, pl_module)))

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


def lightning_ema(steps=STATES, **settings):
    """Lightning's ``EMAWeightAveraging``."""
    averaging = EMAWeightAveraging(**settings)

    def held(trainer, pl_module):
        module = averaging._average_model.module
        return floats(module) if settings.get("use_buffers", True) else dict(module.named_parameters())

    return InTrainer(averaging, held, steps)


def nemo_ema(steps=STATES, **settings):
    """NeMo's ``EMA``, as it puts the average into the module: frozen weights and buffers are the live ones."""

    def held(trainer, pl_module):
        (optimizer,) = trainer.optimizers
        with optimizer.swap_ema_weights():
            return clones(floats(pl_module))

    return InTrainer(packages.nemo().EMA(**settings), held, steps)


class Yolo:
    """``ModelEMA`` of ultralytics or yolov5."""

    def __init__(self, package, **settings):
        self.package, self.settings = package, settings

    def begin(self, module):
        self.average = getattr(packages, self.package)().ModelEMA(module, **self.settings)

    def update(self, module):
        self.average.update(module)

    def tensors(self):
        return floats(self.average.ema)


class LitEma:
    """``LitEma``, read as its users swap it in: frozen weights and buffers are the live ones."""

    def __init__(self, **settings):
        self.settings = settings

    def begin(self, module):
        self.module, self.average = module, packages.lit_ema()(module, **self.settings)

    def update(self, module):
        self.average(module)

    def tensors(self):
        self.average.store(self.module.parameters())
        self.average.copy_to(self.module)
        carried = clones(floats(self.module))
        self.average.restore(self.module.parameters())
        return carried


class Mmdet2:
    """One of mmdetection 2's hooks, called as by mmcv's runner. It puts its averages into the model, here a copy."""

    def __init__(self, name, **settings):
        self.name, self.settings = name, settings

    def begin(self, module):
        with packages.mmdet2() as mmdet2:
            self.hook = getattr(mmdet2, self.name)(**self.settings)
        self.runner = types.SimpleNamespace(model=copy.deepcopy(module), iter=0)
        self.hook.before_run(self.runner)

    def update(self, module):
        self.runner.model.load_state_dict(module.state_dict(), strict=False)
        self.hook.after_train_iter(self.runner)
        self.runner.iter += 1

    def tensors(self):
        buffers = dict(self.runner.model.named_buffers())
        named = {name: buffers[buffer] for name, buffer in self.hook.param_ema_buffer.items()}
        return {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}


class MeanTeacher:
    """mmdetection 3's ``MeanTeacherHook``, called as by mmengine's runner."""

    def __init__(self, **settings):
        self.settings, self.skip_buffer = settings, settings.get("skip_buffer", True)

    def begin(self, module):
        self.hook = packages.mmdet().MeanTeacherHook(**self.settings)
        teacher = copy.deepcopy(module)
        for parameter in teacher.parameters():
            torch.nn.init.ones_(parameter)
        self.runner = types.SimpleNamespace(model=nn.Module(), iter=0)
        self.runner.model.student, self.runner.model.teacher = module, teacher
        self.hook.before_train(self.runner)

    def update(self, module):
        self.hook.after_train_iter(self.runner, self.runner.iter)
        self.runner.iter += 1

    def tensors(self):
        teacher = self.runner.model.teacher
        return dict(teacher.named_parameters()) if self.skip_buffer else floats(teacher)
