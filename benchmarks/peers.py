"""The alternatives that a user would pick, each as its documentation says, averaging at a constant decay of 0.999.

`make test-peers` installs them. What is not installed is left out, and the tables say so.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_ema import Constant, WeightAverage

DECAY = 0.999
OURS = "lightning_ema"
NOT_INSTALLED = "not installed"
PARAMETERS_ONLY = "parameters only"


@dataclass
class Peer:
    """An average of a module's weights.

    Attributes:
        average: the peer's object.
        update: updates the average from the live weights.
        evaluate: swaps the average into the module and out again; None where the peer has no way to.
    """

    average: Any
    update: Callable[[], object]
    evaluate: Callable[[], object] | None = None


def ours(module: nn.Module, buffers: bool) -> Peer:
    average = WeightAverage(module, Constant(DECAY), buffers="average" if buffers else "copy")
    return Peer(average, average.step, lambda: (average.swap_in(), average.swap_out()))


def averaged_model(module: nn.Module, buffers: bool) -> Peer:
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=buffers)
    return Peer(average, lambda: average.update_parameters(module))


def timm(module: nn.Module, buffers: bool) -> Peer | str:
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        return NOT_INSTALLED
    # the one file: the package itself imports torchvision
    spec = importlib.util.spec_from_file_location("timm_ema", Path(found.origin).parent / "utils" / "model_ema.py")
    if spec is None or spec.loader is None:
        return NOT_INSTALLED
    alone = sys.modules.setdefault("timm_ema", importlib.util.module_from_spec(spec))
    if not hasattr(alone, "ModelEmaV3"):
        spec.loader.exec_module(alone)
    average = alone.ModelEmaV3(module, decay=DECAY, exclude_buffers=not buffers)
    return Peer(average, lambda: average.update(module))


def ema_pytorch(module: nn.Module, buffers: bool) -> Peer | str:
    package = _package("ema_pytorch")
    if package is None:
        return NOT_INSTALLED
    settings = {"beta": DECAY, "update_after_step": 0, "update_every": 1, "include_online_model": False}
    average = package.EMA(module, **settings)
    return Peer(average, average.update)


def torch_ema(module: nn.Module, buffers: bool) -> Peer | str:
    package = _package("torch_ema")
    if package is None or buffers:
        return PARAMETERS_ONLY if buffers else NOT_INSTALLED
    parameters = list(module.parameters())  # it keeps only weak references
    average = package.ExponentialMovingAverage(parameters, DECAY)

    def evaluate() -> None:
        with average.average_parameters(parameters):
            pass

    return Peer(average, lambda: average.update(parameters), evaluate)


def diffusers(module: nn.Module, buffers: bool) -> Peer | str:
    package = _package("diffusers.training_utils")
    if package is None or buffers:
        return PARAMETERS_ONLY if buffers else NOT_INSTALLED
    parameters = list(module.parameters())
    average = package.EMAModel(parameters, decay=DECAY)

    def evaluate() -> None:
        average.store(parameters)
        average.copy_to(parameters)
        average.restore(parameters)

    return Peer(average, lambda: average.step(parameters), evaluate)


def mmengine(module: nn.Module, buffers: bool) -> Peer | str:
    package = _package("mmengine.model")
    if package is None:
        return NOT_INSTALLED
    average = package.ExponentialMovingAverage(module, 1 - DECAY, update_buffers=buffers)
    return Peer(average, lambda: average.update_parameters(module))


class _Wrapped(LightningModule):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def lightning(module: nn.Module, buffers: bool) -> Peer | str:
    """Its callback, its averaged model and its exchange: what its hooks do."""
    package = _package("lightning.pytorch.callbacks.weight_averaging")  # from Lightning 2.6 on
    if package is None:
        return NOT_INSTALLED
    wrapped = _Wrapped(module)
    callback = package.EMAWeightAveraging(decay=DECAY, use_buffers=buffers)
    callback.setup(None, wrapped, "fit")
    average = callback._average_model

    def evaluate() -> None:
        callback._swap_models(wrapped)
        callback._swap_models(wrapped)

    return Peer(average, lambda: average.update_parameters(wrapped), evaluate)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


PEERS: dict[str, Callable[[nn.Module, bool], Peer | str]] = {
    OURS: ours,
    "torch AveragedModel": averaged_model,
    "timm ModelEmaV3": timm,
    "mmengine ExponentialMovingAverage": mmengine,
    "ema_pytorch EMA": ema_pytorch,
    "torch_ema": torch_ema,
    "diffusers EMAModel": diffusers,
    "Lightning EMAWeightAveraging": lightning,
}
"""By name: ``(module, whether buffers are averaged)`` to the peer; a word where there is none."""
