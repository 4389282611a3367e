"""A process's cache of devices' values between the asks of a round."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kept:
    """A value that a device's work cached, and its size in bytes."""

    value: Any
    bytes: int


class Scratch:
    """A process's cache between the asks of a round, up to `most_bytes`; it only saves time.

    An entry is returned only to a device whose memory equals the one that its last ask here
    returned.
    """

    def __init__(self, most_bytes: int = 2 << 30) -> None:
        self._most = most_bytes
        self._round: int | None = None
        self._entries: dict[str, tuple[bytes, dict[str, Any], Kept]] = {}
        self._bytes = 0  # of what is kept

    def take(
        self, device: str, payload: bytes | None, round: int | None
    ) -> tuple[dict[str, Any], Any] | None:
        """Remove the entry of a device and return the decoded memory and the cached value; None
        without an entry, or if the device's memory is not `payload` any more.
        """
        if round != self._round:  # entries of earlier rounds will not be used any more
            self._round = round
            self._entries.clear()
            self._bytes = 0
        entry = self._entries.pop(device, None)
        if entry is None:
            return None
        found, memory, kept = entry
        self._bytes -= kept.bytes
        return (memory, kept.value) if found == payload else None

    def put(self, device: str, payload: bytes, memory: dict[str, Any], kept: Kept) -> bool:
        """Add an entry and return whether there was room. Nothing is evicted: devices take turns,
        so the oldest entry is the next to be used.
        """
        if self._bytes + kept.bytes > self._most:
            return False
        self._entries[device] = (payload, memory, kept)
        self._bytes += kept.bytes
        return True
