"""What the stand-ins and the second mmcv leave behind: nothing."""

import importlib.metadata
import importlib.util
import os
import sys

import numpy
import packages
import pytest
import torch


def test_a_stand_in_is_there_inside_the_block_only():
    before, path = dict(os.environ), list(sys.path)
    with packages.standing_in("absent", "torch"):
        part = importlib.import_module("absent.part")
        assert part.anything(1).more is not None and not hasattr(part, "__file__")
        assert importlib.metadata.version("absent") == "0.0" and os.environ["YOLO_OFFLINE"] == "true"
        assert importlib.import_module("torch.nn") is torch.nn  # what is installed is taken
        sys.path.append("elsewhere")
        torch.set_printoptions(precision=2)
    with pytest.raises(ModuleNotFoundError, match="absent"):
        importlib.import_module("absent.part")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("absent")
    assert (dict(os.environ), sys.path) == (before, path)
    assert str(torch.tensor(0.12345)) == "tensor(0.1235)"


@pytest.mark.parametrize("package", ["ultralytics", "yolov5", "latent_diffusion", "nemo", "mmdet"])
def test_nothing_stays_behind_an_import(package):
    before, save, printing = dict(os.environ), torch.save, numpy.get_printoptions()
    getattr(packages, package)()
    imported = {"cv2", "torchvision", "seaborn", "wrapt", "pycocotools"} & sys.modules.keys()
    assert all(sys.modules[name].__spec__.origin for name in imported)  # none, or the real one
    assert (dict(os.environ), numpy.get_printoptions()) == (before, printing) and torch.save is save


def test_the_second_mmcv_makes_way_again():
    packages.mmdet()
    mmcv = importlib.import_module("mmcv")
    with packages.mmdet2():
        assert importlib.import_module("mmcv").__version__ == "1.7.2"
    assert importlib.import_module("mmcv") is mmcv and mmcv.__version__.startswith("2.")
