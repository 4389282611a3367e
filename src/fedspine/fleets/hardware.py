"""The true speeds of simulated devices, computing and communicating, which no method may see.

Section 5.1 of the FedSpine reconstruction: 30 Jetson TX2, 40 NX and 10 AGX by default. Peaks by
power mode follow NVIDIA's mode tables. The modes, which change every 20 rounds, and the four Wi-Fi
groups follow the 80-device papers of FedSpine's authors. A link has a mean for each round. Every
exchange draws its bandwidth around that mean, and a factor on its compute. Every draw is a pure
function of (seed, purpose, device, round, number of the exchange), so nothing depends on the order
of calls.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import exp
from typing import NamedTuple

import numpy as np

from fedspine.core.errors import BadInput, unknown

UTILISATION = 0.30  # of the peak (MFU)
# of one layer in one training step: RoBERTa-base's 12 layers x 20 steps cost 2 s
LAUNCH_SECONDS = 1 / 120
ROUNDS_PER_MODE = 20
GROUP_MBPS = (
    22.0,
    14.0,
    8.0,
    4.0,
)  # mean bandwidth of the Wi-Fi groups at 2, 8, 14 and 20 m, in Mb/s
LOWEST_MBPS, HIGHEST_MBPS = 1.0, 30.0
LINK_SIGMA = 0.3  # of the logarithm of one exchange's bandwidth, over rounds and exchanges
LINK_JITTER = LINK_SIGMA / 2**0.5  # of that within a round: half of the variance, ours
NO_ROUND_TRIP = (0.0,) * len(GROUP_MBPS)

LINKS, MODES, EXCHANGES, MEANS = range(4)  # purposes of random streams, which must differ


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device: fp16 peaks in TFLOPS, one per power mode, and memory that processor and GPU
    share.
    """

    name: str
    peaks_tflops: tuple[float, ...]
    memory_bytes: int


KINDS: Mapping[str, DeviceKind] = {
    kind.name: kind
    for kind in (
        DeviceKind("tx2", (1.33, 0.87, 1.15, 1.15), 8 * 2**30),
        DeviceKind("nx", (6.76, 6.76, 6.76, 3.28, 3.28, 2.09, 6.76, 6.76), 8 * 2**30),
        DeviceKind("agx", (11.28, 2.13, 5.49, 7.37, 7.37, 7.37, 7.37, 5.49), 32 * 2**30),
    )
}
DEFAULT_MIX: Mapping[str, int] = {"tx2": 30, "nx": 40, "agx": 10}


class Timing(NamedTuple):
    """Seconds of one exchange."""

    down: float
    compute: float
    up: float
    round_trip: float = 0.0

    @property
    def total(self) -> float:
        return self.down + self.compute + self.up + self.round_trip


