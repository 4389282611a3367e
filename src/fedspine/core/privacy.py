"""Differential privacy of what leaves a device: the promise of a run, what a device has spent, and
the end of its budget. docs/privacy.md states the guarantee.

Row level is DP-SGD (Abadi et al. 2016, arXiv:1607.00133) on each device. Device level is the
Gaussian mechanism on a device's whole update (clipped as in McMahan et al. 2018, arXiv:1710.06963,
with the noise added on the device, so that the server need not be trusted either).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from fedspine.core.accountant import Spending, epsilon_of, noise_multiplier
from fedspine.core.draws import Draws
from fedspine.core.message import message

Level: TypeAlias = Literal["rows", "devices"]
SPENT = "its privacy budget is spent"
KEPT = "privacy"  # under which a device's memory holds its ledger


class BudgetExceeded(RuntimeError):
    """The privacy budget of a device does not cover an order, so the device declines it."""


@message
class Privacy:
    """What a run promises each device.

    If `epsilon` is None, everything is clipped and sampled, but no noise is added and nothing is
    promised.
    """

    level: Level
    epsilon: float | None
    delta: float
    clip: float  # norm of a row's gradient, or of a device's update
    answers: int  # the most of a device in the whole run, among which the budget is divided


@message
class Spent:
    """What a device has spent in a run, and the epsilon of all of it."""

    entries: tuple[Spending, ...] = ()
    epsilon: float = 0.0


@runtime_checkable
class Ledger(Protocol):
    """Where a device keeps what it has spent."""

    @property
    def spent(self) -> Spent:
        """What the device has spent in this run so far."""
        ...

    def spend(self, spending: Spending) -> None:
        """Record what is about to be spent; if the budget does not cover it, raise BudgetExceeded
        and record nothing.
        """
        ...


@dataclass
class MemoryLedger:
    """The ledger of a simulated device, in its memory, which is saved and restored with the run."""

    terms: Privacy
    memory: dict[str, Any]

    @property
    def spent(self) -> Spent:
        return self.memory.get(KEPT) or Spent()

    def spend(self, spending: Spending) -> None:
        self.memory[KEPT] = afforded(self.spent.entries, spending, self.terms)


@dataclass(frozen=True)
class Guard:
    """Enforces a run's promise on a device, with its terms, its draws and its ledger."""

    terms: Privacy
    draws: Draws
    ledger: Ledger

    def spend(self, rate: float, steps: int) -> float:
        """Spend the budget of one answer of `steps` steps, each of which takes a row with
        probability `rate`; returns the noise multiplier.

        The multiplier is the smallest with which `terms.answers` such answers stay within the
        budget; 0 if the run promises nothing. Raises BudgetExceeded if the budget is used up.
        """
        terms = self.terms
        if terms.epsilon is None:
            return 0.0
        multiplier = noise_multiplier(terms.epsilon, terms.delta, rate, steps * terms.answers)
        self.ledger.spend(Spending(noise_multiplier=multiplier, rate=rate, steps=steps))
        return multiplier

    @property
    def epsilon(self) -> float | None:
        """What the device has spent in this run; None where nothing is promised."""
        return None if self.terms.epsilon is None else self.ledger.spent.epsilon


def afforded(entries: Iterable[Spending], spending: Spending, terms: Privacy) -> Spent:
    """The total spent after `spending`; raises BudgetExceeded if that exceeds the run's budget."""
    after = added(entries, spending)
    epsilon = epsilon_of(after, terms.delta)
    if terms.epsilon is None or epsilon > terms.epsilon:
        raise BudgetExceeded(SPENT)
    return Spent(entries=after, epsilon=epsilon)


def added(entries: Iterable[Spending], spending: Spending) -> tuple[Spending, ...]:
    """The entries with one more; equal releases are one entry, with the sum of their steps."""
    steps: dict[tuple[float, float], int] = {}
    for entry in (*entries, spending):
        kind = (entry.noise_multiplier, entry.rate)
        steps[kind] = steps.get(kind, 0) + entry.steps
    return tuple(
        Spending(noise_multiplier=multiplier, rate=rate, steps=count)
        for (multiplier, rate), count in steps.items()
    )
