"""The recipes against the systems themselves: every tensor is compared after each of at least 40 weight states."""

import pytest
from helpers import needs_weight_averaging
from peers import (
    Diffusers,
    EmaPytorch,
    LitEma,
    MeanTeacher,
    Mmdet2,
    Mmengine,
    Timm,
    Torch,
    TorchEma,
    Yolo,
    lightning_ema,
    nemo_ema,
)
from trajectory import STATES, assert_follows

from lightning_ema import Constant, PerUpdate, recipes

pytestmark = pytest.mark.filterwarnings("ignore")  # what the packages and a Trainer have to say of themselves

MMENGINE = [
    {"interval": 1, "update_buffers": False, "begin_iter": 0},
    {"interval": 3, "update_buffers": False, "begin_iter": 0},
    {"interval": 1, "update_buffers": True, "begin_iter": 6},
    {"interval": 4, "update_buffers": True, "begin_iter": 5},
]


@pytest.mark.parametrize("momentum", [0.0002, 0.2])
@pytest.mark.parametrize("settings", MMENGINE)
def test_mmengine_ema(settings, momentum):
    system = Mmengine("ExponentialMovingAverage", momentum=momentum, **settings)
    assert_follows(system, recipes.mmengine_ema(momentum, **settings), compare_from=max(1, settings["begin_iter"]))


@pytest.mark.parametrize("settings", MMENGINE)
def test_mmengine_swa(settings):
    system = Mmengine("StochasticWeightAverage", **settings)
    assert_follows(system, recipes.mmengine_swa(**settings), compare_from=max(1, settings["begin_iter"]))


@pytest.mark.parametrize(("momentum", "gamma"), [(0.0002, 100), (0.2, 10)])
@pytest.mark.parametrize("settings", MMENGINE)
def test_mmengine_annealing(settings, momentum, gamma):
    system = Mmengine("MomentumAnnealingEMA", momentum=momentum, gamma=gamma, **settings)
    recipe = recipes.mmengine_annealing(momentum, gamma, **settings)
    assert_follows(system, recipe, compare_from=max(1, settings["begin_iter"]))


@pytest.mark.parametrize(("momentum", "gamma"), [(0.0002, 2000), (0.2, 10)])
@pytest.mark.parametrize("settings", MMENGINE)
def test_mmdet_exp_momentum(settings, momentum, gamma):
    system = Mmengine("ExpMomentumEMA", momentum=momentum, gamma=gamma, **settings)
    recipe = recipes.mmdet_exp_momentum(momentum, gamma, **settings)
    assert_follows(system, recipe, compare_from=max(1, settings["begin_iter"]))


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.1, "interval": 3}, {"momentum": 0.2, "skip_buffer": False}])
def test_mean_teacher_hook(settings):
    assert_follows(MeanTeacher(**settings), recipes.mean_teacher_hook(**settings))


@pytest.mark.parametrize("skip_buffers", [True, False])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize(
    ("hook", "recipe", "settings"),
    [
        ("BaseEMAHook", recipes.mmdet2_base, {"momentum": 0.01}),
        ("ExpMomentumEMAHook", recipes.mmdet2_exp, {}),
        ("ExpMomentumEMAHook", recipes.mmdet2_exp, {"total_iter": 10, "momentum": 0.2}),
        ("LinearMomentumEMAHook", recipes.mmdet2_linear, {"momentum": 0.4, "warm_up": 20}),
    ],
)
def test_mmdet2(hook, recipe, settings, interval, skip_buffers):
    settings = {**settings, "interval": interval, "skip_buffers": skip_buffers}
    assert_follows(Mmdet2(hook, **settings), recipe(**settings))


