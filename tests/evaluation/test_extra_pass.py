"""The second pass against a separate evaluation of the same weights; the first against one without a second."""

import multiprocessing
import random
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import Regression, seed_everything, seeded, trainer
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from twice import (
    Accuracy,
    Collection,
    CollectionComputedAtTheEnd,
    CollectionWithoutGroups,
    CountsInAnInteger,
    DrawsRandomNumbers,
    Gathers,
    GathersFromItsStart,
    LogsThroughASubmodule,
    MeanAttribute,
    MetricsInPlainDict,
    NeverReset,
    NoBatchIndex,
    PrefixesNames,
    ReadsTheTrainer,
    Reductions,
    TakesTheIterator,
    TransfersBatches,
    Twice,
    Wrappers,
    WritesBuffers,
    double,
)

from lightning_ema.evaluation.extra_pass import check, evaluate_again, log_again

pytestmark = pytest.mark.filterwarnings("ignore")


class Batches(DataLoader):
    """Three batches of eight and one of three."""

    def __init__(self, seed=0, count=27, **kwargs):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 4, generator=generator)
        super().__init__(TensorDataset(x, x.sum(1, keepdim=True).sin()), kwargs.pop("batch_size", 8), **kwargs)


def evaluate(make, loaders, *callbacks, doubled=False, run="validate", **kwargs):
    module = seeded(make)
    if doubled:
        double(module)
    this = trainer(*callbacks, **kwargs)
    loaders = loaders() if callable(loaders) else loaders
    seed_everything(5, verbose=False)
    data = {"datamodule": loaders} if isinstance(loaders, LightningDataModule) else {"dataloaders": loaders}
    returned = getattr(this, run)(module, **data, verbose=False)
    return {name: value.clone() for name, value in this.callback_metrics.items()}, returned, module


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(torch.as_tensor(first[name]), torch.as_tensor(second[name])) or (
            torch.as_tensor(first[name]).isnan() and torch.as_tensor(second[name]).isnan()
        ), name


def live(name):
    base, mark, index = name.partition("/dataloader_idx_")
    return f"{base}_live{mark}{index}"


def compare(make, loaders=Batches, **kwargs):
    """Both passes against evaluations of their own, in values, names, what is returned, and the module's state."""
    alone, returned_alone, module_alone = evaluate(make, loaders, **kwargs)
    expected, returned_expected, _ = evaluate(make, loaders, doubled=True, **kwargs)
    twice = Twice()
    both, returned, module = evaluate(make, loaders, twice, **kwargs)
    again = {result.name: result.value for result in twice.passes[-1]}
    same(again, expected)
    same({name: value for name, value in both.items() if name in alone}, alone)
    same({name: value for name, value in both.items() if name not in alone}, {live(k): v for k, v in expected.items()})
    for one, one_alone, one_expected in zip(returned, returned_alone, returned_expected, strict=True):
        assert {k: v for k, v in one.items() if "_live" not in k} == pytest.approx(one_alone, rel=0, abs=0, nan_ok=True)
        one_live = {k: v for k, v in one.items() if "_live" in k}
        assert one_live == pytest.approx({live(k): v for k, v in one_expected.items()}, rel=0, abs=0, nan_ok=True)
    same(module.state_dict(), module_alone.state_dict())
    return module, module_alone, again


MODULES = [
    *(Regression, MeanAttribute, Accuracy, Collection, CollectionWithoutGroups, CollectionComputedAtTheEnd),
    *(MetricsInPlainDict, Wrappers, Gathers, GathersFromItsStart, NeverReset, Reductions, CountsInAnInteger),
    *(WritesBuffers, LogsThroughASubmodule, PrefixesNames, TransfersBatches, DrawsRandomNumbers),
    *(TakesTheIterator, NoBatchIndex),
]


@pytest.mark.parametrize("make", MODULES, ids=lambda kind: kind.__name__)
def test_both_passes_give_what_separate_evaluations_give(make):
    compare(make)


def test_a_module_that_reads_what_the_trainer_has():
    class Nothing(Callback):
        pass

    alone, _, _ = evaluate(ReadsTheTrainer, Batches, Nothing())
    twice = Twice()
    evaluate(ReadsTheTrainer, Batches, twice)
    values = {result.name: result.value for result in twice.passes[0]}
    assert values["squared"] == values["loss"] ** 2 != alone["squared"]
    assert values["before"] == alone["before"]


