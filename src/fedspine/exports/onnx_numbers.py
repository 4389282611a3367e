"""Lower precision for an ONNX graph: fp16, and int8 by ONNX Runtime's quantiser.

`int8` scales activations dynamically; `int8-static` uses scales from calibration rows, which saves
that work on the device.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedspine.core.errors import BadInput, reason_of
from fedspine.exports import onnx_wide
from fedspine.exports.onnx_graph import PAST, quiet
from fedspine.exports.onnx_wide import Feeds
from fedspine.exports.signature import LOGITS

if TYPE_CHECKING:
    import onnx

DYNAMIC, STATIC = "int8", "int8-static"
CALIBRATION_ROWS = 128  # at most
# squares overflow fp16 above 255, which activations of decoders exceed
WIDE = ["Pow", "ReduceMean", "Sqrt", "Reciprocal"]
# weights of products in 7 bits, since sums of two 8-bit products overflow on processors with AVX2
# but without VNNI (ONNX Runtime's page on quantisation)
SEVEN_BITS = {"per_channel": True, "reduce_range": True}
PRODUCTS = ["Conv", "MatMul", "Gemm"]


def quantise(path: Path, how: str, feeds: Feeds = ()) -> None:
    """Replace the fp32 graph in `path` by one in lower precision; `how` is a key of `QUANTISERS`.

    Types of inputs and logits do not change; with fp16, a decoder's cache is fp16. `feeds` are the
    rows on which `STATIC` is calibrated. Raises BadInput if it gets none, or if ONNX Runtime cannot
    quantise the graph.
    """
    if how == STATIC and not feeds:
        raise BadInput(
            f"{STATIC} needs calibration rows, and there are none; use --quantize int8, which "
            "needs none"
        )
    with tempfile.TemporaryDirectory() as scratch, quiet():
        try:
            QUANTISERS[how](path, Path(scratch), feeds)
        except Exception as error:  # the quantiser raises many types
            reason = reason_of(error)
            raise BadInput(
                f"ONNX Runtime cannot convert this graph to {how} ({reason}); use --quantize none"
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
    """Remove the casts to fp16 that the converter puts between two nodes that stay in fp32."""
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
    """The nodes before a sine or a cosine: a large angle in fp16 has no fractional digits."""
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
    """int8 weights with one scale per output unit; activations are quantised dynamically."""
    from onnxruntime.quantization import quantize_dynamic

    prepared, apart = _prepared(path, scratch, feeds)
    quantize_dynamic(
        prepared,
        path,
        op_types_to_quantize=["Conv", "MatMul"],
        nodes_to_exclude=apart,
        **SEVEN_BITS,
    )
    _drop_inner_shapes(path)


def _drop_inner_shapes(path: Path) -> None:
    """Remove the shapes of what is computed on the way, which the runtime finds itself."""
    import onnx

    graph = onnx.load(path)
    del graph.graph.value_info[:]
    onnx.save(graph, path)


def _prepared(path: Path, scratch: Path, feeds: Feeds) -> tuple[Path, list[str]]:
    """The graph with 8-bit embeddings and separate wide channels, ready for the quantisation of its
    products, and the products that stay in fp32.

    Wide channels are found on `feeds`, or on random tokens without them.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folded, prepared = scratch / "folded.onnx", scratch / "prepared.onnx"
    # fold the transposes of weights, since only products with a constant are quantised
    quant_pre_process(path, folded, skip_symbolic_shape=True)
    graph = onnx.load(folded)
    apart = onnx_wide.split(graph, feeds or onnx_wide.random_tokens(graph), scratch)
    onnx_wide.quantise_tables(graph)
    onnx.save(graph, prepared)
    return prepared, apart


def _int8_static(path: Path, scratch: Path, feeds: Feeds) -> None:
    """int8 weights as in `_int8`; one scale and zero point for each input of a product, from the
    smallest and the largest value of each batch, averaged over the batches.
    """
    from onnxruntime.quantization import QuantType, quantize_static

    prepared, apart = _prepared(path, scratch, feeds)
    quantize_static(
        prepared,
        path,
        _CalibrationReader(feeds),
        op_types_to_quantize=PRODUCTS,
        nodes_to_exclude=apart,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        # products of two activations, as in attention, are not quantised; nor are outputs
        extra_options={
            "MatMulConstBOnly": True,
            "OpTypesToExcludeOutputQuantization": PRODUCTS,
        },
        **SEVEN_BITS,
    )
    _drop_inner_shapes(path)


class _CalibrationReader:
    """Feeds with the interface of ONNX Runtime's calibration."""

    def __init__(self, feeds: Iterable[Mapping[str, np.ndarray]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, None after the last."""
        feed = next(self._feeds, None)
        return None if feed is None else dict(feed)


QUANTISERS: dict[str, Callable[[Path, Path, Feeds], None]] = {
    "none": lambda path, scratch, feeds: None,
    "fp16": _fp16,
    DYNAMIC: _int8,
    STATIC: _int8_static,
}
