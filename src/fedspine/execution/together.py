"""Serving several asks at once, with their training in one batched pass: what a GPU needs, whose launches dominate.

Each ask runs on a thread of its own, but only one thread moves at any moment: it goes on until it wants to train or is
done. Once all wait, those whose training agrees are trained together. So the order of everything is fixed.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from queue import SimpleQueue
from typing import Any

import torch

from fedspine.core.device import Call, Scratch, Served, serve
from fedspine.core.task import Data
from fedspine.lm.base import Base
from fedspine.lm.prefix import Prefixes
from fedspine.lm.tune import Request, Trace, train
from fedspine.nets.net import Net


def serve_together(
    calls: Sequence[Call],
    base: Base | Net,
    shares: Iterable[Data],
    prefixes: Prefixes | None = None,
    scratch: Scratch | None = None,
) -> list[Served]:
    """What `serve` gives for each call, but for rounding: sums run over other shapes."""
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
    while waiting := [ask for ask in asks if isinstance(ask.said, Request)]:
        groups: dict[Any, list[_Ask]] = {}
        for ask in waiting:
            groups.setdefault(_kind(ask.said), []).append(ask)
        for group in groups.values():
            for ask, trace in zip(group, train([ask.said for ask in group]), strict=True):
                ask.go_on(trace)
    return [ask.said for ask in asks]


def _kind(request: Request) -> Any:
    """What must be equal for requests to be trained in one pass."""
    model = request.model
    return (
        astuple(request.tuning),
        None if request.scoring is None else astuple(request.scoring),
        model.scale,
        tuple(sorted(model.adapter)),
        tuple((name, tuple(tensor.shape)) for name, tensor in sorted(model.head.items())),
        request.reuses,
    )


class _Ask:
    """One ask on its thread; `said` is the training it waits for, or in the end what it served."""

    said: Request | Served

    def __init__(
        self,
        call: Call,
        base: Base | Net,
        data: Data,
        prefixes: Prefixes | None,
        scratch: Scratch | None,
    ) -> None:
        self._answers: SimpleQueue[Trace | None] = SimpleQueue()
        self._sayings: SimpleQueue[Request | Served | BaseException] = SimpleQueue()

        def work() -> Served:
            torch.set_num_threads(1)  # which is a thread's own setting
            return serve(call, base, data, prefixes, self._trained, scratch)

        threading.Thread(target=self._run, args=(work,), daemon=True).start()
        self._listen()

    def go_on(self, trace: Trace) -> None:
        """Give the thread what it waited for, and wait until it waits again or is done."""
        self._answers.put(trace)
        self._listen()

    def give_up(self) -> None:
        """Let the thread end, if it still waits."""
        self._answers.put(None)

    def _run(self, work: Callable[[], Served]) -> None:
        try:
            self._sayings.put(work())
        except BaseException as error:
            self._sayings.put(error)

    def _trained(self, request: Request) -> Trace:
        self._sayings.put(request)
        trace = self._answers.get()
        if trace is None:
            raise RuntimeError("another device's work failed, so this one was given up")
        return trace

    def _listen(self) -> None:
        said = self._sayings.get()
        if isinstance(said, BaseException):
            raise said
        self.said = said