@dataclass(frozen=True)
class Hardware:
    """The devices of one simulated fleet, by index: `kinds` names each one's kind (`fleet_mix`).

    - `spread` stretches slowness: a peak becomes best * (peak / best) ** spread, where best is the
      best peak of the fleet's kinds. 1.0 gives a ratio of 13 between the fastest and the slowest
      mode of the default fleet, 1.8 about 100.
    - `compute_jitter` is the sigma of the log-normal factor on the compute of an exchange, whose
      median is 1.
    - `link_jitter` is the sigma of the bandwidth of an exchange around the link's mean of the
      round, at most LINK_SIGMA. The rest of LINK_SIGMA's variance is that of the means around their
      group's mean.
    - `round_trip_seconds` is added to every exchange, by Wi-Fi group.

    Raises BadInput for an unknown kind, an empty fleet, or a spread, jitter or round trip out of
    range.

    >>> fleet = Hardware(seed=0, kinds=("tx2", "agx"))
    >>> slow, fast = (
    ...     fleet.seconds(i, round=0, ask=0, flops=3e12, launches=0, bytes_down=0, bytes_up=0)
    ...     for i in (0, 1)
    ... )
    >>> slow.compute > fast.compute > slow.up == 0
    True
    """

    seed: int
    kinds: tuple[str, ...]
    spread: float = 1.0
    compute_jitter: float = 0.05
    link_jitter: float = LINK_JITTER
    round_trip_seconds: tuple[float, ...] = NO_ROUND_TRIP

    def __post_init__(self) -> None:
        if not self.kinds or min(self.spread, self.compute_jitter) < 0:
            raise BadInput(
                "expected a device, spread >= 0 and compute_jitter >= 0, "
                f"got {len(self.kinds)} devices, {self.spread} and {self.compute_jitter}"
            )
        if not 0 <= self.link_jitter <= LINK_SIGMA:
            raise BadInput(f"expected a link_jitter from 0 to {LINK_SIGMA}, got {self.link_jitter}")
        if len(self.round_trip_seconds) != len(GROUP_MBPS) or min(self.round_trip_seconds) < 0:
            raise BadInput(
                f"round_trip_seconds of at least 0 for each of {len(GROUP_MBPS)} Wi-Fi groups were "
                f"expected, got {self.round_trip_seconds}"
            )
        for name in self.kinds:
            _kind(name)

    def mode(self, device: int, round: int) -> int:
        """The power mode of a device, redrawn at random every 20 rounds."""
        modes = len(KINDS[self.kinds[device]].peaks_tflops)
        return _one_of(modes, self.seed, MODES, device, round // ROUNDS_PER_MODE)

    def peak_flops(self, device: int, round: int) -> float:
        """Peak FLOP/s of a device in its mode of that round."""
        peak = KINDS[self.kinds[device]].peaks_tflops[self.mode(device, round)]
        return 1e12 * self._best_tflops * (peak / self._best_tflops) ** self.spread

    def mean_mbps(self, device: int, *, round: int) -> float:
        """The mean bandwidth of a device's link in a round, in Mb/s: log-normal around its group's
        mean, in [1, 30].
        """
        (drawn,) = _normals(1, self.seed, MEANS, device, round)
        sigma = max(0.0, LINK_SIGMA**2 - self.link_jitter**2) ** 0.5
        return _about(GROUP_MBPS[self.link_groups[device]], sigma, drawn)

    def bandwidth_mbps(self, device: int, *, round: int, ask: int) -> float:
        """Bandwidth of one exchange in Mb/s, the same down and up: log-normal around the round's
        mean, in [1, 30].
        """
        link, _ = _normals(2, self.seed, EXCHANGES, device, round, ask)
        return _about(self.mean_mbps(device, round=round), self.link_jitter, link)

    def seconds(
        self,
        device: int,
        *,
        round: int,
        ask: int | None,
        flops: float,
        launches: float,
        bytes_down: int,
        bytes_up: int,
    ) -> Timing:
        """Seconds of an exchange of a device that served `ask` exchanges before it in the run.

        If `ask` is None, the link has the round's mean bandwidth and there is no jitter, which is
        all that can be known beforehand. One launch is one layer in one training step.
        """
        if ask is None:
            mbps, jitter = self.mean_mbps(device, round=round), 1.0
        else:
            mbps = self.bandwidth_mbps(device, round=round, ask=ask)
            jitter = exp(
                self.compute_jitter * _normals(2, self.seed, EXCHANGES, device, round, ask)[1]
            )
        bytes_per_second = mbps * 1e6 / 8
        compute = (
            flops / (UTILISATION * self.peak_flops(device, round)) * jitter
            + launches * LAUNCH_SECONDS
        )
        return Timing(
            down=bytes_down / bytes_per_second,
            compute=compute,
            up=bytes_up / bytes_per_second,
            round_trip=self.round_trip_seconds[self.link_groups[device]],
        )

    @cached_property
    def link_groups(self) -> tuple[int, ...]:
        """Each device's Wi-Fi group: drawn once, independent of kind; group sizes differ by at most
        one.
        """
        groups = np.arange(len(self.kinds)) % len(GROUP_MBPS)
        return tuple(np.random.default_rng([self.seed, LINKS]).permutation(groups).tolist())

    @cached_property
    def _best_tflops(self) -> float:
        return max(max(KINDS[name].peaks_tflops) for name in self.kinds)


def _about(mean: float, sigma: float, drawn: float) -> float:
    """A bandwidth within its bounds; shifted so that the mean, not the median, is `mean`."""
    return min(max(mean * exp(sigma * drawn - sigma**2 / 2), LOWEST_MBPS), HIGHEST_MBPS)


# draws are cached, since seeding dominates their cost: a round's exchanges share one mode and one
# mean


@lru_cache(maxsize=4096)
def _one_of(count: int, *where: int) -> int:
    return int(np.random.default_rng(where).integers(count))


@lru_cache(maxsize=4096)
def _normals(count: int, *where: int) -> tuple[float, ...]:
    return tuple(np.random.default_rng(where).standard_normal(count).tolist())


def fleet_mix(mix: Mapping[str, int] | None, devices: int) -> list[str]:
    """Each device's kind, in the order of `mix`; None scales 30 TX2 : 40 NX : 10 AGX to `devices`,
    by the largest remainder.

    Raises BadInput for an unknown kind, a negative count, fewer than one device, or counts that do
    not sum to `devices`.

    >>> fleet_mix(None, 3), fleet_mix({"agx": 1, "tx2": 1}, 2)
    (['tx2', 'nx', 'nx'], ['agx', 'tx2'])
    """
    if devices < 1:
        raise BadInput(f"expected at least one device, got {devices}")
    if mix is None:
        mix = _scaled(DEFAULT_MIX, devices)
    for name in mix:
        _kind(name)
    if min(mix.values(), default=0) < 0 or sum(mix.values()) != devices:
        raise BadInput(
            f"expected counts that sum to {devices} devices, "
            f"got {dict(mix)}; change the mix or devices"
        )
    return [name for name, count in mix.items() for _ in range(count)]


def device_ids(kinds: list[str]) -> list[str]:
    """Names such as tx2-00 and nx-07, numbered over the whole fleet, so that they sort by number
    within a kind.

    >>> device_ids(["tx2", "nx"])
    ['tx2-00', 'nx-01']
    """
    digits = max(2, len(str(len(kinds) - 1)))
    return [f"{kind}-{number:0{digits}d}" for number, kind in enumerate(kinds)]


def _scaled(mix: Mapping[str, int], devices: int) -> dict[str, int]:
    total = sum(mix.values())
    scaled = {name: count * devices // total for name, count in mix.items()}
    by_remainder = sorted(mix, key=lambda name: mix[name] * devices % total, reverse=True)
    for name in by_remainder[: devices - sum(scaled.values())]:
        scaled[name] += 1
    return scaled


def _kind(name: str) -> DeviceKind:
    if name not in KINDS:
        raise unknown("device kind", name, KINDS)
    return KINDS[name]
