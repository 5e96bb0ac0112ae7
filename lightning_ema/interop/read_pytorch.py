"""Readers of files of PyTorch loops: timm, YOLO, diffusers, torch_ema, ema_pytorch, torch's ``AveragedModel``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_ema.interop.imported import (
    Content,
    Imported,
    Weights,
    below,
    count_of,
    tensors,
    warmup_of,
)


def timm(content: Content) -> Imported | None:
    """timm's training script: ``state_dict_ema`` beside ``state_dict``."""
    average, live = content.get("state_dict_ema"), content.get("state_dict")
    if not isinstance(average, Mapping):
        return None
    return Imported(
        "timm",
        "state_dict_ema, as timm's training script writes it",
        _unwrapped(average),
        _unwrapped(live) if isinstance(live, Mapping) else {},
    )


def yolo(content: Content) -> Imported | None:
    """ultralytics, yolov5 and yolov7: ``ema``, a module in float16, and ``updates``."""
    ema, model = content.get("ema"), content.get("model")
    if isinstance(ema, nn.Module):
        live = tensors(model.state_dict()) if isinstance(model, nn.Module) else {}
        return Imported(
            "yolo",
            "ema, a module, and updates, as ultralytics, yolov5 and yolov7 write them",
            tensors(ema.state_dict()),
            live,
            steps=count_of(content.get("updates")),
        )
    if isinstance(model, nn.Module) and {"ema", "updates"} <= content.keys() and ema is None:
        return Imported(
            "yolo",
            "model, a module, and an empty ema, as ultralytics, yolov5 and yolov7 leave the file of a finished run: "
            "model is the average there",
            tensors(model.state_dict()),
        )
    return None


def diffusers(content: Content) -> Imported | None:
    """diffusers' ``EMAModel``: ``shadow_params`` without names, and ``optimization_step``."""
    if not _is_list(content.get("shadow_params")) or "optimization_step" not in content:
        return None
    return Imported(
        "diffusers",
        "shadow_params and optimization_step, as diffusers' EMAModel.state_dict() has them",
        unnamed=tuple(content["shadow_params"]),
        steps=count_of(content["optimization_step"]),
    )


def torch_ema(content: Content) -> Imported | None:
    """torch_ema: ``shadow_params`` without names, of the parameters that require grad, and ``num_updates``."""
    if not _is_list(content.get("shadow_params")) or "collected_params" not in content:
        return None
    return Imported(
        "torch_ema",
        "shadow_params and collected_params, as torch_ema's state_dict() has them",
        unnamed=tuple(content["shadow_params"]),
        steps=count_of(content.get("num_updates")),
        decay=warmup_of(content.get("decay"), counts=content.get("num_updates") is not None),
        notes=("collected_params is what was last put aside, at a time that the file does not tell; it is left out.",),
    )


def ema_pytorch(content: Content) -> Imported | None:
    """ema_pytorch's ``EMA.state_dict()``: ``ema_model.<name>``, ``initted``, ``step``, and mostly the live weights."""
    if not {"initted", "step"} <= content.keys() or not any(name.startswith("ema_model.") for name in content):
        return None
    if not bool(content["initted"]):
        raise ValueError(
            "the file is of ema_pytorch, but from before its first update: it holds no average yet. Take a later file."
        )
    return Imported(
        "ema_pytorch",
        "ema_model.<name> with initted and step, as ema_pytorch's EMA.state_dict() has them",
        below("ema_model.", content),
        below("online_model.", content),
        steps=count_of(content["step"]),
    )


def averaged_model(content: Content) -> Imported | None:
    """torch's ``AveragedModel``: ``n_averaged`` and ``module.<name>``."""
    others = [name for name in content if name != "n_averaged"]
    if "n_averaged" not in content or not others or not all(name.startswith("module.") for name in others):
        return None
    return Imported(
        "averaged_model",
        "n_averaged and module.<name>, as torch's AveragedModel.state_dict() has them",
        below("module.", content),
        steps=count_of(content["n_averaged"]),
    )


def _unwrapped(state: Content) -> Weights:
    return below("module.", state) if all(name.startswith("module.") for name in state) else tensors(state)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(each, Tensor) for each in value)
