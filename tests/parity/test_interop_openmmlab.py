"""Files that the runners of mmdetection 2 (mmcv) and 3 (mmengine) write with their own hooks, read back."""

import logging

import packages
import pytest
import torch
from helpers import clones, engine, equal, trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_ema import EMACallback, interop, recipes
from lightning_ema.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore")  # what the packages and a Trainer have to say of themselves

BATCHES = 4


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2 * BATCHES, 3, 8, 8, generator=generator)


def make(norm=True):
    torch.manual_seed(2)
    between = nn.BatchNorm2d(4) if norm else nn.Tanh()
    return nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.Conv2d(4, 1, 3))


# --- mmdetection 2 ------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """As mmcv's runners take it."""

    def __init__(self, norm):
        super().__init__()
        self.net = make(norm)

    def train_step(self, data, optimizer, **_):
        loss = self.net(data).square().mean()
        return {"loss": loss, "log_vars": {}, "num_samples": len(data)}


class InLightning(LightningModule):
    def __init__(self, norm):
        super().__init__()
        self.net = make(norm)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def run_mmdet2(folder, by_epoch, norm=True):
    """Two epochs, with a file after each; and by steps, the average and the live weights as the hook held them."""
    model, held = Model(norm), {}
    with packages.mmdet2() as mmdet2:

        class Watched(mmdet2.ExpMomentumEMAHook):
            """Notes what the average is after each update, before anything is exchanged."""

            def after_train_iter(self, runner):
                super().after_train_iter(runner)
                state = clones(runner.model.state_dict())
                averages = {name: state[buffer] for name, buffer in self.param_ema_buffer.items()}
                live = {name: state[name] for name in averages}
                floats = {name: tensor for name, tensor in averages.items() if tensor.is_floating_point()}
                held[runner.iter + 1] = {**live, **floats}, live

        logger = logging.getLogger("mmcv")
        logger.setLevel("ERROR")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        arguments = {"optimizer": optimizer, "work_dir": str(folder), "logger": logger, "meta": {}}
        if by_epoch:
            runner = mmdet2.EpochBasedRunner(model, max_epochs=2, **arguments)
        else:
            runner = mmdet2.IterBasedRunner(model, max_iters=2 * BATCHES, **arguments)
        saving = {"interval": 1 if by_epoch else BATCHES, "by_epoch": by_epoch, "create_symlink": False}
        runner.register_training_hooks({"policy": "fixed"}, {"grad_clip": None}, saving)
        runner.register_hook(Watched(total_iter=10, momentum=0.1), priority=49)  # the one of its configurations
        runner.run([DataLoader(images(), batch_size=2)], [("train", 1)])
    names = ("epoch_1", "epoch_2") if by_epoch else (f"iter_{BATCHES}", f"iter_{2 * BATCHES}")
    return *(folder / f"{name}.pth" for name in names), held


@pytest.mark.parametrize(("by_epoch", "system"), [(True, "mmdet2"), (False, "mmdet2_mid_epoch")])
def test_mmdet2(by_epoch, system, tmp_path):
    *files, held = run_mmdet2(tmp_path, by_epoch)
    for file, steps in zip(files, (BATCHES, 2 * BATCHES), strict=True):
        found = interop.read(file)
        assert (found.system, found.steps) == (system, steps)
        average, live = held[steps]
        assert equal(found.weights, average) and equal(found.live, live)
        assert not equal(average, live)
        assert live["net.1.num_batches_tracked"] == steps


@pytest.mark.parametrize(("by_epoch", "system"), [(True, "mmdet2"), (False, "mmdet2_mid_epoch")])
def test_mmdet2_without_counts_of_batches(by_epoch, system, tmp_path):
    file, _, held = run_mmdet2(tmp_path, by_epoch, norm=False)
    with pytest.raises(ValueError, match=r"in several ways; choose with --system NAME"):
        interop.read(file)
    found = interop.read(file, system=system)
    average, live = held[BATCHES]
    assert equal(found.weights, average) and equal(found.live, live)


