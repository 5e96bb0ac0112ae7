"""The further passes over the data of an evaluation: other averages, the live weights, the selection of an average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from lightning.pytorch import LightningModule, Trainer

from lightning_ema.averaging.settings import label
from lightning_ema.averaging.tensor_set import Batches
from lightning_ema.averaging.tracker import Tracker
from lightning_ema.evaluation import extra_pass
from lightning_ema.evaluation.selection import best_of, score_of
from lightning_ema.evaluation.settings import Evaluation
from lightning_ema.schedules.base import PerUpdate, Schedule
from lightning_ema.schedules.basic import Warmup
from lightning_ema.trainer import facts, strategies
from lightning_ema.trainer.evaluation_loop import Result

Take = Callable[[], Batches | None]
"""Gives training batches to recalibrate from; None where there are none."""

Carry = Callable[[int | None], AbstractContextManager[None]]
"""Lets the module carry one of the averages, by its place, or with None the live weights, for the length of a block."""


class Passes:
    """What one evaluation after another asks of the data beside its own pass.

    Args:
        evaluation: which weights are scored.
        name: of the callback, which the names of further metrics begin with.
        decays: of its averages.

    Attributes:
        num_selections: how many validations have ended in which an average could be selected.
    """

    def __init__(self, evaluation: Evaluation, name: str, decays: Sequence[Schedule]) -> None:
        self.num_selections = 0
        self._decays = decays
        self._evaluation = evaluation
        self._name = name
        self._begun: extra_pass.Begun | None = None
        self._scored: list[tuple[str, list[Result]]] = []
        self._could_select = False

    def check(self, trainer: Trainer) -> None:
        """Refuse a trainer under which a further pass cannot be run, where one is asked for."""
        if self._evaluation.needs_passes:
            extra_pass.check(trainer, f"evaluate={self._evaluation.evaluate!r}")

    def begin(self, trainer: Trainer, pl_module: LightningModule, has_weights: bool) -> None:
        """Notes what further passes are to find again, where there are other weights to be scored."""
        self._scored, self._could_select, self._begun = [], False, None
        if has_weights and (self._selects(trainer) or self._beside()):
            self._begun = extra_pass.begin(trainer, pl_module)

    def select(
        self, trainer: Trainer, pl_module: LightningModule, tracker: Tracker | None, batches: Take
    ) -> str | None:
        """Evaluates every average and selects the best one; gives what there is to say of that.

        The results are logged when logging is due, in :meth:`run`.
        """
        begun, select = self._begun, self._evaluation.select
        if tracker is None or begun is None or select is None or not self._selects(trainer):
            return None
        if not tracker.holds.gives_average:
            return None
        self._could_select = True
        if self.num_selections % select.every:
            return None
        scores = []
        for place in range(len(tracker.schedules)):
            carried = tracker.holds.instead(place, batches())
            results = extra_pass.evaluate_again(trainer, pl_module, begun, carried)
            self._scored.append((f"/{self.label(place)}", results))
            logged = {result.name: float(result.value) for result in results}
            # the first process's: values that are not reduced differ among them, and may be logged there alone
            scores.append(score_of(select.metric, strategies.agreed(trainer, logged)))
        tracker.holds.selected = best_of(scores, select.mode, tracker.holds.selected)
        labels = [label(schedule) for schedule in tracker.settings.decays]
        step = tracker.num_steps - tracker.start_step
        return said_of(
            select.metric,
            dict(zip(labels, scores, strict=True)),
            labels[tracker.holds.selected],
            tracker.schedules,
            step,
        )

    def _selects(self, trainer: Trainer) -> bool:
        in_training = facts.is_fitting(trainer) and not trainer.sanity_checking
        return self._evaluation.select is not None and in_training

    @property
    def due(self) -> bool:
        """Whether :meth:`run` has something to do in this evaluation."""
        return self._begun is not None

    def run(self, trainer: Trainer, pl_module: LightningModule, carry: Carry) -> None:
        """Makes the passes that are left, and logs the results of all of them."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        for suffix, results in self._scored:
            extra_pass.log_again(pl_module, results, suffix)
        for suffix, place in self._beside().items():
            results = extra_pass.evaluate_again(trainer, pl_module, begun, carry(place))
            extra_pass.log_again(pl_module, results, suffix)

    def end(self) -> None:
        """An evaluation is over; only now, because a run that is resumed inside of one begins it anew."""
        self.num_selections += self._could_select
        self._could_select = False

    def drop(self) -> None:
        """No further pass is made in this evaluation."""
        self._begun = None

    def suffixes(self) -> list[str]:
        """The ends of the names under which weights are scored that ``state_dict`` of a file does not hold."""
        among = range(len(self._decays)) if self._evaluation.select is not None else ()
        return [*self._beside(), *(f"/{self.label(place)}" for place in among)]

    def label(self, place: int) -> str:
        """A further average in the names of metrics."""
        return f"{self._name}_{label(self._decays[place])}"

    def _beside(self) -> dict[str, int | None]:
        """What is evaluated beside the average: the suffix of its metrics and its place; None for the live weights."""
        live: dict[str, int | None] = {"_live": None} if self._evaluation.scores_live else {}
        further = range(1, len(self._decays)) if self._evaluation.scores_further else ()
        return {**live, **{f"/{self.label(place)}": place for place in further}}


def said_of(metric: str, scores: Mapping[str, float], winner: str, schedules: Sequence[Schedule], step: int) -> str:
    """Said when one of several averages has been selected by a metric.

    Args:
        metric: its name.
        scores: of all averages, by name.
        winner: the name of the one that is selected.
        schedules: of all averages, in the order of ``scores``.
        step: the last one, counted from the start of the averages.
    """
    rest = ", ".join(f"{name} {score:.6g}" for name, score in scores.items() if name != winner)
    by_name = dict(zip(scores, schedules, strict=True))
    same = [n for n in scores if scores[n] == scores[winner] and _same_so_far(by_name[n], by_name[winner], step)]
    one = (
        f" So far {', '.join(same)} are one and the same average: their warm-up has come to a decay of "
        f"{by_name[winner](step):.4g} only. Compare smaller decays, or Constant(...)."
    )
    return f"by {metric} the decay {winner} is selected, with {scores[winner]:.6g} ({rest}).{one if same[1:] else ''}"


def _same_so_far(first: Schedule, second: Schedule, step: int) -> bool:
    """Whether two averages are the same because both are warmed up alike, and neither has come to its own decay."""
    one, other = (each.schedule if isinstance(each, PerUpdate) else each for each in (first, second))
    alike = isinstance(one, Warmup) and isinstance(other, Warmup) and one.offset == other.offset
    return first == second or (alike and type(first) is type(second) and first(step) == second(step))
