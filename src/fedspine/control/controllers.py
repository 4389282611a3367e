"""Controllers, which choose each device's pruning and rank: the paper's S-UCB and its baselines.

FedSpine (reconstructed), section 4. A controller has settings and three functions: `check` refuses
settings that cannot work, `plan` plans the devices whose turn it is, and `learn` returns what is
known of devices after a round, which the next `plan` gets as `known`. Every plan keeps to the
schedule and the device's memory. `foresee` returns true times; only the oracle calls it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar, TypeAlias

from fedspine.control.bandit import Bandit, choose_plan, credit
from fedspine.control.latency_model import (
    LatencyModel,
    coefficients_of,
    no_evidence,
    observe,
    predicted,
)
from fedspine.control.plan import (
    Foresee,
    Plan,
    PlanResult,
    Turn,
    fixed_plan,
    plans_for_deadline,
    random_plan,
    warm_up,
)
from fedspine.core.errors import BadInput, check_ranges
from fedspine.core.message import message

WHERE = "method.controller"


@message
class TextLoad:
    """The operations that a device reported, relative to those of batches of full-length texts."""

    load: float


DeviceModel: TypeAlias = Bandit | LatencyModel | TextLoad  # what a controller knows of one device


@dataclass(frozen=True)
class SUcb:
    """The paper's controller: a bandit for each device, credited with the round's reward."""

    name: ClassVar = "s-ucb"
    exploration: float = 0.1  # c
    discount: float = 0.95  # lambda: what an old play still counts after a new one
    split_at: float = 2.0  # plays at which a leaf of the bandit's tree is refined
    max_tree_depth: int = 2  # 16 cells

    def check(self, ranks: Sequence[int]) -> None:
        check_ranges(
            self,
            {
                "exploration": (0, inf),
                "discount": (0, 1),
                "split_at": (0, inf),
                "max_tree_depth": (1, 10),
            },
            WHERE,
        )

    def plan(
        self, turns: Mapping[str, Turn], known: Mapping[str, Bandit], foresee: Foresee
    ) -> dict[str, Plan]:
        return {
            id: warm_up(turn.limits, turn.rng)
            if turn.warm
            else choose_plan(
                known.get(id, Bandit()), turn.limits, exploration=self.exploration, rng=turn.rng
            )
            for id, turn in turns.items()
        }

    def learn(
        self,
        known: Mapping[str, Bandit],
        results: Mapping[str, PlanResult],
        earned: Mapping[str, float],
        largest_rank: int,
    ) -> dict[str, Bandit]:
        """A device is credited at its plan's point in the unit square."""
        credited = {}
        for id, result in results.items():
            if id in earned and result.plan.action is not None:
                credited[id] = credit(
                    known.get(id, Bandit()),
                    *result.plan.action,
                    earned[id],
                    discount=self.discount,
                    split_at=self.split_at,
                    max_tree_depth=self.max_tree_depth,
                )
        return {**known, **credited}


class _LearnsNothing:
    """A controller whose plans do not depend on earlier rounds."""

    def learn(
        self,
        known: Mapping[str, DeviceModel],
        results: Mapping[str, PlanResult],
        earned: Mapping[str, float],
        largest_rank: int,
    ) -> dict[str, DeviceModel]:
        return {}


@dataclass(frozen=True)
class Random(_LearnsNothing):
    """Pruning and rank drawn uniformly among those that the schedule and the memory allow."""

    name: ClassVar = "random"

    def check(self, ranks: Sequence[int]) -> None:
        pass

    def plan(
        self, turns: Mapping[str, Turn], known: Mapping[str, DeviceModel], foresee: Foresee
    ) -> dict[str, Plan]:
        return {
            id: (warm_up if turn.warm else random_plan)(turn.limits, turn.rng)
            for id, turn in turns.items()
        }


