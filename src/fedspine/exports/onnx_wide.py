"""The two main losses of int8 in ONNX graphs, treated separately: wide channels, and tokens of
unlike size.

ONNX Runtime scales the whole input of a product by its largest number. In a transformer a few
channels are ten times as wide as the others, which leaves few of the 8 bits to the others. So the
wide channels are multiplied separately in fp32 (LLM.int8(), Dettmers et al. 2022,
arXiv:2208.07339). The set of wide channels is fixed at export, since it hardly depends on the text.
Each token's embedding has its own scale. The file holds the wide channels' weights and these scales
in fp16.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fedspine.exports.onnx_graph import PAST
from fedspine.exports.signature import IDS, MASK

if TYPE_CHECKING:
    import onnx

Feeds: TypeAlias = Sequence[Mapping[str, np.ndarray]]  # every input of a graph, by batch
# the largest size of each channel, by input of a product
LargestInputs: TypeAlias = dict[str, np.ndarray]
SHARE = 48  # one channel in this many is wide: 8 of 384
APART = 1.5  # wide channels are this many times as wide as the next one, else none is split off
ROWS, TOKENS, BATCH = 64, 32, 16  # of random tokens
STEPS = 127  # of int8 on each side of zero
TINY = np.float32(2**-24)  # of fp16: the scale of a row of zeros is not 0


def random_tokens(graph: "onnx.ModelProto") -> Feeds:
    """Rows of random tokens for a graph that reads `input_ids`; none for another."""
    table = next((t for node, t in _tables(graph) if node.input[1] == IDS), None)
    if table is None:
        return ()
    rng, feeds = np.random.default_rng(0), []
    facts = {one.key: one.value for one in graph.metadata_props}
    tokens = min(TOKENS, int(facts.get("max_tokens", TOKENS)))
    for _ in range(0, ROWS, BATCH):
        ids = rng.integers(len(table), size=(BATCH, tokens))
        feeds.append({one.name: _given(one, ids) for one in graph.graph.input})
    return feeds


def _given(one: "onnx.ValueInfoProto", ids: np.ndarray) -> np.ndarray:
    if one.name.startswith(PAST):
        _, heads, _, width = (each.dim_value for each in one.type.tensor_type.shape.dim)
        return np.zeros((len(ids), heads, 0, width), np.float32)
    return {IDS: ids, MASK: np.ones_like(ids)}.get(one.name, np.zeros_like(ids))


def split(graph: "onnx.ModelProto", feeds: Feeds, scratch: Path) -> list[str]:
    """Multiply the wide channels of each product with constant weights separately, in fp32.

    The graph changes in place and computes the same but for rounding. `feeds` show which channels
    are wide; without them, the graph does not change. Returns the names of the products that have
    to stay in fp32.
    """
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    sizes = _widths(graph, weights, feeds, scratch)
    wide = {name: chosen for name, each in sizes.items() if len(chosen := _wide(each))}
    biased = _biased(graph, weights)
    nodes, apart, parted, done = [], [], set(), set()
    for node in graph.graph.node:
        if node.output[0] in done:
            continue
        if not _is_product(node, weights) or node.input[0] not in wide:
            nodes.append(node)
            continue
        x, w = node.input
        if x not in parted:
            parted.add(x)
            nodes += _parted(graph, x, wide[x], len(sizes[x]))
        matrix = np.array(numpy_helper.to_array(weights[w]))
        summed = _summed(graph, node, matrix, wide[x], biased.get(node.output[0]))
        nodes += summed
        done.add(summed[-1].output[0])
        apart.append(f"{node.output[0]}_wide")
    _replace(graph, nodes)
    return apart


def _parted(
    graph: "onnx.ModelProto", x: str, chosen: np.ndarray, channels: int
) -> list["onnx.NodeProto"]:
    """The nodes that compute from `x` its narrow channels, with zeros for the wide ones, and its
    wide channels alone.
    """
    from onnx import helper

    narrow = np.ones(channels, np.float32)
    narrow[chosen] = 0
    places = _constant(graph, f"{x}_places", chosen)
    return [
        helper.make_node("Mul", [x, _constant(graph, f"{x}_mask", narrow)], [f"{x}_narrow"]),
        helper.make_node("Gather", [x, places], [f"{x}_wide"], axis=-1),
    ]


def _summed(
    graph: "onnx.ModelProto",
    node: "onnx.NodeProto",
    matrix: np.ndarray,
    chosen: np.ndarray,
    bias: tuple[str, str] | None,
) -> list["onnx.NodeProto"]:
    """The nodes that replace a product by the products of narrow and of wide channels and their
    sum; with a `bias`, its name and the sum's after it, they add this, too.

    The runtime adds a bias within the quantised product that it follows.
    """
    from onnx import helper

    x, y = node.input[0], node.output[0]
    few, widened = _stored_in_half(graph, f"{y}_wide_weight", matrix[chosen])
    matrix[chosen] = 0  # so that these rows widen no scale of the others
    others = _constant(graph, f"{y}_narrow_weight", matrix)
    products = [
        widened,
        helper.make_node("MatMul", [f"{x}_narrow", others], [f"{y}_narrow"], name=node.name),
        helper.make_node("MatMul", [f"{x}_wide", few], [f"{y}_wide"], name=f"{y}_wide"),
    ]
    if bias is None:
        return [*products, helper.make_node("Add", [f"{y}_narrow", f"{y}_wide"], [y])]
    name, after = bias
    return [
        *products,
        helper.make_node("Add", [f"{y}_narrow", name], [f"{y}_biased"]),
        helper.make_node("Add", [f"{y}_biased", f"{y}_wide"], [after]),
    ]


def _biased(
    graph: "onnx.ModelProto", weights: Mapping[str, "onnx.TensorProto"]
) -> dict[str, tuple[str, str]]:
    """The constant vector that is added to a node's output, and the sum, by output; only where
    nothing else reads the output.
    """
    readers = Counter(name for node in graph.graph.node for name in node.input)
    readers.update(one.name for one in graph.graph.output)
    found = {}
    for node in graph.graph.node:
        if node.op_type == "Add":
            for y, vector in (node.input, reversed(node.input)):
                if vector in weights and len(weights[vector].dims) == 1 and readers[y] == 1:
                    found[y] = (vector, node.output[0])
    return found


def _stored_in_half(
    graph: "onnx.ModelProto", name: str, value: np.ndarray
) -> tuple[str, "onnx.NodeProto"]:
    """The name in fp32 of a constant that the file holds in fp16, and the node that widens it,
    which the runtime carries out once, when it loads the graph.
    """
    from onnx import TensorProto, helper

    stored = _constant(graph, f"{name}_half", value.astype(np.float16))
    return name, helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT)


def _constant(graph: "onnx.ModelProto", name: str, value: np.ndarray) -> str:
    from onnx import numpy_helper

    graph.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _wide(sizes: np.ndarray) -> np.ndarray:
    """The places of the wide channels, in order; none if they are not much wider than others."""
    most = len(sizes) // SHARE
    order = np.argsort(-sizes, kind="stable")
    if not most or not sizes[order[0]] > APART * sizes[order[most]]:
        return order[:0]
    return np.sort(order[:most])


def _widths(
    graph: "onnx.ModelProto",
    weights: Mapping[str, "onnx.TensorProto"],
    feeds: Feeds,
    scratch: Path,
) -> LargestInputs:
    """The largest size of each channel of the inputs of products on these rows, without padding."""
    import onnx
    import onnxruntime

    names = sorted({n.input[0] for n in graph.graph.node if _is_product(n, weights)})
    if not feeds or not names:
        return {}
    watched = onnx.ModelProto()
    watched.CopyFrom(graph)
    for name in names:
        watched.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    onnx.save(watched, scratch / "watched.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(scratch / "watched.onnx"), options)
    found: LargestInputs = {}
    for feed in feeds:
        for name, values in zip(names, session.run(names, dict(feed)), strict=True):
            mask = feed.get(MASK)
            if mask is not None and values.shape[:-1] == mask.shape:
                values = values[mask.astype(bool)]
            sizes = np.abs(values).reshape(-1, values.shape[-1]).max(0)
            found[name] = np.maximum(found.get(name, 0.0), sizes)
    return found


def _is_product(node: "onnx.NodeProto", weights: Mapping[str, "onnx.TensorProto"]) -> bool:
    """Whether a node multiplies with a constant fp32 matrix."""
    from onnx import TensorProto

    matrix = weights.get(node.input[1]) if node.op_type == "MatMul" else None
    if matrix is None or node.input[0] in weights:
        return False
    return len(matrix.dims) == 2 and matrix.data_type == TensorProto.FLOAT


def quantise_tables(graph: "onnx.ModelProto") -> None:
    """Hold embeddings in int8, symmetric with one scale for each token."""
    tables = {node.output[0]: table for node, table in _tables(graph)}
    nodes, stored = [], set()
    for node in graph.graph.node:
        y = node.output[0]
        if y not in tables:
            nodes.append(node)
            continue
        name, ids = node.input
        if name not in stored:
            stored.add(name)
            largest = np.abs(tables[y]).max(1, keepdims=True) / STEPS
            scales = np.maximum(largest.astype(np.float16).astype(np.float32), TINY)
            codes = np.clip(np.round(tables[y] / scales), -STEPS, STEPS)
            _constant(graph, f"{name}_int8", codes.astype(np.int8))
            nodes.append(_stored_in_half(graph, f"{name}_scales", scales)[1])
        nodes += _looked_up(name, ids, y)
    _replace(graph, nodes)


def _looked_up(name: str, ids: str, y: str) -> list["onnx.NodeProto"]:
    from onnx import TensorProto, helper

    return [
        helper.make_node("Gather", [f"{name}_int8", ids], [f"{y}_int8"]),
        helper.make_node("Gather", [f"{name}_scales", ids], [f"{y}_scales"]),
        helper.make_node("Cast", [f"{y}_int8"], [f"{y}_steps"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{y}_steps", f"{y}_scales"], [y]),
    ]


def _tables(graph: "onnx.ModelProto") -> Iterator[tuple["onnx.NodeProto", np.ndarray]]:
    """The nodes that look up rows of a constant fp32 matrix, and that matrix."""
    from onnx import TensorProto, numpy_helper

    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        table = weights.get(node.input[0]) if node.op_type == "Gather" else None
        first = all(one.name != "axis" or one.i == 0 for one in node.attribute)
        if table is None or table.data_type != TensorProto.FLOAT:
            continue
        if first and len(table.dims) == 2:
            yield node, numpy_helper.to_array(table)


def _replace(graph: "onnx.ModelProto", nodes: Sequence["onnx.NodeProto"]) -> None:
    """Set the nodes of the graph, and drop constants that no node reads."""
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input} | {o.name for o in graph.graph.output}
    for tensor in [t for t in graph.graph.initializer if t.name not in read]:
        graph.graph.initializer.remove(tensor)
