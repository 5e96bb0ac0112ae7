"""Run by test_ddp_runs: whole runs of a Trainer under DDP in 2 processes, and loading what they wrote in 1 and 4.

Each process writes how the checks ended to <folder>/<processes>-<rank>.json.
"""

import datetime
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
import torch.distributed as dist
from forked import fork, run_checks
from helpers import Regression, clones, engine, equal, loader, schedule_of, seed_everything, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_ema import Bema, Constant, EMACallback, Select, Snapshots, SwitchEMA

LIMIT = datetime.timedelta(seconds=30)  # a process that waits for another in vain says so


class Net(Regression):
    """Other weights in each process, before DDP makes them those of the first."""

    def __init__(self, norm=True, lr=0.05):
        super().__init__(norm=norm, lr=lr)
        torch.manual_seed(100 + (dist.get_rank() if dist.is_initialized() else 0))
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.5)

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)


class FirstOnly(Net):
    """One layer is used in every second step only."""

    def __init__(self):
        super().__init__(norm=False)
        self.extra = torch.nn.Linear(4, 1)

    def loss(self, batch):
        x, y = batch
        extra = self.extra(x) if self.global_step % 2 else 0
        return torch.nn.functional.mse_loss(self.net(x) + extra, y)


class Twice(Net):
    """One layer takes part twice, each time recomputed: without ``static_graph`` DDP refuses it."""

    def __init__(self):
        super().__init__(norm=False)
        self.again = torch.nn.Linear(4, 4)

    def loss(self, batch):
        x, y = batch
        x = x.clone().requires_grad_()
        for _ in range(2):
            x = checkpoint(self.again, x, use_reentrant=True)
        return torch.nn.functional.mse_loss(self.net(x), y)


class ByStep(Net):
    """Each step has its own samples: Lightning begins an epoch's data anew where it resumes in the middle of one."""

    def training_step(self, batch, batch_idx):
        data, first = loader(9).dataset, 8 * self.global_step + self.global_rank
        return self.loss(data[first : first + 8 : 2])


