"""An average that comes to a module which an earlier fit has left with another average of the same tensors."""

import pytest
import torch
from helpers import BATCHES, clones, ema, engine, equal, fit, loader, seeded, trainer
from lightning.pytorch import Callback

from lightning_ema import Constant, EMACallback, WeightAverage

pytestmark = pytest.mark.filterwarnings("ignore")


class Start(Callback):
    def on_train_start(self, trainer, pl_module):
        self.start = clones(pl_module.state_dict())


@pytest.mark.parametrize("after_fit", ["average", "live"])
def test_another_callback_begins_with_what_the_module_holds(after_fit, tmp_path):
    module, first, second, start = (
        seeded(),
        ema(after_fit=after_fit),
        EMACallback(Constant(0.5), name="second"),
        Start(),
    )
    fit(module, first)
    left = clones(module.state_dict())
    this = fit(module, second, start)
    assert equal(start.start, left)
    fresh, alone = seeded(), EMACallback(Constant(0.5), name="second")
    fresh.load_state_dict(left)
    fit(fresh, alone)
    assert equal(second.average.named_tensors(), alone.average.named_tensors())
    assert equal(engine(second.average).named_live(), engine(alone.average).named_live())
    assert equal(module.state_dict(), fresh.state_dict())
    for weights_only in (True, False):
        this.save_checkpoint(tmp_path / "x.ckpt", weights_only)
        file = torch.load(tmp_path / "x.ckpt", weights_only=True)
        assert equal(file["state_dict"], fresh.state_dict())
    assert equal(file["callbacks"][second.state_key]["live"], dict(engine(alone.average).named_live()))


@pytest.mark.parametrize("after_fit", ["average", "live"])
def test_the_first_one_has_no_claim_any_more(after_fit, caplog):
    module, first, start = seeded(), ema(after_fit=after_fit), Start()
    fit(module, first)
    fit(module, ema(name="second", after_fit=after_fit))
    held = clones(module.state_dict())
    with caplog.at_level("INFO"):
        fit(module, first, start)
    assert "the module's weights were changed since the end of training" in caplog.text
    assert equal(start.start, held)
    assert first.average.num_steps == 2 * BATCHES


@pytest.mark.parametrize("after_fit", ["average", "live"])
def test_a_loop_of_ones_own_goes_on_with_what_the_module_holds(after_fit):
    module, callback = seeded(), ema(after_fit=after_fit)
    fit(module, callback)
    before = clones(module.named_parameters())
    average = WeightAverage(module, Constant(0.5))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    average.step()
    values = clones(average.named_tensors())
    for name, value in before.items():
        torch.testing.assert_close(values[name], value + 0.5)
    assert equal(engine(average).named_live(), {name: module.state_dict()[name] for name in values})
    trained = clones(module.state_dict())
    with average.swapped():
        assert equal({name: module.state_dict()[name] for name in values}, values)
    assert equal(module.state_dict(), trained)
    average.apply(keep=True)
    assert equal({name: module.state_dict()[name] for name in values}, values)
    average.restore()
    assert equal(module.state_dict(), trained)
    start = Start()
    fit(module, callback, start)
    assert equal(start.start, trained)


def test_an_average_that_only_looks_takes_nothing_from_the_first():
    module, callback, start = seeded(), ema(), Start()
    fit(module, callback)
    live, held = clones(engine(callback.average).named_live()), clones(module.state_dict())
    average = WeightAverage(module, Constant(0.5))
    with average.swapped():
        pass
    assert average.distance() == 0
    assert equal(module.state_dict(), held)
    fit(module, callback, start)
    assert equal({name: start.start[name] for name in live}, live)
    assert callback.average.num_steps == 4 * BATCHES


def test_a_part_of_the_module_can_be_trained_on_its_own():
    module = seeded()
    fit(module, ema())
    before = clones(module.net[0].state_dict())
    part = WeightAverage(module.net[0], Constant(0.5))
    with torch.no_grad():
        module.net[0].weight.add_(1)
    part.step()
    torch.testing.assert_close(dict(part.named_tensors())["weight"], before["weight"] + 0.5)
    assert torch.equal(dict(engine(part).named_live())["weight"], module.net[0].weight)


def test_a_module_edited_between_two_fits_is_saved_with_its_own_average(tmp_path):
    module, callback = seeded(), ema()
    fit(module, callback)
    module.load_state_dict(seeded(lr=0.3).state_dict())
    this = fit(module, callback)
    this.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert callback.average.num_steps == 2 * BATCHES
    assert equal({name: state[name] for name, _ in callback.average.named_tensors()}, callback.average.named_tensors())


def test_another_callback_after_a_file_was_evaluated(tmp_path):
    module, first, second, start = seeded(), ema(), ema(name="second"), Start()
    this = fit(module, first)
    this.save_checkpoint(tmp_path / "x.ckpt")
    trainer(first).test(module, loader(1), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    held = clones(module.state_dict())
    this = fit(module, second, start)
    assert equal(start.start, held)
    this.save_checkpoint(tmp_path / "y.ckpt")
    state = torch.load(tmp_path / "y.ckpt", weights_only=True)["state_dict"]
    assert equal({name: state[name] for name, _ in second.average.named_tensors()}, second.average.named_tensors())
