"""Only the clock of LEGEND on the 80 simulated devices: how long its rounds take, how long they
were expected to take, and how well they could be foreseen at all; nothing is trained.

The costs are those of MiniLM's six layers on texts of 18 tokens, 8 steps of 16 rows, as in
`legend.toml` on trec6. "At best" is off whoever knows the devices' power modes and the mean of each
link, and thus all but chance: of all forecasts, that with the least median error in each round.

    python experiments/depth_clock.py --per-round 10 --rounds 20 --seeds 0 1 2 3 4
"""

import argparse
from types import SimpleNamespace

import numpy as np

from fedspine.control.depth import DepthPlanner, rising_ranks
from fedspine.control.device_times import timed
from fedspine.core.fleet import Cost
from fedspine.fleets.hardware import (
    GROUP_MBPS,
    HIGHEST_MBPS,
    LAUNCH_SECONDS,
    LINK_SIGMA,
    LOWEST_MBPS,
    Hardware,
    device_ids,
    fleet_mix,
)
from fedspine.lm.cost import Extent, training_flops
from fedspine.lm.forecast import depth_traffic
from fedspine.lm.prunable_layout import layout_of
from fedspine.lm.structure import full
from fedspine.methods.legend import Legend

DEVICES, LAYERS, TOKENS, CLASSES = 80, 6, 18, 6
ROUND_TRIPS = (0.003,) * len(GROUP_MBPS)
SIZES = {"num_hidden_layers": LAYERS, "intermediate_size": 1536, "hidden_size": 384}
METHOD = Legend(steps=8, batch=16)
FIRST = 5  # a forecast counts from the sixth round on
DRAWS = 2000


