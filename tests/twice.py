"""A callback that evaluates other weights in a second pass, and the modules that both files of tests use it with."""

import random
from collections import deque
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from helpers import Regression
from lightning.pytorch import Callback
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassPrecision, MulticlassRecall
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MetricTracker, MinMaxMetric, Running

from lightning_ema.evaluation.extra_pass import begin, check, evaluate_again, log_again


def double(module):
    """Other weights: twice those there are, which is exact."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)


class Twice(Callback):
    """At the end of each evaluation runs a second one with all weights doubled, logged as ``<name>_live``."""

    def __init__(self, factor=2.0, log=True):
        self.factor, self.log = factor, log
        self.passes = []

    def setup(self, trainer, pl_module, stage):
        check(trainer, "evaluate='both'")

    def on_validation_start(self, trainer, pl_module):
        self.begun = begin(trainer, pl_module)

    def on_validation_epoch_end(self, trainer, pl_module):
        kept = [parameter.detach().clone() for parameter in pl_module.parameters()]
        try:
            with torch.no_grad():
                torch._foreach_mul_(list(pl_module.parameters()), self.factor)
            self.passes.append(evaluate_again(trainer, pl_module, self.begun, nullcontext()))
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(pl_module.parameters()), kept)
        if self.log:
            log_again(pl_module, self.passes[-1], "_live")

    on_test_start = on_validation_start
    on_test_epoch_end = on_validation_epoch_end


class Classes(Regression):
    """Three classes out of the regression's inputs; a base for modules that log in one way or other."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.head = torch.nn.Linear(4, 3)

    def scores(self, batch):
        x = batch[0]
        return self.head(x.to(self.head.weight.dtype)).float().softmax(1), x.float().sum(1).gt(0).long()


def collection(**kwargs):
    kinds = {"a": MulticlassAccuracy, "p": MulticlassPrecision, "r": MulticlassRecall}
    return MetricCollection({name: kind(3) for name, kind in kinds.items()}, **kwargs)


class MeanAttribute(Regression):
    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()

    def validation_step(self, batch, batch_idx):
        self.mean(self.loss(batch), weight=len(batch[0]))
        self.log("mean", self.mean)


class Accuracy(Classes):
    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)

    def validation_step(self, batch, batch_idx):
        self.accuracy(*self.scores(batch))
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True, prog_bar=True)


class Collection(Classes):
    def __init__(self):
        super().__init__()
        self.metrics = collection(prefix="val/")

    def validation_step(self, batch, batch_idx):
        self.metrics.update(*self.scores(batch))
        self.log_dict(self.metrics, on_step=False, on_epoch=True)


class CollectionWithoutGroups(Collection):
    def __init__(self):
        super().__init__()
        self.metrics = collection(compute_groups=False)


class CollectionComputedAtTheEnd(Classes):
    def __init__(self):
        super().__init__()
        self.metrics = collection()

    def validation_step(self, batch, batch_idx):
        self.metrics.update(*self.scores(batch))

    def on_validation_epoch_end(self):
        self.log_dict(self.metrics.compute())
        self.metrics.reset()


class MetricsInPlainDict(Classes):
    def __init__(self):
        super().__init__()
        self.hidden = {"auroc": MulticlassAUROC(3), "groups": collection()}

    def validation_step(self, batch, batch_idx):
        for metric in self.hidden.values():
            metric.update(*self.scores(batch))

    def on_validation_epoch_end(self):
        self.log("auroc", self.hidden["auroc"].compute())
        self.log_dict(self.hidden["groups"].compute())
        for metric in self.hidden.values():
            metric.reset()


class Wrappers(Classes):
    def __init__(self):
        super().__init__()
        self.extremes = MinMaxMetric(MulticlassAccuracy(3))
        self.window = Running(MulticlassAccuracy(3), window=2)
        self.classes = ClasswiseWrapper(MulticlassAccuracy(3, average=None))
        self.straps = BootStrapper(MulticlassAccuracy(3), num_bootstraps=3)
        self.tracker = MetricTracker(MulticlassAccuracy(3))

    def on_validation_epoch_start(self):
        self.tracker.increment()

    def validation_step(self, batch, batch_idx):
        for metric in (self.extremes, self.window, self.classes, self.straps, self.tracker):
            metric.update(*self.scores(batch))
        self.log("window", self.window)

    def on_validation_epoch_end(self):
        for metric in (self.extremes, self.classes, self.straps):
            self.log_dict(metric.compute())
            metric.reset()
        self.log("tracker", self.tracker.compute())
        self.log("best", self.tracker.best_metric())


class Gathers(Regression):
    """Lightning's own advice: a list that is filled in the step and emptied at the end."""

    def __init__(self):
        super().__init__()
        self.outputs, self.totals, self.confusion = [], {"loss": torch.zeros(()), "n": 0}, np.zeros((2, 2))
        self.recent = deque(maxlen=3)

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.outputs.append(loss)
        self.recent.append(float(loss))
        self.totals["loss"] += loss
        self.totals["n"] += 1
        self.confusion[int(loss > 1), 0] += 1
        return {"loss": loss, "batch": batch_idx}

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        assert outputs["batch"] == batch_idx
        self.log("from_outputs", outputs["loss"])

    def on_validation_epoch_end(self):
        self.log("mean", torch.stack(self.outputs).mean())
        self.log("total", self.totals["loss"] / self.totals["n"])
        self.log("count", float(len(self.outputs)))
        self.log("large", self.confusion[1, 0])
        self.log("recent", sum(self.recent))
        self.outputs.clear()
        self.totals["loss"].zero_()
        self.totals["n"] = 0
        self.confusion[...] = 0


