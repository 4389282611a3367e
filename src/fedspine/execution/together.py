"""Serving several asks at once, with their training in one batched pass. This is for GPUs, where
kernel launches dominate.

Each ask runs on its own thread, but only one thread runs at a time, until it requests training or
is done. When all threads wait, the requests with equal settings are trained together. So the order
of execution is fixed.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from queue import SimpleQueue
from typing import Any

import torch

from fedspine.core.device import Call, Served, serve
from fedspine.core.scratch import Scratch
from fedspine.core.task import Data
from fedspine.lm.base import Base
from fedspine.lm.digest import tensors_sha256
from fedspine.lm.prefix import Prefixes
from fedspine.lm.request import Request, TuneResult
from fedspine.lm.tune import train
from fedspine.nets.net import Net


def serve_together(
    calls: Sequence[Call],
    base: Base | Net,
    shares: Iterable[Data],
    prefixes: Prefixes | None = None,
    scratch: Scratch | None = None,
) -> list[Served]:
    """What `serve` returns for each call, up to rounding, since sums run over other shapes.

    `shares` has the rows of each call's device.
    """
    asks: list[_Ask] = []
    try:
        for call, data in zip(calls, shares, strict=True):
            asks.append(_Ask(call, base, data, prefixes, scratch))
        return _served(asks)
    except BaseException:
        for ask in asks:
            ask.give_up()
        raise


def _served(asks: list["_Ask"]) -> list[Served]:
    while waiting := [ask for ask in asks if isinstance(ask.latest, Request)]:
        groups: dict[Any, list[_Ask]] = {}
        for ask in waiting:
            groups.setdefault(_kind(ask.latest), []).append(ask)
        for group in groups.values():
            for ask, result in zip(group, train([ask.latest for ask in group]), strict=True):
                ask.resume(result)
    return [ask.latest for ask in asks]


def _kind(request: Request) -> Any:
    """The key of a request; requests with equal keys can be trained in one pass."""
    model = request.model
    return (
        astuple(request.tuning),
        None if request.scoring is None else astuple(request.scoring),
        model.scale,
        tuple(sorted(model.adapter)),
        tuple((name, tuple(tensor.shape)) for name, tensor in sorted(model.head.items())),
        request.reuses,
        request.lowest,
        request.blocks,
        request.freeze_a,
        None if request.taught is None else astuple(request.taught.teaching),
        # quantised in groups of 128 numbers, which would differ in a stack, so it trains alone
        None if request.quantised is None else id(request),
        None if request.change is None else tensors_sha256(request.change),
        None if request.moments is None else request.moments.steps,
    )


class _Ask:
    """One ask on its own thread; `latest` is the training request that it waits for, or at the end
    its result.
    """

    latest: Request | Served

    def __init__(
        self,
        call: Call,
        base: Base | Net,
        data: Data,
        prefixes: Prefixes | None,
        scratch: Scratch | None,
    ) -> None:
        self._answers: SimpleQueue[TuneResult | None] = SimpleQueue()
        self._events: SimpleQueue[Request | Served | BaseException] = SimpleQueue()

        def work() -> Served:
            torch.set_num_threads(1)  # which is a thread's own setting
            return serve(call, base, data, prefixes, self._trained, scratch)

        threading.Thread(target=self._run, args=(work,), daemon=True).start()
        self._wait()

    def resume(self, result: TuneResult) -> None:
        """Hand the thread its training result; return when it waits again or is done."""
        self._answers.put(result)
        self._wait()

    def give_up(self) -> None:
        """End the thread, if it still waits."""
        self._answers.put(None)

    def _run(self, work: Callable[[], Served]) -> None:
        try:
            self._events.put(work())
        except BaseException as error:
            self._events.put(error)

    def _trained(self, request: Request) -> TuneResult:
        self._events.put(request)
        result = self._answers.get()
        if result is None:
            raise RuntimeError("another device's work failed, so this one was given up")
        return result

    def _wait(self) -> None:
        event = self._events.get()
        if isinstance(event, BaseException):
            raise event
        self.latest = event
