"""Files of Lightning runs with LitEma and NeMo, written by their own modules and callbacks, and resumed from."""

import packages
import pytest
import pytorch_lightning
import torch
from helpers import clones, ema, engine, equal, fit, seeded
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightning_ema import Constant, EMACallback, interop
from lightning_ema.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore")  # what the packages and a Trainer have to say of themselves


# --- LitEma -------------------------------------------------------------------------------------------------------


class Unet(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4))])
        self.out = nn.Conv2d(4, 3, 3, padding=1)
        self.frozen = nn.Conv2d(3, 3, 1).requires_grad_(False)

    def forward(self, x, t):
        return self.out(self.input_blocks[0](self.frozen(x)).relu())


def diffusion(**settings):
    """Its own ``DDPM``, which averages the network below ``model.``."""
    torch.manual_seed(2)
    unet = {"target": f"{__name__}.Unet"}
    module = packages.latent_diffusion().DDPM(unet, timesteps=10, image_size=8, monitor=None, **settings)
    module.learning_rate = 0.01
    return module


def autoencoder(ema_decay=0.9):
    """Its own ``AutoencoderKL``, which averages itself; the loss is simpler, and there is one optimizer."""

    class Autoencoder(packages.latent_diffusion().AutoencoderKL):
        def training_step(self, batch, batch_idx):
            inputs = self.get_input(batch, self.image_key)
            return (self(inputs)[0] - inputs).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    torch.manual_seed(2)
    sizes = {"z_channels": 2, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1]}
    layers = {"num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "double_z": True}
    return Autoencoder({**sizes, **layers}, {"target": "torch.nn.Identity"}, embed_dim=2, ema_decay=ema_decay)


def train(module, *callbacks, epochs, ckpt_path=None):
    """Some epochs of 4 batches, with the same noise from whatever epoch they begin."""
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "accelerator": "cpu", "callbacks": list(callbacks)}
    trainer = pytorch_lightning.Trainer(max_epochs=epochs, **settings)
    images = torch.rand(8, 8, 8, 3, generator=torch.Generator().manual_seed(1))
    data = DataLoader([{"image": pair} for pair in images.split(2)], batch_size=None)
    pytorch_lightning.seed_everything(4, verbose=False)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(("make", "averaged", "decay"), [(diffusion, "model.", 0.9999), (autoencoder, "", 0.9)])
def test_lit_ema(make, averaged, decay, tmp_path):
    module = make()
    train(module, epochs=1).save_checkpoint(tmp_path / "theirs.ckpt")
    found = interop.read(tmp_path / "theirs.ckpt")
    live = {n: t for n, t in clones(module.state_dict()).items() if not n.startswith("model_ema.")}
    assert (found.system, found.steps, found.decay) == ("lit_ema", 4, f"Warmup({decay})")
    assert equal(found.live, live)
    with module.ema_scope():
        carried = {n: t for n, t in clones(module.state_dict()).items() if not n.startswith("model_ema.")}
    assert equal(found.weights, carried)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert {n for n in live if not torch.equal(live[n], carried[n])} == {n for n in trained if n.startswith(averaged)}


def test_a_trainer_goes_on_as_lit_ema_does(tmp_path):
    module = diffusion()
    train(module, epochs=1).save_checkpoint(tmp_path / "theirs.ckpt")
    assert main(["import", str(tmp_path / "theirs.ckpt"), "--as", "lightning", "--out", str(tmp_path / "x.ckpt")]) == 0
    theirs = diffusion()
    train(theirs, epochs=2, ckpt_path=tmp_path / "theirs.ckpt")
    callback, ours = EMACallback(0.9999), diffusion(use_ema=False)
    train(ours, callback, epochs=2, ckpt_path=tmp_path / "x.ckpt")
    assert callback.average.num_steps == theirs.model_ema.num_updates == 8
    live = clones(theirs.state_dict())
    assert equal(engine(callback.average).named_live(), {n: live[n] for n, _ in engine(callback.average).named_live()})
    with theirs.ema_scope():
        for name, tensor in callback.average.named_tensors():
            torch.testing.assert_close(tensor, theirs.state_dict()[name], msg=name)
        assert not torch.allclose(live["model.diffusion_model.out.bias"], theirs.model.diffusion_model.out.bias)


# --- NeMo ---------------------------------------------------------------------------------------------------------


def nemo_callbacks(folder, saves=True, **settings):
    package = packages.nemo()
    files = {"dirpath": folder, "save_last": saves, "save_top_k": -1 if saves else 0, "save_nemo_on_train_end": False}
    return package.EMA(0.9, **settings), package.NeMoModelCheckpoint(**files)


class Averages(Callback):
    """What NeMo's optimizer holds at the end, by name; all else is live."""

    def on_train_end(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        optimizer.join()
        names = [name for name, _ in pl_module.named_parameters()]
        averages = dict(zip(names, optimizer.ema_params, strict=True))
        self.average = clones({**pl_module.state_dict(), **averages})


@pytest.mark.parametrize(("every", "updates"), [(1, 12), (5, 3)])
def test_nemo(every, updates, tmp_path):
    held, module = Averages(), seeded()
    this = fit(module, *nemo_callbacks(tmp_path, every_n_steps=every), held, enable_checkpointing=True)
    found = interop.read(tmp_path / "last-EMA.ckpt", live=tmp_path / "last.ckpt")
    assert (found.system, found.steps, found.updates, found.decay) == ("nemo", 12, updates, "Constant(0.9)")
    assert equal(found.weights, held.average) and equal(found.live, module.state_dict())
    assert not torch.allclose(held.average["net.0.weight"], module.net[0].weight)

    with pytest.raises(ValueError, match="no average is recognised"):
        interop.read(tmp_path / "last.ckpt")
    this.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"state_dict is live.*whose name ends in -EMA\.ckpt"):
        interop.read(tmp_path / "other.ckpt")


def test_a_trainer_goes_on_as_nemo_does(tmp_path):
    fit(seeded(), *nemo_callbacks(tmp_path), enable_checkpointing=True)
    files = ["import", str(tmp_path / "last-EMA.ckpt"), "--live", str(tmp_path / "last.ckpt")]
    assert main([*files, "--as", "lightning", "--out", str(tmp_path / "x.ckpt")]) == 0
    held, theirs, ours = Averages(), seeded(), seeded()
    last, more = str(tmp_path / "last.ckpt"), {"enable_checkpointing": True, "max_epochs": 3}
    # it saves no second time: the averages of a resumed run are leaves of autograd, and it cannot exchange them then
    fit(theirs, *nemo_callbacks(tmp_path, saves=False), held, ckpt_path=last, **more)
    callback = ema(decay=Constant(0.9), buffers="copy", after_fit="live")
    fit(ours, callback, ckpt_path=tmp_path / "x.ckpt", max_epochs=3)
    assert callback.average.num_steps == 18
    assert equal(ours.state_dict(), theirs.state_dict())
    for name, tensor in callback.average.named_tensors():
        torch.testing.assert_close(tensor, held.average[name], msg=name)
