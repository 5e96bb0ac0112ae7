"""Named configurations: what other systems compute, under their own argument names and defaults.

Each function returns the keyword arguments with which :class:`~lightning_ema.WeightAverage` and
:class:`~lightning_ema.EMACallback` go through the same averages::

    EMACallback(**recipes.mmengine_annealing(momentum=0.0002, gamma=100))

What an average holds before the other system's own start is not reproduced: until then it is the live weights. Frozen
parameters, which the others average or copy, are left out, because the average of what does not move is itself. Integer
buffers are the live ones.
"""

from lightning_ema.recipes.openmmlab import (
    mean_teacher_hook,
    mmdet2_base,
    mmdet2_exp,
    mmdet2_linear,
    mmdet_exp_momentum,
    mmengine_annealing,
    mmengine_ema,
    mmengine_swa,
    mmpretrain_cosine,
)
from lightning_ema.recipes.pytorch import (
    composer,
    diffusers,
    edm2,
    ema_pytorch,
    lightning_ema_weight_averaging,
    timm_v3,
    torch_averaged_model,
    torch_ema,
    torch_swa,
)
from lightning_ema.recipes.recipe import Recipe
from lightning_ema.recipes.yolo import ultralytics, yolov7, yolox

__all__ = [
    "Recipe",
    "composer",
    "diffusers",
    "edm2",
    "ema_pytorch",
    "lightning_ema_weight_averaging",
    "mean_teacher_hook",
    "mmdet2_base",
    "mmdet2_exp",
    "mmdet2_linear",
    "mmdet_exp_momentum",
    "mmengine_annealing",
    "mmengine_ema",
    "mmengine_swa",
    "mmpretrain_cosine",
    "timm_v3",
    "torch_averaged_model",
    "torch_ema",
    "torch_swa",
    "ultralytics",
    "yolov7",
    "yolox",
]
