"""Every recipe against a plain loop in the other system's notation, through WeightAverage and through a Trainer."""

import inspect
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import BATCHES, Regression, clones, engine, fit, schedule_of, seeded, settings_of
from lightning.pytorch import Callback
from tables import rows
from trajectory import Reference, assert_follows

import lightning_ema
from lightning_ema import Constant, EMACallback, PerUpdate, WeightAverage, recipes
from lightning_ema.recipes.openmmlab import LinearMomentum

pytestmark = pytest.mark.filterwarnings("ignore:every_n_steps")  # followed systems count decays by updates


def mmengine(rate, interval=1, begin_iter=0):
    """Copies until the hook has started, copies at the first call (s = 0), then acts where s % interval == 0."""

    def of_call(n):
        s = n - max(1, begin_iter)
        if s <= 0:
            return 1.0
        return rate(s) if s % interval == 0 else None

    return of_call


def mmdet2(rate, interval=1):
    return lambda n: rate(n) if n % interval == 0 else None


def annealing(momentum, gamma):
    return lambda s: max(momentum, gamma / (gamma + s))


def exp_momentum(momentum, gamma):
    return lambda s: (1 - momentum) * math.exp(-(1 + s) / gamma) + momentum


def cosine(momentum, end_momentum, K):
    return lambda s: end_momentum - (end_momentum - momentum) * (math.cos(math.pi * min(s, K) / K) + 1) / 2


def linear(momentum, interval, warm_up):
    return lambda n: min(momentum**interval, n / (warm_up + n - 1))


def yolo(decay, tau, updates=0):
    return lambda n: 1 - decay * (1 - math.exp(-(updates + n) / tau))


def timm(decay, min_decay=0.0, after=0, warmup=False, gamma=1.0, power=2 / 3):
    def of_call(step):
        t = max(0, step - after - 1)
        if t == 0:
            return 1.0
        return 1 - (max(min_decay, min(1 - (1 + t / gamma) ** -power, decay)) if warmup else decay)

    return of_call


def pytorch_ema(beta, after, every, inv_gamma=1.0, power=2 / 3, min_value=0.0):
    def of_call(n):
        step = n - 1  # the calls before this one
        if step % every:
            return None
        if step <= after:
            return 1.0
        if beta == 1:
            return None
        e = (step + 1) - after - 1
        return 1 - max(min_value, min(1 - (1 + e / inv_gamma) ** -power, beta))

    return of_call


def diffusers(decay, min_decay=0.0, after=0, warmup=False, inv_gamma=1.0, power=2 / 3):
    def of_call(n):
        s = max(0, n - after - 1)
        if s == 0:
            return 1.0
        rise = 1 - (1 + s / inv_gamma) ** -power if warmup else (1 + s) / (10 + s)
        return 1 - max(min_decay, min(rise, decay))

    return of_call


def composer(smoothing, every=1, start=0):
    """The average is a copy of the model at the end of the first batch at which it may start."""

    def of_call(batch):
        if batch <= max(1, start):
            return 1.0
        return 1 - smoothing if batch % every == 0 else None

    return of_call


def lightning(decay, every=1, start=0):
    first = next(i for i in range(1000) if i >= start and i % every == 0)

    def of_call(n):
        index = n - 1
        if index <= first:
            return 1.0
        return 1 - decay if index % every == 0 else None

    return of_call


def edm2(sigma_rel):
    gamma = edm2_gamma(sigma_rel)
    return lambda t: 1 - (1 - 1 / t) ** (gamma + 1)


def edm2_gamma(sigma_rel):
    """The largest real root of (gamma + 2)^2 (gamma + 3) sigma_rel^2 = gamma + 1, multiplied out."""
    return np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real.max()


