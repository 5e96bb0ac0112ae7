"""Run by test_sharded_options in two processes: what else a run on sharded weights may be asked for.

Each process writes to ``<folder>/<rank>.json`` how each check ended: "" or what was raised.
"""

import os
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import engine
from lightning.pytorch import LightningModule
from sharded import (
    Sharded,
    averaging,
    data,
    ended,
    fit,
    forked,
    fully_shard,
    same,
    strategy,
    trainer_of,
    whole,
    whole_of,
    write,
)
from sharded_run import Look, rank_zero
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_ema import (
    Bema,
    Constant,
    MeanTeacherConfig,
    MeanTeacherMixin,
    Power,
    Recalibrate,
    Snapshots,
    SwitchEMA,
    export_average,
)
from lightning_ema.distributed.base import local
from lightning_ema.distributed.dtensor import DTensor

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


# --- runs that are compared with those of one process ---------------------------------------------------------------


class Manual(Sharded):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


class Unfreezing(Sharded):
    def configure_model(self):
        super().configure_model()
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch > 0)


RUNS = {
    "several": (Sharded, {"decay": [Constant(0.9), Bema(0.5)]}, {}),
    "later": (Sharded, {"start_step": 3, "every_n_steps": 2}, {}),
    "epoch": (Sharded, {"start_epoch": 1}, {}),
    "excluded": (Sharded, {"exclude": ["net.1.*"]}, {}),
    "manual": (Manual, {}, {}),
    "accumulated": (Sharded, {}, {"accumulate_grad_batches": 2}),
    "clipped": (Sharded, {}, {"gradient_clip_val": 0.05}),
    "switched": (Sharded, {}, {"beside": [SwitchEMA(every=3)]}),
    "unfrozen": (Unfreezing, {}, {}),
}


@check
def runs(root):
    for name, (make, settings, arguments) in RUNS.items():
        callback, beside = averaging(**settings), arguments.get("beside", [])
        rest = {name: value for name, value in arguments.items() if name != "beside"}
        this = fit(make(), callback, *beside, **rest)
        sets = (
            *(whole_of(average.named_tensors()) for average in callback.averages),
            whole_of(engine(callback.average).named_live()),
        )
        rank_zero(this, sets, root / f"{name}.pt")


# --- memory ---------------------------------------------------------------------------------------------------------


class Large(Sharded):
    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 1))
            self.scale = nn.Parameter(torch.ones(1))
            self.shard(self.device_mesh["data_parallel"])


class Gathered:
    """Counts whether tensors are gathered at all, and the elements that those gathered by us hold at a time."""

    def __enter__(self):
        self.any = False
        self.alive = self.peak = 0
        self.plain = DTensor.redistribute, DTensor.full_tensor
        redistribute, full_tensor = self.plain
        counted = self

        def redistributed(tensor, *args, **kwargs):
            result = redistribute(tensor, *args, **kwargs)
            counted.any |= all(placement.is_replicate() for placement in result.placements)
            return result

        def whole_tensor(tensor, **kwargs):
            return counted.born(full_tensor(tensor, **kwargs))

        DTensor.redistribute, DTensor.full_tensor = redistributed, whole_tensor
        return self

    def __exit__(self, *_):
        DTensor.redistribute, DTensor.full_tensor = self.plain

    def born(self, tensor):
        self.alive += tensor.numel()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(tensor, self.died, tensor.numel())
        return tensor

    def died(self, elements):
        self.alive -= elements


@check
def no_process_gathers_more_than_it_must(root):
    for folders in (True, False):
        path = root / f"large-{folders}"
        callback = averaging(decay=[Constant(0.9), Constant(0.5)])
        this = fit(Large(), callback, folders=folders, epochs=1)
        sizes = [whole(tensor).numel() for _, tensor in callback.average.named_tensors()]
        with Gathered() as gathered:
            this.save_checkpoint(path)
        if folders:
            assert not gathered.any
        elif this.is_global_zero:
            assert gathered.peak == 2 * sum(sizes)  # the live weights and the second average, for the file
        else:
            assert gathered.peak == max(sizes)
        again = averaging(decay=[Constant(0.9), Constant(0.5)])
        with Gathered() as gathered:
            fit(Large(), again, folders=folders, epochs=2, ckpt_path=path)
        assert not (gathered.any and folders) and gathered.peak == 0
        of_last_layer = 64 + 1 + 1  # one row, which the first process has, and its bias, and the scale
        half = (sum(sizes) - of_last_layer) // 2
        for average in again.averages:
            share = sum(local(tensor).numel() for _, tensor in average.named_tensors())
            assert share == half + of_last_layer * this.is_global_zero