@pytest.mark.parametrize("by_epoch", [True, False])
def test_a_trainer_goes_on_as_mmdet2_without_a_break(by_epoch, tmp_path):
    file, last, _ = run_mmdet2(tmp_path, by_epoch)
    assert main(["import", str(file), "--as", "lightning", "--out", str(tmp_path / "x.ckpt")]) == 0
    callback = EMACallback(**recipes.mmdet2_exp(total_iter=10, momentum=0.1))
    trainer(callback, max_epochs=1).fit(InLightning(True), DataLoader(images(), 2), ckpt_path=tmp_path / "x.ckpt")
    theirs = interop.read(last)
    assert callback.average.num_steps == theirs.steps
    for name, tensor in callback.average.named_tensors():
        torch.testing.assert_close(tensor, theirs.weights[name], msg=name)
    for name, tensor in engine(callback.average).named_live():
        torch.testing.assert_close(tensor, theirs.live[name], msg=name)


# --- mmdetection 3 ------------------------------------------------------------------------------------------------


def run_mmengine(model, hook, folder, by_epoch):
    length = {"by_epoch": True, "max_epochs": 1} if by_epoch else {"by_epoch": False, "max_iters": BATCHES}
    saving = {"type": "CheckpointHook", "interval": 1 if by_epoch else BATCHES, "by_epoch": by_epoch}
    with packages.standing_in("cv2"):
        runner = packages.mmdet().Runner(
            model,
            str(folder),
            train_dataloader=DataLoader([{"inputs": image, "data_samples": 0} for image in images()], 2),
            train_cfg=length,
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
            custom_hooks=[hook],
            default_hooks={"checkpoint": saving},
            default_scope="mmdet",
            experiment_name=folder.name,
            log_level="ERROR",
        )
        runner.train()
    return folder / ("epoch_1.pth" if by_epoch else f"iter_{BATCHES}.pth")


@pytest.fixture
def detector():
    """A detector that is registered there under this name."""
    package = packages.mmdet()

    class TinyDetector(package.BaseModel):
        def __init__(self, **_):
            super().__init__()
            self.net = make()

        def loss(self, inputs, data_samples):
            return {"loss": self.net(inputs).square().mean()}

        def forward(self, inputs, data_samples, mode):
            return self.loss(inputs, data_samples)

    package.MODELS.register_module(name="TinyDetector", module=TinyDetector, force=True)
    return TinyDetector


def read(file, capsys, **arguments):
    """Such files hold the log of the run, which is more than tensors, numbers and strings."""
    assert main(["import", str(file), "--as", "weights"]) == 1
    assert "cannot be read without running code that is in it" in capsys.readouterr().err
    return interop.read(file, allow_code=True, **arguments)


@pytest.mark.parametrize("by_epoch", [True, False])
@pytest.mark.parametrize("skip_buffer", [True, False])
def test_mean_teacher(by_epoch, skip_buffer, detector, tmp_path, capsys):
    class SemiSupervised(packages.mmdet().SemiBaseDetector):
        """Trained on labeled images alone."""

        def loss(self, inputs, samples):
            return self.loss_by_gt_instances(inputs, samples)

    model = SemiSupervised({"type": "TinyDetector"}, semi_train_cfg={})
    hook = packages.mmdet().MeanTeacherHook(momentum=0.1, skip_buffer=skip_buffer)
    found = read(run_mmengine(model, hook, tmp_path, by_epoch), capsys)
    assert (found.system, found.steps) == ("mean_teacher", BATCHES)
    assert equal(found.weights, model.teacher.state_dict()) and equal(found.live, model.student.state_dict())
    assert not torch.equal(found.weights["net.0.weight"], found.live["net.0.weight"])
    assert (found.weights["net.1.running_mean"].abs().sum() == 0) == skip_buffer  # as the teacher has them there


@pytest.mark.parametrize("by_epoch", [True, False])
def test_mmengine(by_epoch, detector, tmp_path, capsys):
    model = detector()
    average = {"ema_type": packages.mmdet().ExpMomentumEMA, "gamma": 10, "momentum": 0.1, "update_buffers": True}
    hook = packages.mmengine_hook()(**average)
    file = run_mmengine(model, hook, tmp_path, by_epoch)
    found = read(file, capsys)
    assert (found.system, found.steps) == ("mmengine", BATCHES)
    assert equal(found.weights, hook.ema_model.module.state_dict()) and equal(found.live, model.state_dict())
    assert not equal(found.weights, found.live)

    bare = read(file, capsys, like=model.net.state_dict())  # the network alone, as another program has it
    assert equal(bare.weights, {n.removeprefix("net."): t for n, t in found.weights.items()})
