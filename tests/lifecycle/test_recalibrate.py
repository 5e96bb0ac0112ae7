"""buffers=Recalibrate(...): statistics that belong to the average, in evaluations and files, and nowhere else."""

import pytest
import torch
from helpers import BATCHES, Regression, clones, ema, engine, equal, fit, loader, seed_everything, seeded, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, RandomSampler

from lightning_ema import Recalibrate

pytestmark = pytest.mark.filterwarnings("ignore")


class Network(Regression):
    def forward(self, x):
        return self.net(x)


def recalibrating(**kwargs):
    return ema(buffers=Recalibrate(batches=3), **kwargs)


def by_hand(weights):
    """The statistics that torch's own update_bn gives for these weights on the first three training batches."""
    module = Network()
    module.load_state_dict(weights, strict=False)
    torch.optim.swa_utils.update_bn(list(loader())[:3], module)
    return {
        name: value
        for name, value in module.state_dict().items()
        if ".1." in name and "weight" not in name and "bias" not in name
    }


class Sees(Callback):
    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.seen = clones(pl_module.state_dict())


def test_evaluations_see_statistics_of_the_average():
    sees = Sees()
    fit(seeded(Network), recalibrating(), sees)
    expected = by_hand(sees.seen)
    assert len(expected) == 3
    for name, value in expected.items():
        torch.testing.assert_close(sees.seen[name], value)


def test_training_is_untouched():
    finals = []
    for callbacks in ([], [recalibrating(after_fit="live")]):
        module = seeded(Network, dropout=0.3)
        fit(module, *callbacks, val_check_interval=2)
        finals.append((clones(module.state_dict()), torch.get_rng_state()))
    assert equal(finals[0][0], finals[1][0])
    assert torch.equal(finals[0][1], finals[1][1])


def test_a_sampler_with_a_generator_of_its_own_goes_on_as_without():
    finals = []
    for callbacks in ([], [recalibrating(after_fit="live")]):
        module, data = seeded(Network), loader().dataset
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(5))
        seed_everything(3, verbose=False)
        trainer(*callbacks, val_check_interval=2).fit(module, DataLoader(data, 8, sampler=sampler), loader(1))
        finals.append(clones(module.state_dict()))
    assert equal(*finals)


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_best_file_scores_what_the_log_says(weights_only, tmp_path):
    saving = ModelCheckpoint(tmp_path, monitor="val_loss", save_weights_only=weights_only)
    fit(seeded(Network), recalibrating(), saving, enable_checkpointing=True)
    best = Network.load_from_checkpoint(saving.best_model_path)
    (score,) = trainer().validate(best, loader(2), verbose=False)
    assert score["val_loss"] == saving.best_model_score.item()


@pytest.mark.parametrize("after_fit", ["average", "live"])
def test_evaluating_after_fit_scores_the_same(after_fit):
    callback, module = recalibrating(after_fit=after_fit), seeded(Network)
    this = fit(module, callback)
    logged = this.callback_metrics["val_loss"].item()
    (score,) = this.validate(module, loader(2), verbose=False)
    assert score["val_loss"] == logged


@pytest.mark.parametrize("after_fit", ["average", "live"])
@pytest.mark.parametrize("saved", ["epoch=1", "after fit"])
def test_resuming_is_exact(saved, after_fit, tmp_path):
    def end(callback, module):
        return clones(engine(callback.average).named_live()), clones(callback.average.named_tensors()), callback

    class Final(Callback):
        def on_train_end(self, trainer, pl_module):
            self.state = clones(pl_module.state_dict())

    whole, final = recalibrating(), Final()
    fit(
        seeded(Network),
        whole,
        final,
        ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"),
        max_epochs=4,
        enable_checkpointing=True,
    )
    path = tmp_path / "epoch=1.ckpt"
    if saved == "after fit":
        path = tmp_path / "after.ckpt"
        fit(seeded(Network), recalibrating(after_fit=after_fit)).save_checkpoint(path)
    again, final_again = recalibrating(), Final()
    fit(seeded(Network), again, final_again, max_epochs=4, ckpt_path=path)
    assert equal(final.state, final_again.state)
    assert equal(whole.average.named_tensors(), again.average.named_tensors())


def test_a_second_fit_begins_with_the_live_statistics():
    callback, module = recalibrating(), seeded(Network)

    class Ends(Callback):
        def on_train_end(self, trainer, pl_module):
            self.end = clones(pl_module.state_dict())

        def on_train_start(self, trainer, pl_module):
            self.start = clones(pl_module.state_dict())

    first, second = Ends(), Ends()
    fit(module, callback, first)
    assert not equal(module.state_dict(), first.end)
    fit(module, callback, second)
    assert equal(second.start, first.end)
    assert callback.average.num_updates == 4 * BATCHES


def test_an_error_in_a_validation_leaves_the_live_statistics():
    class Fails(Network):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                raise ZeroDivisionError

    class Live(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.state = clones(pl_module.state_dict())

    module, live = seeded(Fails), Live()
    with pytest.raises(ZeroDivisionError):
        fit(module, recalibrating(), live)
    assert equal(module.state_dict(), live.state)


def test_what_cannot_work_is_refused_by_name():
    with pytest.raises(ValueError, match=r"Regression has none. Define forward\(self, x\), or use buffers='average'"):
        fit(seeded(), recalibrating())
    with pytest.raises(ValueError, match="needs one DataLoader for training, not list"):
        trainer(recalibrating()).fit(seeded(Network), [loader()], loader(1))