# --- tensor parallel ------------------------------------------------------------------------------------------------


class Parallel(Sharded):
    def configure_model(self):
        if hasattr(self, "net"):
            return
        torch.manual_seed(11)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.LayerNorm(3), nn.Linear(3, 1))
        self.scale = nn.Parameter(torch.ones(1))
        if self.device_mesh is not None:
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)


@check
def tensor_parallel(root):
    def parallel(folders, epochs=2, ckpt_path=None):
        callback = averaging()
        this = trainer_of(callback, strategy=strategy(2, folders, tensor_parallel=2), epochs=epochs)
        this.fit(Parallel(), *data(1), ckpt_path=ckpt_path)
        return this, callback.average

    for folders in (True, False):
        path = root / f"parallel-{folders}"
        this, average = parallel(folders)
        this.save_checkpoint(path)
        sets = whole_of(average.named_tensors()), whole_of(engine(average).named_live())
        rank_zero(this, (*sets, float(this.callback_metrics["val_loss"])), root / "parallel.pt")
        _, entire = parallel(folders, 3)
        _, again = parallel(folders, 3, path)
        same(entire.named_tensors(), again.named_tensors())
        same(engine(entire).named_live(), engine(again).named_live())


# --- BatchNorm, 16 bits, snapshots ----------------------------------------------------------------------------------


class Normed(Sharded):
    def configure_model(self):
        if not hasattr(self, "net"):
            torch.manual_seed(11)
            self.net = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 1))
            self.scale = nn.Parameter(torch.ones(1))
            self.shard(self.device_mesh["data_parallel"])


@check
def recalibrated_statistics_leave_the_training_alone(root):
    plain, module, callback = Normed(), Normed(), averaging(buffers=Recalibrate(4))
    fit(plain)
    this = fit(module, callback)
    same(dict(plain.named_parameters()), engine(callback.average).named_live())
    assert not torch.equal(module.net[1].running_mean, plain.net[1].running_mean)
    assert module.net[1].num_batches_tracked == 4 and plain.net[1].num_batches_tracked == 12
    this.save_checkpoint(root / "normed.ckpt")
    entire, again = (averaging(buffers=Recalibrate(4)) for _ in range(2))
    fit(Normed(), entire, epochs=3)
    fit(Normed(), again, epochs=3, ckpt_path=root / "normed.ckpt")
    same(entire.average.named_tensors(), again.average.named_tensors())


@check
def statistics_are_carried_and_saved_as_the_mean_of_all_processes(root):
    for folders in (True, False):
        module, callback = Normed(), averaging()
        this = fit(module, callback, folders=folders)
        this.save_checkpoint(root / f"statistics-{folders}")
        own = dict(stored_statistics(callback.average))
        mean = {name: tensor.clone() for name, tensor in own.items()}
        for tensor in mean.values():
            dist.all_reduce(tensor)
            tensor /= 2
        assert not any(torch.equal(own[name], mean[name]) for name in mean)
        same({name: module.state_dict()[name] for name in mean}, mean)
        if this.is_global_zero and not folders:
            file = torch.load(root / "statistics-False")
            same({name: file["state_dict"][name] for name in mean}, mean)


def stored_statistics(average):
    """What this process keeps, whatever the module carries."""
    for pair in average._tracker.tensors.pairs():
        if pair.candidate.is_buffer:
            yield pair.name, pair.averages[0]


@check
def bf16_weights_keep_a_float32_average_through_both_formats(root):
    for folders in (True, False):
        path = root / f"bf16-{folders}"
        callback, beside = averaging(), averaging(decay=Constant(0.5), evaluate="live", name="beside")
        this = fit(Sharded(), callback, beside, folders=folders, precision="bf16-true")
        assert {tensor.dtype for _, tensor in callback.average.named_tensors()} == {torch.float32}
        this.save_checkpoint(path)
        entire = averaging(), averaging(decay=Constant(0.5), evaluate="live", name="beside")
        again = averaging(), averaging(decay=Constant(0.5), evaluate="live", name="beside")
        fit(Sharded(), *entire, folders=folders, precision="bf16-true", epochs=3)
        fit(Sharded(), *again, folders=folders, precision="bf16-true", epochs=3, ckpt_path=path)
        for one, other in zip(entire, again, strict=True):
            same(one.average.named_tensors(), other.average.named_tensors())
            same(engine(one.average).named_live(), engine(other.average).named_live())


