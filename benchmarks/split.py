"""The cost of a round of split learning, compared with the bare computation in it: `python
benchmarks/split.py --help`.

Both run the same forward and backward passes of the same rows, with the same two halves, on one
thread: ours through the fleet, with messages, memories, the control and a save at the end, bare in
a plain loop. What `method.logit_adjustment` adds to the server model's backward pass counts as
cost, since only ours has it. They take turns, round by round, so that other load on the machine
affects both. The goal of a run of 80 devices for 40 steps is 1.3.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedspine.core.fleet import Fleet
from fedspine.core.process import keep_freed_memory
from fedspine.core.task import Data
from fedspine.execution.workers import Workers, Workshop
from fedspine.fleets.simulated import SimulatedFleet
from fedspine.runs.assemble import assemble, simulate
from fedspine.runs.config import load
from fedspine.split.batches import rows_at
from fedspine.split.composed import ComposedState
from fedspine.split.merged_batch import Part, merged_features
from fedspine.split.messages import Begin
from fedspine.storage.records import Records
from fedspine.storage.store import Saved, Store


@dataclass
class BeginRecorder:
    """A fleet that records the first order of each device, and how often the device had been
    asked by then.
    """

    fleet: Fleet
    asks: dict[str, int]
    orders: dict[str, tuple[Begin, int]] = field(default_factory=dict)

    def ask(self, work: Any, orders: Any, **limits: Any) -> Any:
        for id, order in orders.items():
            if isinstance(order, Begin):
                self.orders[id] = order, self.asks.get(id, 0)
            self.asks[id] = self.asks.get(id, 0) + 1
        return self.fleet.ask(work, orders, **limits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fleet, name)


@dataclass
class Bench:
    """A run under way, and what it takes to repeat its work bare."""

    assembled: Any
    fleet: SimulatedFleet
    store: Store
    records: Records
    asks: dict[str, int] = field(default_factory=dict)

    def round(self, state: ComposedState) -> tuple[ComposedState, float, BeginRecorder]:
        """One round of ours, as a run has it: the next state, seconds of this process, and the
        first orders of devices.
        """
        recorder = BeginRecorder(self.fleet, self.asks)
        started = time.process_time()
        self.fleet.begin_round(state.round)
        after = self.assembled.recipe.method.round(state, recorder)
        self.fleet.end_round(0.0)
        saved = Saved(
            after.round, after, self.fleet.snapshot(), self.fleet.memories, self.records.flush()
        )
        self.store.save(saved)
        return after, time.process_time() - started, recorder

    def bare(self, state: ComposedState, recorder: BeginRecorder) -> tuple[float, int]:
        """The passes of that round in a plain loop: seconds of this process, and rows."""
        assembled, rows, given = (
            self.assembled,
            0,
            {id: self._given(id, asks) for id, (_, asks) in recorder.orders.items()},
        )
        started = time.process_time()
        (some, _), *_ = recorder.orders.values()
        split_model = some.cutting.of(assembled.task.base)
        client_model, server_model = split_model.parts(state.model)
        server_model = _leaves(server_model, split_model.statistics)
        own = {id: _leaves(client_model, split_model.statistics) for id in recorder.orders}
        for step in range(assembled.recipe.method.steps):
            sent = []
            for id, (order, _) in recorder.orders.items():
                data, seed = given[id]
                inputs = data.batch(rows_at(len(data), order.batch, seed, step))
                sent.append(
                    (id, split_model.client_forward(own[id], inputs, seed=0), inputs["labels"])
                )
                rows += len(inputs["labels"])
            parts = [
                Part(device=id, features=features, labels=labels) for id, features, labels in sent
            ]
            # with their graphs: one backward pass goes through all
            features = merged_features(parts)
            split_model.server_forward(
                server_model, features, torch.cat([labels for *_, labels in sent]), seed=0
            ).mean.backward()
            for leaf in [
                *server_model.values(),
                *(leaf for weights in own.values() for leaf in weights.values()),
            ]:
                leaf.grad = None
        return time.process_time() - started, rows

    def _given(self, id: str, asks: int) -> tuple[Data, int]:
        """A device's rows, and the seed of their order in that round."""
        index = [profile.id for profile in self.fleet.devices].index(id)
        seed = int(
            np.random.default_rng((self.assembled.recipe.run.seed, index, asks)).integers(2**31)
        )
        return self.assembled.task.train.take(self.assembled.shares[index]), seed


def _leaves(weights: dict[str, torch.Tensor], still: frozenset[str]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone().requires_grad_(name not in still) for name, tensor in weights.items()
    }


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    keep_freed_memory()
    settings = [
        f"task.{key}={value}"
        for key, value in (("model", arguments.model), ("data", arguments.data))
        if value
    ]
    settings += [
        "method.name=mergesfl-plus",
        "method.batches.name=regulated",
        "method.joining.name=at-once",  # so that the first order says what is repeated bare
        f"method.steps={arguments.steps}",
        f"method.batch={arguments.batch}",
        f"method.selection.fewest={arguments.devices}",
        f"method.selection.most={arguments.devices}",
        f"method.selection.budget_rows={arguments.devices * arguments.batch}",
        f"method.precision={arguments.precision}",
        f"fleet.devices={arguments.devices}",
        f"fleet.per_round={arguments.devices}",
        f"run.rounds={arguments.rounds + 1}",
        *arguments.set,
    ]
    assembled = assemble(load(None, settings))
    with tempfile.TemporaryDirectory() as folder:
        _measure(assembled, Path(folder), arguments.rounds)


def _measure(assembled: Any, folder: Path, rounds: int) -> None:
    store, records = Store(folder / "state"), Records(folder / "records.jsonl")
    store.open()
    workshop = Workshop(task=assembled.task, shares=assembled.shares, test_rows=np.arange(1))
    bench = Bench(
        assembled, simulate(assembled, Workers(workshop, 0), store, records), store, records
    )
    state = assembled.recipe.method.start(assembled.task, np.random.default_rng(0))
    print("| round | rows | ours, s | bare, s | ratio |\n|---|---|---|---|---|")
    ratios = []
    for round in range(rounds + 1):  # the first one loads kernels and is not counted
        before = state
        state, ours, recorder = bench.round(state)
        bare, rows = bench.bare(before, recorder)
        if round:
            ratios.append(ours / bare)
            print(f"| {round} | {rows} | {ours:.2f} | {bare:.2f} | {ours / bare:.3f} |", flush=True)
    print(f"\nmedian {np.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")
    records.close()
    store.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=80)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="default: the embedded job's")
    parser.add_argument("--data", help="default: the embedded job's")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="further settings"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
