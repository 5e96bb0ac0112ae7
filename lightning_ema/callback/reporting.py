"""What a callback logs in training and says after it."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule, Trainer

from lightning_ema.averaging.settings import label
from lightning_ema.callback import messages
from lightning_ema.callback.holder import Holder
from lightning_ema.evaluation.passes import Passes
from lightning_ema.trainer import facts


def log(holder: Holder, passes: Passes, pl_module: LightningModule) -> None:
    """Logs updates, and decay and distance of each average."""
    tracker, name = holder.require(), holder.settings.name
    pl_module.log(f"{name}/updates", float(tracker.num_updates), on_step=True, on_epoch=False, batch_size=1)
    for place in range(len(tracker.schedules)):
        prefix = name if place == 0 else passes.label(place)
        values = {f"{prefix}/decay": tracker.decay(place), f"{prefix}/distance": tracker.distance(place)}
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
        if math.isnan(values[f"{prefix}/distance"]):
            holder.notice_not_finite()


def say_at_end(holder: Holder, passes: Passes, trainer: Trainer) -> None:
    """Says what became of the averages in a fit."""
    tracker, missed = holder.require(), holder.clock.steps.missed
    holder.notice_frozen()
    if tracker.tensors.empty:
        holder.warn(messages.nothing_trained())
        return
    if trainer.global_step > 0 and tracker.num_steps == 0:
        holder.warn(messages.no_step_seen(trainer.global_step))
    elif missed:
        holder.say(messages.steps_missed(missed))
    if waits := tracker.tensors.waits:
        holder.say(messages.waited(waits))
    if holder.average is not None and tracker.num_steps > 0 and not facts.is_trial(trainer):
        for average in holder.average.averages:
            holder.say(average.report())
    select = holder.settings.evaluation.select
    if select is None or tracker.num_updates == 0:
        return
    if passes.num_selections == 0:
        holder.warn(messages.nothing_selected(select.metric))
        return
    place, applied = tracker.holds.selected, holder.settings.after_fit == "average"
    holder.say(messages.selected_last(select.metric, label(tracker.settings.decays[place]), place, applied))
