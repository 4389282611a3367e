"""LoRA depth and ranks for every device, from the times that rounds took: LEGEND's control.

LEGEND (reconstructed), sections 6 to 9; arXiv:2412.20004. The depth of a device is the number of
blocks with an adapter, counted from the output. What a round of each depth takes is estimated in
`device_times`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedspine.control.device_times import DeviceTimes, Expected, expected, median_of_longest
from fedspine.control.links import ratio
from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput, check_ranges

DepthRule: TypeAlias = Literal["barrier-floor", "align-fastest", "tiers", "fixed"]


@dataclass(frozen=True)
class AllBlocks:
    """Every device trains the adapters of all blocks."""

    name: ClassVar = "all"

    def check(self, layers: int) -> None:
        pass


@dataclass(frozen=True)
class Lcd:
    """Each device trains the adapters of as many upper blocks as LEGEND's rule allows it."""

    name: ClassVar = "lcd"
    rule: DepthRule = "barrier-floor"
    fixed: int = 0  # the depth of all where the rule is "fixed"; 0: all blocks
    least: int = 2  # k_min
    coverage: float = 0.1  # c_min: share of a round's devices that train each block
    discount: float = 0.8  # rho: what an old exchange still counts after a new one

    def check(self, layers: int) -> None:
        check_ranges(self, {"coverage": (0, 1), "discount": (0, 1)}, "method.depths")
        check_ranges(self, {"least": (1, layers), "fixed": (0, layers)}, "method.depths")
        check_fixed("method.depths.fixed", self.fixed, "method.depths.rule", self.rule)


def check_fixed(name: str, depth: int, rule_name: str, rule: DepthRule) -> None:
    """Raise BadInput for a depth of all devices where a rule gives each its own."""
    if depth and rule != "fixed":
        raise BadInput(
            f'{name} is {depth}, but {rule_name} is "{rule}", which gives each device a depth; '
            f'leave {name} out, or set {rule_name} to "fixed"'
        )


Depths: TypeAlias = AllBlocks | Lcd

KEEP_WITHIN = 0.05  # of the round's time: a depth one away is not worth a change
FIRST_SHARE = 0.25  # of the common ranks, which devices get before any link is known
ENDS = 24  # times at which a round could end that are compared to fit ranks
ROUGH_STEPS = 14  # of bisection for each of them, to a ten-thousandth of the interval


@dataclass(frozen=True)
class DepthPlan:
    """The plan of one round: each device's depth, its expected seconds, and its ranks from its
    lowest block up, if they are not the common ones.

    `round_seconds` is the time that the round, which waits for all, is as likely to exceed as not.
    No time is expected where no device was ever timed.
    """

    depths: dict[DeviceId, int]
    seconds: dict[DeviceId, float]
    ranks: dict[DeviceId, tuple[int, ...]]
    round_seconds: float | None = None


