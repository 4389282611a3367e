"""A round's plans: who chooses, the bandit or what it is compared with, and what each needs to know.

FedSpine (reconstructed), section 4. The paper's choice is the bandit's; the others are its controls (`random`, `fixed`,
`oracle`), and `deadline`, which chooses for the round's barrier: the moment at which the last device is done.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, Protocol

import numpy as np

from fedspine.control.bandit import pooled
from fedspine.control.device_model import Learnt, alike, paces, pupil
from fedspine.control.latency_model import predicted
from fedspine.control.plan import (
    Foresee,
    Limits,
    Plan,
    choose_plan,
    fixed_plan,
    plans_for_barrier,
    random_plan,
    warm_up,
)
from fedspine.control.sparsity import cubic_floor
from fedspine.core.errors import BadInput


class ChoiceFields(Protocol):
    """The settings of a method that say how it chooses; what they mean is said where the method is."""

    choice: Literal["bandit", "random", "fixed", "oracle", "deadline"]
    sparsity: float
    ranks: tuple[int, ...]
    warmup: float
    until: float
    floor: float
    fleet_say: float
    most_per_round: float
    fixed_ratio: float
    fixed_rank: int
    patience: float
    caution: float
    explore: float
    lipschitz: float
    lipschitz_decay: float
    pooled: float
    discount: float
    split_at: float
    deepest: int
    weights: tuple[float, float, float, float]
    reward: Literal["bounded", "ratio"]


class Standing(Protocol):
    """What the state of a method says of its devices before a round."""

    round: int
    rounds: int
    seed: int
    structures: Mapping[str, Any]  # of every device that has replied
    scores: Any  # the fleet's average importance, None before the first replies
    reached: Mapping[str, float]
    bandits: Learnt


_RANGES = {  # what the fields may be
    "most_per_round": (1e-3, 1),
    "fixed_ratio": (0, 1),
    "patience": (0, 1),
    "caution": (0, inf),
    "explore": (0, inf),
    "lipschitz": (0, inf),
    "lipschitz_decay": (0, 1),
    "pooled": (0, inf),
    "discount": (0, 1),
    "split_at": (0, inf),
    "deepest": (1, 10),
}


def check_ranges(fields: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise BadInput for a field that is not in its range, or is no number."""
    for name, (low, high) in ranges.items():
        if not low <= getattr(fields, name) <= high:
            raise BadInput(
                f"method.{name} is {getattr(fields, name)}, but {low} to {high} was expected"
            )


def check_choice(fields: ChoiceFields) -> None:
    """Raise BadInput for settings of the choice that cannot work."""
    check_ranges(fields, _RANGES)
    cubic_floor(0, 1, fields.sparsity, warmup=fields.warmup, until=fields.until, share=fields.floor)
    if fields.choice == "fixed" and fields.fixed_rank not in fields.ranks:
        raise BadInput(
            f"method.fixed_rank is {fields.fixed_rank}, but one of method.ranks was expected: {fields.ranks}"
        )
    if min(fields.weights) < 0 or not any(fields.weights[:3]):
        raise BadInput(
            f"method.weights is {list(fields.weights)}, but none below 0 and a first three above 0 were expected"
        )


@dataclass(frozen=True)
class Turn:
    """A device's turn to be planned: its limits, and whether it only warms up: nothing is known of its units yet."""

    limits: Limits
    warm: bool
    rng: np.random.Generator


def due(how: ChoiceFields, round: int, rounds: int) -> float:
    """The sparsity below which no device may stay in a round, counted from 0; 0 before the first."""
    if round < 0 or how.sparsity == 0:
        return 0.0
    return cubic_floor(
        round, rounds, how.sparsity, warmup=how.warmup, until=how.until, share=how.floor
    )


def plan_round(
    how: ChoiceFields, standing: Standing, affordable: Mapping[str, int], foresee: Foresee
) -> dict[str, Plan]:
    """The plan of every device that can afford a rank; `affordable` says how many, for all whose turn it is.

    Only the oracle looks at what `foresee` tells.
    """
    turns, learnt = _turns(how, standing, affordable), standing.bandits
    cold = {device: turn for device, turn in turns.items() if not turn.warm}
    match how.choice:
        case "bandit":
            group = alike(learnt) if how.pooled else {}
            plans = {
                id: _by_bandit(how, learnt, group.get(id, ()), id, turn)
                for id, turn in cold.items()
            }
        case "random":
            plans = {id: random_plan(turn.limits, turn.rng) for id, turn in cold.items()}
        case "fixed":  # also in the warm-up, whose ranks are mixed to learn from
            return {
                id: fixed_plan(_warmed(turn), how.fixed_ratio, how.fixed_rank)
                for id, turn in turns.items()
            }
        case "oracle":
            return plans_for_barrier(
                {id: _warmed(turn) for id, turn in turns.items()}, foresee, how.patience
            )
        case "deadline":  # random ranks until the first times are known
            limits = {id: _warmed(turn) for id, turn in turns.items() if learnt}
            plans = plans_for_barrier(
                limits, _by_pace(how, learnt, limits), how.patience, how.caution
            )
    return {
        id: plans[id] if id in plans else warm_up(turn.limits, turn.rng)
        for id, turn in turns.items()
    }


def _turns(how: ChoiceFields, standing: Standing, affordable: Mapping[str, int]) -> dict[str, Turn]:
    turns = {}
    for number, (device, ranks) in enumerate(affordable.items()):
        limits = Limits(
            reached=standing.reached.get(device, 0.0),
            due=due(how, standing.round, standing.rounds),
            target=how.sparsity,
            most_per_round=how.most_per_round,
            ranks=how.ranks,
            affordable=ranks,
        )
        known = device in standing.structures or (how.fleet_say > 0 and standing.scores is not None)
        warm = not known or standing.round < how.warmup * standing.rounds
        if ranks:
            rng = np.random.default_rng([standing.seed, standing.round, number])
            turns[device] = Turn(limits, warm, rng)
    return turns


def _by_bandit(
    how: ChoiceFields, learnt: Learnt, group: Sequence[str], id: str, turn: Turn
) -> Plan:
    others = [pupil(learnt, other).bandit for other in group]
    return choose_plan(
        pooled(pupil(learnt, id).bandit, others, how.pooled),
        turn.limits,
        explore=how.explore,
        lipschitz=how.lipschitz,
        lipschitz_decay=how.lipschitz_decay,
        rng=turn.rng,
    )


def _by_pace(how: ChoiceFields, learnt: Learnt, devices: Iterable[str]) -> Foresee:
    known = paces(learnt, devices)

    def foresee(device: str, reached: float, ranks: Sequence[int]) -> list[float]:
        return [
            predicted(known[device], sparsity=reached, rank=rank / how.ranks[-1]) for rank in ranks
        ]

    return foresee


def _warmed(turn: Turn) -> Limits:
    """The limits of a turn, with nothing left to prune where the device only warms up."""
    limits = turn.limits
    if not turn.warm:
        return limits
    return Limits(
        limits.reached, 0.0, limits.reached, limits.most_per_round, limits.ranks, limits.affordable
    )