@check
def snapshots_hold_whole_tensors(root):
    snapshots = Snapshots(root / "snapshots", every_n_steps=5)
    callback = averaging(decay=[Power(sigma_rel=0.05), Power(sigma_rel=0.1)], snapshots=snapshots)
    with Gathered() as gathered:
        this = fit(Large(), callback)
    if this.is_global_zero:
        last = max((root / "snapshots").iterdir())
        content = torch.load(last)
        assert content["step"] == 12
    for place, average in enumerate(callback.averages):
        expected = whole_of(average.named_tensors())
        if this.is_global_zero:
            same(content["averages"][place]["tensors"], expected)
    if not this.is_global_zero:
        assert gathered.peak == 64 * 64
    rank_zero(this, whole_of(callback.average.named_tensors()), root / "last.pt")


@check
def a_user_who_wraps_the_save_hook(root):
    class Wrapping(Sharded):
        def on_train_end(self):
            original = self.on_save_checkpoint
            self.on_save_checkpoint = lambda checkpoint: original(checkpoint)

    for folders in (True, False):
        callback = averaging(decay=[Constant(0.9), Constant(0.5)])
        this = fit(Wrapping(), callback, folders=folders)
        this.save_checkpoint(root / f"wrapped-{folders}")
        loaded = []
        again = averaging(decay=[Constant(0.9), Constant(0.5)])
        fit(Sharded(), again, Look(again, loaded), folders=folders, epochs=3, ckpt_path=root / f"wrapped-{folders}")
        same(loaded[0], callback.average.named_tensors())
        same(loaded[1], engine(callback.average).named_live())


# --- teacher --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.net = nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 1))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.net(x) * self.scale


class Taught(MeanTeacherMixin, LightningModule):
    mean_teacher = MeanTeacherConfig(decay=Constant(0.75), consistency_weight=1.0, ramp_up_steps=0)
    both = True

    def configure_model(self):
        if hasattr(self, "student"):
            return
        self.student = Net()
        if self.device_mesh is not None:
            for network in (self.student, self.teacher) if self.both else (self.student,):
                for part in (network.net[0], network.net[3], network):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch):
        x, y = batch
        with self.teacher_view() as teacher:
            targets = teacher(x)
        outputs = self.student(x)
        return nn.functional.mse_loss(outputs, y) + self.consistency_weight() * nn.functional.mse_loss(outputs, targets)

    def validation_step(self, batch):
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), 0.05)


class OnlyTheStudent(Taught):
    both = False


@check
def one_process_of_a_run_reads_a_folder_alone(root):
    callback = averaging()
    this = fit(Sharded(), callback, epochs=1)
    this.save_checkpoint(root / "alone")
    expected = whole_of(callback.average.named_tensors())
    if this.is_global_zero:
        exported = torch.load(export_average(root / "alone", root / "alone.pt"))
        assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    torch.distributed.barrier()


@check
def a_teacher(root):
    for folders in (True, False):
        path = root / f"taught-{folders}"
        module = Taught()
        this = fit(module, folders=folders)
        this.save_checkpoint(path)
        rank_zero(this, (whole_of(module.state_dict()), float(this.callback_metrics["val_loss"])), root / "taught.pt")
        assert {type(tensor) for tensor in module.teacher.parameters()} == {DTensor}
        entire, again = Taught(), Taught()
        fit(entire, folders=folders, epochs=3)
        fit(again, folders=folders, epochs=3, ckpt_path=path)
        same(entire.state_dict(), again.state_dict())
        beside, callback = Taught(), averaging()
        fit(beside, callback, folders=folders)
        assert all(name.startswith("student.") for name, _ in callback.average.named_tensors())
        same(
            {n: p for n, p in module.named_parameters() if "teacher" in n},
            dict(p for p in beside.named_parameters() if "teacher" in p[0]),
        )


@check
def a_student_sharded_alone_is_refused(root):
    with pytest.raises(ValueError, match=r"teacher\.scale are not sharded alike\. In configure_model apply"):
        fit(OnlyTheStudent())


def look(folder, wanted):
    checks = {name: function for name, function in CHECKS.items() if not wanted or name in wanted}
    write(folder, os.environ["RANK"], ended(checks, folder))


if __name__ == "__main__":
    forked(2, look, Path(sys.argv[1]), sys.argv[2:])
