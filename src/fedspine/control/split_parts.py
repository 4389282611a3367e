"""The parts of a split round's control, as settings: which devices take part, and how large batches
are.

Each is a part (`core.parts`) of the split methods, `method.selection` and `method.batches`;
`control/split_plan.py` plans rounds with them. Selection by labels, regulated batches and their
tuning are MergeSFL's (Liao et al. 2024, arXiv:2311.13348), regulated batches also AdaSFL's (Liao et
al. 2024, IEEE/ACM Transactions on Networking). Selection by waiting and batches replanned within a
round are ours.
"""

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal, TypeAlias

from fedspine.control.split_plan import SplitControl, SplitLimits
from fedspine.core.errors import BadInput, check_ranges

FULL_BATCHES = 10  # the default budget of an iteration


# --- who takes part ---


@dataclass(frozen=True)
class Everyone:
    """All devices that the fleet offers in a round."""

    name: ClassVar = "all"


@dataclass(frozen=True)
class _Few:
    """The limits of every selection of a few devices."""

    fewest: int = 5  # m_min: devices of a round
    most: int = 20  # m_max
    budget_rows: int = 0  # rows of features per iteration at the server; 0: ten full batches


@dataclass(frozen=True)
class RandomDevices(_Few):
    """Devices drawn regardless of their labels: the baseline for the searches."""

    name: ClassVar = "random"


@dataclass(frozen=True)
class Genetic(_Few):
    """MergeSFL's selection: a genetic search for merged labels close to the fleet's."""

    name: ClassVar = "genetic"
    population: int = 20
    generations: int = 20


@dataclass(frozen=True)
class LeastWaiting(_Few):
    """Ours: among selections whose merged labels are close enough to the fleet's, the one with the
    least waiting.

    Close enough means within half of `batches.divergence`, or of 0.05 nats for equal batches. The
    search is larger than MergeSFL's (20 and 20), which leaves a few devices in the selection that
    make others wait.
    """

    name: ClassVar = "least-waiting"
    population: int = 50
    generations: int = 80


Selection: TypeAlias = Everyone | RandomDevices | Genetic | LeastWaiting


# --- how large batches are ---


@dataclass(frozen=True)
class Equal:
    """The same rows for all devices, as far as data and memory allow, without measuring speed."""

    name: ClassVar = "equal"


@dataclass(frozen=True)
class Regulated:
    """Rows in proportion to the speed measured in earlier rounds, Eq. 9 of MergeSFL."""

    name: ClassVar = "regulated"
    keep: float = 0.8  # a: weight of the old average when a device's speed is measured again
    unmeasured: Literal["slowest", "median"] = "slowest"  # speed assumed for unmeasured devices
    tune: bool = True  # change batches by single rows to bring the merged labels closer
    divergence: float = 0.05  # eps: nats of KL from the fleet's labels above which to tune


@dataclass(frozen=True)
class WithinRound:
    """Ours: rows are replanned within a round, from its own exchanges.

    A device not measured yet counts as the median of the others.
    """

    name: ClassVar = "within-round"
    keep: float = 0.8
    tune: bool = True
    divergence: float = 0.05
    fill_tokens: bool = True  # batches of texts have a fixed number of tokens, else of rows


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
    """Whether plans depend on the devices' labels."""
    tuned = isinstance(batches, Regulated | WithinRound) and batches.tune
    return tuned or not isinstance(selection, Everyone)


def measures_speed(selection: Selection, batches: Batches) -> bool:
    """Whether plans depend on the seconds that a row takes each device."""
    return not isinstance(batches, Equal) or isinstance(selection, LeastWaiting)


def kept_share(batches: Batches) -> float:
    """The weight of the old average when a device's speed is measured again."""
    return Regulated.keep if isinstance(batches, Equal) else batches.keep


def limits_of(
    selection: Selection, batches: Batches, *, devices: int, batch: int, row_bytes: float
) -> SplitLimits:
    """The limits of a plan for a number of `devices` with at most `batch` rows each; `row_bytes` is
    the size of a row's features.

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
