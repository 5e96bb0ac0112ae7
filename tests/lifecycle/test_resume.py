"""Promise 3: a run taken up from a file ends bit for bit where the uninterrupted run does."""

import pytest
import torch
from helpers import BATCHES, Regression, clones, ema, engine, equal, fit, loader, schedule_of, seeded, trainer
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ema import Constant, Cosine, EMACallback, Equal, MeanTeacherConfig, MeanTeacherMixin

SITUATIONS = {
    "plain": ({}, {}, {}),
    "no batch norm": ({"norm": False}, {}, {}),
    "dropout-free bf16-true": ({"norm": False}, {"precision": "bf16-true"}, {}),
    "bf16-mixed": ({"norm": False}, {"precision": "bf16-mixed"}, {}),
    "accumulation": ({}, {"accumulate_grad_batches": 4}, {}),
    "copied buffers": ({}, {}, {"buffers": "copy"}),
    "interval": ({}, {}, {"every_n_steps": 5, "decay": Constant(0.99)}),
    "interval longer than the epoch": ({}, {}, {"every_n_steps": 8, "decay": Constant(0.99)}),
    "started by then": ({}, {}, {"start_step": 4}),
    "not started by then": ({}, {}, {"start_step": 15}),
    "start epoch, started": ({}, {}, {"start_epoch": 1}),
    "start epoch, not started": ({}, {}, {"start_epoch": 2}),
    "equal weights": ({}, {}, {"decay": Equal()}),
    "cosine over the run": ({}, {}, {"decay": Cosine(0.5, 1.0)}),
    "evaluated live": ({}, {}, {"evaluate": "live"}),
    "float64 average": ({}, {}, {"dtype": torch.float64}),
    "live after fit": ({}, {}, {"after_fit": "live"}),
}


class Optimizers(Callback):
    def on_train_end(self, trainer, pl_module):
        self.states = [clones(state) for state in trainer.optimizers[0].state_dict()["state"].values()]


def run(module, callback, **kwargs):
    optimizers = Optimizers()
    fit(seeded(**module), callback, optimizers, max_epochs=4, **kwargs)
    average = callback.average
    counters = {k: v for k, v in average.state_dict().items() if isinstance(v, (int, bool))}
    return clones(engine(average).named_live()), clones(average.named_tensors()), counters, optimizers.states


@pytest.mark.filterwarnings("ignore:every_n_steps")
@pytest.mark.parametrize("situation", SITUATIONS)
def test_from_the_end_of_an_epoch(situation, tmp_path):
    module, settings, callback = SITUATIONS[situation]
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    optimizers = Optimizers()
    whole = EMACallback(**{"decay": 0.9, **callback})
    fit(seeded(**module), whole, optimizers, saving, max_epochs=4, enable_checkpointing=True, **settings)
    again = EMACallback(**{"decay": 0.9, **callback})
    live, average, counters, states = run(module, again, ckpt_path=tmp_path / "epoch=1.ckpt", **settings)
    assert equal(live, engine(whole.average).named_live())
    assert equal(average, whole.average.named_tensors())
    assert counters == {k: v for k, v in whole.average.state_dict().items() if isinstance(v, (int, bool))}
    assert all(equal(a, b) for a, b in zip(states, optimizers.states, strict=True))


class OfLength(Regression):
    batches = BATCHES

    def train_dataloader(self):
        return loader(self.batches)


class Taught(MeanTeacherMixin, OfLength):
    mean_teacher = MeanTeacherConfig(decay=Cosine(0.5, 1.0))

    def __init__(self):
        super().__init__()
        self.student = self.net

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), 0.05)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("batches", [BATCHES, 3, 12])
@pytest.mark.parametrize("epochs_end", [True, False], ids=["saved at the end of an epoch", "saved after a validation"])
def test_epochs_of_another_length_from_here_on(batches, epochs_end, taught, tmp_path):
    """As in another number of processes: the length of the whole run is that of the run as it then goes on."""

    def go_on(batches, ckpt_path=None, **kwargs):
        module, callback = seeded(Taught if taught else OfLength), EMACallback(Cosine(0.5, 1.0))
        module.batches = batches
        saving = ModelCheckpoint(tmp_path / str(batches), save_on_train_epoch_end=epochs_end, filename="{epoch}",
                                 save_top_k=-1)  # fmt: skip
        callbacks = [saving] if taught else [callback, saving]
        this = trainer(*callbacks, max_epochs=4, enable_checkpointing=True, **kwargs)
        this.fit(module, val_dataloaders=loader(2), ckpt_path=ckpt_path)
        average = module.teacher_callback.average if taught else callback.average
        return this.global_step, schedule_of(average).total_steps

    assert go_on(BATCHES) == (24, 24)
    taken, known = go_on(batches, tmp_path / str(BATCHES) / "epoch=0.ckpt")
    # Lightning goes on at batch 6 of an epoch that was saved before its end, where there is one
    assert taken == 6 + 3 * batches + (6 if batches == 12 and not epochs_end else 0)
    assert known == taken
    again = go_on(batches, tmp_path / str(batches) / "epoch=2.ckpt")
    assert again == (taken, taken)


