"""Smaller numbers for an ONNX graph: fp16, and int8 by ONNX Runtime's quantiser.

With `int8` activations are scaled as they come; with `int8-static` by what they came to on
calibration rows, which saves that work on the device.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fedspine.core.errors import BadInput
from fedspine.exports.onnx_graph import LOGITS, PAST, quiet

if TYPE_CHECKING:
    import onnx

Feeds: TypeAlias = Sequence[Mapping[str, np.ndarray]]  # every input of the graph, by batch
STATIC = "int8-static"
CALIBRATION_ROWS = 128  # of which activations are scaled, at most
# Sums of squares and their roots overflow fp16 above 255, which activations of decoders reach
WIDE = ["Pow", "ReduceMean", "Sqrt", "Reciprocal"]
# weights of products in 7 bits, without which sums of two products overflow on processors that have
# AVX2 and no VNNI (ONNX Runtime's page on quantisation)
SEVEN_BITS = {"per_channel": True, "reduce_range": True}
PRODUCTS = ["Conv", "MatMul", "Gemm"]


def quantise(path: Path, how: str, feeds: Feeds = ()) -> None:
    """Replace the fp32 graph in `path` by one of smaller numbers, `how` being a key of
    `QUANTISERS`; inputs and logits stay as they are, and a decoder's cache has the numbers of fp16.

    `feeds` are the rows on which `STATIC` is calibrated. Raises BadInput where there are none, or
    where ONNX Runtime cannot quantise the graph.
    """
    if how == STATIC and not feeds:
        raise BadInput(
            f"{STATIC} is calibrated on rows, and none came; take --quantize int8, which needs none"
        )
    with tempfile.TemporaryDirectory() as scratch, quiet():
        try:
            QUANTISERS[how](path, Path(scratch), feeds)
        except Exception as error:  # the quantiser has many kinds
            reason = " ".join(str(error).split())[:160]
            raise BadInput(
                f"ONNX Runtime cannot make this graph {how} ({reason}); use --quantize none"
            ) from error


def _fp16(path: Path, scratch: Path, feeds: Feeds) -> None:
    import onnx
    from onnxruntime.transformers import float16

    graph = onnx.load(path)
    decoder = any(one.name.startswith(PAST) for one in graph.graph.input)
    smaller = float16.convert_float_to_float16(
        graph,
        keep_io_types=[LOGITS] if decoder else True,
        op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *WIDE],
        node_block_list=_of_angles(graph),
    )
    _keep_fractions(smaller)
    onnx.save(smaller, path)


def _keep_fractions(graph: "onnx.ModelProto") -> None:
    """Let nodes that stay in fp32 hand each other fp32, which the converter rounds on the way."""
    nodes = graph.graph.node
    rounded = {n.output[0]: n.input[0] for n in nodes if n.name.endswith("_cast_to_fp16_node")}
    whole = {
        n.output[0]: rounded[n.input[0]]
        for n in nodes
        if n.name.endswith("_cast_to_fp32_node") and n.input[0] in rounded
    }
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = whole.get(name, name)
    read = {name for node in nodes for name in node.input} | {o.name for o in graph.graph.output}
    for node in [n for n in nodes if n.op_type == "Cast" and n.output[0] not in read]:
        nodes.remove(node)


def _of_angles(graph: "onnx.ModelProto") -> list[str]:
    """The nodes that lead to a sine or a cosine: an angle of many turns has no fraction in fp16."""
    makers = {name: node for node in graph.graph.node for name in node.output}
    found = [node for node in graph.graph.node if node.op_type in ("Cos", "Sin")]
    seen: dict[str, Any] = {}
    while found:
        node = found.pop()
        if node.name not in seen:
            seen[node.name] = node
            found += [makers[name] for name in node.input if name in makers]
    return list(seen)


def _int8(path: Path, scratch: Path, feeds: Feeds) -> None:
    """int8 weights, one scale for each output unit; activations are quantised as they come."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(
        _embedded(path, scratch), path, op_types_to_quantize=["Conv", "MatMul"], **SEVEN_BITS
    )


def _embedded(path: Path, scratch: Path) -> Path:
    """The graph with its embeddings in 8 bits, ready for its products to be quantised."""
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folded, embedded = scratch / "folded.onnx", scratch / "embedded.onnx"
    # folds the transposes of weights, since only products with a constant are quantised
    quant_pre_process(path, folded, skip_symbolic_shape=True)
    quantize_dynamic(folded, embedded, op_types_to_quantize=["Gather"])
    return embedded


def _int8_static(path: Path, scratch: Path, feeds: Feeds) -> None:
    """int8 weights as in `_int8`; one scale and zero for each input of a product, made of the
    smallest and the largest value of each batch, averaged over the batches.
    """
    from onnxruntime.quantization import QuantType, quantize_static

    quantize_static(
        _embedded(path, scratch),
        path,
        _Reader(feeds),
        op_types_to_quantize=PRODUCTS,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        # products of two activations, as in attention, stay as they are; so do outputs
        extra_options={
            "MatMulConstBOnly": True,
            "OpTypesToExcludeOutputQuantization": PRODUCTS,
        },
        **SEVEN_BITS,
    )


class _Reader:
    """Feeds in the interface of ONNX Runtime's calibration."""

    def __init__(self, feeds: Iterable[Mapping[str, np.ndarray]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, None after the last."""
        feed = next(self._feeds, None)
        return None if feed is None else dict(feed)


QUANTISERS: dict[str, Callable[[Path, Path, Feeds], None]] = {
    "none": lambda path, scratch, feeds: None,
    "fp16": _fp16,
    "int8": _int8,
    STATIC: _int8_static,
}
