"""Wide channels apart, and a scale for each embedding: what int8 graphs lose less by."""

import numpy as np
import pytest
from tolerances import FP16

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from fedspine.exports import onnx_numbers, onnx_wide  # noqa: E402

WORDS, WIDTH, OUT = 50, 96, 40
WIDE = (7, 70)


def graph_of(path, *, wide=30.0):
    """Embeddings of unlike sizes; gains as those of a norm, two of them `wide` times the others;
    two products of the same input, the first with a bias.
    """
    rng = np.random.default_rng(0)
    table = rng.normal(size=(WORDS, WIDTH)) * rng.uniform(0.3, 1, (WORDS, 1))
    weights = {"table": table, "gains": np.ones(WIDTH)}
    weights["gains"][list(WIDE)] = wide
    for name in ("first", "second"):
        weights[name] = rng.normal(size=(WIDTH, OUT))
        weights[name][WIDE, :] /= wide  # they count no more than the others
    weights["bias"] = rng.normal(size=OUT)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"], name="look up"),
        helper.make_node("Mul", ["words", "gains"], ["x"], name="gain"),
        helper.make_node("MatMul", ["x", "first"], ["a"], name="one"),
        helper.make_node("MatMul", ["x", "second"], ["b"], name="two"),
        helper.make_node("Add", ["bias", "a"], ["c"], name="biased"),
        helper.make_node("Add", ["c", "b"], ["logits"], name="sum"),
    ]
    shape = ["rows", "tokens"]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "toy",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape, OUT])],
            [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.save(model, path)
    return path


def answers(path):
    ids = np.random.default_rng(1).integers(WORDS, size=(4, 16))
    return onnxruntime.InferenceSession(str(path)).run(None, {"input_ids": ids})[0]


def error(path, expected):
    """Root mean square, over that of what is expected."""
    return float(np.sqrt(((answers(path) - expected) ** 2).mean() / (expected**2).mean()))


def test_split_computes_the_same(tmp_path):
    path = graph_of(tmp_path / "x.onnx")
    expected, graph = answers(path), onnx.load(path)
    apart = onnx_wide.split(graph, onnx_wide.random_tokens(graph), tmp_path)
    onnx.checker.check_model(graph)
    onnx.save(graph, path)
    # a sum of 96 products is off by at most 96 roundoffs of the sum of their sizes, which is at
    # most 10 times the largest answer here; weights of two of them are rounded to fp16
    np.testing.assert_allclose(
        answers(path), expected, atol=2 * 96 * 2.0**-24 * 10 * np.abs(expected).max()
    )
    kept = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    assert apart == ["a_wide", "b_wide"]
    assert kept["x_places"].tolist() == list(WIDE)
    assert not kept["a_narrow_weight"][list(WIDE)].any()
    assert "first" not in kept
    sums = {n.output[0]: set(n.input) for n in graph.graph.node if n.op_type == "Add"}
    assert sums == {  # the bias at the product that is quantised, which can then add it
        "a_biased": {"a_narrow", "bias"},
        "c": {"a_biased", "a_wide"},
        "b": {"b_narrow", "b_wide"},
        "logits": {"c", "b"},
    }


def test_int8_loses_less(tmp_path, monkeypatch):
    """Two channels 30 times as wide leave 255 / 30 steps for the others, about one to each side of
    a typical value; alone they have 255, and their error is that of 7 bits in the weights.
    """
    path = graph_of(tmp_path / "x.onnx")
    expected = answers(path)
    onnx_numbers.quantise(path, "int8")
    assert "int8" in str(onnx.load(path).graph.node)
    monkeypatch.setattr(onnx_wide, "APART", np.inf)  # nothing is kept apart
    together = graph_of(tmp_path / "y.onnx")
    onnx_numbers.quantise(together, "int8")
    # apart: a step of 7 bits in weights up to 2.5, of 8 bits in inputs of +-3.5 and of 0.65 on
    # average, each over the root of 12: 1.1 % and 1.2 %. Together: steps of 0.7 in inputs, 30 %
    assert error(path, expected) < 0.02 < 0.1 < error(together, expected)


def test_a_graph_without_wide_channels_or_tokens_stays(tmp_path):
    for path, feeds in (
        (graph_of(tmp_path / "even.onnx", wide=1.0), None),
        (graph_of(tmp_path / "x.onnx"), ()),
    ):
        graph = onnx.load(path)
        before = graph.SerializeToString()
        given = onnx_wide.random_tokens(graph) if feeds is None else feeds
        assert onnx_wide.split(graph, given, tmp_path) == []
        assert graph.SerializeToString() == before
    net = onnx.load(graph_of(tmp_path / "net.onnx"))
    net.graph.input[0].name = net.graph.node[0].input[1] = "input"
    assert onnx_wide.random_tokens(net) == ()


def test_each_embedding_has_its_own_scale(tmp_path):
    path = graph_of(tmp_path / "x.onnx", wide=1.0)
    graph = onnx.load(path)
    table = numpy_helper.to_array(graph.graph.initializer[0])
    onnx_wide.quantise_tables(graph)
    onnx.checker.check_model(graph)
    kept = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    assert kept["table_int8"].dtype == np.int8 and "table" not in kept
    # half a step of each row, and a scale that is rounded to fp16 times up to 127 steps
    step, scales = np.abs(table).max(1, keepdims=True) / 127, kept["table_scales_half"]
    assert scales.dtype == np.float16
    off = np.abs(kept["table_int8"] * scales.astype(np.float32) - table)
    assert (off <= (0.5 + 127 * FP16) * step).all()
