"""Switch EMA: now and then the live weights are set to the average, and the training goes on from there."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_ema.callback.ema_callback import EMACallback, holder_of
from lightning_ema.callback.holder import Holder
from lightning_ema.checks import check_count
from lightning_ema.trainer import facts


@facts.known_to_pytorch_lightning
class SwitchEMA(Callback):
    """Sets the live weights to the average of an :class:`EMACallback`, every so often; optimizers keep their state.

    The one callback of this package that changes the training.

    Example::

        trainer = Trainer(callbacks=[EMACallback(0.999), SwitchEMA(every="epoch")])

    Args:
        every: at every so many steps since the start of the average, or at the end of each ``"epoch"``.
        name: of the EMACallback, where there are several.

    Sources: Switch EMA (arXiv 2402.09240), Hare and Tortoise.

    Raises:
        ValueError, TypeError: an argument is out of range (here), or the trainer has no such EMACallback or one that
            selects among averages (``setup``).
    """

    def __init__(self, every: int | Literal["epoch"] = "epoch", name: str = "ema") -> None:
        if every != "epoch":
            if isinstance(every, str):
                raise ValueError(f"SwitchEMA: every is {every!r}; it must be a number of steps or 'epoch'.")
            check_count(every, "SwitchEMA: every", at_least=1)
        self._every = every
        self._name = name
        self._switched: int | None = None

    @property
    def state_key(self) -> str:
        return f"SwitchEMA{{'name': {self._name!r}}}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._holder(trainer).settings.evaluation.select is not None:
            raise ValueError(
                "SwitchEMA beside evaluate=Select(...): the live weights could be set to several averages. Leave one "
                "of the two out."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._switched is None:
            when = "at the end of each epoch" if self._every == "epoch" else f"at every {self._every} steps"
            rank_zero_info(
                f"SwitchEMA {self._name!r}: {when} the live weights are set to the average, and the optimizer goes on "
                "from there with the state it has. This changes the training; leave it out for an average that only "
                "follows."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._switch(trainer, trainer.current_epoch)  # due since an epoch that was left early, or a save before it

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._switch(trainer, trainer.current_epoch + trainer.is_last_batch)

    def state_dict(self) -> dict[str, Any]:
        return {"every": self._every, "switched": self._switched}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before = state_dict.get("every")
        if before != self._every:
            rank_zero_warn(
                f"SwitchEMA {self._name!r}: the checkpoint was written with other settings; those given now hold: "
                f"every: {before} in the file, {self._every} now."
            )
        same = before == self._every  # else it counted epochs, or other steps
        self._switched = state_dict.get("switched") if same else None

    def _switch(self, trainer: Trainer, epochs: int) -> None:
        """Sets the live weights to the average where that has come due since the last call.

        Args:
            trainer: the trainer.
            epochs: how many epochs have ended.
        """
        holder = self._holder(trainer)
        holder.update()  # where that callback comes later
        tracker, since = holder.require(), holder.steps_since_start()
        due = epochs if self._every == "epoch" else since // int(self._every)
        if self._switched is not None and due > self._switched and tracker.num_updates > 0:
            tracker.holds.apply_for_good(0)
        self._switched = due

    def _holder(self, trainer: Trainer) -> Holder:
        callbacks = [callback for callback in facts.callbacks(trainer) if isinstance(callback, EMACallback)]
        holders = {holder_of(callback).settings.name: holder_of(callback) for callback in callbacks}
        if self._name not in holders:
            raise ValueError(
                f"SwitchEMA(name={self._name!r}): the trainer has no EMACallback of this name, but "
                f"{', '.join(map(repr, holders)) or 'none'}. Add EMACallback(name={self._name!r}), or give the name of "
                "one that there is."
            )
        return holders[self._name]
