"""Load the graph of an exported net on arrays; all facts on it are in the graph's metadata."""

import json
from pathlib import Path

import numpy as np
import torch

from fedspine.core.errors import BadInput
from fedspine.data.array_rows import RowShape
from fedspine.exports.card import ONNX
from fedspine.exports.loaded import LoadedNet
from fedspine.exports.onnx_graph import ROWS_IN, Graph
from fedspine.exports.signature import LOGITS
from fedspine.nets.load import empty

TYPES = {name: np.dtype(name) for name in ("uint8", "float32")}


def load_net(folder: Path, threads: int | None) -> LoadedNet:
    """The net that `onnx_net.export` wrote; raises BadInput for any other graph."""
    graph = Graph(folder / ONNX, threads)
    facts = graph.facts
    try:
        classes, shape = json.loads(facts["labels"]), json.loads(facts["input_shape"])
        reads = RowShape(tuple(map(int, shape)), TYPES[facts["input_type"]], tuple(classes))
        if facts["task"] != "array" or (graph.inputs, graph.outputs) != ((ROWS_IN,), (LOGITS,)):
            raise ValueError
        with torch.device("meta"):  # only its sizes
            module = empty(facts["net"], reads.shape, len(classes))
    except (KeyError, ValueError, TypeError):  # BadInput is a ValueError
        raise BadInput(
            f"{folder / ONNX} is not the graph of a net that `fedspine export` wrote; export the "
            "model again"
        ) from None
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return LoadedNet(graph, facts["net"], reads, parameters)
