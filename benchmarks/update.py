"""What averaging costs: the update, the callback's own time in a step, and a loan. Ratios taken in one run.

    python benchmarks/update.py            # about half a minute

CPU time on one thread, so that other work on the machine disturbs little; candidates take turns, medians count.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ema import Constant, EMACallback, WeightAverage

RESNET50_WIDTHS = ((64, 3), (128, 4), (256, 6), (512, 3))


def resnet50_like() -> nn.Module:
    """The 161 parameters of a ResNet-50, 25.6 million elements, each in a module of its own as in the original."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in RESNET50_WIDTHS:
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    shapes += [(1000, 2048), (1000,)]
    return nn.ModuleList(nn.ParameterList([nn.Parameter(torch.randn(shape))]) for shape in shapes)


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - start) / repeats


def take_turns(candidates: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for work in candidates.values():
        work()
    for _ in range(rounds):
        for name, work in candidates.items():
            times[name].append(cpu_seconds(work, repeats))
    return times


def update(rounds: int) -> None:
    module = resnet50_like()
    lives = [p.detach() for p in module.parameters()]
    average = WeightAverage(module, Constant(0.999))
    with_check = WeightAverage(module, Constant(0.999), on_nonfinite="skip")
    bare = [live.clone() for live in lives]
    times = take_turns(
        {
            "bare torch._foreach_lerp_": lambda: torch._foreach_lerp_(bare, lives, 1e-3),
            "WeightAverage.step": average.step,
            "WeightAverage.step, on_nonfinite='skip'": with_check.step,
        },
        rounds,
        repeats=3,
    )
    reference = times["bare torch._foreach_lerp_"]
    print(f"\nupdate of {len(lives)} float32 tensors, {sum(t.numel() for t in lives) / 1e6:.1f} million elements")
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
        print(f"  {name:42} {1e3 * statistics.median(seconds):8.2f} ms   {ratio:5.2f} x bare")


def loan(rounds: int) -> None:
    module = resnet50_like()
    average = WeightAverage(module, Constant(0.999))
    tensors = len(list(average.named_tensors()))
    times = take_turns({"loan": lambda: average.lend().recall()}, rounds, repeats=20)
    each = 1e6 * statistics.median(times["loan"]) / tensors
    print(f"\nloan and recall of {tensors} tensors, 102 MB: {each:.2f} us a tensor")


class Mlp(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Timed:
    """Adds up the time that the wrapped functions take."""

    def __init__(self) -> None:
        self.nanoseconds: list[int] = []

    def __call__(self, work: Callable[..., object]) -> Callable[..., object]:
        def timed(*args: object, **kwargs: object) -> object:
            start = time.perf_counter_ns()
            result = work(*args, **kwargs)
            self.nanoseconds.append(time.perf_counter_ns() - start)
            return result

        return timed


def hook_microseconds(callback: Callback, steps: int) -> float:
    """The median time a step of all the callback's work in it, its optimizer hooks included."""
    hooks = [Timed(), Timed(), Timed(), Timed()]
    callback.on_train_batch_start = hooks[0](callback.on_train_batch_start)  # type: ignore[method-assign]
    callback.on_train_batch_end = hooks[1](callback.on_train_batch_end)  # type: ignore[method-assign]
    if isinstance(callback, EMACallback):
        callback._steps._enter = hooks[2](callback._steps._enter)  # type: ignore[assignment,method-assign]
        callback._steps._leave = hooks[3](callback._steps._leave)  # type: ignore[assignment,method-assign]
    data = DataLoader(TensorDataset(torch.randn(steps, 8)), batch_size=1)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, callbacks=[callback], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Mlp(), data)
    per_step = [sum(parts) for parts in zip(*(hook.nanoseconds for hook in hooks if hook.nanoseconds), strict=True)]
    return statistics.median(per_step) / 1e3


def hook(steps: int) -> None:
    ours = [hook_microseconds(EMACallback(Constant(0.99)), steps) for _ in range(3)]
    theirs = [hook_microseconds(EMAWeightAveraging(decay=0.99), steps) for _ in range(3)]
    print("\nthe callback's own time in a training step of a 6-tensor MLP")
    print(f"  {'EMACallback':42} {statistics.median(ours):8.1f} us")
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(f"  {'lightning.pytorch EMAWeightAveraging':42} {statistics.median(theirs):8.1f} us   {ratio:5.1f} x ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, one thread")
    update(rounds=3 if quick else 15)
    loan(rounds=3 if quick else 15)
    hook(steps=100 if quick else 2000)


if __name__ == "__main__":
    main()
