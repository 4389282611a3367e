"""ONNX graphs: written from a module, and run.

Only this file, `onnx_numbers` and `onnx_wide` import ONNX's libraries. PyTorch is imported only to
export a module, so that the peak memory of a process that runs a graph (`python -m
fedspine.exports.onnx_graph`) is the runtime's own.
"""

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedspine.core.errors import BadInput, reason_of
from fedspine.core.process import peak_memory_bytes
from fedspine.exports.signature import IDS, LOGITS, MASK, SEGMENTS, Signature

if TYPE_CHECKING:
    from torch import nn

MISSING = "ONNX needs the packages onnx, onnxscript and onnxruntime; pip install 'fedspine[onnx]'"

try:
    import onnxruntime
except ModuleNotFoundError:
    raise BadInput(MISSING) from None

ROWS_IN = "input"  # of a net: uint8 or fp32 [rows, ...]
PAST, PRESENT = "past_key_values", "present"  # of a decoder: PAST.0.key, PRESENT.0.value, ...
FREE = "past"  # the dimension of a cache that grows
MOST_BYTES = 2_000_000_000  # a protobuf file holds less than 2 GiB


def check_installed() -> None:
    """Raise BadInput if a package that writes graphs is missing."""
    if not all(find_spec(package) for package in ("onnx", "onnxscript")):
        raise BadInput(MISSING)


def write(
    module: "nn.Module",
    path: Path,
    signature: Signature,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write a module as an fp32 graph, with `facts` as its metadata.

    Raises BadInput for a module that cannot be exported.
    """
    import onnx
    import torch

    try:
        with quiet(), _written_out(module):
            program = torch.onnx.export(
                module.eval(),
                kwargs=dict(signature.example),
                dynamic_shapes=dict(signature.free),
                input_names=signature.inputs,
                output_names=signature.outputs,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many types, with messages of several lines
        reason = reason_of(error)
        raise BadInput(
            f"PyTorch {torch.__version__} cannot export this model to ONNX ({reason}); use "
            "--format hf"
        ) from error
    graph = program.model_proto
    _strip(graph)
    _sum_before_norms(graph)
    for key, value in (facts or {}).items():
        graph.metadata_props.add(key=key, value=value)
    onnx.save(graph, path)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings about their own code and about packages not needed here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _written_out(module: "nn.Module") -> Iterator[None]:
    """Let a transformer attend by two products and a softmax.

    In the graph of PyTorch's fused attention a guard against NaN follows each softmax, which takes
    4 to 7 % of the time of half of MiniLM.
    """
    configs = [getattr(part, "config", None) for part in module.modules()]
    named = {id(one): one for one in configs if hasattr(one, "_attn_implementation")}
    before = {key: one._attn_implementation for key, one in named.items()}
    try:
        for one in named.values():
            one._attn_implementation = "eager"
        yield
    finally:
        for key, one in named.items():
            one._attn_implementation = before[key]


def _sum_before_norms(graph: "onnx.ModelProto") -> None:  # noqa: F821
    """Write the addition before each layer norm as a sum of two.

    ONNX Runtime (1.32) fuses an addition with the norm behind it into one kernel, which on CPUs
    takes five times as long as both apart: 13 % of the time of half of MiniLM.
    """
    makers = {name: node for node in graph.graph.node for name in node.output}
    for node in graph.graph.node:
        if node.op_type == "LayerNormalization":
            maker = makers.get(node.input[0])
            if maker is not None and maker.op_type == "Add":
                maker.op_type = "Sum"


def _strip(graph: "onnx.ModelProto") -> None:  # noqa: F821
    """Remove the stack traces, which hold local paths and can be larger than a tiny model."""
    inner = graph.graph
    for part in (graph, inner, *inner.node, *inner.input, *inner.output, *inner.value_info):
        del part.metadata_props[:]
    for node in inner.node:
        node.doc_string = ""


# --- running ---


class Graph:
    """A graph in ONNX Runtime on the CPU; `threads` None: the runtime's default.

    Raises BadInput for a file that is not a graph.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime raises many types
            reason = reason_of(error)
            raise BadInput(f"{path} cannot be read ({reason}); export the model again") from None
        self._inputs = {one.name: one for one in self._session.get_inputs()}
        self.inputs = tuple(self._inputs)
        self.outputs = tuple(one.name for one in self._session.get_outputs())
        self.facts: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name; inputs that the graph does not read are ignored.

        Missing segments default to the first text, a missing cache to an empty one.
        """
        return dict(zip(self.outputs, self._session.run(None, self.given(inputs)), strict=True))

    def logits(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The logits alone; see `run`."""
        (found,) = self._session.run([LOGITS], self.given(inputs))
        return found

    def given(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every input of the graph, with the defaults of `run`."""
        return {
            name: inputs[name] if name in inputs else self._start(name, inputs[IDS])
            for name in self.inputs
        }

    def _start(self, name: str, ids: np.ndarray) -> np.ndarray:
        if name == SEGMENTS:
            return np.zeros_like(ids)
        one = self._inputs[name]
        _, heads, _, width = one.shape
        half = one.type == "tensor(float16)"
        return np.zeros((len(ids), heads, 0, width), np.float16 if half else np.float32)

    def example(self, rows: int, tokens: int) -> dict[str, np.ndarray]:
        """Inputs with `rows` rows, and `tokens` tokens each if the graph reads tokens."""
        if ROWS_IN in self.inputs:
            one = self._inputs[ROWS_IN]
            type = np.uint8 if one.type == "tensor(uint8)" else np.float32
            return {ROWS_IN: np.zeros((rows, *one.shape[1:]), type)}
        ids = np.ones((rows, tokens), np.int64)
        return {IDS: ids, MASK: ids}


def _main(path: str, tokens: str, threads: str, *batches: str) -> None:
    graph = Graph(Path(path), int(threads))
    for batch in batches:
        graph.logits(graph.example(int(batch), int(tokens)))
    print(peak_memory_bytes())


if __name__ == "__main__":
    _main(*sys.argv[1:])