@dataclass(frozen=True)
class DepthPlanner:
    """Chooses depths by a rule of `choose_depths`, but keeps a device's last depth if a change
    gains little.
    """

    rule: DepthRule
    ranks: tuple[int, ...]  # of the blocks, from input to output
    traffic: NDArray[np.float64]  # bytes of a round, [depths 0 to layers]
    least: int
    coverage: float
    fixed: int
    # what a device's adapter is worth grows with its ranks to this power, by which each device's
    # ranks are lowered to what its link can send in time; None: all have the common ranks
    rank_worth: float | None = None

    def plan(
        self,
        times: Mapping[DeviceId, DeviceTimes],
        before: Mapping[DeviceId, int],
        most: Mapping[DeviceId, int],
    ) -> DepthPlan:
        """The next round of the devices in `most`, which names the largest depth in each memory.

        `times` is what exchanges took, and `before` each device's last depth; both may lack
        devices, and name others.
        """
        if not most:  # all are busy
            return DepthPlan({}, {}, {})
        devices, largest = list(most), np.array(list(most.values()))
        known = expected(times, devices, self.traffic / self.traffic[-1])
        if known is None:  # depths spread out tell what a block costs
            spread = np.linspace(self.least, len(self.ranks), len(devices))
            fixed = self.rule == "fixed"
            chosen = np.minimum(self.fixed if fixed else spread.round().astype(int), largest)
            depths = dict(zip(devices, map(int, chosen), strict=True))
            if self.rank_worth is None:
                return DepthPlan(depths, {}, {})
            cut = {id: own_ranks(self.ranks, depth, FIRST_SHARE) for id, depth in depths.items()}
            return DepthPlan(depths, {}, cut)
        if self.rank_worth is not None:
            return self._with_own_ranks(known, devices, largest)
        chosen = choose_depths(
            self.rule,
            known.seconds,
            largest,
            self.ranks,
            least=self.least,
            coverage=self.coverage,
            fixed=self.fixed,
        )
        last = np.array([before.get(id, 0) for id in devices])
        chosen = settled(chosen, np.minimum(last, largest), known.seconds)
        at = np.arange(len(devices)), chosen
        seconds = known.seconds[at]
        variance = known.computing_variance[at] + known.sending_variance[at]
        return DepthPlan(
            depths=dict(zip(devices, map(int, chosen), strict=True)),
            seconds=dict(zip(devices, map(float, seconds), strict=True)),
            ranks={},
            round_seconds=float(median_of_longest(seconds, variance)),
        )

    def _with_own_ranks(
        self, known: Expected, devices: Sequence[DeviceId], most: NDArray[np.int64]
    ) -> DepthPlan:
        """Depths and ranks with which devices are done together.

        ENDS times at which the round could end are compared. A device takes the depth of the rule,
        or with "barrier-floor" the one that is worth most, and of its blocks' ranks the largest
        share that it can compute and move by then. A block's adapter is worth its rank to the power
        `rank_worth`. What counts is the worth for each second until the last device is done.
        """
        rows, floor = np.arange(len(devices)), np.minimum(self.least, most)
        by_depth = np.array(self.ranks[::-1])  # the output's block is the first
        ranks, worth = _sums(by_depth), _sums(by_depth**self.rank_worth)  # of each depth's blocks
        depths = np.arange(len(ranks))
        adapters = known.sending - known.sending[:, :1]  # seconds of traffic without the head
        rest = known.seconds - adapters
        earliest = rest + adapters * ratio(depths, ranks)  # each block at rank 1
        ends = np.geomspace(earliest[rows, floor].min(), known.seconds[rows, most].max(), ENDS)
        shares = np.clip(ratio(ends[:, None, None] - rest, adapters), 0.0, 1.0)
        if self.rule == "barrier-floor":
            possible = (depths >= floor[:, None]) & (depths <= most[:, None])
            in_time = (earliest <= ends[:, None, None]) | (depths == floor[:, None])
            gained = np.maximum(shares**self.rank_worth * worth, depths)
            chosen = np.where(possible & in_time, gained, -1.0).argmax(-1)
        else:
            chosen = choose_depths(
                self.rule, known.seconds, most, self.ranks, least=self.least,
                coverage=self.coverage, fixed=self.fixed,
            )[None].repeat(ENDS, 0)  # fmt: skip
        at = rows, chosen  # [ends, devices]
        share = np.take_along_axis(shares, chosen[..., None], -1)
        blocks = np.arange(len(by_depth))
        own = np.where(blocks < chosen[..., None], _cut(by_depth, share), 0)
        kept = own.sum(-1) / ranks[chosen]
        seconds = rest[at] + kept * adapters[at]
        moved = ratio(seconds - rest[at] + known.sending[rows, 0], known.sending[at])
        variance = known.computing_variance[at] + moved**2 * known.sending_variance[at]
        longest = median_of_longest(seconds, variance, steps=ROUGH_STEPS)
        needed = np.minimum(np.ceil(self.coverage * len(devices)), (blocks < most[:, None]).sum(0))
        enough = ((own > 0).sum(1) >= needed).all(-1)
        a_second = (own**self.rank_worth).sum((1, 2)) / longest
        best = int(np.argmax(np.where(enough, a_second, -np.inf)))
        return DepthPlan(
            depths=dict(zip(devices, map(int, chosen[best]), strict=True)),
            seconds=dict(zip(devices, map(float, seconds[best]), strict=True)),
            ranks={
                id: tuple(map(int, each[:depth][::-1]))
                for id, each, depth in zip(devices, own[best], chosen[best], strict=True)
            },
            round_seconds=float(median_of_longest(seconds[best], variance[best])),
        )