class Clock:
    """A fleet, and what a round of each depth costs a device."""

    def __init__(self, seed: int, rank: int) -> None:
        kinds = tuple(fleet_mix(None, DEVICES))
        self.ids = device_ids(list(kinds))
        self.hardware = Hardware(seed=seed, kinds=kinds, round_trip_seconds=ROUND_TRIPS)
        layout = layout_of(
            SimpleNamespace(model_type="bert", num_attention_heads=12, **SIZES), "bert"
        )
        self.ranks = rising_ranks(LAYERS, LAYERS * rank, METHOD.rank_difference)
        head = SimpleNamespace(numel=lambda: CLASSES * (SIZES["hidden_size"] + 1))
        self.traffic = depth_traffic(layout, self.ranks, {"head": head})
        rows = METHOD.steps * METHOD.batch
        extent = Extent(rows * TOKENS, rows * TOKENS**2)
        self.flops = [
            training_flops(layout, full(layout), self.ranks, extent, LAYERS - depth)
            for depth in range(LAYERS + 1)
        ]

    def seconds(self, place: int, depth: int, kept: float, round: int, ask: int | None) -> Cost:
        """What an exchange costs a device that keeps this share of the ranks."""
        moved = int(self._moved(depth, kept)) // 2
        timing = self.hardware.seconds(
            place,
            round=round,
            ask=ask,
            flops=self.flops[depth],
            launches=METHOD.steps * LAYERS,
            bytes_down=moved,
            bytes_up=moved,
        )
        return Cost(moved, moved, self.flops[depth], 0, timing.total, timing.compute)

    def chance(
        self, place: int, depth: int, kept: float, round: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Draws of the seconds of an exchange, by who knows all but the draw."""
        hardware = self.hardware
        launches = METHOD.steps * LAYERS * LAUNCH_SECONDS
        known = self.seconds(place, depth, kept, round, None).compute_seconds - launches
        factor = np.exp(hardware.compute_jitter * rng.standard_normal(DRAWS))
        mbps = np.full(DRAWS, GROUP_MBPS[hardware.link_groups[place]])
        for sigma in ((LINK_SIGMA**2 - hardware.link_jitter**2) ** 0.5, hardware.link_jitter):
            drawn = np.exp(sigma * rng.standard_normal(DRAWS) - sigma**2 / 2)
            mbps = np.clip(mbps * drawn, LOWEST_MBPS, HIGHEST_MBPS)
        fixed = launches + ROUND_TRIPS[0]
        return fixed + known * factor + self._moved(depth, kept) * 8e-6 / mbps

    def _moved(self, depth: int, kept: float) -> float:
        """Bytes down and up."""
        return self.traffic[0] + kept * (self.traffic[depth] - self.traffic[0])


def least_error(longest: np.ndarray) -> float:
    """The forecast of a time, of which these are draws, with the least median error relative to
    it.
    """
    tried = np.quantile(longest, np.linspace(0.2, 0.7, 26))
    errors = np.median(np.abs(tried[:, None] / longest - 1), 1)
    return float(tried[np.argmin(errors)])


def simulated(wanted: argparse.Namespace, seed: int) -> list[tuple[float, ...]]:
    """Of each round: seconds, waiting share, mean depth, error of the forecast and the least one;
    the errors are nan before the sixth.
    """
    clock, rng = Clock(seed, wanted.rank), np.random.default_rng(seed)
    planner = DepthPlanner(
        rule=wanted.rule,
        ranks=clock.ranks,
        traffic=clock.traffic,
        least=wanted.least_depth,
        coverage=METHOD.coverage,
        fixed=LAYERS,
        rank_worth=wanted.rank_worth if wanted.rank_mode == "per_device" else None,
    )
    times, depths, rows = {}, {}, []
    asked = dict.fromkeys(clock.ids, 0)
    turns = np.concatenate(  # each device has one before any has its second
        [rng.permutation(DEVICES) for _ in range(wanted.rounds * wanted.per_round // DEVICES + 1)]
    )
    for round in range(wanted.rounds):
        places = sorted(turns[round * wanted.per_round : (round + 1) * wanted.per_round])
        most = {clock.ids[place]: LAYERS for place in places}
        plan, longest, spent = planner.plan(times, depths, most), np.zeros(DRAWS), []
        for place, (id, depth) in zip(places, plan.depths.items(), strict=True):
            own = plan.ranks.get(id)
            kept = sum(own) / sum(clock.ranks[LAYERS - depth :]) if own else 1.0
            cost = clock.seconds(place, depth, kept, round, asked[id])
            asked[id] += 1
            spent.append(cost.seconds)
            times[id] = timed(
                times.get(id), cost, depth=depth, layers=LAYERS, full_bytes=clock.traffic[-1],
                discount=METHOD.discount,
            )  # fmt: skip
            if round >= FIRST:
                longest = np.maximum(longest, clock.chance(place, depth, kept, round, rng))
        depths |= plan.depths
        end, errors = max(spent), (np.nan, np.nan)
        if round >= FIRST:
            forecasts = (plan.round_seconds, least_error(longest))
            errors = tuple(abs(each / end - 1) for each in forecasts)
        depth = float(np.mean(list(plan.depths.values())))
        rows.append((end, 1 - float(np.mean(spent)) / end, depth, *errors))
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    arguments.add_argument("--per-round", type=int, default=10)
    arguments.add_argument("--rounds", type=int, default=20)
    arguments.add_argument("--rank", type=int, default=METHOD.rank)
    arguments.add_argument("--least-depth", type=int, default=METHOD.least_depth)
    arguments.add_argument("--rule", default=METHOD.depth_rule)
    arguments.add_argument("--rank-mode", default=METHOD.rank_mode)
    arguments.add_argument("--rank-worth", type=float, default=METHOD.rank_worth)
    wanted = arguments.parse_args()
    found = np.array([simulated(wanted, seed) for seed in wanted.seeds])
    seconds, waiting, depth, error, least = np.moveaxis(found, -1, 0)
    print("| off by, median | at best | waiting share | run, s | mean depth |\n" + "|---" * 5 + "|")
    print(
        f"| {np.nanmedian(error):.3f} | {np.nanmedian(least):.3f} | {waiting.mean():.2f} "
        f"| {seconds.sum(1).mean():.1f} ± {seconds.sum(1).std(ddof=1):.1f} | {depth.mean():.2f} |"
    )


if __name__ == "__main__":
    main()
