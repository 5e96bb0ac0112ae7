"""Recipes for the YOLO family. They average parameters and floating-point buffers, once for each optimizer step."""

from __future__ import annotations

from lightning_ema.checks import check_count
from lightning_ema.recipes.recipe import Recipe, positive, share
from lightning_ema.schedules.basic import ExponentialAnnealing
from lightning_ema.schedules.composed import Shifted


def yolov7(decay: float = 0.9999, updates: int = 0) -> Recipe:
    """The ``ModelEMA`` of yolov7: ``d = decay * (1 - exp(-(updates + n) / 2000))``, from the initial weights on.

    Args:
        decay: in [0, 1].
        updates: how many updates the average has behind it already. Load it into the module first: an average begins
            with the weights that the module has.

    >>> yolov7()["decay"]
    ExponentialAnnealing(0.9999, 2000)
    """
    return _yolo("yolov7", decay, 2000, updates)


def ultralytics(decay: float = 0.9999, tau: float = 2000, updates: int = 0) -> Recipe:
    """The ``ModelEMA`` of ultralytics and yolov5: ``d = decay * (1 - exp(-(updates + n) / tau))``.

    Arguments as in :func:`yolov7`; ``tau`` is the time constant in updates.

    >>> ultralytics(updates=500)["decay"]
    Shifted(ExponentialAnnealing(0.9999, 2000), 500)
    """
    return _yolo("ultralytics", decay, tau, updates)


def yolox(decay: float = 0.9998, updates: int = 0) -> Recipe:
    """The ``ModelEMA`` of YOLOX, as :func:`yolov7`. The default is that of its trainer; the class has 0.9999.

    >>> yolox()["decay"]
    ExponentialAnnealing(0.9998, 2000)
    """
    return _yolo("yolox", decay, 2000, updates)


def _yolo(recipe: str, decay: float, tau: float, updates: int) -> Recipe:
    share(decay, f"{recipe}: decay")
    check_count(updates, f"{recipe}: updates", at_least=0)
    annealing = ExponentialAnnealing(decay, positive(tau, f"{recipe}: tau"))
    return Recipe(decay=Shifted(annealing, updates) if updates else annealing, buffers="average")
