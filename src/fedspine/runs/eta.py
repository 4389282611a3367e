"""The time left of a run: rounds, checks and the final scoring, each extrapolated from its cost so
far.

Work is counted in units that do not change while a model shrinks: a round of the whole model, and a
row scored by the whole model. A row scored at sparsity s costs 1 - s of a row; a round at sparsity
s costs 1 - s * PRUNABLE_SHARE, since part of a round is spent outside the pruned weights. Seconds
per unit are measured as the run goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from fedspine.runs.sections import RunSection

# of the seconds of a training sample, those that a row costs in scoring; measured on the embedded
# job
FORWARD_SHARE = 0.27

# of a round's seconds, those that shrink with the weights, by the precision of the products;
# measured on the embedded job (bf16: products are quick, so that the rest weighs more)
PRUNABLE_SHARE = {"bf16": 0.55, "fp32": 0.85}


@dataclass(frozen=True)
class WorkPlan:
    """The work of a run: its rounds with their planned sparsities, its checks, and its final
    scoring.
    """

    sparsities: Sequence[float]  # planned for each round
    evaluate_every: int  # rounds; 0: never
    check_devices: int
    check_rows: int
    final_devices: int
    final_rows: int
    prunable_share: float = PRUNABLE_SHARE["fp32"]  # of a round's seconds

    @classmethod
    def of(
        cls, run: RunSection, sparsities: Sequence[float], devices: int, rows: int
    ) -> "WorkPlan":
        """The plan of a recipe for a fleet of `devices` and a test set of `rows`."""
        return cls(
            sparsities=sparsities,
            evaluate_every=run.evaluate_every,
            check_devices=min(run.evaluate_devices, devices),
            check_rows=min(run.evaluate_rows, rows),
            final_devices=min(run.final_devices, devices),
            final_rows=run.final_rows_of(rows),
            prunable_share=PRUNABLE_SHARE.get(run.precision, PRUNABLE_SHARE["fp32"]),
        )

    def sparsity(self, round: int) -> float:
        """The planned sparsity of a round, counted from 0; beyond the plan, the last one's."""
        return self.sparsities[min(round, len(self.sparsities) - 1)]

    def round_work(self, round: int) -> float:
        """The work of a round, in rounds of the whole model."""
        return 1 - self.sparsity(round) * self.prunable_share

    def check_work(self, round: int) -> float:
        """Rows of a whole model that a check after `round` rounds scores."""
        return self.check_rows * self._models(round - 1, self.check_devices)

    def final_work(self) -> float:
        """Rows of a whole model that the final scoring scores."""
        return self.final_rows * self._models(len(self.sparsities) - 1, self.final_devices)

    def scored_share(self, models: int) -> float:
        """The share of the final scoring that is done when its first `models` models are."""
        all_models = 2 + self.final_devices  # the unpruned and the global one, too
        pruned = 1 - self.sparsity(len(self.sparsities) - 1)
        works = [1.0, *[pruned] * (all_models - 1)]
        return sum(works[:models]) / sum(works)

    def is_check(self, round: int, rounds: int) -> bool:
        """Whether a check follows after `round` of `rounds` rounds; none does after the last."""
        return bool(self.evaluate_every) and not round % self.evaluate_every and round < rounds

    def _models(self, round: int, devices: int) -> float:
        """The scored models, in whole models: the unpruned one and, if pruned, the global one and
        each device's.
        """
        sparsity = self.sparsity(max(round, 0))
        return 1 + (1 - sparsity) * (1 + devices) if sparsity else 1.0


@dataclass
class Estimate:
    """The wall seconds left, estimated from the rounds and checks of this process."""

    plan: WorkPlan
    _rounds: list[float] = field(default_factory=list)  # seconds per whole round
    _samples: list[float] = field(default_factory=list)  # training samples of a round
    _scoring: list[float] = field(default_factory=list)  # seconds per row of a whole model

    def saw_round(self, round: int, seconds: float, samples: int) -> None:
        """Add the measurement of a round, counted from 0."""
        self._rounds.append(seconds / self.plan.round_work(round))
        self._samples.append(max(1, samples))

    def saw_check(self, round: int, seconds: float) -> None:
        """Add the measurement of the check after `round` rounds."""
        self._scoring.append(seconds / self.plan.check_work(round))

    def seconds_left(self, done: int, rounds: int) -> float | None:
        """Wall seconds until the run's end where `done` of `rounds` are done; None before the
        first.
        """
        if not self._rounds:
            return None
        coming = range(done, rounds)
        training = self.round_seconds * sum(map(self.plan.round_work, coming))
        checks = sum(
            self.plan.check_work(round + 1)
            for round in coming
            if self.plan.is_check(round + 1, rounds)
        )
        return (
            training
            + self.check_row_seconds * checks
            + self.scoring_row_seconds * self.plan.final_work()
        )

    def scoring_left(self, models: int, seconds: float) -> float | None:
        """Wall seconds left of the final scoring, after so many models and `seconds`; None before
        the first model.

        Less than the models not yet done would take by these, where less was expected: equal models
        are scored once, and which are equal shows late.
        """
        if not models:
            return None
        by_models = seconds * (1 / self.plan.scored_share(models) - 1)
        expected = (
            self.scoring_row_seconds * self.plan.final_work() - seconds if self._rounds else 0.0
        )
        return min(by_models, expected) if expected > 0 else by_models

    @property
    def round_seconds(self) -> float:
        """Seconds per whole round; the first round, which prepares what later ones reuse, does not
        count.
        """
        return median(self._rounds[1:] or self._rounds)

    @property
    def check_row_seconds(self) -> float:
        """Seconds per row of a whole model in a check, expected from training before the first."""
        return median(self._scoring) if self._scoring else self._forward_row_seconds

    @property
    def scoring_row_seconds(self) -> float:
        """The same in the final scoring: a short check pays for its start on few rows, and can only
        seem slower.
        """
        return min(self.check_row_seconds, self._forward_row_seconds)

    @property
    def _forward_row_seconds(self) -> float:
        return FORWARD_SHARE * self.round_seconds / median(self._samples)
