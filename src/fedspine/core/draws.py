"""Random draws for differential privacy: which rows a step takes, and its noise.

In simulation they follow from the run's seed, so that a run can be repeated. At a real site they
come from a cryptographic generator whose key never leaves the site.
"""

import hashlib
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

STREAM = 104  # the purpose of this stream of a device, which must differ from that of its own


@runtime_checkable
class Draws(Protocol):
    """A stream of draws; each call goes on where the last one ended."""

    def uniform(self, count: int) -> Float[np.ndarray, " count"]:
        """float64, from 0 to below 1."""
        ...

    def normal(self, count: int) -> Float[np.ndarray, " count"]:
        """float64, of the standard normal distribution."""
        ...

    def coarse_normal(self, count: int) -> Float[np.ndarray, " count"]:
        """float32, the same from half as many bits, in a third of the time: for noise of which
        nothing is promised in numbers.
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

    Who does not know the key cannot tell them from random ones. Normal draws are those of Box and
    Muller (1958). Raises ValueError for a key of fewer than 32 bytes.
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
        pairs = -(-count // 2)
        stream = self._bytes(6 * pairs)
        words = np.frombuffer(stream, "<u4", pairs).astype(np.float32)
        uniform = (words + np.float32(0.5)) * np.float32(2.0**-32)  # no radius is beyond 6.8
        radius = np.sqrt(np.float32(-2) * np.log(uniform))
        angle = np.frombuffer(stream, "<u2", pairs, 4 * pairs) * np.float32(2 * np.pi / 2**16)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def _bytes(self, count: int) -> bytes:
        self._calls += 1
        stream = hashlib.shake_256(self._key + self._calls.to_bytes(8, "little"))
        return stream.digest(count)
