"""What a user asks of an evaluation: one frozen value, checked where it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_ema.averaging.settings import Buffers
from lightning_ema.checks import check_choice, check_count
from lightning_ema.evaluation.selection import Mode

Evaluate = Literal["average", "live", "both"]
Others = Literal["follow", "log", "evaluate"]


@dataclass(frozen=True)
class Scoring:
    """Which weights are scored. The docstring of :class:`~lightning_ema.EMACallback` says what each field means."""

    evaluate: Evaluate
    others: Others
    select: str | None
    mode: Mode
    evaluate_every: int

    @classmethod
    def checked(
        cls,
        evaluate: Evaluate,
        others: Others,
        select: str | None,
        mode: Mode,
        evaluate_every: int,
        *,
        several: bool,
        buffers: Buffers,
        switch_every: int | Literal["epoch"] | None,
    ) -> Scoring:
        """Checks the fields, and beside them what excludes some of them.

        Raises:
            ValueError, TypeError: naming the argument, what was given, what is accepted and what to write instead.
        """
        check_choice(evaluate, "evaluate", get_args(Evaluate))
        check_choice(others, "others", get_args(Others))
        if others != "follow" and not several:
            raise ValueError(f"others={others!r} needs several decays, for instance decay=[0.99, 0.999].")
        if others == "evaluate" and evaluate == "live":
            raise ValueError("others='evaluate' beside evaluate='live': write evaluate='both', or 'average'.")
        check_choice(mode, "mode", get_args(Mode))
        check_count(evaluate_every, "evaluate_every", at_least=1)
        if select is None and (mode != "min" or evaluate_every != 1):
            raise ValueError("mode and evaluate_every belong to select: write select='val_loss', or leave them out.")
        scoring = cls(evaluate, others, select, mode, evaluate_every)
        if select is not None:
            scoring._check_select(several, buffers, switch_every)
        return scoring

    def _check_select(self, several: bool, buffers: Buffers, switch_every: int | Literal["epoch"] | None) -> None:
        select = self.select
        if not isinstance(select, str) or not select:
            raise ValueError(f"select is {select!r}; it must be the name of a metric, such as 'val_loss'.")
        if not several:
            raise ValueError(
                f"select={select!r} needs several decays to choose from, for instance decay=[0.99, 0.999]."
            )
        for argument, value, refused in (("evaluate", self.evaluate, "live"), ("others", self.others, "evaluate")):
            if value == refused:
                raise ValueError(f"select={select!r} beside {argument}={refused!r}: leave {argument} out.")
        if buffers == "recalibrate":
            raise ValueError(f"select={select!r} beside buffers='recalibrate': write buffers='average'.")
        if switch_every is not None:  # by which of the averages?
            raise ValueError(f"select={select!r} beside switch_every={switch_every!r}: leave one of them out.")

    @property
    def passes(self) -> list[str]:
        """The arguments, as they were written, that ask for further passes over the data."""
        asked = [f"evaluate={self.evaluate!r}"] if self.evaluate == "both" else []
        asked += [f"others={self.others!r}"] if self.others == "evaluate" else []
        return asked + ([f"select={self.select!r}"] if self.select is not None else [])
