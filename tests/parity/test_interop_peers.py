"""Files that the systems themselves write, read back: the same tensors, the live weights, the steps."""

import types

import packages
import pytest
import torch
from helpers import equal
from packages import peer
from peers import Diffusers, EmaPytorch, Mmengine, Timm, TorchEma
from trajectory import net, walk

from lightning_ema import interop

pytestmark = pytest.mark.filterwarnings("ignore")  # what the packages have to say of themselves

CALLS = 5


def run(system):
    """The module after some calls; ``system.average`` is the package's own object."""
    module = net()
    system.begin(module)
    for _ in walk(module, CALLS):
        system.update(module)
    return module


def read(content, tmp_path, **arguments):
    torch.save(content, tmp_path / "file.pt")
    return interop.read(tmp_path / "file.pt", **arguments)


def assert_holds(found, system, module, steps):
    """All floats as the package has them, everything else as in the model; the live weights where they are there."""
    state, theirs = module.state_dict(), system.tensors()
    assert found.weights.keys() == state.keys()
    assert {"first.weight", "first.bias", "norm.weight", "head.bias"} <= theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(found.weights[name], tensor), name
    assert not torch.equal(found.weights["head.bias"], state["head.bias"])
    assert found.live == {} or equal(found.live, state)
    assert found.steps == steps


@pytest.mark.parametrize("update_buffers", [True, False])
def test_mmengine(update_buffers, tmp_path):
    system = Mmengine("ExponentialMovingAverage", momentum=0.2, update_buffers=update_buffers)
    module = run(system)
    hook = packages.mmengine_hook()()
    hook.ema_model, hook.src_model = system.average, module
    content = {"meta": {}, "state_dict": dict(module.state_dict())}
    hook.before_save_checkpoint(types.SimpleNamespace(), content)
    found = read(content, tmp_path)
    assert found.system == "mmengine" and found.live
    assert_holds(found, system, module, CALLS)


def test_timm(tmp_path):
    system = Timm(decay=0.8)
    module = run(system)
    content = {"epoch": 1, "state_dict": module.state_dict(), "state_dict_ema": system.average.module.state_dict()}
    found = read(content, tmp_path)
    assert found.system == "timm" and found.live
    assert_holds(found, system, module, None)


@pytest.mark.parametrize("nested", [True, False])
def test_ema_pytorch(nested, tmp_path):
    system = EmaPytorch(beta=0.8, update_after_step=0, update_every=1)
    module = run(system)
    state = system.average.state_dict()
    found = read({"model": module.state_dict(), "ema": state} if nested else state, tmp_path)
    assert found.system == "ema_pytorch" and found.live == {}
    assert_holds(found, system, module, CALLS)


def test_ema_pytorch_with_its_online_model(tmp_path):
    module = net()
    average = peer("ema_pytorch").EMA(module, beta=0.8, update_after_step=0, update_every=1)
    for _ in walk(module, CALLS):
        average.update()
    found = read(average.state_dict(), tmp_path)
    assert equal(found.live, module.state_dict())
    assert equal(found.weights, average.ema_model.state_dict())


def test_diffusers(tmp_path):
    system = Diffusers(decay=0.8)
    module = run(system)
    found = read(system.average.state_dict(), tmp_path, like=module.state_dict())
    assert found.system == "diffusers"
    assert_holds(found, system, module, CALLS)
    for name in ("norm.running_mean", "norm.num_batches_tracked"):  # it averages parameters only
        assert torch.equal(found.weights[name], module.state_dict()[name])


@pytest.mark.parametrize("counts", [True, False])
def test_torch_ema(counts, tmp_path):
    """It leaves out frozen parameters: the shapes tell which, or a file of the trained ones does."""
    module = net()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    average = peer("torch_ema").ExponentialMovingAverage(trained.values(), decay=0.8, use_num_updates=counts)
    for _ in walk(module, CALLS):
        average.update()
    with average.average_parameters():
        carried = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert not torch.equal(carried["head.bias"], module.head.bias)
    state = average.state_dict()
    found = read(state, tmp_path, like=trained)
    assert (found.system, found.steps) == ("torch_ema", CALLS if counts else None)
    assert found.decay == ("Warmup(0.8)" if counts else "Constant(0.8)")
    assert found.weights.keys() == trained.keys()
    assert all(torch.equal(found.weights[name], carried[name]) for name in trained)
    with pytest.raises(ValueError, match=r"in several ways: .*norm\.bias or frozen\.bias"):  # both are of 4 numbers
        read(state, tmp_path, like=module.state_dict())


def test_torch_ema_of_all_parameters(tmp_path):
    system = TorchEma(decay=0.8)
    module = net().requires_grad_(True)
    system.begin(module)
    for _ in walk(module, CALLS):
        system.update(module)
    found = read(
        {"model": module.state_dict(), "ema": system.average.state_dict()}, tmp_path, like=tmp_path / "file.pt"
    )
    assert_holds(found, system, module, CALLS)
