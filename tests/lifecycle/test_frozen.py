"""Parameters that are frozen at the start of a fit, and networks that a module moves by hand."""

import logging

import pytest
import torch
from helpers import BATCHES, Regression, clones, ema, equal, fit, seeded
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn

from lightning_ema import Constant, WeightAverage


class Finetuned(Regression):
    def __init__(self):
        super().__init__(norm=False)
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))

    def loss(self, batch):
        return super().loss([self.backbone(batch[0]), batch[1]])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)


class Followed(BackboneFinetuning):
    """Follows the formula by hand, from the weights at the moment they are unfrozen."""

    def __init__(self, decay):
        super().__init__(unfreeze_backbone_at_epoch=1, verbose=False)
        self.decay, self.average = decay, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.average is None and pl_module.backbone[0].weight.requires_grad:
            self.average = clones(pl_module.backbone.state_dict())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.average is not None:
            for name, live in pl_module.backbone.state_dict().items():
                if live.is_floating_point():
                    self.average[name].lerp_(live, 1 - self.decay)


def close(average, expected):
    for name, value in average.items():
        torch.testing.assert_close(value, expected[name.removeprefix("backbone.")], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("include", [["backbone.*"], ["backbone.0.*"], ["*.0.weight", "backbone.1.*"]])
def test_an_average_of_what_is_unfrozen_later_begins_then(include, order):
    callback, by_hand = ema(decay=Constant(0.75), include=include, after_fit="live"), Followed(0.75)
    fit(seeded(Finetuned), *[callback, by_hand][::order], max_epochs=3)
    average = {n: t for n, t in callback.average.named_tensors() if n.startswith("backbone.")}
    assert average
    close(average, by_hand.average)


def test_what_was_saved_while_nothing_was_trained_resumes(tmp_path):
    first = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, by_hand = ema(decay=Constant(0.75), include=["backbone.*"], after_fit="live"), Followed(0.75)
    fit(seeded(Finetuned), whole, by_hand, first, max_epochs=3, enable_checkpointing=True)
    # after the unfreezing BackboneFinetuning itself does not resume exactly
    again = ema(decay=Constant(0.75), include=["backbone.*"], after_fit="live")
    fit(seeded(Finetuned), again, Followed(0.75), max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert equal(whole.average.named_tensors(), again.average.named_tensors())


def test_until_then_the_module_is_evaluated_and_saved_as_it_is(tmp_path):
    kept = ModelCheckpoint(tmp_path, filename="{epoch}")
    module, callback = seeded(Finetuned), ema(include=["backbone.*"])
    module.backbone.requires_grad_(False)
    with pytest.warns(UserWarning, match="there is no average: every parameter that include and exclude leave was fro"):
        fit(module, callback, kept, max_epochs=1, enable_checkpointing=True)
    file = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert equal(file["state_dict"], module.state_dict())


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"include": ["backbone.9.*"]}, "'backbone.9.*' matches no tensor"),
        ({"exclude": ["spine.*"]}, r"'spine.*' matches no tensor"),
        ({"include": ["backbone.*"], "exclude": ["back*"]}, "nothing to average: no parameter is left"),
        ({"include": ["*.running_mean"]}, "nothing to average: no parameter is left"),
    ],
)
def test_patterns_that_leave_nothing_are_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        fit(seeded(Finetuned), ema(**patterns))


def test_in_a_plain_loop_it_begins_when_something_is_unfrozen():
    net = nn.Linear(1, 1, bias=False).requires_grad_(False)
    average = WeightAverage(net, Constant(0.5))
    assert not average.step() and not average.step()
    assert (average.num_steps, average.num_updates) == (2, 0)
    with torch.no_grad():
        net.weight.fill_(4.0)
    net.requires_grad_(True)
    average.step()  # joins with 4
    with torch.no_grad():
        net.weight.fill_(8.0)
    average.step()
    assert dict(average.named_tensors())["weight"].item() == 6.0


class Momentum(Regression):
    """A momentum encoder, moved by hand as BYOL, MoCo and lightly's heads do; statistics of its own."""

    AFFINE = True

    def __init__(self, write):
        super().__init__()
        self.momentum = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=self.AFFINE)).requires_grad_(False)
        self.write = write

    def training_step(self, batch, batch_idx):
        self.momentum(batch[0])
        with torch.no_grad():
            for parameter in self.momentum.parameters():
                self.write(parameter)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.05)


class WithoutAffine(Momentum):
    AFFINE = False


def replace_data(parameter):
    parameter.data = parameter.data * 0.9


WRITES = {
    "in place": lambda parameter: parameter.mul_(0.9),
    "through data": lambda parameter: parameter.data.mul_(0.9),
    "other data": replace_data,
    "copied": lambda parameter: parameter.copy_(parameter * 0.9),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("make", [Momentum, WithoutAffine])
def test_a_network_moved_by_hand_stays_live_with_its_statistics_and_is_named_once(make, write, caplog):
    module, callback = seeded(make, write=WRITES[write]), ema(decay=Constant(0.5))
    with caplog.at_level(logging.INFO):
        fit(module, callback)
    assert {name.split(".")[0] for name, _ in callback.average.named_tensors()} == {"net"}
    said = [r.getMessage() for r in caplog.records if "frozen, but changed during the fit" in r.getMessage()]
    assert len(said) == 1 and "momentum.0.weight, momentum.0.bias" in said[0]


def test_a_frozen_network_that_does_not_move_is_not_named(caplog):
    with caplog.at_level(logging.INFO):
        fit(seeded(Momentum, write=lambda parameter: None), ema())
    assert "frozen, but changed" not in caplog.text


def test_include_frozen_averages_it_with_its_statistics():
    callback = ema(decay=Constant(0.5), include_frozen=True, after_fit="live")
    fit(seeded(Momentum, write=WRITES["in place"]), callback, max_epochs=1)
    names = {name for name, _ in callback.average.named_tensors()}
    assert {"momentum.0.weight", "momentum.1.running_mean"} <= names
    assert callback.average.num_updates == BATCHES
