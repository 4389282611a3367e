"""PyramidFL's control: guided selection of devices, and more local steps for the fast ones.

PyramidFL (Li et al. 2022, MobiCom) uses the selection of Oort (Lai et al. 2021, OSDI,
arXiv:2010.06081). A device's score rises with the loss of its rows and with the time since it was
last asked, and falls if it is slow. A share of each round explores devices that were never asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from fedspine.core.errors import BadInput
from fedspine.core.message import message

MOST_MORE = 10  # times the usual work that a device with slack may add
WHERE = "method.selection"
UNCERTAIN = 0.1  # weight of the bonus for those not asked for long


@message
class Seen:
    """What the server knows of one device."""

    reward: float  # rows times the root of the mean squared loss
    norm: float  # of its last update
    round: int  # of its last turn, counted from 1


@dataclass(frozen=True)
class Selecting:
    """The settings of a selection: `method.selection` of PyramidFL."""

    name: ClassVar = "oort"
    participants: int = 10  # devices of a round, chosen from those that the fleet offers
    explore: float = 0.9  # share of them that was never asked, in the first round
    explore_keep: float = 0.95  # what is left of that share, each round
    explore_least: float = 0.2
    # devices below this share of the last chosen one's score are not considered
    cut_off: float = 0.7
    clip: float = 0.95  # quantile of the rewards above which they count alike
    patience: float = 0.5  # quantile of the devices' times above which a device counts as slow
    penalty: float = 2.0  # power by which longer times count

    def check(self) -> None:
        """Raise BadInput for settings that cannot work."""
        if self.participants < 1:
            raise BadInput(f"{WHERE}.participants is {self.participants}, but at least 1 is needed")
        for name in ("explore", "explore_keep", "explore_least", "cut_off", "clip", "patience"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(
                    f"{WHERE}.{name} is {getattr(self, name)}, but a share from 0 to 1 was expected"
                )
        if not 0 <= self.penalty < inf:
            raise BadInput(
                f"{WHERE}.penalty is {self.penalty}, but a finite number of at least 0 was expected"
            )


@dataclass(frozen=True)
class Thinning:
    """How much of its update each device leaves out, by the norm of its last one:
    `method.thinning` of PyramidFL.
    """

    name: ClassVar = "by-norm"
    least: float = 0.1  # share of each tensor, of the update with the largest norm
    most: float = 0.5  # of the one with the smallest

    def check(self) -> None:
        """Raise BadInput for settings that cannot work."""
        if not 0 <= self.least <= self.most < 1:
            raise BadInput(
                f"method.thinning.least and most are {self.least} and {self.most}, but they must "
                "rise, from 0 to below 1"
            )


def scores(
    seen: Sequence[Seen], seconds: Float[np.ndarray, " devices"], round: int, selecting: Selecting
) -> Float[np.ndarray, " devices"]:
    """The score of each device in `round`, counted from 1; `seconds` [devices] is the expected time
    of each device's round.

    >>> same = Selecting(
    ...     participants=1, explore=0, explore_keep=1, explore_least=0, cut_off=1, clip=1,
    ...     patience=0, penalty=2,
    ... )
    >>> seen = [Seen(reward=1.0, norm=1.0, round=1)] * 2
    >>> quick, slow = scores(seen, np.array([1.0, 2.0]), 2, same)
    >>> round(float(quick / slow), 6)
    4.0
    """
    rewards = np.array([one.reward for one in seen])
    clipped = np.minimum(rewards, np.quantile(rewards, selecting.clip))
    reach = clipped.max() - clipped.min()
    useful = (clipped - clipped.min()) / reach if reach > 0 else np.zeros(len(seen))
    last = np.array([one.round for one in seen])
    useful = useful + np.sqrt(UNCERTAIN * np.log(max(round, 1)) / np.maximum(last, 1))
    preferred = np.quantile(seconds, selecting.patience)
    return useful * np.minimum(1.0, preferred / seconds) ** selecting.penalty


def select(
    examples: Mapping[str, int],
    seen: Mapping[str, Seen],
    seconds: Mapping[str, float],
    round: int,
    selecting: Selecting,
    rng: np.random.Generator,
) -> list[str]:
    """The devices of `round`, counted from 1, in the order of `examples`, the rows of all that
    could take part.

    `seconds` is the expected time of a round of each device in `seen`. Among devices never asked,
    the probability is in proportion to the rows.
    """
    known = [device for device in examples if device in seen]
    new = [device for device in examples if device not in seen]
    wanted = min(selecting.participants, len(examples))
    share = max(selecting.explore * selecting.explore_keep ** (round - 1), selecting.explore_least)
    exploring = min(len(new), max(int(np.floor(wanted * share + 0.5)), wanted - len(known)))
    taken = _drawn(new, np.array([float(examples[device]) for device in new]), exploring, rng)
    if wanted > exploring:
        times = np.array([seconds[device] for device in known])
        found = scores([seen[device] for device in known], times, round, selecting)
        last = np.sort(found)[-(wanted - exploring)]
        worth = [i for i, score in enumerate(found) if score >= selecting.cut_off * last]
        taken |= _drawn([known[i] for i in worth], found[worth], wanted - exploring, rng)
    return [device for device in examples if device in taken]


def _drawn(
    devices: Sequence[str], weights: Float[np.ndarray, " n"], count: int, rng: np.random.Generator
) -> set[str]:
    """So many devices, drawn with probability proportional to their weight; those of weight 0 come
    last.
    """
    if count == 0:
        return set()
    floor = max(float(weights.max()), 1.0) * 1e-9
    likely = np.maximum(weights, floor)
    return set(
        rng.choice(np.array(devices), count, replace=False, p=likely / likely.sum()).tolist()
    )


def steps_with_slack(steps: int, slack_seconds: float, pass_seconds: float, pass_steps: int) -> int:
    """The usual steps, plus those of as many whole passes over the device's rows as fit the time
    that it would wait.

    At most `MOST_MORE` times the usual steps are added; none if the time of a pass is unknown (0).

    >>> steps_with_slack(20, slack_seconds=7.0, pass_seconds=3.0, pass_steps=5)
    30
    """
    if pass_seconds <= 0:
        return steps
    passes = int(max(0.0, slack_seconds) // pass_seconds)
    return steps + min(MOST_MORE * steps, passes * pass_steps)


def dropped(norms: Sequence[float | None], lowest: float, highest: float) -> list[float]:
    """The share of its update that each device leaves out: `lowest` for the largest norm, `highest`
    for the smallest.

    The others are spaced evenly by the rank of their norms. A device whose norm is unknown leaves
    out `lowest`.

    >>> dropped([3.0, None, 1.0, 2.0], 0.0, 0.5)
    [0.0, 0.0, 0.5, 0.25]
    """
    known = sorted((norm for norm in norms if norm is not None), reverse=True)
    step = (highest - lowest) / max(len(known) - 1, 1)
    return [lowest if norm is None else lowest + step * known.index(norm) for norm in norms]