@pytest.mark.parametrize("settings", [{}, {"decay": 0.9, "tau": 20}, {"decay": 0.99, "tau": 5.5, "updates": 30}])
@pytest.mark.parametrize("package", ["ultralytics", "yolov5"])
def test_yolo(package, settings):
    assert_follows(Yolo(package, **settings), recipes.ultralytics(**settings))
    if "tau" not in settings:
        assert_follows(Yolo(package, **settings), recipes.yolov7(**settings))


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_lit_ema(decay, counts):
    """It is torch_ema's, as far as the weights go; the argument's name has the letters that its package gives it."""
    system = LitEma(decay=decay, use_num_upates=counts)
    assert_follows(system, recipes.torch_ema(decay=decay, use_num_updates=counts))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decay": 0.9, "update_after_step": 7},
        {"decay": 0.9, "exclude_buffers": True},
        {"use_warmup": True},
        {"decay": 0.7, "use_warmup": True, "min_decay": 0.3, "update_after_step": 4},
        {"decay": 0.9, "use_warmup": True, "warmup_gamma": 5.0, "warmup_power": 0.75, "exclude_buffers": True},
    ],
)
def test_timm_v3(settings, foreach):
    assert_follows(Timm(foreach=foreach, **settings), recipes.timm_v3(**settings))


@pytest.mark.parametrize(
    ("settings", "last_copy"),
    [
        ({}, 101),
        ({"update_after_step": 0, "update_every": 1}, 1),
        ({"beta": 0.8, "update_after_step": 5, "update_every": 1}, 6),
        ({"beta": 0.9, "update_after_step": 9, "update_every": 3, "inv_gamma": 4.0, "power": 0.8}, 10),
        ({"beta": 0.95, "update_after_step": 11, "update_every": 4, "min_value": 0.6}, 9),
        ({"beta": 0.9, "update_after_step": 2, "update_every": 5}, 1),
        ({"beta": 1.0, "update_after_step": 3, "update_every": 2}, 3),
    ],
)
def test_ema_pytorch(settings, last_copy):
    assert_follows(EmaPytorch(**settings), recipes.ema_pytorch(**settings), compare_from=last_copy)


@pytest.mark.parametrize("decay", [0.5, 0.9999])
@pytest.mark.parametrize("use_num_updates", [True, False])
def test_torch_ema(decay, use_num_updates):
    settings = {"decay": decay, "use_num_updates": use_num_updates}
    assert_follows(TorchEma(**settings), recipes.torch_ema(**settings))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decay": 0.7, "update_after_step": 6},
        {"decay": 0.8, "min_decay": 0.45, "update_after_step": 2},
        {"use_ema_warmup": True},
        {"decay": 0.9, "use_ema_warmup": True, "inv_gamma": 3.0, "power": 0.8, "min_decay": 0.3},
    ],
)
def test_diffusers(settings, foreach):
    assert_follows(Diffusers(foreach=foreach, **settings), recipes.diffusers(**settings))


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("start", [0, 5])
def test_torch_swa(use_buffers, every, start):
    """Its user calls it; the first call copies, and equal weights it is from there."""
    recipe = recipes.torch_swa(use_buffers) | {"start_step": start, "every_n_steps": every}
    first = start + every
    assert_follows(Torch(None, use_buffers, first, every), recipe, compare_from=first)


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("first", [1, 6])
def test_torch_averaged_model(use_buffers, every, first):
    recipe = recipes.torch_averaged_model(0.9, use_buffers) | {"start_step": first, "every_n_steps": every}
    assert_follows(
        Torch(0.9, use_buffers, first, every), recipe | {"decay": PerUpdate(recipe["decay"])}, compare_from=first
    )


@needs_weight_averaging
@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize(("every", "start", "first"), [(1, None, 1), (3, None, 1), (1, 5, 6), (4, 6, 9)])
def test_lightning_ema_weight_averaging(use_buffers, every, start, first):
    settings = {"decay": 0.9, "use_buffers": use_buffers, "update_every_n_steps": every}
    settings["update_starting_at_step"] = start
    system = lightning_ema(steps=first - 1 + STATES, **settings)
    recipe = recipes.lightning_ema_weight_averaging(**settings)
    assert_follows(system, recipe, compare_from=first, make=system.make, walk=system.walk)


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_nemo(decay):
    system = nemo_ema(decay=decay)
    assert_follows(system, {"decay": Constant(decay), "buffers": "copy"}, make=system.make, walk=system.walk)


def test_nemo_at_an_interval_begins_with_the_first_step():
    """Its updates come after the steps 1, 4, 7, ...: those of an average that counted two before."""
    system = nemo_ema(decay=0.8, every_n_steps=3)
    ours = {"decay": PerUpdate(0.8), "buffers": "copy", "every_n_steps": 3}
    assert_follows(system, ours, make=system.make, walk=system.walk, counted_before=2)
