"""The device's side of an exchange: the device that a work function gets, and serving an order.

Serving is a pure function of (order, data, memory, seed). So it gives the same result in this
process, in a worker process and on another machine, and up to rounding in a pass with other
devices.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fedspine.core.draws import SeededDraws
from fedspine.core.message import Tensors, pack, unpack
from fedspine.core.noise import GrowingNoise, MemoryAnswerCounter, Noise
from fedspine.core.privacy import BudgetExceeded, Guard, Ledger, MemoryLedger, Privacy
from fedspine.core.scratch import Kept, Scratch
from fedspine.core.task import Data

DeviceId: TypeAlias = str
O = TypeVar("O")  # noqa: E741 - what the server orders
R = TypeVar("R")  # what a device returns
NOISE = 105  # appended to a simulated device's seed for the draws of its noise
# rows that a class needs on a simulated device for its mean and its count to leave
FEWEST_OF_CLASS = 3


@dataclass
class Device:
    """One device, as passed to its work.

    `memory` holds messages, or what they may hold, by name for the device's next ask; `rng` is
    seeded from the run's seed, the device and the number of asks that it has served.
    """

    id: DeviceId
    data: Data
    base: Any  # a `Base` of `lm` for texts, a `Net` of `nets` for arrays
    memory: dict[str, Any]
    rng: np.random.Generator
    prefixes: Any = None  # `lm.prefix.Prefixes`, a cache of activations of frozen blocks, or None
    # trains this device together with others; None: on its own
    trainer: Callable[[Any], Any] | None = None
    kept: Any = None  # what the last ask of this round cached, if this process still has it
    # the fewest distinct rows behind a number that leaves; 0, as in simulation: any
    fewest_rows: int = 0
    # rows that a class needs for its mean and its count to leave
    fewest_of_class: int = FEWEST_OF_CLASS
    privacy: Guard | None = None  # enforces `[privacy]` in training; None: no promise
    noise: GrowingNoise | None = None  # added to what leaves; None: no noise
    flops: float = field(default=0.0, init=False)
    launches: int = field(default=0, init=False)
    samples: int = field(default=0, init=False)
    peak_memory_bytes: int = field(default=0, init=False)
    keeping: "Kept | None" = field(default=None, init=False)
    used: list[np.ndarray] = field(default_factory=list, init=False)  # rows, as `uses` notes them
    # noise that was added, relative to the change of weights
    noise_share: float | None = field(default=None, init=False)
    # the texts that this ask was counted for, and its noise
    _noisy: tuple[np.ndarray, Noise] | None = field(default=None, init=False)

    def uses(self, rows: np.ndarray) -> None:
        """Note that the result of this ask depends on these rows; see `rows_used`.

        A site answers only if enough rows are noted, so work that reads rows must call it.
        """
        self.used.append(rows)

    @property
    def rows_used(self) -> int:
        """The number of distinct rows noted by `uses`; windows of one text are one row."""
        return len(self._texts_used())

    def _texts_used(self) -> np.ndarray:
        noted = np.unique(np.concatenate(self.used)) if self.used else np.empty(0, np.int64)
        return np.unique(self.data.texts_of(noted))

    def released(self, before: Tensors, after: Tensors, rows: int | None = None) -> Tensors:
        """The weights `after` training as they may leave: with the device's noise on their change
        from `before`, the weights that it was sent. Work that trains weights must return these.

        `rows` is the number of rows behind them; None: those that were noted.
        """
        if self.noise is None:
            return after
        if rows is None:
            rows, noise = self.rows_used, self._noise_of(self._texts_used())
        else:  # which of them are behind it is private
            noise = self._noise_of(np.unique(self.data.texts_of(np.arange(len(self.data)))))
        self.noise_share = noise.share_of(rows)
        return noise.added(before, after, rows)

    def beside(self, values: Tensor, one_row: float | Tensor) -> Tensor:
        """Numbers computed from the rows noted so far, as they may leave: with the device's noise
        times `one_row`, which is what one row more or less changes in each. Work that returns such
        numbers, other than weights, must return these.
        """
        if self.noise is None:
            return values
        return self._noise_of(self._texts_used()).beside(values, one_row)

    def mean_beside(self, mean: float, one_row: float) -> float:
        """As `beside`, for a mean of at least 0; one that is not finite is returned as it is."""
        if self.noise is None or not isfinite(mean):
            return mean
        return max(0.0, float(self.beside(torch.tensor([mean]), one_row)))

    def counts_beside(self, counts: Int[Tensor, " classes"]) -> Int[Tensor, " classes"]:
        """The counts of the noted rows by class, int64, as they may leave: with the device's noise,
        0 for a class with fewer than `fewest_of_class`, and no larger in sum than the true ones.
        """
        enough, most = counts >= self.fewest_of_class, int(counts.sum())
        if self.noise is None:
            return counts * enough
        reported = self.beside(counts, 1.0).round().long()
        reported = torch.where(enough & (reported >= self.fewest_of_class), reported, 0)
        return reported * most // max(most, int(reported.sum()))

    def _noise_of(self, texts: np.ndarray) -> Noise:
        """This ask's noise; asking again for the same texts counts once."""
        assert self.noise is not None
        if self._noisy is None or not np.array_equal(self._noisy[0], texts):
            self._noisy = texts, self.noise.about(texts)
        return self._noisy[1]

    def keep(self, value: Any, bytes: int) -> None:
        """Cache `value`, of about `bytes` bytes, for this device's next ask in this round.

        It only saves time: it may be gone by then, and the result must be the same without it.
        """
        self.keeping = Kept(value, bytes)

    def spend(
        self, *, flops: float = 0.0, memory_bytes: int = 0, launches: int = 0, samples: int = 0
    ) -> None:
        """Account for work: floating-point operations, peak memory, layers launched, rows."""
        self.flops += flops
        self.launches += launches
        self.samples += samples
        self.peak_memory_bytes = max(self.peak_memory_bytes, memory_bytes)


