"""The same exchange on Flower's deployment runtime: every node returns the numbers it was sent."""

import json
from pathlib import Path
from time import perf_counter, sleep

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()
server = ServerApp()
NODES = 2


@client.query()
def echo(message: Message, context: Context) -> Message:
    return Message(RecordDict({"numbers": message.content["numbers"]}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    while len(nodes := list(grid.get_node_ids())) < NODES:
        sleep(0.2)
    config, rng = context.run_config, np.random.default_rng(0)
    seconds: dict[str, list[float]] = {}
    for size in str(config["sizes"]).split(","):
        seconds[size] = []
        for number in range(-1, int(config["exchanges"])):  # the first is not counted
            numbers = rng.random(int(size) // 4, dtype=np.float32)
            began = perf_counter()
            record = RecordDict({"numbers": ArrayRecord({"x": Array(numbers)})})
            asks = [
                Message(content=record, message_type=MessageType.QUERY, dst_node_id=node)
                for node in nodes
            ]
            replies = list(grid.send_and_receive(asks))
            took = perf_counter() - began
            for reply in replies:
                if reply.has_error() or not np.array_equal(
                    reply.content["numbers"]["x"].numpy(), numbers
                ):
                    raise RuntimeError("a node did not return what it was sent")
            if number >= 0:
                seconds[size].append(took)
            # what there is, if time runs out
            Path(str(config["into"])).write_text(json.dumps(seconds))