R = recipes
FOLLOWED = {  # recipe, rate of the n-th call, whether float buffers are averaged
    "mmengine ema": (R.mmengine_ema(0.1), mmengine(lambda s: 0.1), False),
    "mmengine ema, interval": (R.mmengine_ema(0.2, interval=3), mmengine(lambda s: 0.2, 3), False),
    "mmengine ema, buffers": (R.mmengine_ema(0.2, 2, True), mmengine(lambda s: 0.2, 2), True),
    "mmengine ema, begin": (R.mmengine_ema(0.2, begin_iter=5), mmengine(lambda s: 0.2, 1, 5), False),
    "mmengine ema, begin at 1": (R.mmengine_ema(0.2, begin_iter=1), mmengine(lambda s: 0.2, 1, 1), False),
    "mmengine ema, all": (R.mmengine_ema(0.3, 4, True, 7), mmengine(lambda s: 0.3, 4, 7), True),
    "mmengine swa": (R.mmengine_swa(), mmengine(lambda s: 1 / (s + 1)), False),
    "mmengine swa, interval": (R.mmengine_swa(3), mmengine(lambda s: 1 / (s // 3 + 1), 3), False),
    "mmengine swa, all": (R.mmengine_swa(5, True, 6), mmengine(lambda s: 1 / (s // 5 + 1), 5, 6), True),
    "mmengine annealing": (R.mmengine_annealing(), mmengine(annealing(2e-4, 100)), False),
    "mmengine annealing, reached": (R.mmengine_annealing(0.3, 10), mmengine(annealing(0.3, 10)), False),
    "mmengine annealing, all": (R.mmengine_annealing(0.2, 5, 3, True, 4), mmengine(annealing(0.2, 5), 3, 4), True),
    "mmdet exp": (R.mmdet_exp_momentum(gamma=20), mmengine(exp_momentum(2e-4, 20)), False),
    "mmdet exp, all": (R.mmdet_exp_momentum(0.1, 9, 2, True, 3), mmengine(exp_momentum(0.1, 9), 2, 3), True),
    "mmpretrain cosine": (R.mmpretrain_cosine(0.3, total_steps=44), mmengine(cosine(0.3, 0.0, 44)), False),
    "mmpretrain cosine, past K": (R.mmpretrain_cosine(0.3, 0.1, total_steps=20), mmengine(cosine(0.3, 0.1, 20)), False),
    "mmpretrain cosine, all": (
        R.mmpretrain_cosine(0.4, 0.05, 3, True, total_steps=50, begin_iter=6),
        mmengine(cosine(0.4, 0.05, 50), 3, 6),
        True,
    ),
    "mmdet2 base": (R.mmdet2_base(0.1), mmdet2(lambda n: 0.1), True),
    "mmdet2 base, interval": (R.mmdet2_base(0.1, interval=4), mmdet2(lambda n: 0.1, 4), True),
    "mmdet2 base, no buffers": (R.mmdet2_base(0.1, 2, skip_buffers=True), mmdet2(lambda n: 0.1, 2), False),
    "mmdet2 exp": (R.mmdet2_exp(20, 0.05), mmdet2(lambda n: 0.95 * math.exp(-n / 20) + 0.05), True),
    "mmdet2 exp, all": (R.mmdet2_exp(9, 0.1, 3, True), mmdet2(lambda n: 0.9 * math.exp(-n / 9) + 0.1, 3), False),
    "mmdet2 linear": (R.mmdet2_linear(momentum=0.3), mmdet2(linear(0.3, 1, 100)), True),
    "mmdet2 linear, interval": (R.mmdet2_linear(30, 0.6, 2), mmdet2(linear(0.6, 2, 30), 2), True),
    "mmdet2 linear, all": (R.mmdet2_linear(4, 0.5, 3, True), mmdet2(linear(0.5, 3, 4), 3), False),
    "mean teacher": (R.mean_teacher_hook(0.1), mmdet2(lambda n: 0.1), False),
    "mean teacher, all": (R.mean_teacher_hook(0.2, 3, skip_buffer=False), mmdet2(lambda n: 0.2, 3), True),
    "yolov7": (R.yolov7(), yolo(0.9999, 2000), True),
    "yolov7, resumed": (R.yolov7(0.9, updates=1500), yolo(0.9, 2000, 1500), True),
    "ultralytics": (R.ultralytics(tau=30), yolo(0.9999, 30), True),
    "ultralytics, resumed": (R.ultralytics(0.95, 40, 25), yolo(0.95, 40, 25), True),
    "yolox": (R.yolox(), yolo(0.9998, 2000), True),
    "yolox, resumed": (R.yolox(updates=9000), yolo(0.9998, 2000, 9000), True),
    "timm": (R.timm_v3(0.9), timm(0.9), True),
    "timm, late": (R.timm_v3(0.9, update_after_step=6, exclude_buffers=True), timm(0.9, after=6), False),
    "timm, min_decay without warm-up": (R.timm_v3(0.6, min_decay=0.5), timm(0.6, 0.5), True),
    "timm, warm-up": (R.timm_v3(use_warmup=True), timm(0.9999, warmup=True), True),
    "timm, all": (
        R.timm_v3(0.85, 0.3, 4, True, 5.0, 0.75, True),
        timm(0.85, 0.3, 4, True, 5.0, 0.75),
        False,
    ),
    "diffusers": (R.diffusers(), diffusers(0.9999), False),
    "diffusers, capped": (R.diffusers(0.7), diffusers(0.7), False),
    "diffusers, min_decay": (R.diffusers(0.8, 0.45, 3), diffusers(0.8, 0.45, 3), False),
    "diffusers, low min_decay": (R.diffusers(0.9, 0.35), diffusers(0.9, 0.35), False),
    "diffusers, min_decay met exactly": (R.diffusers(0.9, 0.5), diffusers(0.9, 0.5), False),
    "diffusers, min_decay below all": (R.diffusers(0.9, 0.1), diffusers(0.9, 0.1), False),
    "diffusers, min_decay is decay": (R.diffusers(0.8, 0.8), diffusers(0.8, 0.8), False),
    "diffusers, warm-up": (
        R.diffusers(0.9, 0.2, 5, True, 3.0, 0.8),
        diffusers(0.9, 0.2, 5, True, 3.0, 0.8),
        False,
    ),
    "torch_ema": (R.torch_ema(0.7), lambda n: 1 - min(0.7, (1 + n) / (10 + n)), False),
    "torch_ema, bare": (R.torch_ema(0.9, use_num_updates=False), lambda n: 1 - 0.9, False),
    "composer": (R.composer("10ba"), composer(2 ** (-1 / 10)), True),
    "composer, start": (R.composer("20ba", ema_start="7ba"), composer(2 ** (-1 / 20), start=7), True),
    "composer, interval": (
        R.composer("20ba", ema_start="8ba", update_interval="4ba"),
        composer(2 ** (-4 / 20), every=4, start=8),
        True,
    ),
    "composer, smoothing": (
        R.composer(None, 0.8, ema_start="6ba", update_interval="3ba"),
        composer(0.8, every=3, start=6),
        True,
    ),
    "edm2": (R.edm2([0.1]), edm2(0.1), False),
    "torch swa": (R.torch_swa(), lambda n: 1 / n, False),
    "torch swa, buffers, every 3 from 4": (
        {**R.torch_swa(use_buffers=True), "start_step": 4, "every_n_steps": 3},
        lambda n: 1.0 if n <= 4 else (1 / ((n - 4) // 3) if (n - 4) % 3 == 0 else None),
        True,
    ),
    "torch ema": (R.torch_averaged_model(0.9), lambda n: 1.0 if n == 1 else 1 - 0.9, False),
    "torch ema, buffers": (R.torch_averaged_model(0.8, True), lambda n: 1.0 if n == 1 else 1 - 0.8, True),
    "lightning": (R.lightning_ema_weight_averaging(decay=0.9), lightning(0.9), True),
    "lightning, no buffers": (R.lightning_ema_weight_averaging(False, 0.9, 3), lightning(0.9, 3), False),
    "lightning, late": (R.lightning_ema_weight_averaging(True, 0.8, 4, 6), lightning(0.8, 4, 6), True),
    "lightning, late and met": (R.lightning_ema_weight_averaging(True, 0.8, 3, 6), lightning(0.8, 3, 6), True),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore:every_n_steps")
@pytest.mark.parametrize("case", FOLLOWED)
def test_a_recipe_goes_through_the_averages_of_its_system(case):
    recipe, rate, buffers = FOLLOWED[case]
    assert_follows(Reference(rate, buffers), recipe)


@pytest.mark.parametrize(
    ("settings", "last_copy"),
    [
        ({"beta": 0.9999, "update_after_step": 0, "update_every": 1}, 1),
        ({"beta": 0.9, "update_after_step": 5, "update_every": 1}, 6),
        ({"beta": 0.9, "update_after_step": 9, "update_every": 3, "inv_gamma": 4.0, "power": 0.8}, 10),
        ({"beta": 0.95, "update_after_step": 11, "update_every": 4, "min_value": 0.6}, 9),
        ({"beta": 0.95, "update_after_step": 2, "update_every": 5}, 1),
        ({"beta": 1.0, "update_after_step": 3, "update_every": 2}, 3),
    ],
)
def test_ema_pytorch_copies_at_its_interval_until_it_starts(settings, last_copy):
    names = {"update_after_step": "after", "update_every": "every"}
    rate = pytorch_ema(**{names.get(name, name): value for name, value in settings.items()})
    assert_follows(Reference(rate, buffers=True), recipes.ema_pytorch(**settings), compare_from=last_copy)


def test_ema_pytorch_has_its_defaults():
    """update_after_step=100, update_every=10: copies up to call 101, then averages at 111, 121, ..."""
    recipe = recipes.ema_pytorch()
    rate = pytorch_ema(0.9999, 100, 10)
    assert_follows(Reference(rate, buffers=True), recipe, compare_from=101)
    assert 1 - recipe["decay"](20) == pytest.approx(21 ** (-2 / 3), abs=1e-12)  # call 121: e = 20


def test_edm2_is_exact_at_any_interval():
    """One update over delta steps: (1 - delta / t) ** (gamma + 1)."""
    gamma = edm2_gamma(0.1)
    rate = lambda t: 1 - (1 - 4 / t) ** (gamma + 1) if t % 4 == 0 else None  # noqa: E731
    assert_follows(Reference(rate, buffers=False), {**recipes.edm2([0.1]), "every_n_steps": 4}, compare_from=4)


def test_composer_with_an_interval_from_the_beginning_has_the_initial_weights_in_it():
    """The one case that differs: composer begins with the weights after the first batch."""
    rate = lambda batch: 1 - 2 ** (-3 / 9) if batch % 3 == 0 else None  # noqa: E731
    assert_follows(Reference(rate, buffers=True), recipes.composer("9ba", update_interval="3ba"))


def test_a_parameter_unfrozen_later_has_the_average_of_a_system_that_averaged_it_all_along():
    reference = Reference(mmengine(lambda s: 0.2), buffers=False)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    reference.begin(module)
    average = WeightAverage(module, **recipes.mmengine_ema(0.2))
    for n in range(1, 12):
        if n == 6:
            module.requires_grad_(True)
            engine(average).refresh()  # as EMACallback does before each step
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.full_like(parameter, 0.1 * n))
        reference.update(module)
        average.step()
        with average.swapped():
            for name, tensor in reference.tensors().items():
                torch.testing.assert_close(module.state_dict()[name].double(), tensor, rtol=0, atol=5e-6)


def assert_follows_one_number(recipe, rate, compare_from=1, states=40):
    """As ``assert_follows`` on one number in float64: quick enough for every combination of start and interval."""
    module = torch.nn.Module()
    module.number = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    average, reference = WeightAverage(module, **recipe), 0.0
    for n in range(1, states + 1):
        live = math.sin(1.7 * n) + 0.1 * n
        with torch.no_grad():
            module.number.fill_(live)
        average.step()
        if rate(n) is not None:
            reference += rate(n) * (live - reference)
        if n >= compare_from:
            assert dict(average.named_tensors())["number"].item() == pytest.approx(reference, abs=1e-12), n


@rows("every", range(1, 8))
def test_every_combination_of_start_and_interval(every):
    for start in range(0, 13):
        swa = mmengine(lambda s: 1 / (s // every + 1), every, start)
        assert_follows_one_number(recipes.mmengine_swa(every, begin_iter=start), swa)
        ours = recipes.lightning_ema_weight_averaging(True, 0.9, every, start)
        assert_follows_one_number(ours, lightning(0.9, every, start))
        last_copy = start // every * every + 1
        ours = recipes.ema_pytorch(0.9, start, every, min_value=0.2)
        assert_follows_one_number(ours, pytorch_ema(0.9, start, every, min_value=0.2), last_copy)
        if start % every == 0 and (start > 0 or every == 1):
            ours = recipes.composer("9ba", None, f"{start}ba", f"{every}ba")
            assert_follows_one_number(ours, composer(2 ** (-every / 9), every, start))


@rows("decay", [0.7, 0.999])
def test_diffusers_floor_at_every_height(decay):
    for height in range(0, 1000, 7):
        low = min(height / 1000, decay)
        rate, schedule = diffusers(decay, low), recipes.diffusers(decay, low)["decay"]
        for n in (1, 2, 3, 5, 8, 9, 10, 17, 40, 90, 300, 5000):
            assert schedule(n) == pytest.approx(1 - rate(n + 1), abs=1e-12)
            assert schedule.product(n - 1, n + 1) == pytest.approx(schedule(n) * schedule(n + 1), abs=1e-12)


class Watch(Callback):
    """What an average should be, from the live weights after each batch."""

    def __init__(self, rate):
        self.reference = Reference(rate, buffers=False)

    def on_fit_start(self, trainer, pl_module):
        self.reference.begin(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.reference.update(pl_module)


@pytest.mark.parametrize("begin_iter", [0, 1, 4])
def test_mmpretrain_cosine_takes_the_length_of_the_whole_run(begin_iter):
    total = 4 * BATCHES
    recipe = recipes.mmpretrain_cosine(momentum=0.5, end_momentum=0.1, begin_iter=begin_iter)
    watch, callback = Watch(mmengine(cosine(0.5, 0.1, total), 1, begin_iter)), EMACallback(**recipe)
    fit(seeded(), watch, callback, max_epochs=4)
    last = total - max(1, begin_iter)
    # the last of K calls has s = K - 1, before the end of the cosine
    assert schedule_of(callback.average)(last) == pytest.approx(1 - cosine(0.5, 0.1, total)(last), abs=1e-12)
    averages = dict(callback.average.named_tensors())
    for name, tensor in watch.reference.tensors().items():
        torch.testing.assert_close(averages[name].double(), tensor, rtol=0, atol=5e-6)


def test_mmpretrain_cosine_of_a_resumed_run_is_that_of_the_whole_run(tmp_path):
    recipe = recipes.mmpretrain_cosine(momentum=0.5, end_momentum=0.1)
    whole, first, resumed = (EMACallback(**recipe) for _ in range(3))
    fit(seeded(), whole, max_epochs=4)
    fit(seeded(), first, max_epochs=4, max_steps=BATCHES).save_checkpoint(tmp_path / "half.ckpt")
    fit(seeded(), resumed, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert schedule_of(resumed.average) == schedule_of(whole.average)
    last = 4 * BATCHES - 1
    assert schedule_of(resumed.average)(last) == pytest.approx(1 - cosine(0.5, 0.1, 4 * BATCHES)(last), abs=1e-12)


class FromSecondEpoch(Callback):
    """mmengine's hook with ``begin_epoch=2``: the first step of the second epoch copies, later ones average."""

    def __init__(self, momentum, accumulated):
        self.momentum, self.accumulated = momentum, accumulated

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        live = {name: p.detach() for name, p in pl_module.named_parameters()}
        if trainer.current_epoch == 0 or batch_idx < self.accumulated:
            self.average = clones(live)
        elif (batch_idx + 1) % self.accumulated == 0:
            self.average = {n: (1 - self.momentum) * a + self.momentum * live[n] for n, a in self.average.items()}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_begin_epoch_is_begin_iter_after_an_epoch_of_steps(accumulated):
    hook, recipe = FromSecondEpoch(0.3, accumulated), recipes.mmengine_ema(momentum=0.3)
    exact = EMACallback(**recipes.mmengine_ema(momentum=0.3, begin_iter=BATCHES // accumulated + 1))
    near = EMACallback(**recipe, start_epoch=1, evaluate="live", name="near")
    fit(seeded(), hook, exact, near, accumulate_grad_batches=accumulated)
    averages, others = dict(exact.average.named_tensors()), dict(near.average.named_tensors())
    for name, tensor in hook.average.items():
        torch.testing.assert_close(averages[name], tensor, rtol=0, atol=1e-6)
    assert max((others[name] - tensor).abs().max() for name, tensor in hook.average.items()) > 1e-4


@rows("case", FOLLOWED)
def test_recipes_are_plain_values(case):
    recipe, _, _ = FOLLOWED[case]
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    names = {name: getattr(lightning_ema, name) for name in lightning_ema.__all__} | {"LinearMomentum": LinearMomentum}
    assert eval(repr(recipe), names) == recipe


@rows("name", [name for name in recipes.__all__ if name != "Recipe"])
def test_recipes_are_arguments_of_the_callback_and_of_the_engine(name):
    make = getattr(recipes, name)
    needed = {"decay": 0.99} if name == "torch_ema" else {}
    if name == "mmpretrain_cosine":
        needed = {"total_steps": 10}
    recipe = make(**needed)
    callback, average = EMACallback(**recipe), WeightAverage(Regression(), **recipe)
    assert settings_of(callback) == engine(average).settings
    assert set(inspect.signature(make).parameters).isdisjoint({"kwargs", "args"})


DEFAULTS = {  # of the published classes
    "mmengine_ema": {"momentum": 2e-4, "interval": 1, "update_buffers": False, "begin_iter": 0},
    "mmengine_annealing": {"momentum": 2e-4, "gamma": 100},
    "mmdet_exp_momentum": {"momentum": 2e-4, "gamma": 2000},
    "mmpretrain_cosine": {"momentum": 0.004, "end_momentum": 0.0, "total_steps": None},
    "mmdet2_base": {"momentum": 2e-4, "interval": 1, "skip_buffers": False},
    "mmdet2_exp": {"total_iter": 2000},
    "mmdet2_linear": {"warm_up": 100},
    "mean_teacher_hook": {"momentum": 0.001, "interval": 1, "skip_buffer": True},
    "yolov7": {"decay": 0.9999, "updates": 0},
    "ultralytics": {"decay": 0.9999, "tau": 2000, "updates": 0},
    "timm_v3": {"decay": 0.9999, "warmup_gamma": 1, "warmup_power": 2 / 3, "use_warmup": False},
    "ema_pytorch": {"beta": 0.9999, "power": 2 / 3, "inv_gamma": 1, "update_after_step": 100, "update_every": 10},
    "diffusers": {"decay": 0.9999, "inv_gamma": 1, "power": 2 / 3, "use_ema_warmup": False},
    "composer": {"half_life": "1000ba", "smoothing": None, "ema_start": "0.0dur", "update_interval": None},
}


@rows("name", DEFAULTS)
def test_defaults_are_those_of_the_system(name):
    parameters = inspect.signature(getattr(recipes, name)).parameters
    assert {argument: parameters[argument].default for argument in DEFAULTS[name]} == DEFAULTS[name]


BAD = [
    (lambda: R.mmengine_ema(momentum=1.5), r"mmengine_ema: momentum is 1.5; it is the share of the new weights"),
    (lambda: R.mmengine_ema(momentum=-0.1), "mmengine_ema: momentum is -0.1"),
    (lambda: R.mmengine_ema(momentum=math.nan), "mmengine_ema: momentum is nan"),
    (lambda: R.mmengine_ema(momentum="0.1"), "mmengine_ema: momentum is '0.1'"),
    (lambda: R.mmengine_ema(interval=0), "mmengine_ema: interval is 0; it must be at least 1"),
    (lambda: R.mmengine_ema(begin_iter=-1), "mmengine_ema: begin_iter is -1"),
    (lambda: R.mmengine_ema(update_buffers="yes"), "mmengine_ema: update_buffers is 'yes'"),
    (lambda: R.mmengine_swa(interval=0), "mmengine_swa: interval is 0"),
    (lambda: R.mmengine_swa(interval=1.5), "mmengine_swa: interval is 1.5; it must be a whole number"),
    (lambda: R.mmengine_annealing(gamma=0), "mmengine_annealing: gamma is 0"),
    (lambda: R.mmdet_exp_momentum(gamma=-1), "mmdet_exp_momentum: gamma is -1"),
    (lambda: R.mmpretrain_cosine(end_momentum=2), "mmpretrain_cosine: end_momentum is 2"),
    (lambda: R.mmpretrain_cosine(total_steps=0), "mmpretrain_cosine: total_steps is 0"),
    (lambda: R.mmdet2_base(momentum=2), "mmdet2_base: momentum is 2"),
    (lambda: R.mmdet2_base(skip_buffers=1), "mmdet2_base: skip_buffers is 1"),
    (lambda: R.mmdet2_exp(total_iter=0), "mmdet2_exp: total_iter is 0"),
    (lambda: R.mmdet2_linear(warm_up=0.5), "mmdet2_linear: warm_up is 0.5; it must be at least 1"),
    (lambda: R.mmdet2_linear(interval=0), "mmdet2_linear: interval is 0"),
    (lambda: R.mmdet2_linear(momentum=3), "mmdet2_linear: momentum is 3"),
    (lambda: R.mean_teacher_hook(skip_buffer=None), "mean_teacher_hook: skip_buffer is None"),
    (lambda: R.yolov7(decay=1.1), r"yolov7: decay is 1.1; it must lie in \[0, 1\]"),
    (lambda: R.yolov7(updates=-3), "yolov7: updates is -3"),
    (lambda: R.ultralytics(tau=0), "ultralytics: tau is 0"),
    (lambda: R.yolox(decay=None), "yolox: decay is None; it must be a number"),
    (lambda: R.timm_v3(warmup_gamma=0), "timm_v3: warmup_gamma is 0"),
    (lambda: R.timm_v3(warmup_power=-1), "timm_v3: warmup_power is -1"),
    (lambda: R.timm_v3(update_after_step=-1), "timm_v3: update_after_step is -1"),
    (lambda: R.timm_v3(0.5, min_decay=0.9, use_warmup=True), "timm_v3: min_decay 0.9 is above decay 0.5"),
    (lambda: R.ema_pytorch(beta=-1), "ema_pytorch: beta is -1"),
    (lambda: R.ema_pytorch(update_every=0), "ema_pytorch: update_every is 0"),
    (lambda: R.ema_pytorch(0.5, min_value=0.6), "ema_pytorch: min_value 0.6 is above beta 0.5"),
    (lambda: R.ema_pytorch(inv_gamma=0), "ema_pytorch: inv_gamma is 0"),
    (lambda: R.diffusers(min_decay=2), "diffusers: min_decay is 2"),
    (lambda: R.diffusers(0.5, min_decay=0.7), "diffusers: min_decay 0.7 is above decay 0.5"),
    (lambda: R.diffusers(power=0), "diffusers: power is 0"),
    (lambda: R.torch_ema(7), "torch_ema: decay is 7"),
    (lambda: R.composer("10ba", 0.9), "composer: half_life is '10ba' and smoothing is 0.9; give exactly one"),
    (lambda: R.composer(None), "composer: half_life is None and smoothing is None"),
    (lambda: R.composer("2ep"), r"composer: half_life is '2ep'; only batches .*HalfLife\(epochs=2\)"),
    (lambda: R.composer("0ba"), "composer: half_life is 0; it must be at least 1"),
    (lambda: R.composer(ema_start="0.5dur"), "composer: ema_start is '0.5dur'; only batches"),
    (lambda: R.composer(None, 1.5), "composer: smoothing is 1.5"),
    (lambda: R.composer(ema_start="7ba", update_interval="5ba"), "multiple of update_interval, '5ba', such as '10ba'"),
    (lambda: R.edm2([0.1, 0.5]), r"edm2: 0.5 in stds; it must lie in \(0, 0.2887\]"),
    (lambda: R.edm2(0.05), r"edm2: stds is 0.05; it must be a list of widths, such as \[0.05, 0.1\]"),
    (lambda: R.torch_averaged_model(2), "torch_averaged_model: decay is 2"),
    (lambda: R.lightning_ema_weight_averaging(update_every_n_steps=0), "update_every_n_steps is 0"),
    (lambda: R.lightning_ema_weight_averaging(update_starting_at_step=-1), "update_starting_at_step is -1"),
    (lambda: R.lightning_ema_weight_averaging(decay=2), "lightning_ema_weight_averaging: decay is 2"),
]


@rows(("make", "message"), BAD)
def test_bad_arguments_are_refused_under_the_names_of_the_system(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_recipe_can_be_added_to():
    class Callable(Regression):
        def forward(self, x):
            return self.net(x)

    callback = EMACallback(**recipes.torch_swa() | {"buffers": "recalibrate"}, start_epoch=1, every_n_steps=BATCHES)
    module = seeded(Callable)
    states = []

    class EndOfEpoch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            states.append(clones(pl_module.named_parameters()))

    fit(module, callback, EndOfEpoch(), max_epochs=4)
    for name, tensor in dict(callback.average.named_tensors()).items():
        mean = sum(state[name].double() for state in states[1:]) / 3
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=5e-6)


def test_a_momentum_of_one_copies_and_of_zero_keeps():
    assert recipes.mmengine_ema(momentum=1)["decay"] == PerUpdate(Constant(0))
    assert recipes.mmengine_ema(momentum=0)["decay"] == PerUpdate(Constant(1))
