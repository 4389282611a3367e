"""Accounting of differential privacy: Rényi accounting of Gaussian noise on Poisson-sampled
batches, by Google's `dp-accounting`, which only this file imports.

Mironov et al. 2019 (arXiv:1908.10530), converted to epsilon and delta as in Canonne et al. 2020
(arXiv:2004.00010, proposition 12). The result is an upper bound.
"""

import importlib.util
import logging
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from fedspine.core.errors import BadInput
from fedspine.core.message import message

# Rényi orders: some of the library's, none below 2, whose sums often do not converge
ORDERS = (2, 2.5, *range(3, 17), 18, 20, 24, 28, 32, 40, 48, 64, 96, 128, 256, 512)
GRID = 1e4  # noise multipliers are rounded up to multiples of 1 / GRID, so that the budget suffices
LEAST, MOST = 0.1, 1e5  # the range of noise multipliers


@message
class Spending:
    """What one device has spent: `steps` releases of a sum with Gaussian noise.

    The noise's standard deviation is `noise_multiplier` times the sum's sensitivity; `rate` is the
    probability with which a row takes part in a step.
    """

    noise_multiplier: float
    rate: float
    steps: int


def needs_accountant() -> None:
    """Raise BadInput if `dp-accounting` is not installed."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise BadInput("[privacy] needs an accountant: pip install 'fedspine[privacy]'")


def epsilon_of(spent: Iterable[Spending], delta: float) -> float:
    """The epsilon, at this delta, of all that was spent; 0 for nothing, infinite without noise.

    Neighbouring data sets differ by the presence of one row.
    """
    from dp_accounting.rdp import RdpAccountant

    # which reports the orders that it leaves out; the bound holds without them
    logging.getLogger("absl").setLevel(logging.ERROR)
    accountant, entries = RdpAccountant(list(ORDERS)), list(spent)
    if not entries:
        return 0.0
    if any(not entry.noise_multiplier > 0 for entry in entries):
        return math.inf
    for entry in entries:
        accountant.compose(_event(entry.noise_multiplier, entry.rate, entry.steps))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=4096)
def noise_multiplier(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The smallest noise multiplier, a multiple of 1 / GRID, with which `steps` releases at this
    sampling rate spend at most `epsilon` at `delta`; at least LEAST.

    Raises BadInput if none up to MOST suffices.
    """

    from scipy.optimize import brentq

    def excess(exponent: float) -> float:
        spending = Spending(noise_multiplier=math.exp(exponent), rate=rate, steps=steps)
        return math.log(epsilon_of((spending,), delta)) - math.log(epsilon)

    low, high = math.log(LEAST), 0.0
    while excess(high) > 0:
        low, high = high, high + 1
        if high > math.log(MOST):
            raise BadInput(
                f"privacy.epsilon is {epsilon:g} at a delta of {delta:g}, for which {steps} steps "
                "need more noise than anything could be learnt from; raise it, or train for fewer "
                "steps"
            )
    exponent = low if excess(low) <= 0 else float(brentq(excess, low, high, xtol=1 / GRID))
    rounded = math.ceil(math.exp(exponent) * GRID)
    while excess(math.log(rounded / GRID)) > 0:  # where brentq ended a little below
        rounded += 1
    return rounded / GRID


def _event(multiplier: float, rate: float, steps: int) -> Any:
    import dp_accounting

    noise: Any = dp_accounting.GaussianDpEvent(multiplier)
    if rate < 1:
        noise = dp_accounting.PoissonSampledDpEvent(rate, noise)
    return dp_accounting.SelfComposedDpEvent(noise, steps)
