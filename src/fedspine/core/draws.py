"""Random draws for differential privacy and for the noise of a site: which rows a step takes, and
its noise.

In simulation they follow from the run's seed, so that a run can be repeated. At a real site they
come from a cryptographic generator whose key never leaves the site.
"""

import hashlib
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

PART = 2**13  # draws that are computed at a time, so that they stay in the cache
STREAM = 104  # appended to a device's seed, so that this stream differs from the device's `rng`


@runtime_checkable
class Draws(Protocol):
    """A stream of draws; each call continues the stream."""

    def uniform(self, count: int) -> Float[np.ndarray, " count"]:
        """Uniform draws, float64, from 0 to below 1."""
        ...

    def normal(self, count: int) -> Float[np.ndarray, " count"]:
        """Standard normal draws, float64."""
        ...

    def coarse_normal(self, count: int) -> Float[np.ndarray, " count"]:
        """Standard normal draws, float32, from half as many bits and in a fifth of the time; for
        noise without a guarantee.
        """
        ...


class SeededDraws:
    """The draws of a simulation, from the seed of an ask."""

    def __init__(self, seed: tuple[int, ...]) -> None:
        self._rng = np.random.default_rng([*seed, STREAM])

    def uniform(self, count: int) -> Float[np.ndarray, " count"]:
        return self._rng.random(count)

    def normal(self, count: int) -> Float[np.ndarray, " count"]:
        return self._rng.standard_normal(count)

    def coarse_normal(self, count: int) -> Float[np.ndarray, " count"]:
        return self._rng.standard_normal(count, np.float32)


class SecretDraws:
    """The draws of a real site: the stream of SHAKE-256 (FIPS 202) under a key that is used once.

    Without the key they cannot be distinguished from random bits. Normal draws use the transform of
    Box and Muller (1958). Raises ValueError for a key of fewer than 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < 32:
            raise ValueError(f"expected a key of at least 32 bytes, got {len(key)}")
        self._key, self._calls = key, 0

    def uniform(self, count: int) -> Float[np.ndarray, " count"]:
        words = np.frombuffer(self._bytes(8 * count), "<u8")
        return (words >> np.uint64(11)) * 2.0**-53  # as many bits as a float64 has

    def normal(self, count: int) -> Float[np.ndarray, " count"]:
        pairs = -(-count // 2)
        radius = np.sqrt(-2 * np.log(1 - self.uniform(pairs)))
        angle = 2 * np.pi * self.uniform(pairs)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def coarse_normal(self, count: int) -> Float[np.ndarray, " count"]:
        """As `Draws.coarse_normal`: the transform of Box and Muller, with 32 bits for the radius
        and 32 for the angle, computed in fp32.

        Each draw is within 2e-6 of the exact transform of its bits as float32 holds them, whose
        distribution function is within 2**-23 of the normal one; that of the draws is within 1e-6.
        No draw is beyond 6.77, which a normal one exceeds with probability 1.3e-11. With fewer bits
        than a float32 has, values would lie on a grid, and a guess of the value under the noise
        could be checked against it.
        """
        pairs = -(-count // 2)
        words = np.frombuffer(self._bytes(8 * pairs), "<i4").reshape(2, pairs)
        drawn = np.empty((2, pairs), np.float32)
        for first in range(0, pairs, PART):
            part = slice(first, first + PART)
            uniform = words[0, part].view("<u4").astype(np.float32)
            uniform += np.float32(0.5)
            uniform *= np.float32(2.0**-32)
            radius = np.log(uniform, out=uniform)
            radius *= np.float32(-2)
            np.sqrt(radius, out=radius)
            angle = words[1, part].astype(np.float32)
            angle *= np.float32(np.pi * 2.0**-31)
            np.multiply(radius, np.cos(angle), out=drawn[0, part])
            np.multiply(radius, np.sin(angle), out=drawn[1, part])
        return drawn.reshape(-1)[:count]

    def _bytes(self, count: int) -> bytes:
        self._calls += 1
        stream = hashlib.shake_256(self._key + self._calls.to_bytes(8, "little"))
        return stream.digest(count)