class GathersFromItsStart(Regression):
    def on_validation_start(self):
        self.losses = []

    def on_validation_epoch_start(self):
        self.meter = Meter()

    def on_validation_batch_start(self, batch, batch_idx):
        self.log("index", float(batch_idx), reduce_fx="sum")

    def validation_step(self, batch, batch_idx):
        self.losses.append(self.loss(batch))
        self.meter.add(self.losses[-1].item())

    def on_validation_epoch_end(self):
        self.log("last", self.losses[-1])
        self.log("meter", self.meter.sum / self.meter.count)


class Meter:
    def __init__(self):
        self.sum = self.count = 0

    def add(self, value):
        self.sum, self.count = self.sum + value, self.count + 1


class NeverReset(Regression):
    """A user's mistake that an evaluation survives: what is gathered goes on from evaluation to evaluation."""

    outputs = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        type(self).outputs = []
        self.meter, self.count = Meter(), 0

    def validation_step(self, batch, batch_idx):
        self.outputs.append(self.loss(batch))
        self.meter.add(self.outputs[-1].item())
        self.count += 1

    def on_validation_epoch_end(self):
        self.log_dict({"sum": sum(self.outputs), "meter": self.meter.sum, "count": self.count})


class Reductions(Regression):
    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        for name in ("mean", "sum", "min", "max"):
            self.log(name, loss, reduce_fx=name)
        self.log("callable", loss, reduce_fx=torch.max)
        self.log("stepwise", loss, on_step=True, on_epoch=False)
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("weighted", loss, batch_size=batch_idx + 1)
        self.log("synced", loss, sync_dist=True)
        self.log("rank_zero", loss, rank_zero_only=True)
        self.log("silent", loss, logger=False, prog_bar=True)
        self.log("double", loss.double() * 1e300)
        self.log("nan", loss * float("nan"))
        self.log_dict({"number": batch_idx, "flag": True, "negative": -loss})


class Items(Metric):
    """A metric whose value is a whole number."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, count):
        self.total += count

    def compute(self):
        return self.total


class CountsInAnInteger(Regression):
    def __init__(self):
        super().__init__()
        self.items = Items()

    def validation_step(self, batch, batch_idx):
        self.items.update(len(batch[0]))
        self.log("items", self.items)


class WritesBuffers(Regression):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("worst", torch.zeros(()), persistent=False)

    def validation_step(self, batch, batch_idx):
        self.seen += len(batch[0])
        self.worst = torch.maximum(self.worst, self.loss(batch))
        self.net[1].train()  # BatchNorm goes on with its statistics
        self.log("loss", self.loss(batch))

    def on_validation_epoch_end(self):
        self.log("seen", self.seen.float())
        self.log("worst", self.worst)


class Reports(torch.nn.Module):
    """A submodule that was given its owner's ``log``."""

    def __init__(self, log):
        super().__init__()
        self.report = partial(log, prog_bar=True)

    def forward(self, loss):
        self.report("reported", loss)


class LogsThroughASubmodule(Regression):
    def __init__(self):
        super().__init__()
        self.reports = Reports(self.log)

    def validation_step(self, batch, batch_idx):
        self.reports(self.loss(batch))


class PrefixesNames(Regression):
    def log(self, name, *args, **kwargs):
        super().log(f"val/{name}", *args, **kwargs)


class TransfersBatches(Regression):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 1, batch[1]]

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return super().transfer_batch_to_device([batch[0] * 3, batch[1]], device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0].flip(0), batch[1]]


class DrawsRandomNumbers(Regression):
    def __init__(self):
        super().__init__(dropout=0.5)
        self.generator = torch.Generator().manual_seed(3)

    def on_validation_model_eval(self):
        self.eval()
        self.net[2].train()

    def validation_step(self, batch, batch_idx):
        noise = torch.rand(1, generator=self.generator) + random.random() + np.random.rand()
        self.log("loss", self.loss(batch) * noise)


class ReadsTheTrainer(Regression):
    def validation_step(self, batch, batch_idx):
        assert self.trainer.callbacks
        assert self.trainer.num_val_batches == [4]
        assert self.trainer.validating
        self.log("before", float(len(self.trainer.callback_metrics)))
        self.log("loss", self.loss(batch))

    def on_validation_epoch_end(self):
        self.log("squared", self.trainer.callback_metrics["loss"] ** 2)


class TakesTheIterator(Regression):
    def validation_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        self.log("loss", self.loss(batch), batch_size=len(batch[0]))
        self.log("index", float(batch_idx), batch_size=1)


class NoBatchIndex(Regression):
    def validation_step(self, batch):
        self.log("loss", self.loss(batch))
