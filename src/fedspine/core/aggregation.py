"""Aggregations: how a server merges what the devices of a round send, by the mean or by a rule that
one bad device cannot move far.

Each is a part (`core.parts`) of the recipe, `fleet.aggregation`. A fleet carries it to the methods,
and `core.merging` applies it. Each has `check(replies)`, which raises BadInput for settings that
cannot work or too few replies in a round; `shares(norms)`, the share of each device's change that
counts; and `fewest(replies)`, the owners that an entry needs.

Sources: the coordinate-wise median and trimmed mean are those of Yin et al. 2018
(arXiv:1803.01498). Bounds on the norm of an update are those of Sun et al. 2019 (arXiv:1911.07963),
here relative to the round's median, as Andrew et al. 2021 (arXiv:1905.03871) track a quantile of
the norms. Weights in the trimmed mean are ours.
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

    def shares(self, norms: Sequence[float]) -> list[float]:
        return [1.0] * len(norms)

    def fewest(self, replies: int) -> int:
        return 1


@dataclass(frozen=True)
class TrimmedMean:
    """For each entry, the mean without the lowest and the highest values, weighted by rows."""

    name: ClassVar = "trimmed_mean"
    share: float = 0.2  # of a round's replies, left out at each end; one at least

    def check(self, replies: int) -> None:
        if not 0 < self.share < 0.5:
            raise BadInput(
                f"fleet.aggregation.share is {self.share:g}, but a share above 0 and below 0.5 was "
                'expected; for no trimming write fleet.aggregation = "mean"'
            )
        needed = max(self.fewest(replies), ceil(1 / self.share - TINY))
        if replies < needed:
            raise BadInput(
                f"fleet.aggregation is trimmed_mean with a share of {self.share:g}, which needs "
                f"{needed} replies in a round, but there are {replies}; raise fleet.per_round, or "
                "choose another aggregation"
            )

    def shares(self, norms: Sequence[float]) -> list[float]:
        return [1.0] * len(norms)

    def cut(self, replies: int) -> int:
        """The number of values left out at each end of every entry; so many bad devices do no harm.

        It depends on the round's replies and not on an entry's owners, since all bad devices may
        own it.

        >>> TrimmedMean(share=0.2).cut(10), TrimmedMean(share=0.2).cut(4)
        (2, 1)
        """
        return max(1, floor(self.share * replies + TINY))

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

    def shares(self, norms: Sequence[float]) -> list[float]:
        return [1.0] * len(norms)

    def fewest(self, replies: int) -> int:
        return 3  # nothing shows which of two values is the bad one


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


Aggregation: TypeAlias = Mean | TrimmedMean | Median | NormClip
CHOICES: dict[str, type[Any]] = {part.name: part for part in (Mean, TrimmedMean, Median, NormClip)}


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


def _at_least(name: str, needed: int, replies: int) -> None:
    if replies < needed:
        raise BadInput(
            f"fleet.aggregation is {name}, which needs {needed} replies in a round, but there "
            f"{'is' if replies == 1 else 'are'} {replies}; raise fleet.per_round, or leave "
            "fleet.aggregation out"
        )
