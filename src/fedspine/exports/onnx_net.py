"""Export of a convolutional net to a folder for ONNX Runtime: one graph from raw rows of the data
to class logits, and a parity report against the PyTorch model.

Moving channels and scaling are part of the graph; class names and the shape of a row are in its
metadata. It runs without fedspine.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedspine.core.errors import BadInput
from fedspine.core.task import Arrays
from fedspine.data.array_rows import UNKNOWN, RowShape
from fedspine.data.dataset import ArrayRows
from fedspine.exports import bench, onnx_graph
from fedspine.exports.card import ONNX
from fedspine.exports.classifier_parity import ClassifierParity, agreement
from fedspine.exports.given_rows import array_rows, spread
from fedspine.exports.onnx_graph import ROWS_IN, Graph
from fedspine.exports.onnx_numbers import CALIBRATION_ROWS, DYNAMIC, STATIC, quantise
from fedspine.exports.parity import write_parity
from fedspine.exports.signature import LOGITS, Signature
from fedspine.exports.whole_folder import check_new, whole_folder
from fedspine.nets.load import channels_at, load, scale_of, stored
from fedspine.nets.net import NetModel
from fedspine.runs.config import Recipe
from fedspine.runs.read_data import dataset
from fedspine.runs.task_record import TaskRecord, record_of

ROWS = 1000  # to compare on at most
BATCH = 32  # rows at a time
BATCHES = (1, 32)  # timed batch sizes
REPEATS = 7  # of each timing

CODE = """\
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(str(Path(sys.argv[1]) / "model.onnx"))
rows = np.load(sys.argv[2])  # {type} [rows, {shape}]
(logits,) = session.run(["logits"], {{"input": rows}})
labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
print(*(labels[row] for row in logits.argmax(1)), sep="\\n")
"""


@dataclass(frozen=True)
class NetData:
    """The rows of a run on arrays, as they are in the data and as the net reads them."""

    raw: ArrayRows  # to compare on
    read: Arrays  # the same rows, as the net reads them
    rows_from: str  # where they come from
    calibration: np.ndarray  # training rows as they are in the data
    scale: tuple[np.ndarray, np.ndarray] | None  # see `fedspine.nets.load.scale_of`


@dataclass(frozen=True)
class NetParity(ClassifierParity):
    """The parity report of a net, beside the time that the same graph takes in fp32."""

    latency_seconds_fp32: dict[int, float]  # empty if this is in fp32

    @property
    def line(self) -> str:
        if self.quantize == "none":
            return super().line
        small, large = (1e3 * seconds for _, seconds in sorted(self.latency_seconds_fp32.items()))
        said = f"{super().line}; in fp32 {small:.1f} ms and {large:.1f} ms"
        slower = any(
            seconds > self.latency_seconds_fp32[rows]
            for rows, seconds in self.latency_seconds.items()
        )
        if slower and self.quantize == DYNAMIC:
            said += (
                f", so it is slower here: take {STATIC}, which scales nothing in a call, or none"
            )
        return said


class _OfRows(nn.Module):
    """The module that is traced: from raw rows of the data to logits."""

    def __init__(self, net: nn.Module, place: int | None, scale: Any) -> None:
        super().__init__()
        self.net, self.place = net, place
        for name, value in zip(("mean", "deviation"), scale or (0.0, 255.0), strict=True):
            self.register_buffer(name, torch.as_tensor(value))

    def forward(self, input: Tensor) -> Tensor:
        rows = input.unsqueeze(1) if self.place is None else input.movedim(self.place, 1)
        return self.net((rows.float() - self.mean) / self.deviation)


def export(
    model: NetModel, data: NetData, folder: Path, *, name: str, record: TaskRecord, quantize: str
) -> ClassifierParity:
    """Write the net of a run as the new `folder`; `quantize` is a key of `onnx_numbers.QUANTISERS`.

    The folder appears only when it is complete. Raises BadInput if it exists, and for a graph
    outside its tolerance, which is that of `fedspine.exports.onnx`.
    """
    onnx_graph.check_installed()
    check_new(folder)
    shape, classes = data.raw.x.shape[1:], record.classes
    net = stored(model, shape, len(classes))
    facts = {
        "name": name,
        "task": record.kind,
        "net": model.net,
        "labels": json.dumps(classes),
        "input_shape": json.dumps(shape),
        "input_type": data.raw.x.dtype.name,
    }
    with whole_folder(folder) as partial:
        traced = _OfRows(net, channels_at(model.net, shape), data.scale)
        onnx_graph.write(traced, partial / ONNX, _signature(data.raw.x), facts)
        single = {} if quantize == "none" else _latency(partial / ONNX)
        feeds = [{ROWS_IN: data.calibration[i : i + BATCH]} for i in _starts(data.calibration)]
        quantise(partial / ONNX, quantize, feeds)
        parity = _parity(net, partial, data, quantize, single)
        card_text = _readme(facts, quantize, write_parity(parity, partial))
        (partial / "README.md").write_text(card_text, encoding="utf-8")
    return parity


def _signature(rows: np.ndarray) -> Signature:
    return Signature(
        inputs=(ROWS_IN,),
        outputs=(LOGITS,),
        example={ROWS_IN: torch.zeros(2, *rows.shape[1:], dtype=torch.from_numpy(rows[:0]).dtype)},
        free={ROWS_IN: {0: "rows"}},
    )


def _starts(rows: np.ndarray) -> range:
    return range(0, len(rows), BATCH)


# --- the rows ---


def data_of(recipe: Recipe, record: TaskRecord, place: str | None) -> NetData:
    """The rows to compare on, at most 1000, spread evenly: those in `place`, or the run's test
    rows; and calibration rows and scale, from its training rows.

    Raises BadInput if the run's data is gone or changed, or `place` holds other arrays.
    """
    needed = "a net's rows are scaled by the run's training rows"
    try:
        data = dataset(recipe)
    except BadInput as error:
        raise BadInput(f"{needed}, which are not available: {error}") from None
    if record_of(recipe, data).data_sha256 != record.data_sha256:
        raise BadInput(f"{needed}, and {recipe.task.data} has changed since; restore it")
    raw, rows_from = data.test, "test rows of the run"
    if place is not None:
        raw, rows_from = _stated(place, data.test, record), f"rows of {Path(place).name}"
    raw, calibration = _thinned(raw, ROWS), _thinned(data.train, CALIBRATION_ROWS)
    splits = [(rows.x, rows.labels) for rows in (data.train, raw)]
    net, train, read = load(recipe.task.model, *splits, classes=len(record.classes))
    del net, train
    return NetData(raw, read, rows_from, calibration.x, _scale(recipe.task.model, data.train.x))


def _scale(name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    place = channels_at(name, x.shape[1:])
    return scale_of(x[:, None] if place is None else np.moveaxis(x, place, 1))


def _thinned(rows: ArrayRows, most: int) -> ArrayRows:
    return rows.take(spread(len(rows), most))


def _stated(place: str, like: ArrayRows, record: TaskRecord) -> ArrayRows:
    """The labelled rows in `place`, which are like those of the run."""
    rows, _ = array_rows(place, RowShape(like.x.shape[1:], like.x.dtype, record.classes))
    labelled = rows.take(np.flatnonzero(rows.labels != UNKNOWN))
    if not len(labelled):
        raise BadInput(f"{place} has no labels; give rows with labels with --rows")
    return ArrayRows(labelled.x, labelled.labels, {})


# --- parity ---


def _parity(
    net: nn.Module, folder: Path, data: NetData, quantize: str, single: dict[int, float]
) -> NetParity:
    graph = Graph(folder / ONNX, threads=1)
    with torch.inference_mode():
        batches = data.read.batches_by_length(BATCH)
        ours = np.concatenate([net(data.read.batch(b)["inputs"]).numpy() for b in batches])
    starts = _starts(data.raw.x)
    theirs = np.concatenate([graph.logits({ROWS_IN: data.raw.x[i : i + BATCH]}) for i in starts])
    return NetParity(
        rows_from=data.rows_from,
        rows=len(data.raw),
        **agreement(ours, theirs, data.raw.labels),
        quantize=quantize,
        bytes=(folder / ONNX).stat().st_size,
        latency_seconds=_latency(folder / ONNX),
        latency_seconds_fp32=single,
        tokens=None,
        peak_memory_bytes=bench.peak_memory_bytes(folder),
    )


def _latency(file: Path) -> dict[int, float]:
    """Seconds of a call by batch size, on one thread."""
    graph = Graph(file, threads=1)
    return {rows: _seconds(graph, rows) for rows in BATCHES}


def _seconds(graph: Graph, rows: int) -> float:
    inputs, seconds = graph.example(rows, 0), []
    graph.logits(inputs)  # the first call is slower
    for _ in range(REPEATS):
        start = perf_counter()
        graph.logits(inputs)
        seconds.append(perf_counter() - start)
    return median(seconds)


def _readme(facts: Mapping[str, str], quantize: str, measured: str) -> str:
    shape = ", ".join(map(str, json.loads(facts["input_shape"])))
    labels = ", ".join(json.loads(facts["labels"]))
    return f"""---
library_name: onnx
tags: [fedspine, federated-learning]
---
# {facts["name"]}

Trained over many devices by fedspine, as one ONNX graph: rows of the data in, class logits out.

| | |
|---|---|
| net | {facts["net"]} |
| classes | {labels} |
| `{ROWS_IN}` | {facts["input_type"]} [rows, {shape}], not scaled |
| `{LOGITS}` | fp32 [rows, classes] |
| numbers | {"fp32" if quantize == "none" else quantize} |

{measured}Class names, shape and type are in the graph's metadata. With `onnxruntime` alone:

```python
{CODE.format(type=facts["input_type"], shape=shape)}```
"""