Work: TypeAlias = Callable[[Device, O], R]


def on_device(work: Work[O, R]) -> Work[O, R]:
    """Mark a module-level function `(Device, Order) -> Result` as work that a fleet may send to
    devices by name.

    Raises TypeError for a function that is not at the top of its module.

    >>> from fedspine import Device, message, on_device
    >>> @message
    ... class RowsHeld:
    ...     rows: int
    >>> @on_device
    ... def count_rows(device: Device, order: RowsHeld) -> RowsHeld:
    ...     return RowsHeld(rows=order.rows + len(device.data))
    >>> name_of(count_rows)
    'fedspine.core.device:count_rows'
    """
    if "." in work.__qualname__:
        raise TypeError(
            f"{work.__qualname__} must be defined at the top "
            "of its module, so that a device can find it"
        )
    work.__on_device__ = True  # type: ignore[attr-defined]
    return work


def keeps_privacy(work: Work[O, R]) -> Work[O, R]:
    """Mark work whose result depends on nothing but its order, what `lm.tune` returns and the
    number of rows, so that it may serve runs with `[privacy]`.
    """
    work.__keeps_privacy__ = True  # type: ignore[attr-defined]
    return work


def keeps(work: Work[Any, Any]) -> bool:
    """Whether work is marked by `keeps_privacy`."""
    return getattr(work, "__keeps_privacy__", False)


def returns_sent_weights(work: Work[O, R]) -> Work[O, R]:
    """Mark work that trains only for its time and loss: the weights in its result are those of its
    order, so `allow.fewest_steps` and `allow.noise` of a site do not apply to it.
    """
    work.__returns_sent_weights__ = True  # type: ignore[attr-defined]
    return work


def priced_by(charged: Work[Any, Any]) -> Callable[[Work[O, R]], Work[O, R]]:
    """Mark work that does more than `lm.tune`. In a plan, `charged` runs in its place: it spends on
    the device what the work would spend and returns a result of the same shapes, without reading
    the base's weights.
    """

    def mark(work: Work[O, R]) -> Work[O, R]:
        work.__priced_by__ = charged  # type: ignore[attr-defined]
        return work

    return mark


def pricing_of(work: Work[Any, Any]) -> Work[Any, Any]:
    """The work that a plan runs in place of this one; see `priced_by`."""
    return getattr(work, "__priced_by__", work)


def returns_learnt(work: Work[Any, Any]) -> bool:
    """Whether the weights in the result of this work are trained; see `returns_sent_weights`."""
    return not getattr(work, "__returns_sent_weights__", False)


def name_of(work: Work[Any, Any]) -> str:
    """The name by which a device finds this work, `module:function`; raises TypeError for a
    function that is not marked by `on_device`.
    """
    if not getattr(work, "__on_device__", False):
        raise TypeError(f"{work!r} is not work for a device; decorate it with @on_device")
    return f"{work.__module__}:{work.__qualname__}"


def find_work(name: str) -> Work[Any, Any]:
    """The work called `module:function`; raises LookupError where there is none."""
    module, _, function = name.partition(":")
    work = getattr(importlib.import_module(module), function, None)
    if not getattr(work, "__on_device__", False):
        raise LookupError(f"{name} is no work for a device")
    return work  # type: ignore[return-value]