class SeveralLoaders(MeanAttribute):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = self.loss(batch)
        self.mean(loss)
        self.log("mean", self.mean)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log(f"own/{dataloader_idx}", loss, add_dataloader_idx=False)

    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self.last = dataloader_idx

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        assert self.last == dataloader_idx

    def on_validation_epoch_end(self):
        self.log("last", float(self.last))


class OwnNames(Regression):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log(f"own/{dataloader_idx}", self.loss(batch), add_dataloader_idx=False)
        self.log("unseen", self.loss(batch), logger=False)


class Combined(Regression):
    def validation_step(self, batch, batch_idx):
        parts = batch.values() if isinstance(batch, dict) else batch
        losses = [self.loss(part) for part in parts if part is not None]
        self.log("sum", sum(losses))
        self.log("several", float(len(losses)))


class Data(LightningDataModule):
    def val_dataloader(self):
        self.asked = getattr(self, "asked", 0) + 1
        return Batches()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] - 1, batch[1]]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Batches().dataset)


class Once(IterableDataset):
    def __init__(self):
        self.rows = iter(Batches().dataset)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.rows)


class Rows:
    """Neither a DataLoader nor an iterator."""

    def __iter__(self):
        return iter(Batches())


LOADERS = {
    "a list": (SeveralLoaders, lambda: [Batches(), Batches(1, 13)]),
    "names of the user's": (OwnNames, lambda: [Batches(), Batches(1, 13)]),
    "a dict": (SeveralLoaders, lambda: {"a": Batches(), "b": Batches(1, 13)}),
    "an empty one among them": (SeveralLoaders, lambda: [Batches(), Batches(1, 0), Batches(2, 9)]),
    "one in a list": (SeveralLoaders, lambda: [Batches()]),
    "combined in sequence": (SeveralLoaders, lambda: CombinedLoader([Batches(), Batches(1, 13)], "sequential")),
    **{
        mode: (Combined, lambda mode=mode: CombinedLoader([Batches(), Batches(1, 13)], mode))
        for mode in ("min_size", "max_size", "max_size_cycle")
    },
    "combined as a dict": (Combined, lambda: CombinedLoader({"a": Batches(), "b": Batches(1, 13)}, "max_size")),
    "a datamodule": (Regression, Data),
    "a stream": (Regression, lambda: DataLoader(Stream(), 8)),
    "an iterable of the user's": (Regression, Rows),
    "shuffled": (DrawsRandomNumbers, lambda: Batches(shuffle=True)),
    "shuffled by its own generator": (Regression, lambda: Batches(shuffle=True, generator=torch.Generator())),
    "workers with a stream each": (
        Regression,
        lambda: DataLoader(Once(), 8, num_workers=1, multiprocessing_context="fork"),
    ),
    "workers": (Regression, lambda: Batches(num_workers=1, multiprocessing_context="fork")),
    "workers that stay": (
        MeanAttribute,
        lambda: Batches(num_workers=1, multiprocessing_context="fork", persistent_workers=True),
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_loaders(kind):
    compare(*LOADERS[kind])


@pytest.mark.parametrize("limit", [1, 2, 0.5, 100])
def test_limits(limit):
    compare(SeveralLoaders, LOADERS["a list"][1], limit_val_batches=limit)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed", "16-true", "64-true"])
@pytest.mark.parametrize("make", [Accuracy, WritesBuffers])
def test_precisions(make, precision):
    compare(make, precision=precision)


@pytest.mark.parametrize("settings", [{"inference_mode": False}, {"fast_dev_run": 2}, {"barebones": True}], ids=str)
def test_settings_of_the_trainer(settings):
    if "barebones" in settings:
        settings = {"enable_progress_bar": False, "barebones": True}
    compare(Regression, **settings)


def test_a_test_run():
    expected, _, _ = evaluate(Regression, Batches, doubled=True, run="test")
    both, returned, _ = evaluate(Regression, Batches, Twice(), run="test")
    alone, _, _ = evaluate(Regression, Batches, run="test")
    assert both == {"test_loss": alone["test_loss"], "test_loss_live": expected["test_loss"]}
    assert returned == [{name: value.item() for name, value in both.items()}]


def test_a_second_pass_with_the_same_weights_sees_the_same_random_numbers():
    """Shuffling, dropout and noise of both passes are the same, so a difference is one of the weights."""
    both, _, _ = evaluate(DrawsRandomNumbers, lambda: Batches(shuffle=True), Twice(factor=1.0))
    assert both["loss"] == both["loss_live"]


def test_random_states_are_those_of_one_pass():
    states = []
    for callbacks in ([], [Twice()]):
        generator = torch.Generator()
        loaders = Batches(shuffle=True, generator=generator)
        _, _, module = evaluate(DrawsRandomNumbers, loaders, *callbacks)
        draws = torch.rand(1), random.random(), np.random.rand()
        states.append((*draws, torch.rand(1, generator=generator), torch.rand(1, generator=module.generator)))
    assert states[0] == states[1]


def test_random_states_come_back_where_other_weights_draw_more():
    class DrawsMore(Regression):
        def validation_step(self, batch, batch_idx):
            torch.rand(int(self.net[0].weight.abs().max() * 100))
            self.log("val_loss", self.loss(batch))

    draws = []
    for callbacks in ([], [Twice()]):
        evaluate(DrawsMore, Batches, *callbacks)
        draws.append(torch.rand(1))
    assert draws[0] == draws[1]


def test_workers_of_the_second_pass_end_with_it():
    class Counts(Twice):
        def on_validation_epoch_end(self, trainer, pl_module):
            before = multiprocessing.active_children()
            super().on_validation_epoch_end(trainer, pl_module)
            counts.append((len(before), len(multiprocessing.active_children())))

    counts = []
    evaluate(*LOADERS["workers that stay"], Counts())
    assert counts == [(1, 1)]


def test_one_table_is_printed(capsys):
    trainer(Twice()).validate(seeded(), Batches(), verbose=True)
    printed = capsys.readouterr().out
    assert printed.count("Validate metric") == printed.count("val_loss_live") == 1


def test_whole_numbers():
    class Renames(Twice):
        def on_validation_epoch_end(self, trainer, pl_module):
            log_again(pl_module, evaluate_again(trainer, pl_module, self.begun, nullcontext()), "_again")

    with warnings.catch_warnings():  # Lightning warns once for each name
        warnings.filterwarnings("error", message=".*needs to be floating")
        both, _, _ = evaluate(CountsInAnInteger, Batches, Renames())
    assert both["items"] == both["items_again"] == 27


def test_the_progress_bar_shows_of_the_second_pass_what_it_shows_of_the_first():
    shown = {}

    class Shows(Callback):
        def on_validation_end(self, trainer, pl_module):
            shown.update(trainer.progress_bar_metrics)

    evaluate(Reductions, Batches, Shows(), Twice())
    assert {name for name in shown if "live" in name} == {"silent_live"}


def test_several_passes_in_one_evaluation():
    class Thrice(Twice):
        def on_validation_epoch_end(self, trainer, pl_module):
            for _ in range(2):
                super().on_validation_epoch_end(trainer, pl_module)

    twice = Thrice()
    both, _, _ = evaluate(Gathers, Batches, twice)
    expected, _, _ = evaluate(Gathers, Batches, doubled=True)
    first, second = ({result.name: result.value for result in results} for results in twice.passes)
    same(first, expected)
    same(second, expected)
    assert both["mean_live"] == expected["mean"]
    thrice = Thrice()
    evaluate(ReadsTheTrainer, Batches, thrice)
    first, second = ({result.name: result.value for result in results} for results in thrice.passes)
    same(first, second)


def test_no_hook_of_a_callback_is_called_and_the_module_sees_its_trainer():
    calls, seen = [], []

    class Counts(Callback):
        def __getattribute__(self, name):
            if name.startswith("on_validation"):
                calls.append(name)
            return super().__getattribute__(name)

    class Looks(Regression):
        def on_validation_epoch_end(self):
            seen.append((len(self.trainer.callbacks), self.trainer.current_epoch, self.trainer.should_stop))
            self.trainer.should_stop = True

    evaluate(Looks, Batches, Counts(), Twice())
    assert len(calls) == len(set(calls) - {"on_validation_batch_start", "on_validation_batch_end"}) + 2 * 4
    assert seen == [(2, 0, False), (2, 0, False)]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["validation_step", "on_validation_epoch_end", "on_validation_end", "loader"])
def test_an_exception_in_the_second_pass_goes_on_and_leaves_nothing_behind(error, where):
    class Fails(Gathers):
        def fails(self, here):
            if here == where and self.net[0].weight.abs().max() > 0.75:  # below: a quarter of a layer of four inputs
                raise error

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if batch_idx == 2:
                self.fails("validation_step")
            return {"loss": self.loss(batch), "batch": batch_idx}

        def on_validation_epoch_end(self):
            self.fails("on_validation_epoch_end")
            super().on_validation_epoch_end()

        def on_validation_end(self):
            self.fails("on_validation_end")

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.fails("loader")
            return batch

    class Catches(Twice):
        def on_validation_epoch_end(self, trainer, pl_module):
            loop, metrics, state = trainer.validate_loop, trainer._logger_connector, torch.get_rng_state()
            outputs, names = list(pl_module.outputs), set(vars(pl_module))
            with pytest.raises(type(error)) as raised:
                super().on_validation_epoch_end(trainer, pl_module)
            assert raised.value is error
            assert trainer.validate_loop is loop and trainer._logger_connector is metrics
            assert torch.equal(torch.get_rng_state(), state)
            assert len(pl_module.outputs) == len(outputs) == 4
            assert all(one is other for one, other in zip(pl_module.outputs, outputs, strict=True))
            assert set(vars(pl_module)) == names
            assert pl_module._current_fx_name == "on_validation_epoch_end"

    alone, _, _ = evaluate(Gathers, Batches)
    beside, _, _ = evaluate(Fails, Batches, Catches())
    same(beside, alone)


class OnceHidden(IterableDataset):
    def __init__(self):
        self.rows = iter(Batches().dataset)

    def __iter__(self):
        return self.rows


@pytest.mark.parametrize("loaders", [lambda: DataLoader(Once(), 8), lambda: [iter(list(Batches()))]])
def test_data_that_can_be_passed_over_once_are_refused(loaders):
    with pytest.raises(ValueError, match=r"over the data several times, and (Once|list_iterator) is an iterator"):
        evaluate(Regression, loaders, Twice())


def test_data_that_turn_out_to_be_used_up():
    with pytest.raises(RuntimeError, match="gave no batch in a further pass"):
        evaluate(Regression, lambda: DataLoader(OnceHidden(), 8), Twice())


def test_results_say_how_a_value_was_logged():
    twice = Twice()
    evaluate(Reductions, Batches, twice)
    flags = {r.name: (r.prog_bar, r.logger, r.synced, r.rank_zero_only) for r in twice.passes[0]}
    assert "stepwise" not in flags
    assert flags["mean"] == (False, True, False, False)
    assert flags["silent"] == (True, False, False, False)
    assert flags["rank_zero"] == (False, True, False, True)
    assert (flags["both"], flags["both_epoch"]) == ((False, False, False, False), (False, True, False, False))
    evaluate(MeanAttribute, Batches, twice)
    assert twice.passes[1][0].synced  # a metric synchronizes itself
    assert {result.group for results in twice.passes for result in results} == {None}


@pytest.mark.parametrize("suffix", ["", "_epoch"], ids=["the same", "another's"])
def test_names_that_collide_are_refused(suffix):
    class Renames(Twice):
        def on_validation_epoch_end(self, trainer, pl_module):
            log_again(pl_module, evaluate_again(trainer, pl_module, self.begun, nullcontext()), suffix)

    with pytest.raises(ValueError, match=r"would be logged once more .* taken by another value that Reductions logs"):
        evaluate(Reductions, Batches, Renames())


def test_a_name_that_only_the_modules_last_hook_logs():
    class Collides(Regression):
        def on_validation_epoch_end(self):
            self.log("val_loss_live", 1.0)

    with pytest.raises(ValueError, match="'val_loss' would be logged once more as 'val_loss_live'"):
        evaluate(Collides, Batches, Twice())


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "Other"])
def test_other_strategies_are_refused_by_name(name):
    from lightning.pytorch.strategies import DDPStrategy

    this = trainer()
    bases = (DDPStrategy,) if name == "DeepSpeedStrategy" else ()
    this._accelerator_connector.strategy = object.__new__(type(name, bases, {}))
    with pytest.raises(ValueError, match=f"does not work with {name}.*Use one of these, or leave evaluate='both' out"):
        check(this, "evaluate='both'")


def test_ddp_and_what_derives_from_it_are_accepted():
    from lightning.pytorch.strategies import DDPStrategy

    this = trainer()
    this._accelerator_connector.strategy = object.__new__(type("Mine", (DDPStrategy,), {}))
    check(this, "evaluate='both'")


def test_a_version_of_lightning_whose_loop_is_another_is_refused():
    this = trainer()
    del this.validate_loop._combined_loader
    with pytest.raises(ValueError, match=r"whose evaluation loop has no _combined_loader. Leave evaluate='both' out"):
        check(this, "evaluate='both'")
