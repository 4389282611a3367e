"""The parts of a split round's control, as settings: who takes part, and how large batches are.

Each is a part (`core.parts`) of the split methods, `method.selection` and `method.batches`;
`control/split_plan.py` makes plans of them. Selection by labels, regulated batches and their tuning
are MergeSFL's (Liao et al. 2024, arXiv:2311.13348), regulated batches AdaSFL's too (Liao et al.
2024, IEEE/ACM Transactions on Networking). What is weighed and planned within a round is ours.
"""

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal, TypeAlias

from fedspine.control.split_plan import SplitControl, SplitLimits
from fedspine.core.errors import BadInput, check_ranges

FULL_BATCHES = 10  # the budget of an iteration where none is set


# --- who takes part ---


@dataclass(frozen=True)
class Everyone:
    """All devices that the fleet offers in a round."""

    name: ClassVar = "all"


@dataclass(frozen=True)
class _Few:
    """What binds every choice of a few devices."""

    fewest: int = 5  # m_min: devices of a round
    most: int = 20  # m_max
    budget_rows: int = 0  # features that the server takes in one iteration; 0: ten full batches


@dataclass(frozen=True)
class RandomDevices(_Few):
    """Devices drawn whatever their labels: the control of the searches."""

    name: ClassVar = "random"


@dataclass(frozen=True)
class Genetic(_Few):
    """MergeSFL's: a genetic search for the merged labels nearest the fleet's."""

    name: ClassVar = "genetic"
    population: int = 20
    generations: int = 20


@dataclass(frozen=True)
class LeastWaiting(_Few):
    """Ours: of choices whose merged labels are near enough to the fleet's, the one that waits
    least.

    Near enough is half of the batches' limit on divergence, half of 0.05 nats for equal ones. With
    the usual 20 and 20 a few devices that wait would be left in, so the search is longer.
    """

    name: ClassVar = "least-waiting"
    population: int = 50
    generations: int = 80


Selection: TypeAlias = Everyone | RandomDevices | Genetic | LeastWaiting


# --- how large batches are ---


@dataclass(frozen=True)
class Equal:
    """The same rows for all, as far as data and memory allow; no speed is measured for them."""

    name: ClassVar = "equal"


@dataclass(frozen=True)
class Regulated:
    """Rows in proportion to the speed that earlier rounds showed, Eq. 9 of MergeSFL."""

    name: ClassVar = "regulated"
    keep: float = 0.8  # a: share of the old average when a device's speed is measured again
    unmeasured: Literal["slowest", "median"] = "slowest"  # what a device never measured counts as
    tune: bool = True  # batches are changed by single rows to bring the merged labels nearer
    divergence: float = 0.05  # eps: nats of KL from the fleet's labels above which that is done


@dataclass(frozen=True)
class WithinRound:
    """Ours: rows are planned again within a round, from its own exchanges.

    A device never measured counts as the median of the others.
    """

    name: ClassVar = "within-round"
    keep: float = 0.8
    tune: bool = True
    divergence: float = 0.05
    fill_tokens: bool = True  # batches of texts are so many tokens; else so many rows


Batches: TypeAlias = Equal | Regulated | WithinRound


# --- what follows from both ---


def check_control(selection: Selection, batches: Batches) -> None:
    """Raise BadInput for settings that cannot work, whatever the fleet."""
    if isinstance(selection, _Few) and selection.budget_rows < 0:
        raise BadInput(
            f"method.selection.budget_rows is {selection.budget_rows}, but at least 0 was expected"
        )
    if isinstance(selection, Genetic | LeastWaiting):
        check_ranges(
            selection, {"population": (2, inf), "generations": (0, inf)}, "method.selection"
        )
    if isinstance(batches, Regulated | WithinRound):
        check_ranges(batches, {"divergence": (0, inf)}, "method.batches")
        if not 0 <= batches.keep < 1:
            raise BadInput(f"method.batches.keep is {batches.keep}, but 0 to below 1 was expected")


def needs_labels(selection: Selection, batches: Batches) -> bool:
    """Whether plans depend on the labels that devices hold."""
    tuned = isinstance(batches, Regulated | WithinRound) and batches.tune
    return tuned or not isinstance(selection, Everyone)


def measures_speed(selection: Selection, batches: Batches) -> bool:
    """Whether plans depend on how long a row takes each device."""
    return not isinstance(batches, Equal) or isinstance(selection, LeastWaiting)


def kept_share(batches: Batches) -> float:
    """The share of the old average when a device's speed is measured again."""
    return Regulated.keep if isinstance(batches, Equal) else batches.keep


def limits_of(
    selection: Selection, batches: Batches, *, devices: int, batch: int, row_bytes: float
) -> SplitLimits:
    """What binds a plan for so many `devices`, of at most `batch` rows each; `row_bytes` are those
    of a row's features.

    Raises BadInput for limits that no plan can meet.
    """
    divergence = SplitLimits.divergence if isinstance(batches, Equal) else batches.divergence
    if isinstance(selection, Everyone):
        fewest, most, rows = devices, devices, devices * batch
    else:
        fewest, most = selection.fewest, selection.most
        rows = selection.budget_rows or FULL_BATCHES * batch
    return SplitLimits(
        largest_batch=batch,
        fewest=fewest,
        most=most,
        feature_bytes=row_bytes,
        budget_bytes=rows * row_bytes,
        divergence=divergence,
    )


def control_of(selection: Selection, batches: Batches) -> SplitControl:
    """Which parts of the control are on."""
    regulate = not isinstance(batches, Equal)
    tune = isinstance(batches, Regulated | WithinRound) and batches.tune
    match selection:
        case Everyone():
            return SplitControl(select="all", regulate=regulate, tune=tune)
        case RandomDevices():
            return SplitControl(select="random", regulate=regulate, tune=tune)
        case Genetic() | LeastWaiting():
            return SplitControl(
                select="genetic",
                regulate=regulate,
                tune=tune,
                population=selection.population,
                generations=selection.generations,
            )
