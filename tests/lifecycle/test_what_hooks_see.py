"""The table of docs/how-to/beside-other-libraries.md: which weights the module holds in which hook."""

import pytest
import torch
from helpers import Regression, clones, ema, equal, fit, seeded
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ema import Constant

LIVE, AVERAGE = "live", "average"
TABLE = {  # of a callback before ours, of one behind it, of the module
    "on_validation_start": (LIVE, AVERAGE, AVERAGE),
    "on_validation_epoch_start": (AVERAGE, AVERAGE, AVERAGE),
    "on_validation_batch_end": (AVERAGE, AVERAGE, AVERAGE),
    "on_validation_epoch_end": (AVERAGE, AVERAGE, AVERAGE),
    "on_validation_end": (AVERAGE, LIVE, LIVE),
    "on_train_batch_end": (LIVE, LIVE, LIVE),
    "on_train_epoch_end": (LIVE, LIVE, LIVE),
    "on_save_checkpoint": (AVERAGE, AVERAGE, AVERAGE),
}


@pytest.mark.parametrize("hook", TABLE)
def test_what_the_module_holds(hook, tmp_path):
    callback, seen = ema(decay=Constant(0.9)), {}

    def look(who, module):
        average = callback.average
        if average is None or average.num_updates == 0:
            return
        held = clones(module.named_parameters())
        live = dict(callback._holder.tracker.named_live())
        carried = equal(held, average.named_tensors())
        seen.setdefault(who, set()).add(AVERAGE if carried else LIVE if equal(held, live) else "neither")

    def looking(who):
        looks = Callback()
        setattr(looks, hook, lambda trainer, module, *rest: look(who, module))
        return looks

    class Module(Regression):
        pass

    setattr(Module, hook, lambda self, *rest: look("module", self))
    kept = ModelCheckpoint(tmp_path)
    fit(seeded(Module, norm=False), looking("before"), callback, looking("behind"), kept, enable_checkpointing=True)
    assert tuple(seen[who] for who in ("before", "behind", "module")) == tuple({each} for each in TABLE[hook])


@pytest.mark.parametrize("order", [1, -1])
def test_a_copied_callback_has_the_average(order):
    """As neuralforecast does: what it is given is copied for each fit."""
    import copy

    given, module = ema(decay=Constant(0.9)), seeded(norm=False)
    this = fit(module, *[copy.deepcopy(given), Callback()][::order])
    (used,) = [each for each in this.callbacks if type(each) is type(given)]
    assert given.average is None
    assert equal(module.named_parameters(), used.average.named_tensors())
    assert not torch.equal(module.net[0].weight, dict(used._holder.tracker.named_live())["net.0.weight"])