class ByHand(Callback):
    """The average of parameters and statistics, in this process, worked out after each step of the optimizer."""

    def __init__(self, decay=0.5):
        self.decay, self.steps = decay, 0

    def on_train_start(self, trainer, pl_module):
        self.average = clones(floats_of(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            for name, live in floats_of(pl_module).items():
                self.average[name].mul_(self.decay).add_(live, alpha=1 - self.decay)


class Carried(Callback):
    """What the module carries in each validation, before and after the forward passes, beside what each stores."""

    def __init__(self, by_hand):
        self.by_hand, self.seen, self.live = by_hand, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.live.append(clones(pl_module.state_dict()))

    def on_validation_epoch_start(self, trainer, pl_module):
        self.seen.append((clones(self.by_hand.average), clones(floats_of(pl_module))))

    def on_validation_epoch_end(self, trainer, pl_module):
        self.seen.append((clones(self.by_hand.average), clones(floats_of(pl_module))))


def floats_of(module):
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def ddp(**kwargs):
    return DDPStrategy(process_group_backend="gloo", timeout=LIMIT, **kwargs)


def fit(module, *callbacks, devices=2, epochs=2, ckpt_path=None, batches=3, samples=None, ddp_kwargs=None, **kwargs):
    """Fits on the same global batches of 8 samples, whatever the number of processes; gives the trainer."""
    seed_everything(3, verbose=False)
    strategy = "auto" if devices == 1 else ddp(**(ddp_kwargs or {}))
    this = trainer(
        *callbacks, strategy=strategy, devices=devices, **{"max_epochs": epochs, "num_sanity_val_steps": 0, **kwargs}
    )
    data = loader(batches).dataset if samples is None else TensorDataset(*loader(9).dataset[:samples])
    sampler = DistributedSampler(data, shuffle=False) if devices > 1 else None
    this.fit(
        module,
        DataLoader(data, 8 // devices, sampler=sampler),
        DataLoader(loader(1).dataset, 8 // devices),
        ckpt_path=ckpt_path,
    )
    return this


def averaging(decay=None, **kwargs):
    return EMACallback(decay or [Constant(0.5), Constant(0.8)], **kwargs)


def of_all(value):
    """The values of all processes, in the order of their ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def alike_everywhere(named):
    return all(equal(named, other) for other in of_all(clones(named)))


def parameters_of(average):
    return {name: tensor for name, tensor in average.named_tensors() if "running" not in name}


def largest_difference(first, second):
    return max((first[name].double() - second[name].double()).abs().max().item() for name in second)


def report(folder, rank, **differences):
    if rank == 0:
        with (Path(folder) / "differences.txt").open("a") as file:
            file.write(f"{differences}\n")


# --- the averages ---------------------------------------------------------------------------------------------------


def check_averages_of_unseeded_processes(rank, processes, folder):
    """The same in each process bit for bit, and those of a single process on the same global batches."""
    single, initial = averaging(), {}
    module = Net(norm=False)
    initial = of_all(clones(module.state_dict()))
    assert not equal(initial[0], initial[1])
    alone = Net(norm=False)
    alone.load_state_dict(initial[0])
    fit(alone, single, devices=1)
    for shard in (False, True):
        callback = averaging(shard=shard)
        fit(module if shard else Net(norm=False), callback)
        for average, expected in zip(callback.averages, single.averages, strict=True):
            named = dict(average.named_tensors())
            assert alike_everywhere(named)
            difference = largest_difference(named, dict(expected.named_tensors()))
            report(folder, rank, shard=shard, decay=repr(schedule_of(average)), difference=difference)
            assert difference <= 1e-6
    assert equal(module.state_dict(), callback.average.named_tensors())  # applied
    pairs = list(callback.average._tracker.tensors.pairs())
    assert sum(pair.averages[0].numel() for pair in pairs) in (24, 25)  # of 49
    assert all(pair.averages[0].numel() < 32 for pair in pairs)


def check_modes_of_ddp(rank, processes, folder):
    """Averages are those of the live weights, at each step of the optimizer, and those of a single process."""
    modes = [
        (FirstOnly, {"find_unused_parameters": True}, {}, 6),
        (Twice, {"static_graph": True}, {}, 6),
        (lambda: Net(norm=False), {"gradient_as_bucket_view": True}, {"gradient_clip_val": 0.1}, 6),
        (lambda: Net(norm=False), {}, {"accumulate_grad_batches": 2, "samples": 40}, 6),
        (lambda: Net(norm=False), {}, {"samples": 21}, 6),  # an uneven last batch, padded by the sampler
        (lambda: Net(norm=False), {}, {"precision": "bf16-mixed"}, 6),
    ]
    for make, ddp_kwargs, kwargs, steps in modes:
        module, callback, by_hand = make(), averaging(shard=True), ByHand()
        first = of_all(clones(module.state_dict()))[0]
        this = fit(module, callback, by_hand, ddp_kwargs=ddp_kwargs, **kwargs)
        named = dict(callback.average.named_tensors())
        assert callback.average.num_steps == this.global_step == steps
        assert alike_everywhere(named)
        assert largest_difference(named, by_hand.average) <= 1e-7
        if kwargs.get("samples") != 21:  # padded samples count twice
            module, single = make(), averaging()
            module.load_state_dict(first)
            fit(module, single, devices=1, **kwargs)
            difference = largest_difference(named, dict(single.average.named_tensors()))
            report(folder, rank, mode=[ddp_kwargs, kwargs], difference=difference)
            assert difference <= (1e-3 if "precision" in kwargs else 1e-6)


def check_statistics(rank, processes, folder):
    """At each swap and each save all have the first process's statistics, or the mean; each stores its own."""
    for shard, broadcast in ((False, True), (False, False), (True, False)):
        callback, by_hand = averaging(shard=shard), ByHand()
        carried, module = Carried(by_hand), Net()
        this = fit(module, callback, by_hand, carried, ddp_kwargs={"broadcast_buffers": broadcast})
        own = {name: tensor for name, tensor in callback.average.named_tensors() if "running" in name}
        assert len(carried.seen) == 4 and len(own) == 2
        live = carried.live[-1]
        this.save_checkpoint(Path(folder) / "x.ckpt")
        saved = torch.load(Path(folder) / "x.ckpt", weights_only=True)
        for average, seen in [
            *carried.seen,
            (by_hand.average, saved["state_dict"]),
            (by_hand.average, module.state_dict()),
        ]:
            averages = of_all(average)
            for name in averages[0]:
                if "running" in name:
                    assert not torch.equal(averages[0][name], averages[1][name])
                    expected = averages[0][name] if broadcast else (averages[0][name] + averages[1][name]) / 2
                else:
                    expected = average[name]
                assert torch.allclose(seen[name], expected, rtol=0, atol=1e-7), name
            assert alike_everywhere({name: seen[name] for name in average})
        callback.average.restore()
        assert equal(module.state_dict(), live)
        stored = {n: t for n, t in callback.average.named_tensors() if n in own}
        assert largest_difference(stored, {name: by_hand.average[name] for name in own}) <= 1e-7
        assert not alike_everywhere(stored)


def check_statistics_in_an_evaluation_afterwards(rank, processes, folder):
    """DDP wraps the module in a fit only, so that nothing else would make the statistics alike."""
    for broadcast in (True, False):
        callback, by_hand = averaging(shard=True, after_fit="live"), ByHand()
        module, carried = Net(), Carried(by_hand)
        this = fit(module, callback, by_hand, carried, ddp_kwargs={"broadcast_buffers": broadcast})
        assert equal(module.state_dict(), carried.live[-1])
        carried.seen.clear()
        this.validate(module, loader(2, 4), verbose=False)
        averages = of_all(by_hand.average)
        for _, seen in carried.seen:
            for name in ("net.1.running_mean", "net.1.running_var"):
                expected = averages[0][name] if broadcast else (averages[0][name] + averages[1][name]) / 2
                assert torch.allclose(seen[name], expected, rtol=0, atol=1e-7), name
        # Lightning itself has given all processes the live weights of the first one
        assert len(carried.seen) == 2 and equal(module.state_dict(), of_all(carried.live[-1])[0])


def check_recalibrated_statistics(rank, processes, folder):
    """The mean over the batches of all processes."""
    for broadcast in (True, False):
        callback, by_hand = averaging(buffers="recalibrate"), ByHand()
        carried, module = Carried(by_hand), Net()
        this = fit(module, callback, by_hand, carried, ddp_kwargs={"broadcast_buffers": broadcast})
        for _, seen in carried.seen:
            assert alike_everywhere(seen)
        this.save_checkpoint(Path(folder) / "x.ckpt")
        assert equal(torch.load(Path(folder) / "x.ckpt", weights_only=True)["state_dict"], module.state_dict())
        reference = Net()
        reference.load_state_dict(
            {**module.state_dict(), **{n: by_hand.average[n] for n, _ in module.named_parameters()}}
        )
        batches = [batch for other in range(2) for batch in torch.arange(24)[other::2].split(4)]
        data = loader(3).dataset
        with torch.no_grad():
            torch.optim.swa_utils.update_bn([data[batch][0] for batch in batches], reference)
        assert largest_difference(module.state_dict(), floats_of(reference)) <= 1e-6


# --- files ----------------------------------------------------------------------------------------------------------


def check_files(rank, processes, folder):
    """Those of a shared average are those of a whole one, also where the average is wider than the model."""
    for norm, dtype, decay in ((True, None, None), (False, torch.float64, None), (True, None, Bema(kappa=0.5))):
        entries, states = [], []
        for shard in (False, True):
            path = Path(folder) / f"{'shared' if shard else 'whole'}.ckpt"
            callback = averaging(decay, shard=shard, dtype=dtype)
            this = fit(Net(norm=norm), callback)
            this.save_checkpoint(path)
            file = torch.load(path, weights_only=True)
            entries.append(file["callbacks"][callback.state_key])
            states.append(file["state_dict"])
            assert equal(file["state_dict"], this.lightning_module.state_dict())
        assert equal(*states)
        first, second = entries
        assert first.keys() == second.keys() and first["names"] == second["names"]
        for key in ("average", "live", "origin"):
            assert equal(first[key], second[key])
        assert all(equal(a, b) for a, b in zip(first["further"], second["further"], strict=True))
        assert {k: first[k] for k in first if k.startswith(("num", "bias", "decay"))} == {
            k: second[k] for k in second if k.startswith(("num", "bias", "decay"))
        }
        assert bool(first["average"]) == (dtype is not None or decay is not None)
    callback = averaging(shard=True)
    this = fit(Net(), callback)
    this.save_checkpoint(Path(folder) / "shared.ckpt")
    averages = [clones(parameters_of(average)) for average in callback.averages]
    torch.save(averages, Path(folder) / f"averages-{rank}.pt")


def check_resume(rank, processes, folder):
    """Bit for bit, at the end of an epoch and in the middle of one."""
    for shard, kwargs in ((True, {}), (False, {}), (True, {"every_n_train_steps": 2})):
        path = Path(folder) / "resume"
        keep = ModelCheckpoint(path, save_top_k=-1, filename="{step}", enable_version_counter=False, **kwargs)
        whole, again = averaging(shard=shard), averaging(shard=shard)
        modules = ByStep(), ByStep()
        fit(modules[0], whole, keep, epochs=5, max_steps=9, enable_checkpointing=True)
        step = 4 if kwargs else 6
        # an epoch may begin anew, or be skipped: only steps tell when the run is over
        fit(modules[1], again, epochs=5, max_steps=9, ckpt_path=path / f"step={step}.ckpt")
        for one, other in zip(whole.averages, again.averages, strict=True):
            assert equal(parameters_of(one), parameters_of(other))
            assert equal(*of_all(parameters_of(other)))
        assert (whole.average.num_steps, whole.average.num_updates) == (9, 9)
        assert equal(*(m.state_dict() for m in modules))
        assert alike_everywhere(modules[1].state_dict())


def check_best_last_and_weights_only(rank, processes, folder):
    path = Path(folder) / "kept"
    best = ModelCheckpoint(path, monitor="val_loss", save_last=True, filename="best")
    weights = ModelCheckpoint(path, save_weights_only=True, filename="weights")
    callback, module = averaging(shard=True), Net()
    this = fit(module, callback, best, weights, enable_checkpointing=True)
    (result,) = this.validate(module, loader(2, 4), verbose=False)
    kept = {name: torch.load(path / f"{name}.ckpt", weights_only=True) for name in ("best", "last", "weights")}
    assert "callbacks" not in kept["weights"]
    assert equal(kept["weights"]["state_dict"], module.state_dict())
    again = averaging(shard=True)
    fit(Net(), again, ckpt_path=path / "last.ckpt")
    assert equal(parameters_of(again.average), parameters_of(callback.average))
    module.load_state_dict(kept["best"]["state_dict"])
    (scored,) = trainer(devices=1).validate(module, loader(1), verbose=False)
    assert scored["val_loss"] == pytest.approx(best.best_model_score.item(), abs=1e-6)
    assert result["val_loss"] == pytest.approx(this.callback_metrics["val_loss"].item())


def check_a_file_of_weight_averaging(rank, processes, folder):
    """Lightning's file has no weights at the start, which a schedule that corrects needs in every process."""
    path, module = Path(folder) / "lightning.ckpt", Net()
    fit(module, epochs=1).save_checkpoint(path)
    if rank == 0:
        file = torch.load(path, weights_only=True)
        file["current_model_state"] = {name: tensor + 1 for name, tensor in file["state_dict"].items()}
        file["averaging_state"] = {"n_averaged": torch.tensor(2)}
        torch.save(file, path)
    dist.barrier()
    results = []
    for shard in (False, True):
        callback = averaging(Bema(kappa=0.5), shard=shard)
        loaded = Loaded(callback)
        fit(Net(), callback, loaded, ckpt_path=path)
        assert all(torch.equal(loaded.live[n], t + 1) for n, t in module.state_dict().items())
        results.append(clones(parameters_of(callback.average)))
        assert callback.average.num_updates == 5
    assert equal(*results)


# --- afterwards -----------------------------------------------------------------------------------------------------


def check_evaluations_afterwards(rank, processes, folder):
    """In the trainer that fitted, in others with as many processes, and in one process alone."""
    callback, module = averaging(shard=True, evaluate="all"), Net()
    plain, same = averaging(evaluate="all"), Net()
    this, other = fit(module, callback), fit(same, plain)
    assert {"val_loss", "val_loss_live", "val_loss/ema_Constant_0.8"} <= this.callback_metrics.keys()
    assert this.callback_metrics == other.callback_metrics
    applied = clones(module.state_dict())
    for trainers in (
        (this, other),
        (trainer(callback, strategy=ddp(), devices=2), trainer(plain, strategy=ddp(), devices=2)),
    ):
        shared, whole = (
            t.validate(m, loader(2, 4), verbose=False) for t, m in zip(trainers, (module, same), strict=True)
        )
        assert shared == whole and len(shared[0]) == 3
        assert equal(module.state_dict(), applied) and alike_everywhere(applied)
    this.test(module, loader(2, 4), verbose=False)
    this.predict(module, loader(2, 4))
    if rank == 0:  # the others do not take part
        alone = trainer(devices=1)
        (result,) = alone.validate(module, loader(1), verbose=False)
        assert result["val_loss"] == pytest.approx(shared[0]["val_loss"], abs=1e-6)
        with pytest.raises(RuntimeError, match="partitioned among 2 processes"):  # the further averages lie in parts
            trainer(callback, devices=1).validate(module, loader(1), verbose=False)
        alone = trainer(callback, devices=1)
        alone.strategy.connect(module)
        module.trainer = alone
        with pytest.raises(RuntimeError, match="partitioned among 2 processes"):
            alone.save_checkpoint(Path(folder) / "y.ckpt")
        (result,) = trainer(plain, devices=1).validate(same, loader(1), verbose=False)
        assert result.keys() == shared[0].keys()
    dist.barrier()


def check_one_average_evaluated_by_one_process(rank, processes, folder):
    callback, module = averaging(Constant(0.5), shard=True), Net()
    fit(module, callback)
    applied = clones(module.state_dict())
    if rank == 0:
        trainer(callback, devices=1).validate(module, loader(1), verbose=False)
        trainer(callback, devices=1).predict(module, loader(1))
        assert equal(module.state_dict(), applied)
    dist.barrier()
    callback, module = averaging(Constant(0.5), shard=True, after_fit="live"), Net()
    fit(module, callback)
    live = clones(module.state_dict())
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"partitioned among 2 processes \(shard=True\), but this trainer has 1"):
            trainer(callback, devices=1).validate(module, loader(1), verbose=False)
        assert equal(module.state_dict(), live)
    dist.barrier()
    with pytest.raises(RuntimeError, match=r"partitioned among 2 processes \(shard=True\), but this trainer has 1"):
        fit(module, callback, devices=1)


def check_a_second_fit_goes_on(rank, processes, folder):
    results = []
    for shard in (False, True):
        callback, module = averaging(shard=shard), Net()
        this = fit(module, callback)
        fit(module, callback)
        this.fit_loop.max_epochs = 3
        this.fit(module, loader(4, 4))
        results.append((clones(module.state_dict()), callback.average.num_steps))
        assert alike_everywhere(module.state_dict())
    assert equal(results[0][0], results[1][0]) and results[0][1] == results[1][1] == 14


def check_a_file_that_does_not_load(rank, processes, folder):
    """The average was in the module and now lies in parts: no process waits for those of others."""
    callback, module = averaging(Constant(0.5), shard=True), Net()
    carried = Carried(ByHand())
    this = fit(module, callback, carried.by_hand, carried)
    (scored,) = this.validate(module, loader(2, 4), verbose=False)
    path = Path(folder) / "other.ckpt"
    if rank == 0:
        torch.save({"state_dict": {"net.0.weight": torch.zeros(8, 4)}, "pytorch-lightning_version": "2.4.0"}, path)
    dist.barrier()
    with pytest.raises(RuntimeError, match="Missing key"):
        this.validate(module, loader(2, 4), ckpt_path=path, verbose=False)
    assert equal(module.state_dict(), carried.live[-1])
    another = trainer(callback, strategy=ddp(), devices=2)  # the first one holds on to the file
    assert another.validate(module, loader(2, 4), verbose=False) == [scored]
    assert equal(module.state_dict(), of_all(carried.live[-1])[0])


# --- options --------------------------------------------------------------------------------------------------------


def check_switching_and_snapshots(rank, processes, folder):
    states = []
    for shard in (False, True):
        directory = Path(folder) / f"snapshots-{shard}"
        callback = averaging(shard=shard, snapshots=Snapshots(directory, every_n_steps=2))
        module = Net()
        fit(module, callback, SwitchEMA(every=2))
        states.append(clones(module.state_dict()))
        assert alike_everywhere(parameters_of(callback.average))
    assert equal(*states)
    if rank == 0:
        whole, shared = (sorted(Path(folder).glob(f"snapshots-{shard}/*.pt")) for shard in (False, True))
        assert len(whole) == len(shared) == 3
        for one, other in zip(whole, shared, strict=True):
            first, second = torch.load(one, weights_only=True), torch.load(other, weights_only=True)
            for a, b in zip(first["averages"], second["averages"], strict=True):
                assert equal(a["tensors"], b["tensors"])
    dist.barrier()


def check_two_callbacks(rank, processes, folder):
    first, second = averaging(shard=True), averaging(Constant(0.9), evaluate="live", name="slow")
    module = Net()
    this = fit(module, first, second, logger=True, default_root_dir=folder, log_every_n_steps=1)
    assert equal(module.state_dict(), {**module.state_dict(), **parameters_of(first.average)})
    assert alike_everywhere(parameters_of(second.average))
    assert 0 < this.callback_metrics["ema/distance"] < this.callback_metrics["slow/distance"]
    path = Path(folder) / "two.ckpt"
    this.save_checkpoint(path)
    again = averaging(shard=True), averaging(Constant(0.9), evaluate="live", name="slow")
    fit(Net(), *again, ckpt_path=path)
    for one, other in zip((first, second), again, strict=True):
        assert equal(parameters_of(one.average), parameters_of(other.average))


class Scored(Net):
    """Each process has an opinion of its own, and one value is logged in the first process alone."""

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("own", loss if self.global_rank == 0 else -loss)
        if self.global_rank == 0:
            self.log("first", loss, rank_zero_only=True)


def check_a_selection_is_that_of_the_first_process(rank, processes, folder):
    def selected(metric, mode):
        callback = averaging([Constant(0.2), Constant(0.95)], evaluate=Select(metric, mode=mode))
        module = Scored(norm=False)
        fit(module, callback, num_sanity_val_steps=0)
        assert equal(module.state_dict(), callback.selected.named_tensors())
        return callback.averages.index(callback.selected)

    for metric in ("own", "first"):
        smallest, largest = of_all(selected(metric, "min")), of_all(selected(metric, "max"))
        assert (smallest, largest) == ([0, 0], [1, 1])  # the slow average still is near the random weights
    with pytest.raises(ValueError, match=r"Select\('none'\): the module logs no such metric .* It logs first, own"):
        selected("none", "min")


def check_nonfinite_statistics_in_one_process(rank, processes, folder):
    class Breaks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.net[1].running_mean.nan_to_num_()

        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 2 and trainer.global_rank == 1:
                pl_module.net[1].running_mean.fill_(float("nan"))

    for shard in (False, True):
        callback = averaging(shard=shard, on_nonfinite="skip")
        fit(Net(), callback, Breaks(), ddp_kwargs={"broadcast_buffers": False})
        assert (callback.average.num_updates, engine(callback.average).num_skipped) == (5, 1)
        assert alike_everywhere(parameters_of(callback.average))


def check_an_exception_in_all_processes(rank, processes, folder):
    """A whole average is saved without waiting for others; a shared one is refused, with the reason."""

    class Raises(Net):
        def validation_step(self, batch, batch_idx):
            if self.current_epoch == 1:
                raise ValueError("a bug")

    for shard in (False, True):
        callback, by_hand = averaging(shard=shard), ByHand()

        class Saves(Callback):
            def __init__(self, path):
                self.path = path

            def on_exception(self, trainer, pl_module, exception):
                trainer.save_checkpoint(self.path)

        path, module = Path(folder) / f"exception-{shard}.ckpt", Raises()
        with pytest.raises((ValueError, RuntimeError)) as caught:
            fit(module, callback, by_hand, Saves(path))
        assert equal(floats_of(module), of_all(floats_of(module))[rank]) and not engine(callback.average).weights.held
        if shard:
            assert "partitioned among processes" in str(caught.value) and not path.exists()
        else:
            assert "a bug" in str(caught.value)
            saved = torch.load(path, weights_only=True)
            assert largest_difference(saved["state_dict"], of_all(by_hand.average)[0]) <= 1e-7
            fit(Net(), averaging(), ckpt_path=path)
    # the processes meet again in the next run
    fit(Net(), callback, epochs=1)
    assert alike_everywhere(parameters_of(callback.average))


def check_single_device_with_shard(rank, processes, folder):
    states = []
    for shard in (False, True):
        callback, module = averaging(shard=shard), Net()
        fit(module, callback, devices=1)
        assert engine(callback.average).processes == 1
        states.append(clones(module.state_dict()))
    assert equal(*states)


def check_strategies_that_shard_weights_share_nothing(rank, processes, folder):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    with pytest.raises(ValueError, match="shard=True does not go with ModelParallelStrategy"):
        trainer(averaging(shard=True), strategy=strategy, devices=2).fit(Net(), loader(3, 4))


# --- loading in other numbers of processes --------------------------------------------------------------------------


class Loaded(Callback):
    def __init__(self, callback):
        self.callback = callback

    def on_train_start(self, trainer, pl_module):
        self.averages = [clones(average.named_tensors()) for average in self.callback.averages]
        self.live = clones(pl_module.state_dict())


def check_loading_elsewhere(rank, processes, folder):
    for shard in (False, True):
        callback = averaging(shard=shard)
        loaded = Loaded(callback)
        devices = {"devices": processes, "batches": 4 * processes}
        fit(Net(), callback, loaded, epochs=3, ckpt_path=Path(folder) / "shared.ckpt", **devices)
        entry = torch.load(Path(folder) / "shared.ckpt", weights_only=True)["callbacks"][callback.state_key]
        for named, expected in zip(loaded.averages, torch.load(Path(folder) / "averages-1.pt"), strict=True):
            assert all(torch.equal(named[name], tensor) for name, tensor in expected.items())
        assert all(torch.equal(loaded.live[name], tensor) for name, tensor in entry["live"].items())
        assert callback.average.num_steps > 6
    state = torch.load(Path(folder) / "shared.ckpt", weights_only=True)["state_dict"]
    (averages, _) = torch.load(Path(folder) / "averages-0.pt")
    module = Net.load_from_checkpoint(Path(folder) / "shared.ckpt", map_location="cpu")
    assert equal(module.state_dict(), state)
    assert all(torch.equal(state[name], tensor) for name, tensor in averages.items())


IN_TWO = [value for name, value in list(globals().items()) if name.startswith("check_") and "elsewhere" not in name]
ELSEWHERE = [check_loading_elsewhere]


def start(rank, processes, folder, name):
    file = Path(folder) / f"group-{name}-{processes}"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=processes, timeout=LIMIT)


def main(rank, processes, folder, checks):
    torch.set_num_threads(1)
    if processes > 1:
        start(rank, processes, folder, "checks")
    run_checks(rank, processes, checks, folder)


if __name__ == "__main__":
    folder, only = sys.argv[1], sys.argv[2:]
    ended = [fork(main, 2, folder, [c for c in IN_TWO if not only or c.__name__ in only])]
    if not only or "check_files" in only:
        ended += [fork(main, processes, folder, ELSEWHERE) for processes in (1, 4)]
    sys.exit(any(itertools.chain.from_iterable(ended)))
