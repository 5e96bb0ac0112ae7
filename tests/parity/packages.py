"""Systems whose packages import others that are not installed here: imported with stand-ins for these."""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import types
import warnings
from pathlib import Path
from unittest import mock

import numpy
import pytest
import pytorch_lightning
import torch
from packaging.version import parse

MMDET2 = Path(sys.prefix) / "mmdet2"


def peer(name):
    """The package, if it is installed. Under REQUIRE_PEERS (set by ``make test-peers``) a missing one is an error."""
    if os.environ.get("REQUIRE_PEERS"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed; `make test-peers` installs it")


class StandIn(types.ModuleType):
    """A module that has whatever is asked of it, and of which nothing is used."""

    __path__ = ()
    __version__ = "0.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=f"{self.__name__}.{name}")


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last, and so only for what is not installed."""

    def __init__(self, names):
        self.names = [name for name in names if "." in name or importlib.util.find_spec(name) is None]
        self.made = []

    def find_spec(self, name, path=None, target=None):
        known = any(name == each or name.startswith(f"{each}.") for each in self.names)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec):
        self.made.append(spec.name)
        return StandIn(spec.name)

    def exec_module(self, module):
        if module.__name__ == "pkg_resources":
            module.parse_version = parse


@contextlib.contextmanager
def standing_in(*names):
    """Imports inside the block get stand-ins for these packages where they are missing; nothing of it stays behind.

    Nor does what packages change for everybody when they are imported: the environment, the search path, ``torch.save``
    and how numbers are printed.
    """
    finder, installed_version = StandIns(names), importlib.metadata.version

    def version(name):
        return StandIn.__version__ if name in finder.names else installed_version(name)

    options = vars(torch._tensor_str.PRINT_OPTS)
    printing = options.copy()
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        numpy.printoptions(),
        mock.patch.dict(os.environ, {"YOLO_CONFIG_DIR": folder, **QUIET}),
        mock.patch.object(sys, "path", list(sys.path)),
        mock.patch.object(torch, "save", torch.save),
        mock.patch.object(importlib.metadata, "version", version),
    ):
        warnings.simplefilter("ignore")
        sys.meta_path.append(finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
            options.clear()
            options.update(printing)
            for name in finder.made:
                sys.modules.pop(name, None)


# no look-ups in the network, and no installing of what is missing
QUIET = {
    "YOLO_AUTOINSTALL": "false",
    "YOLO_OFFLINE": "true",
    "YOLO_VERBOSE": "false",
    "YOLOv5_AUTOINSTALL": "false",
    "YOLOv5_VERBOSE": "false",
}


def installed(name):
    """Skips, or fails under REQUIRE_PEERS, where a package is missing; does not import it."""
    if importlib.util.find_spec(name) is None:
        peer(name)


def take(module, *names):
    return {name: getattr(importlib.import_module(module), name) for name in names}


@functools.cache
def ultralytics():
    installed("ultralytics")
    with standing_in("cv2", "torchvision", "polars"):
        return types.SimpleNamespace(
            **take("ultralytics.utils.torch_utils", "ModelEMA", "strip_optimizer"),
            **take("ultralytics.nn.tasks", "DetectionModel", "yaml_model_load"),
            **take("ultralytics.engine.trainer", "BaseTrainer"),
            **take("ultralytics.cfg", "get_cfg"),
        )


@functools.cache
def yolov5():
    installed("yolov5")
    with standing_in("cv2", "pkg_resources", "seaborn", "thop", "torchvision", "polars"):
        return types.SimpleNamespace(
            **take("yolov5.utils.torch_utils", "ModelEMA", "smart_resume"),
            **take("yolov5.utils.general", "strip_optimizer"),
            **take("yolov5.utils.loss", "ComputeLoss"),
            **take("yolov5.models.yolo", "DetectionModel"),
            folder=Path(importlib.import_module("yolov5").__file__).parent,
        )


@functools.cache
def lit_ema():
    """The class of the latent diffusion models."""
    return peer("ldm.modules.ema").LitEma


@functools.cache
def latent_diffusion():
    """The latent diffusion models' own LightningModules; ``rank_zero_only`` lies elsewhere in newer Lightning."""
    for name in ("ldm", "einops", "transformers"):
        installed(name)
    place = "pytorch_lightning.utilities.distributed"
    moved = types.ModuleType(place)
    moved.rank_zero_only = pytorch_lightning.utilities.rank_zero_only
    with standing_in("kornia", "omegaconf", "open_clip", "torchvision"), mock.patch.dict(sys.modules, {place: moved}):
        return types.SimpleNamespace(
            **take("ldm.models.autoencoder", "AutoencoderKL"), **take("ldm.models.diffusion.ddpm", "DDPM")
        )


def alone(name, file):
    """A single file of a package as a module of that name, without the packages above it."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def timm_model_ema():
    """timm's ``utils/model_ema.py``: the package itself imports torchvision."""
    installed("timm")
    (folder,) = importlib.util.find_spec("timm").submodule_search_locations
    return alone("timm_model_ema", Path(folder) / "utils" / "model_ema.py")


@functools.cache
def nemo():
    """The callback and the checkpoint callback; the collections above them import all of NeMo."""
    installed("nemo")
    (folder,) = importlib.util.find_spec("nemo").submodule_search_locations
    above = "nemo.collections.common"
    ema = alone(f"{above}.callbacks.ema", Path(folder) / "collections" / "common" / "callbacks" / "ema.py")
    callbacks = types.ModuleType(f"{above}.callbacks")
    callbacks.EMA = ema.EMA
    common = types.ModuleType(above)
    with (
        standing_in("hydra", "multistorageclient", "omegaconf", "wrapt"),
        mock.patch.dict(sys.modules, {above: common, f"{above}.callbacks": callbacks}),
    ):
        return types.SimpleNamespace(
            EMA=ema.EMA, **take("nemo.utils.callbacks.nemo_model_checkpoint", "NeMoModelCheckpoint")
        )


@functools.cache
def mmengine_hook():
    """mmengine's ``EMAHook``; the package of hooks imports OpenCV, of which it has no use."""
    peer("mmengine.model")
    with standing_in("cv2"):
        return peer("mmengine.hooks").EMAHook


@functools.cache
def mmdet():
    """mmdetection 3 with mmengine's runner; ``mmcv._ext`` are its operators in C++."""
    for name in ("mmengine", "mmcv", "mmdet"):
        installed(name)
    with standing_in("cv2", "mmcv._ext", "pycocotools", "shapely", "six", "terminaltables", "torchvision"):
        return types.SimpleNamespace(
            **take("mmdet.engine.hooks.mean_teacher_hook", "MeanTeacherHook"),
            **take("mmdet.models.detectors", "SemiBaseDetector"),
            **take("mmdet.models.layers.ema", "ExpMomentumEMA"),
            **take("mmdet.registry", "MODELS"),
            **take("mmengine.model", "BaseModel"),
            **take("mmengine.runner", "Runner"),
        )


@contextlib.contextmanager
def mmdet2():
    """mmdetection 2 and the mmcv below it, in place of those of other releases, which have the same names."""
    if not MMDET2.is_dir():
        reason = f"mmdetection 2 is not in {MMDET2}; `make test-peers` puts it there"
        pytest.fail(reason) if os.environ.get("REQUIRE_PEERS") else pytest.skip(reason)
    others = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("mmcv", "mmdet")}
    with mock.patch.dict(sys.modules), standing_in("cv2", "torchvision"), mock.patch("time.sleep"):  # its runners wait
        for name in others:
            del sys.modules[name]
        sys.path.insert(0, str(MMDET2))
        importlib.invalidate_caches()
        hooks = alone("mmdet_core_hook_ema", MMDET2 / "mmdet" / "core" / "hook" / "ema.py")
        yield types.SimpleNamespace(
            **take("mmcv.runner", "EpochBasedRunner", "IterBasedRunner"),
            **{name: getattr(hooks, name) for name in ("BaseEMAHook", "ExpMomentumEMAHook", "LinearMomentumEMAHook")},
        )
