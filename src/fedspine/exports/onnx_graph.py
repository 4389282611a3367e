"""ONNX graphs: written from a module, quantised, and run.

The only file that imports ONNX's libraries. PyTorch is imported only where a module is exported, so
that the peak memory of a process that runs a graph (`python -m fedspine.exports.onnx_graph`) is the
runtime's own.
"""

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedspine.core.errors import BadInput
from fedspine.core.process import peak_memory_bytes

if TYPE_CHECKING:
    from torch import nn

MISSING = "ONNX needs the packages onnx, onnxscript and onnxruntime; pip install 'fedspine[onnx]'"

try:
    import onnxruntime
except ModuleNotFoundError:
    raise BadInput(MISSING) from None

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # int64 [rows, tokens] each
LOGITS = "logits"  # fp32 [rows, classes]
MOST_BYTES = 2_000_000_000  # a protobuf file holds less than 2 GiB
EXAMPLE = (2, 8)  # rows and tokens of the traced inputs; unequal and above 1, so both stay free


def check_installed() -> None:
    """Raise BadInput where a package that writes graphs is missing."""
    if not all(find_spec(package) for package in ("onnx", "onnxscript")):
        raise BadInput(MISSING)


def write(module: "nn.Module", path: Path, *, segments: bool) -> None:
    """Write a module as an fp32 graph whose numbers of rows and of tokens are free.

    `module` maps `INPUTS`, with `segments` all three and else the first two, to a tensor of logits.
    Raises BadInput for a module that cannot be exported.
    """
    import onnx
    import torch

    names = INPUTS if segments else INPUTS[:2]
    try:
        with _quiet():
            program = torch.onnx.export(
                module.eval(),
                kwargs={name: torch.ones(EXAMPLE, dtype=torch.int64) for name in names},
                dynamic_shapes={name: {0: "rows", 1: "tokens"} for name in names},
                input_names=names,
                output_names=[LOGITS],
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter has many kinds, of several lines each
        reason = " ".join(str(error).split())[:160]
        raise BadInput(
            f"PyTorch {torch.__version__} cannot export this model to ONNX ({reason}); use "
            "--format hf"
        ) from error
    graph = program.model_proto
    _strip(graph)
    onnx.save(graph, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' remarks on their own code and on packages that are not needed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _strip(graph: "onnx.ModelProto") -> None:  # noqa: F821
    """Remove the stack traces, which hold paths of this machine and outweigh a tiny model."""
    inner = graph.graph
    for part in (graph, inner, *inner.node, *inner.input, *inner.output, *inner.value_info):
        del part.metadata_props[:]
    for node in inner.node:
        node.doc_string = ""


# --- smaller numbers ---


def quantise(path: Path, how: str) -> None:
    """Replace the fp32 graph in `path` by one of smaller numbers, `how` being a key of
    `QUANTISERS`; inputs and logits stay as they are.
    """
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        QUANTISERS[how](path, Path(scratch))


def _fp16(path: Path, scratch: Path) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)


def _int8(path: Path, scratch: Path) -> None:
    """int8 weights, one scale for each output unit; activations are quantised as they come."""
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folded, embedded = scratch / "folded.onnx", scratch / "embedded.onnx"
    # folds the transposes of weights, since only products with a constant are quantised
    quant_pre_process(path, folded, skip_symbolic_shape=True)
    quantize_dynamic(folded, embedded, op_types_to_quantize=["Gather"])
    # weights of products in 7 bits, without which sums of two products overflow on processors that
    # have AVX2 and no VNNI (ONNX Runtime's page on quantisation)
    products = ["Conv", "MatMul"]
    quantize_dynamic(
        embedded, path, op_types_to_quantize=products, per_channel=True, reduce_range=True
    )


QUANTISERS: dict[str, Callable[[Path, Path], None]] = {
    "none": lambda path, scratch: None,
    "fp16": _fp16,
    "int8": _int8,
}


# --- running ---


class Graph:
    """A graph in ONNX Runtime on the CPU; `threads` None leaves their number to it.

    Raises BadInput for a file that is no graph.
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
        except Exception as error:  # the runtime has many kinds
            reason = " ".join(str(error).split())[:160]
            raise BadInput(f"{path} cannot be read ({reason}); export the model again") from None
        self.inputs = tuple(one.name for one in self._session.get_inputs())

    def logits(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """fp32 [rows, classes] of `INPUTS`, int64 [rows, tokens]; segments that are missing are all
        of the first text, and those that the graph does not read are left out.
        """
        ids = inputs[INPUTS[0]]
        given = {name: inputs.get(name, np.zeros_like(ids)) for name in self.inputs}
        (found,) = self._session.run([LOGITS], given)
        return found


def _main(path: str, tokens: str, threads: str, *batches: str) -> None:
    graph = Graph(Path(path), int(threads))
    for batch in batches:
        ids = np.ones((int(batch), int(tokens)), np.int64)
        graph.logits({"input_ids": ids, "attention_mask": ids})
    print(peak_memory_bytes())


if __name__ == "__main__":
    _main(*sys.argv[1:])
