"""What the callback itself costs in a training step, and what a checkpoint with the average costs to write.

python benchmarks/callback.py
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from measure import Table, arguments, in_turns
from models import resnet18
from peers import NOT_INSTALLED
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ema import Constant, EMACallback
from lightning_ema.callback.ema_callback import holder_of

try:
    from lightning.pytorch.callbacks import EMAWeightAveraging
except ImportError:  # before Lightning 2.6
    EMAWeightAveraging = None

Build = Callable[[], nn.Module]

NONE = "an empty Callback"
TWICE = "an empty Callback, 32 layers"
CALLBACKS: dict[str, Callable[[], Callback] | None] = {
    NONE: Callback,
    "lightning_ema EMACallback": lambda: EMACallback(Constant(0.99)),
    "the same, every_n_steps=10": lambda: EMACallback(Constant(0.99), every_n_steps=10),
    "the same, start_step far ahead": lambda: EMACallback(Constant(0.99), start_step=10**9),
    "Lightning EMAWeightAveraging": None if EMAWeightAveraging is None else lambda: EMAWeightAveraging(decay=0.99),
}


class Training(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))


class _Clock:
    """Adds up, step by step, the CPU time that the wrapped functions take; the clock itself is in it."""

    def __init__(self) -> None:
        self.steps: list[int] = [0]

    def around(self, work: Callable[..., object]) -> Callable[..., object]:
        def timed(*args: object, **kwargs: object) -> object:
            start = time.thread_time_ns()
            result = work(*args, **kwargs)
            self.steps[-1] += time.thread_time_ns() - start
            return result

        return timed

    def next(self) -> None:
        self.steps.append(0)


class _Steps(Callback):
    """The last callback: notes when each training step is over."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self.ends: list[int] = []

    def on_train_batch_end(self, *args: object) -> None:
        self.ends.append(time.process_time_ns())
        self._clock.next()


def fitted(make: Callable[[], Callback], net: nn.Module, shape: tuple[int, ...], batch: int, steps: int) -> list[float]:
    """Medians over the steps, in microseconds: the callback's own work, optimizer hooks included; the whole step."""
    callback, clock = make(), _Clock()
    for hook in ("on_train_batch_start", "on_train_batch_end"):
        setattr(callback, hook, clock.around(getattr(callback, hook)))
    if isinstance(callback, EMACallback):
        counter = holder_of(callback).clock.steps
        for hook in ("_enter", "_leave"):
            setattr(counter, hook, clock.around(getattr(counter, hook)))
    last = _Steps(clock)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[callback, last],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Training(net), DataLoader(TensorDataset(torch.randn(steps * batch, *shape)), batch_size=batch))
    whole = [after - before for before, after in zip(last.ends, last.ends[1:], strict=False)]
    return [statistics.median(clock.steps[1:-1]) / 1e3, statistics.median(whole) / 1e3]


def training(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], batch: int, steps: int, runs: int
) -> Table:
    columns = ["us, own work", "% of the step"]
    table = Table(f"callback_{name}", f"a training step, {name}, batch {batch} of {shape}", columns)
    taken: dict[str, list[list[float]]] = {each: [] for each, make in CALLBACKS.items() if make is not None}
    for _ in range(runs):
        for each, times in taken.items():
            make = CALLBACKS[each]
            if make is not None:
                times.append(fitted(make, build(), shape, batch, steps))
    for each in CALLBACKS:
        if each not in taken:
            table.rows[each] = [NOT_INSTALLED, ""]
            continue
        own, whole = (statistics.median(run[place] for run in taken[each]) for place in (0, 1))
        table.rows[each] = [own, 100 * own / whole]
    table.show()
    return table


def checkpoint(rounds: int) -> Table:
    """``Trainer.save_checkpoint`` after a step of SGD; with an average, the file holds it and the live weights.

    A network of twice the size and no average shows what as many bytes take without us.
    """
    columns = ["ms", "x the plain file's time", "x the plain file's bytes"]
    table = Table("checkpoint", "saving a checkpoint of 16 linear layers, 17 MB", columns)
    with tempfile.TemporaryDirectory() as folder:
        saves, sizes = {}, {}
        for each, make in {**CALLBACKS, TWICE: Callback}.items():
            if make is None or each.startswith("the same"):
                continue
            layers = 32 if each == TWICE else 16
            trainer = Trainer(
                accelerator="cpu", max_steps=1, logger=False, callbacks=[make()], enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            module = Training(nn.Sequential(*(nn.Linear(512, 512) for _ in range(layers))))
            trainer.fit(module, DataLoader(TensorDataset(torch.randn(4, 512)), batch_size=2))
            file = Path(folder) / f"{len(saves)}.ckpt"
            saves[each] = lambda t=trainer, f=file: t.save_checkpoint(f)
            saves[each]()
            sizes[each] = file.stat().st_size
        for each, save in saves.items():
            median, ratio = in_turns(saves[NONE], save, rounds, at_least=0.2)
            table.rows[each] = [1e3 * median, ratio, sizes[each] / sizes[NONE]]
    table.show()
    return table


def main(rounds: int) -> list[Table]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    runs = max(1, rounds // 3)
    return [
        training("mlp", mlp, (8,), batch=1, steps=1000, runs=runs),
        training("resnet18", resnet18, (3, 32, 32), batch=16, steps=8, runs=runs),
        checkpoint(rounds),
    ]


if __name__ == "__main__":
    main(arguments(__doc__))
