"""Aggregations: how a server merges what the devices of a round send, by the mean or by a rule that
one bad device cannot move far.

Each is a part (`core.parts`) of the recipe, `fleet.aggregation`. A fleet carries it to the methods,
and `core.merging` applies it. Each has `check(replies)`, which raises BadInput for settings that
cannot work or too few replies in a round, and `fewest(replies)`, the owners that an entry needs.

Sources: the coordinate-wise median and trimmed mean are those of Yin et al. 2018
(arXiv:1803.01498), Multi-Krum is that of Blanchard et al. 2017 (arXiv:1703.02757). Bounds on the
norm of an update are those of Sun et al. 2019 (arXiv:1911.07963), here relative to the round's
median, as Andrew et al. 2021 (arXiv:1905.03871) track a quantile of the norms. Weights by rows in
the trimmed mean and in Multi-Krum are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any, ClassVar, TypeAlias

from fedspine.core import parts
from fedspine.core.errors import BadInput

TINY = 1e-9  # guards against rounding: a share of 0.2 of ten devices is two


@dataclass(frozen=True)
class Mean:
    """The mean, weighted by rows; one device can move it arbitrarily far."""

    name: ClassVar = "mean"

    def check(self, replies: int) -> None:
        pass

    def fewest(self, replies: int) -> int:
        return 1


@dataclass(frozen=True)
class TrimmedMean:
    """For each entry, the mean without the lowest and the highest values, weighted by rows."""

    name: ClassVar = "trimmed_mean"
    share: float = 0.2  # of a round's replies, left out at each end; one at least

    def check(self, replies: int) -> None:
        _check_share(self, replies)

    def cut(self, replies: int) -> int:
        """The number of values left out at each end of every entry; so many bad devices do no harm.

        It depends on the round's replies and not on an entry's owners, since all bad devices may
        own it.

        >>> TrimmedMean(share=0.2).cut(10), TrimmedMean(share=0.2).cut(4)
        (2, 1)
        """
        return _part_of(self.share, replies)

    def fewest(self, replies: int) -> int:
        """The owners that an entry needs for a value to be left, of so many `replies`."""
        return 2 * self.cut(replies) + 1


@dataclass(frozen=True)
class Median:
    """For each entry, the median; of an even number the mean of the two in the middle, weighted by
    rows.
    """

    name: ClassVar = "median"

    def check(self, replies: int) -> None:
        _at_least(self.name, self.fewest(replies), replies)

    def fewest(self, replies: int) -> int:
        return 3  # nothing shows which of two values is the bad one


@dataclass(frozen=True)
class MultiKrum:
    """The mean, weighted by rows, of the changes that have the most like them: the others count for
    nothing.
    """

    name: ClassVar = "multi_krum"
    share: float = 0.2  # of a round's replies, left out; one at least

    def check(self, replies: int) -> None:
        _check_share(self, replies)

    def left_out(self, replies: int) -> int:
        """The number of changes that count for nothing; so many bad devices do no harm."""
        return _part_of(self.share, replies)

    def kept(self, distances: Sequence[Sequence[float]]) -> list[bool]:
        """Whether each device's change counts, by the squared distances of every two of them.

        A change scores the sum of its distances to its nearest others, two fewer than would be left
        beside it if all bad ones were gone. Those with the highest scores are left out; changes of
        equal scores are treated alike.

        >>> line = [0.0, 1.0, 2.0, 3.0, 9.0]
        >>> MultiKrum().kept([[(x - y) ** 2 for y in line] for x in line])
        [True, True, True, True, False]
        """
        replies = len(distances)
        near = replies - self.left_out(replies) - 2
        scores = [
            sum(sorted(each for j, each in enumerate(row) if j != i)[:near])
            for i, row in enumerate(distances)
        ]
        bound = sorted(scores)[replies - self.left_out(replies) - 1]
        return [score <= bound for score in scores]

    def fewest(self, replies: int) -> int:
        """The changes among which bad ones, of so many `replies`, cannot be each other's likes."""
        return 2 * self.left_out(replies) + 3


@dataclass(frozen=True)
class NormClip:
    """The mean, weighted by rows, of changes that are scaled down to at most `bound` times the
    round's median norm.
    """

    name: ClassVar = "norm_clip"
    bound: float = 1.0  # the largest norm, as a multiple of the median one

    def check(self, replies: int) -> None:
        if not 0 < self.bound < float("inf"):
            raise BadInput(
                f"fleet.aggregation.bound is {self.bound:g}, but a multiple of the median norm "
                "above 0 was expected"
            )
        _at_least(self.name, self.fewest(replies), replies)

    def shares(self, norms: Sequence[float]) -> list[float]:
        """The share of each device's change that counts, 1 for those within the bound.

        Of an even number the lower median is used, which fewer than half cannot raise. A single
        device has no bound, so nothing of its change counts.

        >>> NormClip(bound=2.0).shares([1.0, 1.0, 8.0])
        [1.0, 1.0, 0.25]
        """
        if len(norms) < self.fewest(len(norms)):
            return [0.0] * len(norms)
        largest = self.bound * sorted(norms)[(len(norms) - 1) // 2]
        return [1.0 if norm <= largest else largest / norm for norm in norms]

    def fewest(self, replies: int) -> int:
        return 2


Aggregation: TypeAlias = Mean | TrimmedMean | Median | MultiKrum | NormClip
CHOICES: dict[str, type[Any]] = {
    part.name: part for part in (Mean, TrimmedMean, Median, MultiKrum, NormClip)
}


def aggregation_of(given: Any) -> Any:
    """The part that a name or a table of a recipe describes; any other value is returned as it is.

    Raises BadInput for unknown names and settings.
    """
    match given:
        case str():
            return parts.part("fleet.aggregation", CHOICES, Mean(), {"name": given})
        case dict():
            return parts.part("fleet.aggregation", CHOICES, Mean(), given)
        case _:
            return given


def _part_of(share: float, replies: int) -> int:
    return max(1, floor(share * replies + TINY))


def _check_share(how: TrimmedMean | MultiKrum, replies: int) -> None:
    if not 0 < how.share < 0.5:
        raise BadInput(
            f"fleet.aggregation.share is {how.share:g}, but a share above 0 and below 0.5 was "
            'expected; to leave nothing out write fleet.aggregation = "mean"'
        )
    needed = max(how.fewest(replies), ceil(1 / how.share - TINY))
    if replies < needed:
        raise BadInput(
            f"fleet.aggregation is {how.name} with a share of {how.share:g}, which needs "
            f"{needed} replies in a round, but there are {replies}; raise fleet.per_round, or "
            "choose another aggregation"
        )


def _at_least(name: str, needed: int, replies: int) -> None:
    if replies < needed:
        raise BadInput(
            f"fleet.aggregation is {name}, which needs {needed} replies in a round, but there "
            f"{'is' if replies == 1 else 'are'} {replies}; raise fleet.per_round, or leave "
            "fleet.aggregation out"
        )