def _sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the first none, one, two, ... of the values."""
    return np.append(0.0, np.cumsum(values))


def rising_ranks(layers: int, budget: int, difference: float) -> tuple[int, ...]:
    """Ranks of the blocks, from input to output, `difference` apart and `budget` in all; section 6.

    After rounding, missing ranks are added at the output end and surplus ones removed at the input
    end; none falls below 1. A negative difference gives falling ranks with the same sum.

    >>> rising_ranks(4, 32, 1.0), rising_ranks(3, 24, 0.0)
    ((6, 8, 8, 10), (8, 8, 8))
    """
    if budget < layers:
        raise ValueError(f"a budget of at least one rank for {layers} blocks was expected")
    least = (budget - abs(difference) * layers * (layers - 1) / 2) / layers
    ranks = [max(1, round(least + abs(difference) * block)) for block in range(layers)]
    block = layers - 1
    while sum(ranks) < budget:
        ranks[block] += 1
        block = (block - 1) % layers
    block = 0
    while sum(ranks) > budget:
        if ranks[block] > 1:
            ranks[block] -= 1
        block = (block + 1) % layers
    ranks.sort()
    return tuple(ranks if difference >= 0 else reversed(ranks))


def choose_depths(
    rule: DepthRule,
    seconds: NDArray[np.float64],
    most: NDArray[np.int64],
    ranks: Sequence[int],
    *,
    least: int,
    coverage: float,
    fixed: int,
) -> NDArray[np.int64]:
    """The depth of every device for one round; LCD, section 9.

    `seconds` [devices, layers + 1] never falls with depth, `most` [devices] is the largest depth
    that fits a device's memory, at least 1, and `ranks` [layers] are those of the blocks from input
    to output. No depth is below `least`, unless memory forbids it. The rules are:

    - `barrier-floor`: of all times at which a round could end, take the one with the most
      rank-weighted coverage of the blocks per second, among those at which each block is trained by
      a share `coverage` of the devices as far as memory allows; every device takes the largest
      depth that it finishes by then.
    - `align-fastest`: every device takes the largest depth that it finishes by the time at which
      the fastest device is done with all blocks.
    - `tiers`: three groups of equal size by speed, at a half, three quarters and all of the blocks.
    - `fixed`: the depth `fixed` for all.
    """
    devices, layers = seconds.shape[0], seconds.shape[1] - 1
    floor = np.minimum(least, most)
    if rule == "fixed":
        return np.minimum(fixed, most)
    if rule == "tiers":
        order = np.empty(devices, dtype=np.int64)
        order[np.argsort(seconds[:, layers], kind="stable")] = np.arange(devices)
        shares = np.array([1.0, 0.75, 0.5])[np.minimum(3 * order // devices, 2)]
        return np.clip(np.ceil(shares * layers).astype(np.int64), floor, most)
    if rule == "align-fastest":
        return _filled(seconds, float(seconds[:, layers].min()), floor, most)
    return _filled(seconds, _best_end(seconds, floor, most, ranks, coverage), floor, most)


def _best_end(
    seconds: NDArray[np.float64],
    floor: NDArray[np.int64],
    most: NDArray[np.int64],
    ranks: Sequence[int],
    coverage: float,
) -> float:
    devices, layers = seconds.shape[0], seconds.shape[1] - 1
    depths = np.arange(1, layers + 1)
    possible = np.where(depths <= most[:, None], seconds[:, 1:], np.inf)  # [devices, layers]
    # what is done in any case is done at any time
    possible = np.where(depths <= floor[:, None], -np.inf, possible)
    first = seconds[np.arange(devices), floor].max()  # before it no round can end
    ends = np.unique(np.append(possible[np.isfinite(possible) & (possible > first)], first))
    # the share of the devices that train the block of this depth when a round ends then
    covered = np.stack(
        [np.searchsorted(np.sort(column), ends, side="right") for column in possible.T]
    )
    reachable = (possible < np.inf).sum(0)
    needed = np.minimum(np.ceil(coverage * devices), reachable)
    enough = (covered >= needed[:, None]).all(0)
    weights = np.asarray(ranks, dtype=np.float64)[::-1]  # by depth: the output's block is the first
    gain = weights @ covered / (devices * weights.sum())
    return float(ends[np.argmax(np.where(enough, gain / ends, -np.inf))])


def _filled(
    seconds: NDArray[np.float64],
    end: float,
    floor: NDArray[np.int64],
    most: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The largest depth that each device finishes by `end`, within its bounds."""
    return np.clip((seconds[:, 1:] <= end).sum(1), floor, most)


def settled(
    chosen: NDArray[np.int64], before: NDArray[np.int64], seconds: NDArray[np.float64]
) -> NDArray[np.int64]:
    """`chosen`, or a device's depth `before` (0: none) if it differs by one and would end within a
    twentieth of the round's time of the round's end.
    """
    rows = np.arange(len(chosen))
    end = seconds[rows, chosen].max()
    near = (before > 0) & (np.abs(chosen - before) == 1)
    return np.where(
        near & (np.abs(seconds[rows, before] - end) < KEEP_WITHIN * end), before, chosen
    )


def own_ranks(ranks: Sequence[int], depth: int, share: float) -> tuple[int, ...]:
    """The ranks of a device from its lowest block up: this share of the common ones; section 6.

    >>> own_ranks((6, 8, 8, 10), 2, share=0.5)
    (4, 5)
    """
    return tuple(map(int, _cut(np.array(ranks[len(ranks) - depth :]), share)))


def _cut(ranks: NDArray[np.int64], share: NDArray[np.float64] | float) -> NDArray[np.int64]:
    """Each rank times the share, rounded down, but at least 1."""
    # a billionth more, so that a share of 1 but for rounding cuts nothing
    return np.maximum(1, (share * ranks + 1e-9).astype(np.int64))
