"""Readers of files of Lightning runs: Lightning's own callbacks, LitEma, NeMo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_ema.checkpoint.section import foreign
from lightning_ema.interop.imported import (
    Content,
    Imported,
    Weights,
    below,
    callbacks_of,
    count_of,
    grouped,
    is_statistic,
    refuse_ambiguous,
    state_of,
    tensors,
    warmup_of,
)


def weight_averaging(content: Content) -> Imported | None:
    """Lightning's ``WeightAveraging``: ``state_dict`` is the average, ``current_model_state`` live."""
    known = foreign(content)
    if known is None:
        return None
    steps, updates, live = known
    return Imported(
        "weight_averaging",
        "current_model_state and averaging_state, as Lightning's WeightAveraging writes them",
        tensors(content["state_dict"]),
        tensors(live),
        steps=steps,
        updates=updates,
        checkpoint=_without_callbacks(content, "WeightAveraging", "current_model_state", "averaging_state"),
    )


def stochastic_weight_averaging(content: Content) -> Imported | None:
    """Lightning's ``StochasticWeightAveraging``: its callback state holds ``average_model_state``.

    Only parameters are averaged there; the buffers beside them are those of the start.
    """
    states = [s for s in callbacks_of(content).values() if isinstance(s, dict)]
    states = [s for s in states if "average_model_state" in s and "n_averaged" in s]
    if len(states) != 1:
        return None
    updates, average = int(states[0]["n_averaged"]), states[0]["average_model_state"]
    if average is None or updates == 0:
        raise ValueError(
            "the file is of Lightning's StochasticWeightAveraging, but from before its start: it holds no average yet, "
            "its state_dict is the live weights. Take a later file."
        )
    live = tensors(content["state_dict"])
    weights = {name: live[name] if is_statistic(name, live[name]) else t for name, t in tensors(average).items()}
    return Imported(
        "stochastic_weight_averaging",
        f"average_model_state and n_averaged = {updates} (epochs) in a callback's state, as Lightning's "
        "StochasticWeightAveraging writes them",
        weights,
        live,
        updates=updates,
        decay="Equal()",
        checkpoint={**_without_callbacks(content, "StochasticWeightAveraging"), "lr_schedulers": []},
        notes=(
            "BatchNorm statistics are the live ones: this system estimates them anew at the end of its run. "
            "buffers='recalibrate' does the same.",
            "The file's learning rate schedule is that of this system and is left out.",
        ),
    )


def lit_ema(content: Content) -> Imported | None:
    """LitEma of the latent diffusion models: ``model_ema.<name without dots>`` beside the live weights."""
    state = tensors(state_of(content))
    ema = below("model_ema.", state)
    if not {"decay", "num_updates"} <= ema.keys():
        return None
    steps, decay = int(ema.pop("num_updates")), float(ema.pop("decay"))
    live = {name: tensor for name, tensor in state.items() if not name.startswith("model_ema.")}
    names = _undotted(ema, live)
    is_lightning = "pytorch-lightning_version" in content
    return Imported(
        "lit_ema",
        "model_ema.<name without dots> with model_ema.decay and model_ema.num_updates, as LitEma has them",
        {**live, **{names[short]: tensor for short, tensor in ema.items()}},
        live,
        steps=steps if steps >= 0 else None,
        decay=warmup_of(decay, counts=steps >= 0),
        checkpoint=dict(content) if is_lightning else {},
        notes=("The entries model_ema.* are left out: take LitEma out of the module.",),
    )


def nemo(content: Content) -> Imported | None:
    """NeMo's ``<name>-EMA.ckpt``: ``state_dict`` is the average, and the optimizer's state holds it once more."""
    states = content.get("optimizer_states") or ()
    if not states or not all(isinstance(s, Mapping) and {"opt", "ema", "current_step"} <= s.keys() for s in states):
        return None
    weights = tensors(content["state_dict"])
    averages = [average for state in states for average in state["ema"]]
    if not all(any(_same(average, t) for t in weights.values()) for average in averages):
        raise ValueError(
            "the file is NeMo's, but its state_dict is live, and the averages beside it have no names. Give the file "
            "that was written with it, whose name ends in -EMA.ckpt; this one then goes with --live."
        )
    steps, every = int(states[0]["current_step"]), int(states[0].get("every_n_steps", 1))
    return Imported(
        "nemo",
        "opt, ema and current_step in the optimizer's state, as NeMo's EMA writes them, with ema equal to state_dict",
        weights,
        steps=steps,
        updates=-(-steps // every),  # at the steps 1, every + 1, 2 * every + 1, ...
        decay=warmup_of(states[0].get("decay"), counts=False),
        checkpoint={**_without_callbacks(content, "EMA"), "optimizer_states": [dict(s["opt"]) for s in states]},
    )


def nemo_by_name(content: Content) -> list[Imported]:
    """A checkpoint whose name ends in ``-EMA.ckpt``, which NeMo gives to files with the average in ``state_dict``."""
    if not isinstance(content.get("state_dict"), Mapping):
        return []
    state = callbacks_of(content).get("EMA")
    steps = state.get("cur_step") if isinstance(state, Mapping) else None
    because = "the file's name ends in -EMA.ckpt, as NeMo names the file with the average in state_dict"
    kept = _without_callbacks(content, "EMA")
    return [Imported("nemo", because, tensors(content["state_dict"]), steps=count_of(steps), checkpoint=kept)]


def _without_callbacks(content: Content, kind: str, *keys: str) -> dict[str, Any]:
    """A checkpoint without the state of callbacks whose class's name contains ``kind``, and without some keys."""
    kept = {key: state for key, state in callbacks_of(content).items() if kind not in key.split("{")[0]}
    return {**{key: value for key, value in content.items() if key not in keys}, "callbacks": kept}


def _undotted(short: Weights, live: Weights) -> dict[str, str]:
    """The names in a model whose names without dots are those given; the model may lie below one prefix."""
    prefixes = sorted({name[: place + 1] for name in live for place in _dots(name)} | {""})
    fits = []
    for prefix in prefixes:
        named = grouped((n.removeprefix(prefix).replace(".", ""), n) for n in live if n.startswith(prefix))
        if short.keys() <= named.keys():
            fits.append({name: named[name] for name in short})
    if not fits:
        raise ValueError(
            f"the file is of LitEma, but its {len(short)} averages, such as {next(iter(short), 'none')!r}, are not the "
            "names of the file's live weights without their dots. Nothing in the file then tells where they belong."
        )
    together = {name: [candidate for fit in fits for candidate in fit[name]] for name in short}
    refuse_ambiguous(together)
    return {name: candidates[0] for name, candidates in together.items()}


def _dots(name: str) -> list[int]:
    return [place for place, letter in enumerate(name) if letter == "."]


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool((first.to(second.dtype) == second).all())
