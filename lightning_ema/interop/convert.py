"""Averages in other systems' files: what a file holds, and the same as plain weights or as a Lightning checkpoint."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_ema.checkpoint.entry import CallbackEntry, stored_average
from lightning_ema.checkpoint.entry import write as write_entry
from lightning_ema.checkpoint.section import STATE_KEY_PREFIX, state_key
from lightning_ema.checks import check_count, check_one_of
from lightning_ema.files.reading import load as load_file
from lightning_ema.files.writing import whole_or_not
from lightning_ema.interop.export import write_weights
from lightning_ema.interop.imported import Content, Imported, Reader, Weights, callbacks_of, state_of, tensors
from lightning_ema.interop.naming import named_in_order, renamed
from lightning_ema.interop.read_lightning import (
    lit_ema,
    nemo,
    nemo_by_name,
    stochastic_weight_averaging,
    weight_averaging,
)
from lightning_ema.interop.read_openmmlab import mean_teacher, mmdet2, mmdet2_mid_epoch, mmengine
from lightning_ema.interop.read_pytorch import averaged_model, diffusers, ema_pytorch, timm, torch_ema, yolo
from lightning_ema.modules.named_tensors import without_wrappers
from lightning_ema.schedules.history import History

Form = Literal["lightning", "weights"]

READERS: dict[str, Reader] = {
    reader.__name__: reader
    for reader in (
        weight_averaging,
        stochastic_weight_averaging,
        mmengine,
        mmdet2,
        mmdet2_mid_epoch,
        mean_teacher,
        timm,
        yolo,
        diffusers,
        torch_ema,
        lit_ema,
        ema_pytorch,
        nemo,
        averaged_model,
    )
}
"""The readers, by the name of the system."""

# entries of a file that are read as part of it, rather than as something with an average of its own
_PARTS = frozenset({"state_dict", "callbacks", "ema_state_dict", "state_dict_ema", "averaging_state", "meta"})
_MODELS = ("state_dict", "model", "model_state_dict", "model_state")


def read(
    file: str | Path | Content,
    *,
    like: str | Path | Content | None = None,
    live: str | Path | Content | None = None,
    system: str | None = None,
    allow_code: bool = False,
) -> Imported:
    """The average in another system's file.

    Args:
        file: the file (``torch.save`` or safetensors), or its content.
        like: a file or content with the model's own names: a ``state_dict``, or a checkpoint that has one. Needed
            where ``file`` has no names; otherwise the names are made to fit, where they differ by a prefix. What the
            average does not hold (buffers, frozen weights) is taken from it.
        live: a file or content with the live weights, where ``file`` does not have them.
        system: one of the names in ``READERS``, where a file can be read as that of several systems.
        allow_code: let files run code while they are read, which whoever wrote them has chosen.

    Raises:
        ValueError: no system is recognised, or several; names are missing, ambiguous or do not fit; or a file would
            run code.
        ModuleNotFoundError: a file needs a package that is not installed.
    """
    content = _load(file, allow_code)
    imported = recognise(content, str(file) if isinstance(file, (str, Path)) else "", system)
    if not imported.weights and not imported.unnamed:
        raise ValueError(f"{imported.because}; but there is no tensor in it.")
    if imported.steps == 0 or imported.updates == 0:
        raise ValueError(
            f"{imported.because}; but from before its first update: it holds no average yet. Take a later file."
        )
    if like is not None:
        other = _load(like, allow_code)
        imported = _fitted(imported, _model(other, like), _about(other))
    elif imported.unnamed:
        raise ValueError(
            f"{imported.because}: the averages have no names. Give the model's with --like FILE (in Python like=...): "
            "a state_dict of the model, or a checkpoint that has one."
        )
    if live is not None:
        imported = replace(imported, live=renamed(_model(_load(live, allow_code), live), imported.weights))
    _check(imported)
    return imported


def recognise(content: Content, path: str = "", system: str | None = None) -> Imported:
    """What a file's content holds, from its keys and, for NeMo, from its path.

    Raises:
        ValueError: no system is recognised, or several.
    """
    if system is not None:
        check_one_of(system, "system", tuple(READERS))
    if any(str(key).startswith(STATE_KEY_PREFIX) for key in callbacks_of(content)):
        raise ValueError(
            "the checkpoint is lightning_ema's own: EMACallback resumes from it as it is, and "
            "`python -m lightning_ema export` writes its average alone."
        )
    readers = READERS if system is None else {system: READERS[system]}
    places = [("", content)]
    places += [(f"under {k!r}: ", v) for k, v in content.items() if isinstance(v, Mapping) and k not in _PARTS]
    results = [(where, _read_by(reader, part)) for where, part in places for reader in readers.values()]
    imported = [replace(one, because=where + one.because) for where, one in results if one is not None]
    if not imported and path.endswith("-EMA.ckpt") and system in (None, "nemo"):
        imported = nemo_by_name(content)
    if len(imported) > 1:
        raise ValueError(
            "the file can be read in several ways; choose with --system NAME (in Python system=...):\n  "
            + "\n  ".join(f"{one.system}: {one.because}" for one in imported)
        )
    if not imported:
        shown = [str(key) for key in content]
        inside = [str(key) for key in state_of(content)] if state_of(content) is not content else []
        raise ValueError(
            f"no average is recognised in the file{f' by the reader of {system}' if system else ''}. Its keys: "
            f"{_list(shown)}{f'; in state_dict: {_list(inside)}' if inside else ''}. Known are:\n  "
            + "\n  ".join(f"{name}: {_summary(reader)}" for name, reader in READERS.items())
        )
    return imported[0]


def write(imported: Imported, path: str | Path, form: Form, *, steps: int | None = None, name: str = "ema") -> Path:
    """Writes an average that was read.

    Args:
        imported: what :func:`read` gave.
        path: ``weights``: a ``.safetensors`` or ``.pt`` file. ``lightning``: any file.
        form: ``"weights"``: the averaged ``state_dict`` alone. ``"lightning"``: a checkpoint from which a Trainer with
            an ``EMACallback`` goes on, and which any Trainer tests.
        steps: which the average has seen, where the file does not say or you know better.
        name: of the ``EMACallback`` that is to go on.

    Returns:
        The path written to.

    Raises:
        ValueError: the number of steps is needed and not known.
    """
    check_one_of(form, "form", get_args(Form))
    known = imported.steps if steps is None else steps
    if known is not None and imported.updates is not None and imported.updates > known:
        raise ValueError(
            f"steps is {known}, but the file of {imported.system} counts {imported.updates} updates, and each takes a "
            f"step. Give at least as many: --steps {imported.updates} (in Python steps={imported.updates})."
        )
    if form == "weights":
        text = {"average": imported.system, "steps": "" if known is None else str(known), "decay": imported.decay}
        return write_weights(imported.weights, path, {key: value for key, value in text.items() if value})
    if known is None:
        raise ValueError(
            f"the file of {imported.system} does not say how many steps its average has seen, and a warm-up that began "
            "anew would wipe it out. Give them: --steps N (in Python steps=N)."
        )
    check_count(known, "steps", at_least=1)
    with whole_or_not(Path(path)) as temporary:
        torch.save(as_checkpoint(imported, known, name), temporary)
    return Path(path)


def as_checkpoint(imported: Imported, steps: int, name: str = "ema") -> dict[str, Any]:
    """A Lightning checkpoint whose ``state_dict`` is the average, with the entry from which ``EMACallback`` resumes.

    Epoch, optimizers and loops are those of the file where it was Lightning's; otherwise training begins at its first
    epoch, with the average, its counters and the live weights in place.
    """
    averaged = {without_wrappers(n): t for n, t in imported.weights.items() if t.is_floating_point() or t.is_complex()}
    differing = [n for n, t in imported.live.items() if not torch.equal(t, imported.weights[n].to(t.dtype))]
    model = averaged | {without_wrappers(name): tensor for name, tensor in imported.live.items()}
    entry = CallbackEntry(
        num_steps=steps,
        num_updates=imported.updates or steps,
        num_skipped=0,
        last_update_step=steps,
        start_step=0,
        started=True,
        config={"decay": imported.decay} if imported.decay else {},
        names=tuple(averaged),
        average=stored_average(averaged, model),
        further=(),
        origin={},
        histories=(History(),),
        biases=(0.0,),
        steps_before=0 if "global_step" in imported.checkpoint else steps,  # whether the trainer counts them, too
        live={without_wrappers(name): imported.live[name] for name in differing},
    )
    begun = {"epoch": 0, "global_step": 0, "optimizer_states": [], "lr_schedulers": [], "callbacks": {}}
    checkpoint = {"pytorch-lightning_version": _lightning_version(), **begun, **imported.checkpoint}
    callbacks = {**checkpoint["callbacks"], state_key(name): write_entry(entry)}
    other = {k: v for k, v in checkpoint.get("state_dict", {}).items() if not isinstance(v, Tensor)}  # extra states
    return {**checkpoint, "state_dict": {**other, **imported.weights}, "callbacks": callbacks}


def describe(imported: Imported, steps: int | None = None) -> str:
    """What was imported and why, and what a reader should know, line by line.

    Args:
        imported: what :func:`read` gave.
        steps: those given to :func:`write`, which count instead of what the file says.
    """
    floats = {str(t.dtype).removeprefix("torch.") for t in imported.weights.values() if t.is_floating_point()}
    counted = "unknown to the file" if imported.steps is None else f"{imported.steps:,}"
    counted = counted if steps is None else f"{steps:,}, from --steps ({counted}{' in it' if imported.steps else ''})"
    updates = "" if imported.updates is None else f", updates {imported.updates:,}"
    lines = [
        f"{imported.system}: {imported.because}",
        f"average: {len(imported.weights)} tensors, {', '.join(sorted(floats))}; steps {counted}{updates}",
        f"live weights: {len(imported.live)} tensors" if imported.live else "live weights: none in the file",
    ]
    return "\n".join([*lines, *imported.notes])


def _read_by(reader: Reader, content: Content) -> Imported | None:
    try:
        return reader(content)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"the file has keys of {reader.__name__}, but under them not what that system writes "
            f"({type(error).__name__}: {error}). Take another file, or say which system wrote it: --system NAME (in "
            "Python system=...)."
        ) from error


def _fitted(imported: Imported, model: Weights, about: Content) -> Imported:
    """What was found under the names of a model, with what the model has beyond it."""
    weights = named_in_order(imported.unnamed, model) if imported.unnamed else renamed(imported.weights, model)
    same = weights.keys() <= imported.weights.keys()
    rest = {name: tensor for name, tensor in model.items() if name not in weights}
    taken = f"Taken from the model of --like, {len(rest)} tensors that the average does not hold: {_list(list(rest))}."
    return replace(
        imported,
        weights={name: weights.get(name, tensor) for name, tensor in model.items()},
        live=renamed(imported.live, model) if imported.live else {},
        unnamed=(),
        checkpoint={**about, **imported.checkpoint} if same else about,
        notes=(*imported.notes, taken) if rest else imported.notes,
    )


def _about(content: Content) -> dict[str, Any]:
    """What a Lightning checkpoint says of its module, as ``load_from_checkpoint`` needs it."""
    keys = ("hyper_parameters", "hparams_name", "pytorch-lightning_version")
    return {key: content[key] for key in keys if key in content}


def _check(imported: Imported) -> None:
    wrong = [f"{name}: not in the average" for name in imported.live if name not in imported.weights]
    wrong += [
        f"{name}: shape {tuple(tensor.shape)} live, {tuple(imported.weights[name].shape)} averaged"
        for name, tensor in imported.live.items()
        if name in imported.weights and tensor.shape != imported.weights[name].shape
    ]
    if wrong:
        raise ValueError(f"{imported.system}: live weights and average do not fit:\n  " + "\n  ".join(wrong[:8]))


def _model(content: Content, file: str | Path | Content) -> Weights:
    """The one ``state_dict`` in a file of a model."""
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return tensors(content)
    held = {key: content[key] for key in _MODELS if isinstance(content.get(key), (Mapping, nn.Module))}
    if len(held) != 1:
        raise ValueError(
            f"{file if isinstance(file, (str, Path)) else 'the content'} must be a state_dict, or hold one under "
            f"one of {', '.join(_MODELS)}. Its keys: {_list([str(key) for key in content])}."
        )
    (state,) = held.values()
    return tensors(state.state_dict() if isinstance(state, nn.Module) else state)


def _load(file: str | Path | Content, allow_code: bool) -> Content:
    if isinstance(file, Mapping):
        return file
    if Path(file).suffix == ".safetensors":
        from safetensors.torch import load_file as load_safetensors

        return load_safetensors(file)
    try:
        content = load_file(Path(file), trust=allow_code)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} cannot be read without running code that is in it, or is no file of torch.save "
            f"({str(error).strip().splitlines()[0]}). Such code can do anything on your machine. If you trust whoever "
            "wrote the file, add --allow-code (in Python allow_code=True)."
        ) from error
    except (ModuleNotFoundError, AttributeError) as error:
        raise ModuleNotFoundError(
            f"{file} holds objects of the program that wrote it, which must be importable: {error}. Run this where "
            "that program is installed, for instance in its repository's folder."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is damaged, or no file of torch.save ({error}).") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a dictionary. Write its state_dict() instead.")
    return content


def _lightning_version() -> str:
    for package in ("lightning", "pytorch-lightning"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    raise ModuleNotFoundError("Lightning is not installed: pip install lightning.")


def _summary(reader: Reader) -> str:
    return (reader.__doc__ or "").strip().splitlines()[0].replace("``", "")


def _list(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