BATCH_ORDERS = {
    "in order": (lambda data: DataLoader(data, 8), 0.0, True),
    "a sampler seeded by the epoch": (
        lambda data: DataLoader(data, 8, sampler=DistributedSampler(data, num_replicas=1, rank=0)),
        0.0,
        True,
    ),
    "shuffled": (lambda data: DataLoader(data, 8, shuffle=True), 0.0, False),
    "dropout": (lambda data: DataLoader(data, 8), 0.5, False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", BATCH_ORDERS)
def test_random_numbers_are_the_loaders_and_the_modules_own(order, tmp_path):
    make, dropout, repeats = BATCH_ORDERS[order]
    batches = make(loader().dataset)

    def ends(**kwargs):
        callback, module = ema(after_fit="live"), seeded(dropout=dropout)
        saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", enable_version_counter=False)
        seed_everything(5, verbose=False)
        trainer(callback, saving, max_epochs=3, enable_checkpointing=True).fit(module, batches, **kwargs)
        return clones(engine(callback.average).named_live())

    whole = ends()
    assert equal(ends(ckpt_path=tmp_path / "epoch=1.ckpt"), whole) is repeats


def test_fit_twice_goes_on_from_the_live_weights():
    whole = ema()
    fit(seeded(), whole, max_epochs=4)
    halves, module = ema(), seeded()
    this = fit(module, halves, max_epochs=2)
    assert not equal(engine(halves.average).named_live(), halves.average.named_tensors())
    this.fit_loop.max_epochs = 4
    this.fit(module, loader(), loader(2))
    # the optimizer is made anew by a second fit, so only the counters and the start can be compared
    assert halves.average.num_updates == whole.average.num_updates == 4 * BATCHES


@pytest.mark.parametrize("after_fit", ["average", "live"])
def test_a_second_fit_begins_with_the_live_weights(after_fit):
    callback, module = ema(after_fit=after_fit), seeded()
    fit(module, callback)
    live = clones(engine(callback.average).named_live())
    seen = {}

    class First(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update(clones(pl_module.state_dict()))

    fit(module, callback, First())
    assert equal({name: seen[name] for name in live}, live)
    assert callback.average.num_updates == 4 * BATCHES


@pytest.mark.parametrize("after_fit", ["average", "live"])
def test_weights_that_the_user_loads_between_two_fits_count(after_fit, caplog):
    callback, module = ema(after_fit=after_fit), seeded()
    fit(module, callback)
    loaded = seeded().state_dict()
    module.load_state_dict(loaded)
    seen = {}

    class First(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update(clones(pl_module.state_dict()))

    with caplog.at_level("INFO"):
        fit(module, callback, First())
    assert equal(seen, loaded)
    assert callback.average.num_updates == 2 * BATCHES
    assert "changed since the end of training" in caplog.text


def test_another_module_starts_anew():
    callback = ema()
    fit(seeded(), callback)
    other = seeded(norm=False)
    fit(other, callback)
    assert engine(callback.average).module is other
    assert callback.average.num_updates == 2 * BATCHES


def test_a_plain_checkpoint_is_gone_on_from(tmp_path, caplog):
    fit(seeded()).save_checkpoint(tmp_path / "plain.ckpt")
    callback = ema()
    with caplog.at_level("INFO"):
        fit(seeded(), callback, max_epochs=3, ckpt_path=tmp_path / "plain.ckpt")
    assert callback.average.num_updates == BATCHES


def test_a_resume_says_where_the_average_goes_on(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(seeded(), ema(start_step=2)).save_checkpoint(tmp_path / "x.ckpt")
        assert not [text for text in caplog.messages if "goes on" in text]
        fit(seeded(), ema(start_step=2), max_epochs=3, ckpt_path=tmp_path / "x.ckpt")
    said = [text for text in caplog.messages if "goes on" in text]
    assert said == [f"EMACallback 'ema': goes on at step {2 * BATCHES}, {2 * BATCHES - 2} updates."]


def test_a_file_whose_average_has_another_name_is_refused(tmp_path):
    fit(seeded(), ema(name="slow")).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(
        ValueError, match=r"no average under EMACallback\{'name': 'ema'\}, but under EMACallback\{'name': 'slow'\}"
    ):
        fit(seeded(), ema(), max_epochs=3, ckpt_path=tmp_path / "x.ckpt")


def test_evaluating_a_file_leaves_the_callback_as_it_is(tmp_path):
    callback, module = ema(after_fit="live"), seeded()
    this = fit(module, callback)
    this.save_checkpoint(tmp_path / "x.ckpt")
    other = ema()
    trainer(other).validate(seeded(), loader(1), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert other.average is None


def test_the_deliverable_loads_without_the_library(tmp_path):
    callback, module = ema(), seeded()
    fit(module, callback).save_checkpoint(tmp_path / "x.ckpt")
    assert equal(Regression.load_from_checkpoint(tmp_path / "x.ckpt").state_dict(), module.state_dict())
