"""The device's side of an exchange: the device that a work function gets, and serving an order.

Serving is a pure function of (order, data, memory, seed). So it can run in this process, in a
worker process, batched with other devices, or on another machine, with the same result.
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
NOISE = 105  # the purpose of the stream of its noise, apart from that of its promise
# rows of a class on a simulated device, below which it says nothing of the class
FEWEST_OF_CLASS = 3


@dataclass
class Device:
    """One device, as passed to its work.

    `memory` holds messages that outlive the exchange; `rng` is seeded from the run's seed, the
    device and the number of asks that it has served.
    """

    id: DeviceId
    data: Data
    base: Any  # a `Base` of `lm` for texts, a `Net` of `nets` for arrays
    memory: dict[str, Any]
    rng: np.random.Generator
    # `lm.prefix.Prefixes`, or None: where activations of the frozen blocks may be kept
    prefixes: Any = None
    # trains this device together with others; None: on its own
    trainer: Callable[[Any], Any] | None = None
    kept: Any = None  # kept by the last ask of this round, if this process still has it
    # the fewest distinct rows that may stand behind a number that leaves; 0, as in simulation: any
    fewest_rows: int = 0
    fewest_of_class: int = FEWEST_OF_CLASS  # rows of a class, below which nothing of it leaves
    privacy: Guard | None = None  # what training here must keep; None: the run promises nothing
    noise: GrowingNoise | None = None  # on what leaves; None: it leaves as it is
    flops: float = field(default=0.0, init=False)
    launches: int = field(default=0, init=False)
    samples: int = field(default=0, init=False)
    peak_memory_bytes: int = field(default=0, init=False)
    keeping: "Kept | None" = field(default=None, init=False)
    used: list[np.ndarray] = field(default_factory=list, init=False)  # rows, as `uses` notes them
    noise_share: float | None = field(default=None, init=False)  # that was added, beside the change
    # the texts that this ask was counted for, and its noise
    _noisy: tuple[np.ndarray, Noise] | None = field(default=None, init=False)

    def uses(self, rows: np.ndarray) -> None:
        """Note that what this ask returns rests on these rows; see `rows_used`.

        A site answers only where enough rows are noted, so work that reads rows has to call it.
        """
        self.used.append(rows)

    @property
    def rows_used(self) -> int:
        """How many distinct rows were noted; windows of one text are one row."""
        return len(self._texts_used())

    def _texts_used(self) -> np.ndarray:
        noted = np.unique(np.concatenate(self.used)) if self.used else np.empty(0, np.int64)
        return np.unique(self.data.texts_of(noted))

    def released(self, before: Tensors, after: Tensors, rows: int | None = None) -> Tensors:
        """Weights as they may leave: those of `after`, with the device's noise on what differs from
        `before`, which it was sent. What trains weights has to return what this does.

        `rows` stand behind them; None: those that were noted.
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
        """Numbers that rest on the rows noted so far, as they may leave: with the device's noise,
        beside what one row more or less changes in each. What returns numbers of rows that are no
        weights has to return what this does.
        """
        if self.noise is None:
            return values
        return self._noise_of(self._texts_used()).beside(values, one_row)

    def mean_beside(self, mean: float, one_row: float) -> float:
        """The same of one mean of at least 0; one that is not finite stays."""
        if self.noise is None or not isfinite(mean):
            return mean
        return max(0.0, float(self.beside(torch.tensor([mean]), one_row)))

    def counts_beside(self, counts: Int[Tensor, " classes"]) -> Int[Tensor, " classes"]:
        """Numbers of the noted rows that each class has, as they may leave: 0 of a class with fewer
        than `fewest_of_class`, with the device's noise, and in all no more than there are.
        """
        enough, most = counts >= self.fewest_of_class, int(counts.sum())
        if self.noise is None:
            return counts * enough
        reported = self.beside(counts, 1.0).round().long()
        reported = torch.where(enough & (reported >= self.fewest_of_class), reported, 0)
        return reported * most // max(most, int(reported.sum()))

    def _noise_of(self, texts: np.ndarray) -> Noise:
        """This ask's noise; it is counted once for the same texts."""
        assert self.noise is not None
        if self._noisy is None or not np.array_equal(self._noisy[0], texts):
            self._noisy = texts, self.noise.about(texts)
        return self._noisy[1]

    def keep(self, value: Any, bytes: int) -> None:
        """Cache `value`, of about this size, for this device's next ask in this round.

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
    """Mark work whose result follows from its order, from what `lm.tune` returns and from the
    number of rows alone, so that it may serve runs with `[privacy]`.
    """
    work.__keeps_privacy__ = True  # type: ignore[attr-defined]
    return work


def keeps(work: Work[Any, Any]) -> bool:
    """Whether work is marked by `keeps_privacy`."""
    return getattr(work, "__keeps_privacy__", False)


def returns_sent_weights(work: Work[O, R]) -> Work[O, R]:
    """Mark work that trains for its time and loss alone: the weights in its result are those of its
    order, so a site does not bind how it trains.
    """
    work.__returns_sent_weights__ = True  # type: ignore[attr-defined]
    return work


def priced_by(charged: Work[Any, Any]) -> Callable[[Work[O, R]], Work[O, R]]:
    """Mark work that does more than `lm.tune`: `charged` spends what the work would on the device
    and returns a result of its shapes, without a number of the base.
    """

    def mark(work: Work[O, R]) -> Work[O, R]:
        work.__priced_by__ = charged  # type: ignore[attr-defined]
        return work

    return mark


def pricing_of(work: Work[Any, Any]) -> Work[Any, Any]:
    """What a plan runs in the place of this work; see `priced_by`."""
    return getattr(work, "__priced_by__", work)


def returns_learnt(work: Work[Any, Any]) -> bool:
    """Whether the weights in the result of this work are trained; see `returns_sent_weights`."""
    return not getattr(work, "__returns_sent_weights__", False)


def name_of(work: Work[Any, Any]) -> str:
    """The name by which a device finds this work: `module:function`."""
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
    noise: float = 0.0  # share of it beside what training changes, as the run asks for; 0: none


@dataclass(frozen=True)
class Served:
    """The packed result and memory of a call, and the resources that the work used.

    A device that declines has an empty result, its memory as before, and the reason.
    """

    result: bytes
    memory: bytes
    flops: float
    launches: int
    samples: int
    peak_memory_bytes: int
    kept: bool = False  # whether the process holds something for the device's next ask
    rows: int = 0  # distinct ones that the result rests on, as the work noted them
    epsilon: float | None = None  # spent by the device in this run, where it promises privacy
    noise: float | None = None  # share beside the change of weights; None: none was added
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
    """Do the work of `call` on `data`, the device's own rows; `scratch` never changes the result.

    `fewest_rows` and `fewest_of_class` are the device's. `guard` keeps the call's privacy, `noise`
    is on what leaves; None: those of a simulated device.
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
    """The work of a call; raises LookupError where it would break the run's promise."""
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