@dataclass(frozen=True)
class Call:
    """One ask of one device: everything its result depends on, except for the data and the base."""

    device: DeviceId
    index: int  # of the device in the fleet; its share of the data
    work: str
    order: bytes
    memory: bytes | None
    seed: tuple[int, ...]
    round: int = 0
    privacy: Privacy | None = None  # of the run
    noise: float = 0.0  # `fleet.noise` of the run, relative to what training changes; 0: none


@dataclass(frozen=True)
class Served:
    """The packed result and memory of a call, and the resources that the work used.

    If the device declines, the result is empty, the memory is as before, and `declined` has the
    reason.
    """

    result: bytes
    memory: bytes
    flops: float
    launches: int
    samples: int
    peak_memory_bytes: int
    kept: bool = False  # whether the process holds something for the device's next ask
    rows: int = 0  # distinct rows that the work noted; 0 without `fewest_rows`
    epsilon: float | None = None  # spent by the device in this run, if it promises privacy
    noise: float | None = None  # relative to the change of weights; None: none was added
    declined: str | None = None


def serve(
    call: Call,
    base: Any,
    data: Data,
    prefixes: Any = None,
    trainer: Callable[[Any], Any] | None = None,
    scratch: Scratch | None = None,
    fewest_rows: int = 0,
    fewest_of_class: int = FEWEST_OF_CLASS,
    guard: Guard | None = None,
    noise: GrowingNoise | None = None,
) -> Served:
    """Do the work of `call` on `data`, the device's own rows; `prefixes` and `scratch` never change
    the result.

    `trainer`, `fewest_rows` and `fewest_of_class` are as in `Device`. `guard` enforces the call's
    privacy and `noise` is added to what leaves; None: those of a simulated device. Raises
    LookupError for a name that is no work, or for work that cannot keep the promised privacy.
    """
    found = None if scratch is None else scratch.take(call.device, call.memory, call.round)
    memory, kept = (
        (unpack(call.memory) if call.memory is not None else {}, None) if found is None else found
    )
    device = Device(
        id=call.device,
        data=data,
        base=base,
        memory=memory,
        rng=np.random.default_rng(call.seed),
        prefixes=prefixes,
        trainer=trainer,
        kept=kept,
        fewest_rows=fewest_rows,
        fewest_of_class=fewest_of_class,
        privacy=_simulated_guard(call, memory) if guard is None else guard,
        noise=_simulated_noise(call, memory) if noise is None else noise,
    )
    try:
        result = _allowed(call)(device, unpack(call.order))
    except BudgetExceeded as reason:
        return _declined(call, device, str(reason))
    remembered = pack(device.memory).payload
    keeps = (
        scratch is not None
        and device.keeping is not None
        and scratch.put(device.id, remembered, device.memory, device.keeping)
    )
    return Served(
        result=pack(result).payload,
        memory=remembered,
        flops=device.flops,
        launches=device.launches,
        samples=device.samples,
        peak_memory_bytes=device.peak_memory_bytes,
        kept=keeps,
        rows=device.rows_used if fewest_rows else 0,
        epsilon=None if device.privacy is None else device.privacy.epsilon,
        noise=device.noise_share,
    )


def _allowed(call: Call) -> Work[Any, Any]:
    """The work of a call; raises LookupError if it would break the run's promise."""
    work = find_work(call.work)
    if call.privacy is not None and not keeps(work):
        raise LookupError(f"{call.work} cannot keep [privacy]; see @keeps_privacy")
    return work


def _simulated_guard(call: Call, memory: dict[str, Any]) -> Guard | None:
    if call.privacy is None:
        return None
    ledger: Ledger = MemoryLedger(call.privacy, memory)
    return Guard(call.privacy, SeededDraws(call.seed), ledger)


def _simulated_noise(call: Call, memory: dict[str, Any]) -> GrowingNoise | None:
    if not call.noise:
        return None
    return GrowingNoise(
        call.noise, lambda answers: SeededDraws((*call.seed, NOISE)), MemoryAnswerCounter(memory)
    )


def _declined(call: Call, device: Device, reason: str) -> Served:
    return Served(
        result=b"",
        memory=pack({}).payload if call.memory is None else call.memory,
        flops=0.0,
        launches=0,
        samples=0,
        peak_memory_bytes=0,
        epsilon=None if device.privacy is None else device.privacy.epsilon,
        declined=reason,
    )