@dataclass(frozen=True)
class Fixed(_LearnsNothing):
    """In every round, the same share of the largest pruning that it allows, and the same rank."""

    name: ClassVar = "fixed"
    ratio: float = 0.5  # of method.most_per_round; 0 prunes as the schedule demands and no more
    rank: int = 8  # or the largest below it that fits the memory

    def check(self, ranks: Sequence[int]) -> None:
        check_ranges(self, {"ratio": (0, 1)}, WHERE)
        if self.rank not in ranks:
            raise BadInput(
                f"{WHERE}.rank is {self.rank}, but one of method.ranks was expected: {tuple(ranks)}"
            )

    def plan(
        self, turns: Mapping[str, Turn], known: Mapping[str, DeviceModel], foresee: Foresee
    ) -> dict[str, Plan]:
        return {id: fixed_plan(turn.binding, self.ratio, self.rank) for id, turn in turns.items()}


@dataclass(frozen=True)
class Deadline:
    """Plans that all end by one deadline, with times predicted from what devices report."""

    name: ClassVar = "deadline"
    latency_margin: float = 0.3  # by how much a predicted time may be too short
    deadline_slack: float = 0.0  # 0 ends the round as soon as can be, 1 hurries nobody
    discount: float = 0.95  # what an old report still counts after a new one

    def check(self, ranks: Sequence[int]) -> None:
        check_ranges(
            self,
            {"latency_margin": (0, inf), "deadline_slack": (0, 1), "discount": (0, 1)},
            WHERE,
        )

    def plan(
        self, turns: Mapping[str, Turn], known: Mapping[str, LatencyModel], foresee: Foresee
    ) -> dict[str, Plan]:
        if not known:  # any rank, so that its time becomes known
            return {id: warm_up(turn.limits, turn.rng) for id, turn in turns.items()}
        limits = {id: turn.binding for id, turn in turns.items()}
        coefficients = coefficients_of(
            {device: model.evidence for device, model in known.items()}, limits
        )

        def predict(device: str, sparsity: float, ranks: Sequence[int]) -> list[float]:
            largest = limits[device].ranks[-1]
            return [
                predicted(coefficients[device], sparsity=sparsity, rank=rank / largest)
                for rank in ranks
            ]

        return plans_for_deadline(limits, predict, self.deadline_slack, self.latency_margin)

    def learn(
        self,
        known: Mapping[str, LatencyModel],
        results: Mapping[str, PlanResult],
        earned: Mapping[str, float],
        largest_rank: int,
    ) -> dict[str, LatencyModel]:
        """The reported times, added to what is known of each device's."""
        timed = {
            id: LatencyModel(
                evidence=observe(
                    known[id].evidence if id in known else no_evidence(),
                    sparsity=result.plan.sparsity,
                    rank=result.plan.rank / largest_rank,
                    seconds=result.seconds,
                    compute_seconds=result.compute_seconds,
                    bytes=result.bytes,
                    discount=self.discount,
                )
            )
            for id, result in results.items()
        }
        return {**known, **timed}


@dataclass(frozen=True)
class Oracle:
    """Plans as `Deadline`, with the true times that only a simulated fleet knows: an upper bound on
    what planning can gain.
    """

    name: ClassVar = "oracle"
    deadline_slack: float = 0.0  # 0 ends the round as soon as can be, 1 hurries nobody

    def check(self, ranks: Sequence[int]) -> None:
        check_ranges(self, {"deadline_slack": (0, 1)}, WHERE)

    def plan(
        self, turns: Mapping[str, Turn], known: Mapping[str, TextLoad], foresee: Foresee
    ) -> dict[str, Plan]:
        limits = {id: turn.binding for id, turn in turns.items()}
        return plans_for_deadline(limits, foresee, self.deadline_slack)

    def learn(
        self,
        known: Mapping[str, TextLoad],
        results: Mapping[str, PlanResult],
        earned: Mapping[str, float],
        largest_rank: int,
    ) -> dict[str, TextLoad]:
        """How long each device's texts are, which only its operations show."""
        return {**known, **{id: TextLoad(load=result.load) for id, result in results.items()}}


Controller: TypeAlias = SUcb | Random | Fixed | Deadline | Oracle
