"""What a callback puts into checkpoints and takes out of them. ``state_dict`` of every file is the average."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_ema.averaging.state_dict import gather, resume
from lightning_ema.averaging.swap import lasting
from lightning_ema.averaging.tensor_set import Estimate
from lightning_ema.averaging.tensor_set import write as write_into
from lightning_ema.callback import sharded_files
from lightning_ema.callback.holder import Holder
from lightning_ema.callback.messages import adopted, not_returned, resumed, save_needs_all
from lightning_ema.callback.own_loading import FileLoading
from lightning_ema.callback.tested_files import check_weights_only, note, of_entry
from lightning_ema.checkpoint.entry import (
    CallbackEntry,
    Recalibrated,
    add_averages,
    lacking,
    read,
    stored_average,
    write,
)
from lightning_ema.checkpoint.section import changes, find, foreign, other_settings, state_key
from lightning_ema.distributed.base import cut_of
from lightning_ema.evaluation.file_weights import FileWeights
from lightning_ema.evaluation.passes import Passes
from lightning_ema.modules.batchnorm import statistics_of
from lightning_ema.modules.named_tensors import Survey
from lightning_ema.trainer import facts, strategies
from lightning_ema.trainer.checkpoint_hook import Hook, ModuleHook
from lightning_ema.trainer.method_hook import Call, around_save, leave_save


class Checkpointing:
    """The part of an average's holder that lies in checkpoints.

    Args:
        callback: whose average it is.
        holder: of the average.
        passes: which count the selections among averages.
    """

    def __init__(self, callback: Callback, holder: Holder, passes: Passes) -> None:
        self._callback = callback
        self._holder = holder
        self._passes = passes
        self._key = state_key(holder.settings.name)
        self._loading = FileLoading()
        holder.before_forget = self.let_go

    def expect_file(self, module: LightningModule) -> None:
        """A fit may load a file into the module: what is in it is kept before the module's own hook sees it."""
        ModuleHook.install(module, "on_load_checkpoint", self._around_load)

    def end_loading(self) -> None:
        """No file is to be loaded any more before training."""
        self._loading.forget()

    def take_hold(self) -> None:
        """Stands in the module's own checkpoint hooks, again where it was displaced."""
        module = cast(LightningModule, self._holder.require().module)
        ModuleHook.install(module, "on_save_checkpoint", self._around_save)
        ModuleHook.install(module, "on_load_checkpoint", self._around_load)
        if (trainer := facts.trainer_of(module)) is not None:
            around_save(trainer, self._around_file)

    def let_go(self) -> None:
        """Leaves the module's hooks as they were."""
        if self._holder.tracker is not None:
            module = self._holder.tracker.module
            ModuleHook.remove(module, "on_save_checkpoint", self._around_save)
            ModuleHook.remove(module, "on_load_checkpoint", self._around_load)
            if (trainer := facts.trainer_of(module)) is not None:
                leave_save(trainer, self._around_file)

    # --- saving -------------------------------------------------------------------------------------------------------

    def entry(self) -> dict[str, Any]:
        """The callback's entry in a checkpoint; empty where there is no average."""
        holder = self._holder
        tracker = holder.tracker
        if tracker is None:
            return {}
        trainer = facts.trainer_of(tracker.module)
        if trainer is not None:
            holder.check_processes(trainer)
        holds, model = tracker.holds, Survey(tracker.module).tensors
        state = gather(tracker)  # which looks for layers that were replaced since the last step
        live = dict(tracker.named_live()) if holds.gives_average else dict(tracker.weights.stored)
        if holds.gives_average and holds.estimates:
            live |= holds.live_statistics() or statistics_of(tracker.module)
        if holds.gives_average and holds.selected == 0 and not tracker.schedules[0].corrects:
            state = replace(state, average=stored_average(state.average, model))
        decay = None
        with suppress(ValueError):  # a schedule that does not know the run yet
            decay = tracker.decay(0)
        entry = CallbackEntry(
            **{**vars(state), "config": holder.settings.describe()},
            steps_before=holder.clock.steps_before,
            pace=holder.clock.pace,
            live=live,
            selected=holds.selected,
            num_selections=self._passes.num_selections,
            decay=decay,
            recalibrated=tuple(
                Recalibrated(each.made_at, each.statistics if place > 0 else {})
                for place, each in enumerate(holds.estimates)
            )
            or None,
        )
        return write(entry)

    def _around_file(self, trainer: Trainer, save: Call) -> None:
        """While a file is written the module carries what the file holds, for every hook of everyone.

        A sharded module after an exception in one process does not: :meth:`save` refuses that in its turn.
        """
        holder, pl_module = self._holder, trainer.lightning_module
        holder.drop_if_over()
        holder.update()
        tracker = holder.of(pl_module)
        ours = tracker is not None and self._callback in facts.callbacks(trainer)
        if tracker is None or not ours or (tracker.sharded and facts.is_interrupted(trainer)):
            save()
            return
        holder.check_processes(trainer)
        with tracker.weights.as_evaluated(tracker.holds, holder.batches(trainer)):
            save()

    def save(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is put together: its ``state_dict`` becomes the average's."""
        tracker = self._holder.tracker
        if tracker is not None and tracker.module is not pl_module:
            checkpoint.get("callbacks", {}).pop(self._key, None)
        elif tracker is not None:
            self.take_hold()
            self._put_average(trainer, checkpoint)
        elif strategies.spawns(trainer) and facts.is_fitting(trainer):
            self._holder.warn(not_returned())

    def _around_save(self, pl_module: LightningModule, checkpoint: dict[str, Any], own: Hook) -> None:
        """The module's own hook runs on the average too; what it leaves out of ``state_dict`` goes into our entry."""
        holder, trainer = self._holder, facts.trainer_of(pl_module)
        holder.update()
        tracker = holder.of(pl_module)
        if trainer is None or tracker is None or self._callback not in facts.callbacks(trainer):
            own(checkpoint)
            return
        entry = checkpoint.get("callbacks", {}).get(self._key)
        if not tracker.holds.gives_average:
            if (
                "callbacks" not in checkpoint
                and tracker.num_updates > 0
                and not holder.settings.evaluation.gives_average
            ):
                note(checkpoint, holder.settings.name, average=False)
            own(checkpoint)
        else:
            if "callbacks" not in checkpoint:  # a weights-only save: no hook of a callback is called for it
                self._put_average(trainer, checkpoint)
                note(checkpoint, holder.settings.name, average=True)
            missing: list[str] = []
            with tracker.weights.as_evaluated(tracker.holds, holder.batches(trainer)):
                own(checkpoint)
                if entry is not None:
                    not_held = tracker.not_held_by(checkpoint.get("state_dict", {}), place=0)
                    missing = lacking(entry, not_held)
                if "state_dict" in checkpoint:
                    checkpoint["state_dict"] = lasting(checkpoint["state_dict"], tracker.weights.returning())
            if entry is not None:  # not during the swap, in which averages may lie in the module's own storage
                names = sharded_files.agreed(trainer, tracker, missing)
                if names:
                    add_averages(entry, {name: t for name, t in tracker.named_tensors(0) if name in names})
        if entry is not None and tracker.sharded:
            sharded_files.store(trainer, checkpoint, entry)

    def _put_average(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Makes ``checkpoint["state_dict"]`` that of the module carrying the average, where it is not already."""
        holder, tracker = self._holder, self._holder.require()
        if tracker.sharded and facts.is_interrupted(trainer):
            raise RuntimeError(save_needs_all())
        holder.check_processes(trainer)
        if tracker.holds.wants_average:
            del checkpoint["state_dict"]  # before a second one is gathered
            with tracker.weights.as_evaluated(tracker.holds, holder.batches(trainer)):
                taken = trainer.strategy.lightning_module_state_dict()
                checkpoint["state_dict"] = lasting(taken, tracker.weights.returning())

    # --- loading ------------------------------------------------------------------------------------------------------

    def load(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> bool:
        """A checkpoint is read, whose ``state_dict`` the module has already; gives whether an average was taken up."""
        holder = self._holder
        if not facts.is_fitting(trainer):
            sharded_files.check(trainer, checkpoint, checkpoint.get("callbacks", {}).get(self._key))
            return False
        holder.forget()
        stored, others = find(checkpoint, self._key), foreign(checkpoint)
        entry = None
        if stored is not None:
            sharded_files.fetch(trainer, pl_module, checkpoint, stored)
            entry = self._loading.migrated(pl_module, read(stored, CallbackEntry))
        if entry is None and others is None:
            holder.say("the checkpoint holds no average; it starts from its weights.")
            if not holder.clock.steps.held:
                return False  # it is built where every other average is, in on_fit_start
        holder.build(trainer, pl_module)
        tracker = holder.require()
        if entry is not None:
            self._resume(entry, strict=getattr(pl_module, "strict_loading", True))
            if changed := changes(entry.config, holder.settings.describe()):
                holder.warn(other_settings(changed))
            holder.say(resumed(tracker.num_steps, tracker.num_updates))
        elif others is not None:
            self._adopt(*others)
            holder.say(adopted(tracker.num_steps, tracker.num_updates))
        self.take_hold()
        if holder.clock.steps.held:
            holder.go_on()
        return True

    def _take_for_test(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A file is about to be evaluated: keeps those of its weights that ``state_dict`` does not hold."""
        stored = find(checkpoint, self._key) if self._key in checkpoint.get("callbacks", {}) else None
        shards = sharded_files.is_folder(stored) or any(c.sharded for c in map(cut_of, pl_module.parameters()))
        if not stored or shards:
            return
        entry = read(stored, CallbackEntry)

        def loaded() -> FileWeights:
            migrated = self._loading.migrated(pl_module, entry)
            self._loading.forget()
            return of_entry(pl_module, migrated)

        self._holder.to_test = loaded

    def _around_load(self, pl_module: LightningModule, checkpoint: dict[str, Any], own: Hook) -> None:
        """A file is about to be loaded for an evaluation: what the last fit left is stored."""
        trainer = facts.trainer_of(pl_module)
        self._holder.drop_if_over()
        tracker = self._holder.of(pl_module)
        if trainer is not None and tracker is not None and not facts.is_fitting(trainer):
            tracker.weights.store()
        if trainer is not None and not facts.is_fitting(trainer) and trainer.ckpt_path is not None:
            check_weights_only(checkpoint, self._holder.settings)
            self._take_for_test(pl_module, checkpoint)
        self._loading.keep(checkpoint)
        own(checkpoint)

    def _resume(self, entry: CallbackEntry, strict: bool) -> None:
        holder, tracker = self._holder, self._holder.require()
        known = Survey(tracker.module).tensors
        gone_on = resume(tracker, entry, known, entry.live, strict)
        if news := gone_on.said([repr(schedule) for schedule in holder.settings.average.decays]):
            holder.warn(f"the checkpoint is of other averages: {news}.")
        holder.clock.resume(entry.steps_before, entry.pace)
        holder.is_new = False
        if holder.settings.evaluation.select is not None:
            selected = gone_on.places.index(entry.selected) if entry.selected in gone_on.places else 0
            tracker.holds.selected, self._passes.num_selections = selected, entry.num_selections
        if tracker.holds.estimates and entry.recalibrated is not None:
            of_file = statistics_of(tracker.module)  # those of the first average lie in state_dict
            for place, before in enumerate(gone_on.places):
                if before is not None and before < len(entry.recalibrated):
                    kept = entry.recalibrated[before]
                    statistics = kept.statistics if before > 0 else of_file
                    copies = {name: t.clone() for name, t in statistics.items()}
                    tracker.holds.estimates[place] = Estimate(kept.at, copies)
        write_into({name: tensor for name, tensor in entry.live.items() if name in known}, tracker.module)

    def _adopt(self, steps: int, updates: int, live: dict[str, Tensor]) -> None:
        """Takes over an average of Lightning's ``WeightAveraging``; one without an update is none yet."""
        tracker = self._holder.require()
        if updates > 0:
            loaded = dict(tracker.named_live())  # the file's average
            state = replace(
                gather(tracker),
                num_steps=steps,
                num_updates=updates,
                last_update_step=steps,
                started=True,
                start_step=0,  # also where this callback's own start would come later
                names=tuple(loaded),
                average=loaded,
                further=tuple(loaded for _ in tracker.schedules[1:]),
                origin=loaded,
            )
            resume(tracker, state)
            self._holder.is_new = False
        write_into(self._loading.live_of_another(cast(LightningModule, tracker.module), live), tracker.module)
        if updates == 0 and tracker.started:
            tracker.start()
