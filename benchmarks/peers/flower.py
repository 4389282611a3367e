"""Flower's simulation engine at its best: one actor per core, the model kept in each, stock FedAvg
of adapter and head.

`run_simulation` is the engine that `flwr run` starts too, with the in-memory grid, so no polling of
a SuperLink.
"""

import logging
import os
from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from time import perf_counter

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from peers.loop import Learner, learner
from peers.work import Outcome, Way, Work

client = ClientApp()


def _learner(message: Message) -> Learner:
    torch.set_num_threads(1)
    config = message.content["config"]
    return learner(
        Path(config["folder"]), Way(config["precision"], config["padding"], config["attention"])
    )


@client.query()
def who(message: Message, context: Context) -> Message:
    """Load the model, so that no round has to, and say which device this is."""
    _learner(message)
    return Message(
        RecordDict({"who": ConfigRecord({"device": context.node_config["partition-id"]})}),
        reply_to=message,
    )


@client.train()
def train(message: Message, context: Context) -> Message:
    mine = _learner(message)
    device, number = (
        context.node_config["partition-id"],
        message.content["config"]["server-round"] - 1,
    )
    asked = dict(mine.work.plan[number])[device]
    tensors = message.content["arrays"].to_torch_state_dict()
    tuned = mine.tune(tensors, device, asked, number)
    arrays = ArrayRecord({name: torch.from_numpy(array) for name, array in tuned.arrays.items()})
    metrics = MetricRecord({"num-examples": tuned.examples, "seconds": tuned.seconds})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class Cohorts(FedAvg):
    """FedAvg that asks the plan's devices instead of random ones, and keeps the time."""

    def __init__(self, work: Work, nodes: dict[int, int]) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.plan, self.nodes = work.plan, nodes  # node ids by device
        self.times: list[float] = []
        self.passes: list[float] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.times = self.times or [perf_counter()]
        config["server-round"] = server_round
        record = RecordDict({"arrays": arrays, "config": config})
        chosen = [self.nodes[device] for device, _ in self.plan[server_round - 1]]
        return [
            Message(content=record, message_type=MessageType.TRAIN, dst_node_id=node)
            for node in chosen
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        if any(reply.has_error() for reply in replies):
            raise RuntimeError(next(reply.error.reason for reply in replies if reply.has_error()))
        self.passes.append(sum(reply.content["metrics"]["seconds"] for reply in replies))
        averaged = super().aggregate_train(server_round, replies)
        self.times.append(perf_counter())
        return averaged


def run(work: Work, way: Way) -> Outcome:
    """FedAvg over the whole work with an actor of one thread per core."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    cores = len(os.sched_getaffinity(0))
    settings = work.settings
    config = ConfigRecord({"folder": str(work.folder), **asdict(way)})
    found: list[tuple[Cohorts, dict[str, torch.Tensor]]] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Cohorts(work, _nodes(grid, settings.devices, config))
        initial = ArrayRecord(work.initial())
        result = strategy.start(grid, initial, num_rounds=settings.rounds, train_config=config)
        found.append((strategy, result.arrays.to_torch_state_dict()))

    resources = {
        "init_args": {"num_cpus": cores},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(server, client, num_supernodes=settings.devices, backend_config=resources)
    strategy, tensors = found[0]
    marks = strategy.times
    rounds = [after - before for before, after in pairwise(marks)]
    return Outcome(rounds, strategy.passes, cores, learner(work.folder, way).accuracy(tensors))


def _nodes(grid: Grid, devices: int, config: ConfigRecord) -> dict[int, int]:
    """The node id of each device, asked of the nodes themselves."""
    while len(ids := list(grid.get_node_ids())) < devices:
        pass
    asks = [
        Message(RecordDict({"config": config}), dst_node_id=node, message_type=MessageType.QUERY)
        for node in ids
    ]
    replies = list(grid.send_and_receive(asks))
    if any(reply.has_error() for reply in replies):
        raise RuntimeError(next(reply.error.reason for reply in replies if reply.has_error()))
    return {reply.content["who"]["device"]: reply.metadata.src_node_id for reply in replies}
