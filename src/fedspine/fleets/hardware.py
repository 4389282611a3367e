"""The truth about simulated devices: how fast each computes and exchanges, which no method may see.

Section 5.1 of the FedSpine reconstruction: 30 Jetson TX2, 40 NX and 10 AGX by default. Peaks by power mode follow
NVIDIA's mode tables; the modes that change every 20 rounds and the four Wi-Fi groups follow the 80-device papers of the
same group. Every draw is a pure function of (seed, purpose, device, round, ask): nothing depends on the order of calls.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import exp
from typing import NamedTuple

import numpy as np

from fedspine.errors import BadInput, unknown

UTILISATION = 0.30  # of the peak (MFU)
LAUNCH_SECONDS = (
    1 / 120
)  # of one layer in one training step: RoBERTa-base's 12 layers x 20 steps cost 2 s
ROUNDS_PER_MODE = 20
GROUP_MBPS = (
    22.0,
    14.0,
    8.0,
    4.0,
)  # mean bandwidth of the Wi-Fi groups at 2, 8, 14 and 20 m, in Mb/s
LOWEST_MBPS, HIGHEST_MBPS = 1.0, 30.0
LINK_SIGMA = 0.3  # of the logarithm

LINKS, MODES, EXCHANGES = range(3)  # what randomness is for, so that the streams never meet


@dataclass(frozen=True)
class Kind:
    """A kind of device: fp16 peaks in TFLOPS, one per power mode, and memory that processor and GPU share."""

    name: str
    peaks_tflops: tuple[float, ...]
    memory_bytes: int


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("tx2", (1.33, 0.87, 1.15, 1.15), 8 * 2**30),
        Kind("nx", (6.76, 6.76, 6.76, 3.28, 3.28, 2.09, 6.76, 6.76), 8 * 2**30),
        Kind("agx", (11.28, 2.13, 5.49, 7.37, 7.37, 7.37, 7.37, 5.49), 32 * 2**30),
    )
}
DEFAULT_MIX: Mapping[str, int] = {"tx2": 30, "nx": 40, "agx": 10}


class Timing(NamedTuple):
    """Seconds of one exchange."""

    down: float
    compute: float
    up: float

    @property
    def total(self) -> float:
        return self.down + self.compute + self.up


@dataclass(frozen=True)
class Hardware:
    """The devices of one simulated fleet, by index: `kinds` names each one's kind (`fleet_mix`).

    spread stretches slowness: a peak becomes best * (peak/best)**spread, with the best peak of the fleet's kinds; 1.0
    gives a ratio of 13 between the fastest and the slowest mode of the default fleet, 1.8 about 100.
    compute_jitter: sigma of the log-normal factor on compute, whose median is 1.
    Raises BadInput for an unknown kind, an empty fleet or a negative spread or jitter.

    >>> fleet = Hardware(seed=0, kinds=("tx2", "agx"))
    >>> slow, fast = (
    ...     fleet.seconds(i, round=0, ask=0, flops=3e12, launches=0, bytes_down=0, bytes_up=0) for i in (0, 1)
    ... )
    >>> slow.compute > fast.compute > slow.up == 0
    True
    """

    seed: int
    kinds: tuple[str, ...]
    spread: float = 1.0
    compute_jitter: float = 0.05

    def __post_init__(self) -> None:
        if not self.kinds or min(self.spread, self.compute_jitter) < 0:
            raise BadInput(
                "a device, spread >= 0 and compute_jitter >= 0 were expected, "
                f"{len(self.kinds)} devices, {self.spread} and {self.compute_jitter} came"
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

    def bandwidth_mbps(self, device: int, *, round: int, ask: int) -> float:
        """Bandwidth of a round's exchanges in Mb/s, the same down and up: log-normal about its group's mean, in [1, 30]."""
        return self._exchange(device, round, ask)[0]

    def seconds(
        self,
        device: int,
        *,
        round: int,
        ask: int,
        flops: float,
        launches: float,
        bytes_down: int,
        bytes_up: int,
    ) -> Timing:
        """How long an exchange of a round takes a device that had served `ask` before the round; one launch is one layer
        in one training step."""
        mbps, jitter = self._exchange(device, round, ask)
        bytes_per_second = mbps * 1e6 / 8
        compute = (
            flops / (UTILISATION * self.peak_flops(device, round)) * jitter
            + launches * LAUNCH_SECONDS
        )
        return Timing(bytes_down / bytes_per_second, compute, bytes_up / bytes_per_second)

    @cached_property
    def link_groups(self) -> tuple[int, ...]:
        """Each device's Wi-Fi group: drawn once, independent of kind, in groups whose sizes differ by one at most."""
        groups = np.arange(len(self.kinds)) % len(GROUP_MBPS)
        return tuple(np.random.default_rng([self.seed, LINKS]).permutation(groups).tolist())

    @cached_property
    def _best_tflops(self) -> float:
        return max(max(KINDS[name].peaks_tflops) for name in self.kinds)

    def _exchange(self, device: int, round: int, ask: int) -> tuple[float, float]:
        """Bandwidth in Mb/s and the factor on compute."""
        link, compute = _two_normals(self.seed, EXCHANGES, device, round, ask)
        # shifted so that the mean, not the median, is the group's
        mbps = GROUP_MBPS[self.link_groups[device]] * exp(LINK_SIGMA * link - LINK_SIGMA**2 / 2)
        return min(max(mbps, LOWEST_MBPS), HIGHEST_MBPS), exp(self.compute_jitter * compute)


# draws are kept, since seeding is what they cost, and a round of split learning wants the same ones forty times


@lru_cache(maxsize=4096)
def _one_of(count: int, *where: int) -> int:
    return int(np.random.default_rng(where).integers(count))


@lru_cache(maxsize=4096)
def _two_normals(*where: int) -> tuple[float, float]:
    link, compute = np.random.default_rng(where).standard_normal(2).tolist()
    return link, compute


def fleet_mix(mix: Mapping[str, int] | None, devices: int) -> list[str]:
    """Each device's kind, in the order of `mix`; None scales 30 TX2 : 40 NX : 10 AGX by the largest remainder.

    Raises BadInput for an unknown kind, a negative count, or counts that do not sum to `devices`, which is positive.

    >>> fleet_mix(None, 3), fleet_mix({"agx": 1, "tx2": 1}, 2)
    (['tx2', 'nx', 'nx'], ['agx', 'tx2'])
    """
    if devices < 1:
        raise BadInput(f"at least one device was expected, {devices} came")
    if mix is None:
        mix = _scaled(DEFAULT_MIX, devices)
    for name in mix:
        _kind(name)
    if min(mix.values(), default=0) < 0 or sum(mix.values()) != devices:
        raise BadInput(
            f"counts that sum to {devices} devices were expected, {dict(mix)} came; change the mix or devices"
        )
    return [name for name, count in mix.items() for _ in range(count)]


def device_ids(kinds: list[str]) -> list[str]:
    """Names such as tx2-00 and nx-07, numbered over the whole fleet, so that they sort by number within a kind.

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


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise unknown("device kind", name, KINDS)
    return KINDS[name]
