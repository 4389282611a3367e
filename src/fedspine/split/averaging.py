"""Which model a split method deploys: the last round's, or the mean of the rounds' models."""

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from fedspine.core.tensors import average
from fedspine.split.interface import SplitModel

LATER = 3  # the larger, the more later rounds count in the mean


@dataclass(frozen=True)
class LastRound:
    """The model with which training goes on."""

    name: ClassVar = "last"


@dataclass(frozen=True)
class RoundsMean:
    """The mean of the models of all rounds; training goes on from the last one's."""

    name: ClassVar = "rounds-mean"


Averaging: TypeAlias = LastRound | RoundsMean


def first_mean(averaging: Averaging, model: Any) -> Any:
    """The mean before the first round; None where the last round's model is deployed."""
    return None if averaging == LastRound() else model


def mean_after(
    averaging: Averaging, split_model: SplitModel, before: Any, newest: Any, rounds: int
) -> Any:
    """The mean after `rounds` rounds, of which `newest` is the last one's model and `before` the
    mean of the others; None where the last round's is deployed.
    """
    match averaging:
        case LastRound():
            return None
        case RoundsMean():
            return running_mean(split_model, before, newest, rounds)


def running_mean(split_model: SplitModel, mean: Any, newest: Any, rounds: int) -> Any:
    """The mean of the models of `rounds` rounds, from that of the rounds before and the newest.

    Later ones count more: polynomial-decay averaging of Shamir and Zhang 2013 (arXiv:1212.1824).
    The first round's model is its own mean, after 5 rounds the newest counts a half, after 25 a
    seventh.
    """
    share = (LATER + 1) / (rounds + LATER)
    pairs = zip(split_model.parts(mean), split_model.parts(newest), strict=True)
    return split_model.join(
        *(average([(1 - share, before), (share, now)]) for before, now in pairs)
    )
