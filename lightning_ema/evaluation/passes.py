"""The further passes over the data of an evaluation: other averages, the live weights, the choice among averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning.pytorch import LightningModule, Trainer

from lightning_ema.averaging.module_weights import Batches, Custody
from lightning_ema.averaging.settings import label
from lightning_ema.averaging.weight_average import WeightAverage
from lightning_ema.callback.messages import chosen
from lightning_ema.evaluation import extra_pass
from lightning_ema.evaluation.selection import best_of, score_of
from lightning_ema.evaluation.settings import Scoring
from lightning_ema.trainer import facts, strategies
from lightning_ema.trainer.evaluation_loop import Result

Take = Callable[[], Batches | None]
"""Gives training batches to recalibrate from; None where there are none."""


class Passes:
    """What one evaluation after another asks of the data beside its own pass.

    Args:
        scoring: which weights are scored.
        name: of the callback, which the names of further metrics begin with.
    """

    def __init__(self, scoring: Scoring, name: str) -> None:
        self._scoring = scoring
        self._name = name
        self._begun: extra_pass.Begun | None = None
        self._scored: list[tuple[str, list[Result]]] = []
        self._could_choose = False

    def check(self, trainer: Trainer) -> None:
        """Refuse a trainer under which a second pass cannot be run, where one is asked for."""
        for asked in self._scoring.passes:
            extra_pass.check(trainer, asked)

    def begin(self, trainer: Trainer, pl_module: LightningModule, custody: Custody | None) -> None:
        """Notes what further passes are to find again; a file that is evaluated has none."""
        self._scored, self._could_choose, self._begun = [], False, None
        if custody is None or custody.average.module is not pl_module or custody.holds_file:
            return
        chooses = self._scoring.select is not None and facts.is_fitting(trainer)
        if not trainer.sanity_checking and (chooses or self._beside(custody.average.averages)):
            self._begun = extra_pass.begin(trainer, pl_module)

    def choose(
        self, trainer: Trainer, pl_module: LightningModule, custody: Custody | None, batches: Take
    ) -> str | None:
        """Evaluates every average and hands the best one to the custody; gives what there is to say of that.

        The results are logged when logging is due, in :meth:`run`.
        """
        begun, metric = self._begun, self._scoring.select
        if custody is None or begun is None or metric is None or not facts.is_fitting(trainer):
            return None
        if not custody.gives_average:
            return None
        self._could_choose = True
        if custody.choices % self._scoring.evaluate_every:
            return None
        averages, scores = custody.average.averages, []
        for place, average in enumerate(averages):
            results = extra_pass.evaluate_again(trainer, pl_module, begun, custody.instead(place, batches()))
            self._scored.append((f"/{self.label(average)}", results))
            logged = {result.name: float(result.value) for result in results}
            # the first process's: values that are not reduced differ among them, and may be logged there alone
            scores.append(score_of(metric, strategies.agreed(trainer, logged)))
        custody.chosen = best_of(scores, self._scoring.mode, custody.chosen)
        labels, first = [label(average.settings.decay) for average in averages], averages[0]
        schedules, step = [average.schedule for average in averages], first.num_steps - first.start_step
        return chosen(metric, dict(zip(labels, scores, strict=True)), labels[custody.chosen], schedules, step)

    @property
    def due(self) -> bool:
        """Whether :meth:`run` has something to do in this evaluation."""
        return self._begun is not None

    def run(self, trainer: Trainer, pl_module: LightningModule, custody: Custody | None, batches: Take) -> None:
        """Makes the passes that are left, and logs the results of all of them."""
        begun, self._begun = self._begun, None
        if begun is None or custody is None:
            return
        for suffix, results in self._scored:
            extra_pass.log_again(pl_module, results, suffix)
        for suffix, place in self._beside(custody.average.averages).items():
            results = extra_pass.evaluate_again(trainer, pl_module, begun, custody.instead(place, batches()))
            extra_pass.log_again(pl_module, results, suffix)

    def end(self, custody: Custody | None) -> None:
        """An evaluation is over; only now, because a run that is resumed inside of one begins it anew."""
        if custody is not None and self._could_choose:
            custody.choices += 1
        self._could_choose = False

    def drop(self) -> None:
        """No further pass is made in this evaluation."""
        self._begun = None

    def suffixes(self, averages: Sequence[WeightAverage]) -> list[str]:
        """The ends of the names under which weights are scored that ``state_dict`` of a file does not hold."""
        among = averages if self._scoring.select is not None else []
        return [*self._beside(averages), *(f"/{self.label(average)}" for average in among)]

    def label(self, average: WeightAverage) -> str:
        """A further average in the names of metrics."""
        return f"{self._name}_{label(average.settings.decay)}"

    def _beside(self, averages: Sequence[WeightAverage]) -> dict[str, int | None]:
        """What is evaluated beside the average: the suffix of its metrics and its place; None for the live weights."""
        live: dict[str, int | None] = {"_live": None} if self._scoring.evaluate == "both" else {}
        others = averages[1:] if self._scoring.others == "evaluate" else []
        return {**live, **{f"/{self.label(average)}": place for place, average in enumerate(others, start=1)}}
