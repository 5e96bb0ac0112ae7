"""The average of a LoRA model as an adapter of PEFT: written by its own call, read by its own call."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import clones, ema, engine, loader, trainer
from lightning.pytorch import LightningModule
from packages import peer
from safetensors.torch import load_file
from torch import nn

from lightning_ema import WeightAverage

pytestmark = pytest.mark.filterwarnings("ignore")  # what the packages and a Trainer have to say of themselves

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "checkpoints.md"


def base():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def with_adapter():
    peft = peer("peft")
    return peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0", "2"]))


class Adapted(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = with_adapter()

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.05)


def loaded(folder):
    return peer("peft").PeftModel.from_pretrained(base(), folder)


def assert_adapter(folder, network, live):
    """The files hold the low-rank weights alone; with them a fresh base computes what the averaged network does."""
    (x, _), *_ = loader(1)
    assert {p.name for p in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    written = load_file(folder / "adapter_model.safetensors")
    assert len(written) == 4 and all(".lora_A." in name or ".lora_B." in name for name in written)
    with torch.no_grad():
        assert torch.equal(loaded(folder)(x), network(x))
        assert not torch.allclose(loaded(folder)(x), live)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    peer("peft")
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(5)
    module, callback = Adapted(), ema(decay=0.99)
    this = trainer(callback, max_epochs=3)
    this.fit(module, loader())
    this.save_checkpoint(folder / "last.ckpt")
    (x, _), *_ = loader(1)
    averaged = clones(module.state_dict())
    fresh = Adapted()
    fresh.load_state_dict(averaged | clones(engine(callback.average).named_live()))
    with torch.no_grad():
        return folder, module, callback, fresh.network(x)


def test_only_the_adapter_is_averaged(run):
    _, module, callback, _ = run
    names = {name for name, _ in callback.average.named_tensors()}
    assert names == {name for name in module.state_dict() if ".lora_" in name} and len(names) == 4


def test_after_a_fit(run, tmp_path):
    _, module, _, live = run
    module.network.save_pretrained(tmp_path / "adapter")
    assert_adapter(tmp_path / "adapter", module.network, live)


def test_from_a_checkpoint(run, tmp_path):
    folder, module, _, live = run
    deployed = Adapted.load_from_checkpoint(folder / "last.ckpt")
    deployed.network.save_pretrained(tmp_path / "adapter")
    assert_adapter(tmp_path / "adapter", module.network, live)


def test_in_a_loop_of_ones_own(tmp_path):
    network = with_adapter()
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 0.05)
    average = WeightAverage(network, decay=0.99)
    for x, y in loader():
        optimizer.zero_grad()
        nn.functional.mse_loss(network(x), y).backward()
        optimizer.step()
        average.step()
    (x, _), *_ = loader(1)
    with torch.no_grad():
        live = network(x)
    with average.swapped():
        network.save_pretrained(tmp_path / "adapter")
        assert_adapter(tmp_path / "adapter", network, live)
    with torch.no_grad():
        assert torch.equal(network(x), live)


def test_a_16_bit_adapter_is_written_in_its_own_dtype(tmp_path):
    network = with_adapter().bfloat16()
    average = WeightAverage(network, decay=0.5)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if ".lora_" in name:
                p.fill_(1.0)
    average.step()
    with average.swapped():
        network.save_pretrained(tmp_path / "adapter")
        carried = {name: t.clone() for name, t in network.state_dict().items() if ".lora_" in name}
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    assert {name.replace(".default", ""): t.sum().item() for name, t in carried.items()} == {
        name: t.sum().item() for name, t in written.items()
    }


def test_what_the_page_says_runs(run, tmp_path, monkeypatch):
    _, module, _, live = run
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    namespace = {"model": module, "base_model": base()}
    exec(compile(block, str(PAGE), "exec"), namespace)
    (x, _), *_ = loader(1)
    with torch.no_grad():
        assert torch.equal(namespace["adapted"](x), module.network(x))
    assert_adapter(tmp_path / "adapter", module.network, live)
