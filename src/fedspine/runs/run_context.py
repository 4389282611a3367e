"""A run under way: its fixed parts, and how far it is."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedspine.execution.workers import Workers
from fedspine.fleets.checked import Exchanges
from fedspine.fleets.rounds import RoundFleet, Totals
from fedspine.runs.assemble import Assembled
from fedspine.runs.config import Recipe
from fedspine.storage.records import Records
from fedspine.storage.store import Store


@dataclass
class Stopwatch:
    """Wall seconds of this run, those before a resume included."""

    training: float = 0.0
    before: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def total(self) -> float:
        return self.before + time.monotonic() - self.started


@dataclass(frozen=True)
class RunContext:
    """The parts of a run that stay the same in all rounds."""

    assembled: Assembled
    workers: Workers
    store: Store
    records: Records
    fleet: RoundFleet
    run_dir: Path
    exchanges: Exchanges = field(default_factory=Exchanges)

    @property
    def recipe(self) -> Recipe:
        return self.assembled.recipe


@dataclass
class Point:
    """The progress of a run: the method's state after `round` rounds, and the sums until then."""

    round: int
    state: Any
    sums: Totals = field(default_factory=Totals)
    watch: Stopwatch = field(default_factory=Stopwatch)
