"""ONNX graphs of convolutional nets: rows of the data in, logits of the PyTorch net out, and
every refusal.
"""

import dataclasses
import json
import re
import shutil
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from runs import carried_out, in_process
from tolerances import LOGITS, rounding
from torch.utils.flop_counter import FlopCounterMode

from fedspine.core.errors import BadInput
from fedspine.data.dataset import ArrayRows
from fedspine.exports import bench, fit, onnx_net, onnx_numbers
from fedspine.exports.card import weight_bytes
from fedspine.exports.load import load_model
from fedspine.exports.of_run import export_model
from fedspine.exports.onnx_graph import Graph
from fedspine.exports.onnx_net import NetData
from fedspine.exports.predict import predict
from fedspine.nets.load import empty, load
from fedspine.nets.net import NetModel
from fedspine.runs.read_data import dataset
from fedspine.runs.run_dir import recipe_of
from fedspine.runs.task_record import TaskRecord, recorded

CLASSES = ("red", "green", "blue")
RECORD = TaskRecord(1, "array", CLASSES, {}, 1, None, None, "rows", {}, "net", None)
ROWS = {  # net, shape of a row, dtype
    "sounds": ("cnn-s", (8300,), np.float32),
    "pictures": ("alexnet-small", (9, 8, 3), np.uint8),  # channels last
}


def rows_of(shape, type, seed=0, count=40):
    rng = np.random.default_rng(seed)
    if type == np.uint8:
        x = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    else:
        x = rng.normal(5, 3, (count, *shape)).astype(np.float32)
    return ArrayRows(x, rng.integers(0, 3, count), {})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function that gives the folder of one of ROWS, its data and the parity."""
    root, made = tmp_path_factory.mktemp("nets"), {}

    def folder(name):
        if name not in made:
            made[name] = make(root / name, *ROWS[name])
        return made[name]

    return folder


def make(folder, net, shape, type):
    train, test = rows_of(shape, type), rows_of(shape, type, seed=1)
    loaded, _, read = load(net, (train.x, train.labels), (test.x, test.labels), classes=3)
    model = NetModel(net=net, weights=loaded.start(np.random.default_rng(0)))
    data = NetData(test, read, "rows", train.x, onnx_net._scale(net, train.x))
    with pytest.MonkeyPatch.context() as patch:  # the test of a run's export measures it
        patch.setattr(onnx_net.bench, "peak_memory_bytes", lambda folder: 1)
        parity = onnx_net.export(model, data, folder, name="toy", record=RECORD, quantize="none")
    return folder, data, parity


@pytest.mark.parametrize("name", ROWS)
def test_a_graph_reads_rows_as_the_data_has_them(exported, name, monkeypatch, capsys, tmp_path):
    folder, data, parity = exported(name)
    net, shape, type = ROWS[name]
    assert parity.largest_difference <= LOGITS
    assert (parity.equal_predictions, parity.rows, parity.tokens) == (1, 40, None)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    (read,) = session.get_inputs()
    assert (read.name, read.shape) == ("input", ["rows", *shape])
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata == {
        "name": "toy",
        "task": "array",
        "net": net,
        "labels": json.dumps(CLASSES),
        "input_shape": json.dumps(shape),
        "input_type": np.dtype(type).name,
    }
    # the lines in its README.md run it
    np.save(tmp_path / "rows.npy", data.raw.x[:3])
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.setattr(sys, "argv", ["x", str(folder), str(tmp_path / "rows.npy")])
    exec(code, {})
    (logits,) = session.run(["logits"], {"input": data.raw.x[:3]})
    assert capsys.readouterr().out.split() == [CLASSES[row] for row in logits.argmax(1)]


@pytest.mark.parametrize("how", ["fp16", "int8", "int8-static"])
def test_smaller_numbers(exported, tmp_path, how):
    folder, data, _ = exported("pictures")
    smaller = shutil.copytree(folder, tmp_path / how) / "model.onnx"
    onnx_numbers.quantise(smaller, how, [{"input": data.calibration}])
    found = [Graph(path).logits({"input": data.raw.x}) for path in (folder / "model.onnx", smaller)]
    if how == "fp16":  # half a unit in the last of 11 bits, for inputs and weights of eight layers
        apart, size = (np.sqrt((part**2).mean()) for part in (found[0] - found[1], found[0]))
        assert 0 < apart < 2.0**-11 * np.sqrt(2 * 8) * size
    else:  # rows differ as before; how much rounding shows depends on what was learnt
        assert not np.array_equal(*found)
        assert np.corrcoef(*((part - part.mean(0)).ravel() for part in found))[0, 1] > 0.9
    bytes = [path.stat().st_size for path in (folder / "model.onnx", smaller)]
    # layers in int8 keep their biases in fp32, and the graph its names
    assert bytes[1] < (0.55 if how == "fp16" else 0.35) * bytes[0]


def test_predictions_are_those_of_the_net(exported):
    folder, data, _ = exported("pictures")
    net, rows = load_model(folder), data.raw
    logits = Graph(folder / "model.onnx").logits({"input": rows.x})
    found = predict(net, rows.x)
    assert [one.label for one in found] == [CLASSES[row] for row in logits.argmax(1)]
    likeliest = np.exp(logits - logits.max(1, keepdims=True))
    expected = 1 / likeliest.sum(1)  # in batches of 32 sums have another order
    trained = list(empty(*ROWS["pictures"][:2], 3).parameters())
    off = rounding(sum(weight[0].numel() for weight in trained if weight.dim() > 1))
    assert [one.probability for one in found] == pytest.approx(expected.tolist(), rel=off)
    assert (net.kind, net.labels, net.runtime) == ("array", CLASSES, "ONNX Runtime")
    assert net.parameters == sum(tensor.numel() for tensor in trained)
    with pytest.raises(BadInput, match="holds float32 rows of shape .*, but uint8 of shape"):
        predict(net, rows.x.astype(np.float32))


def test_a_report_says_what_the_graph_takes_in_fp32(exported):
    """Dynamic int8 computes scales in each call, which costs nets more than it saves."""
    parity = exported("pictures")[2]
    assert parity.latency_seconds_fp32 == {} and "in fp32" not in parity.line
    took = {"latency_seconds": {1: 2e-4, 32: 9e-3}, "latency_seconds_fp32": {1: 3e-4, 32: 4e-3}}
    slow = dataclasses.replace(parity, quantize="int8", **took)
    assert slow.line.endswith(
        "; in fp32 0.3 ms and 4.0 ms, so it is slower here: take int8-static, "
        "which scales nothing in a call, or none"
    )
    assert dataclasses.replace(slow, quantize="int8-static").line.endswith(
        "; in fp32 0.3 ms and 4.0 ms"
    )


# --- from a run ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    rows = rows_of((3, 16), np.float32)
    names = np.array(["up", "down", "flat"])
    np.savez(root / "waves.npz", x=rows.x, y=rows.labels, label_names=names)
    settings = {
        "task.data": root / "waves.npz",
        "task.model": "cnn-h",
        "fleet.devices": 2,
        "fleet.per_round": 2,
        "run.rounds": 1,
        "run.workers": 1,
        "run.references": "false",
        "method.name": "fedavg",
        "method.steps": 1,
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    carried_out("run", *words, "--out", root / "run", "--json")
    return root / "run"


def test_export_of_a_run(run, tmp_path, monkeypatch, capsys):
    words = ("export", run, "--to", tmp_path / "x", "--format", "onnx", "--quantize", "int8-static")
    code, out, lines = in_process(monkeypatch, capsys, *words, "--device", "global", "--json")
    assert (code, lines) == (0, [])
    parity = json.loads(out)["parity"]
    assert (parity["rows_from"], parity["quantize"]) == ("test rows of the run", "int8-static")
    assert parity["peak_memory_bytes"] > 10_000_000
    assert set(parity["latency_seconds_fp32"]) == {"1", "32"} and "; in fp32 " in parity["line"]
    assert {file.name for file in (tmp_path / "x").iterdir()} == {
        *("README.md", "model.onnx", "parity.json")
    }


@pytest.fixture(scope="module")
def models(run):
    """The run's net in fp32 and in fp16, and one whose labels have other names."""
    folders = {how: run.parent / how for how in ("none", "fp16")}
    for how, folder in folders.items():
        export_model(run, device="global", format="onnx", to=folder, quantize=how)
    folders["other"] = shutil.copytree(folders["none"], run.parent / "other")
    graph = onnx.load(folders["other"] / "model.onnx")
    (labels,) = (one for one in graph.metadata_props if one.key == "labels")
    labels.value = json.dumps(["left", "right", "flat"])
    onnx.save(graph, folders["other"] / "model.onnx")
    return folders


def test_predict_reads_rows_from_files_and_of_the_run(run, models, tmp_path, monkeypatch, capsys):
    def asked(*words):
        words = ("predict", models["none"], *words, "--json")
        code, out, lines = in_process(monkeypatch, capsys, *words)
        assert (code, lines) == (0, [])
        return json.loads(out)

    of_run = asked("--rows", run)
    test = dataset(recipe_of(run)).test
    logits = Graph(models["none"] / "model.onnx").logits({"input": test.x})
    names = recorded(run).classes
    assert [one["label"] for one in of_run["predictions"]] == [names[i] for i in logits.argmax(1)]
    assert [one["true_label"] for one in of_run["predictions"]] == [names[i] for i in test.labels]
    assert of_run["accuracy"] == (logits.argmax(1) == test.labels).mean()
    assert asked("--rows", run, "--row", 5, "--row", 2)["predictions"] == [
        of_run["predictions"][5],
        of_run["predictions"][2],
    ]
    # all of these hold test row 3, in numbers of other widths, alone, or without its label
    np.save(tmp_path / "one.npy", test.x[3].astype(np.float64))
    np.save(tmp_path / "more.npy", test.x[3:])
    np.savez(tmp_path / "bare.npz", x=test.x[3:])
    np.savez(tmp_path / "partly.npz", x=test.x[3:6], y=np.array(["", names[1], names[2]]))
    for name in ("one.npy", "more.npy", "bare.npz", "partly.npz"):
        first = asked("--rows", tmp_path / name)["predictions"][0]
        assert first == of_run["predictions"][3] | {"row": 0, "true_label": None, **near(first)}
    assert asked("--rows", tmp_path / "partly.npz")["predictions"][2]["true_label"] == names[2]


def near(one):
    """A probability may differ in its last bits, since rows are computed in other batches."""
    return {"probability": pytest.approx(one["probability"], rel=1e-5)}


def test_formats_of_a_net_are_compared_on_the_runs_rows(run, models, monkeypatch, capsys):
    monkeypatch.setattr(bench, "peak_memory_bytes", lambda *_, **__: 1)
    words = ("bench", models["none"], models["fp16"], "--rows", run)
    code, out, _ = in_process(monkeypatch, capsys, *words, "--json")
    assert code == 0
    whole, half = json.loads(out)["models"]
    assert [one["quantize"] for one in (whole, half)] == ["none", "fp16"]
    assert whole["same_rows"]["rows_from"] == "test rows of run" and whole["tokens"] is None
    parity = json.loads((models["none"] / "parity.json").read_text())
    assert whole["same_rows"]["accuracy"] == parity["accuracy"]
    assert half["same_rows"]["equal_predictions"] == 1  # 8 rows
    # weights of 2 bytes instead of 4; a tenth is room for the graph and its names
    assert half["file_bytes"] < 0.6 * whole["file_bytes"] and not whole["block_parameters"]
    assert set(half["latency_seconds"]) == {"1", "32"}
    code, out, _ = in_process(monkeypatch, capsys, *words)
    assert code == 0 and "fp16" in out and "run by" not in out
    code, out, _ = in_process(monkeypatch, capsys, *words[:2], "--against", words[2])
    assert code == 0 and "weight file" in out and "weights in the blocks" not in out


def test_what_predict_and_bench_refuse_of_a_net(run, models, tmp_path, monkeypatch, capsys):
    place, other = models["none"], models["other"]
    np.save(tmp_path / "short.npy", np.zeros((2, 3, 12), np.float32))
    np.save(tmp_path / "bytes.npy", np.zeros((2, 3, 16), np.uint8))
    np.save(tmp_path / "none.npy", np.zeros((0, 3, 16), np.float32))
    np.save(tmp_path / "object.npy", np.array([{}], object))
    foreign = shutil.copytree(place, tmp_path / "foreign") / "model.onnx"
    graph = onnx.load(foreign)
    del graph.metadata_props[:]
    onnx.save(graph, foreign)
    rows = ("predict", place, "--rows")
    cases = {
        ("predict", place, "text"): "reads no texts; give rows with --rows FILE",
        ("predict", place): "reads no texts; give rows with --rows FILE",
        (*rows, tmp_path / "short.npy"): "holds float32 rows of shape [3, 12], but float32",
        (*rows, tmp_path / "bytes.npy"): "holds uint8 rows of shape [3, 16], but float32",
        (*rows, tmp_path / "none.npy"): "has no rows",
        (*rows, tmp_path / "object.npy"): "cannot read",
        (*rows, tmp_path / "gone.npy"): "found nothing there; name an .npy or .npz file",
        (*rows, run, "--row", "8"): "has 8 rows, numbered from 0 to 7",
        ("predict", other, "--rows", run): "of another task than the model",
        ("predict", foreign.parent, "--rows", run): "not the graph of a net that `fedspine export`",
        ("bench", place, other): "expected models of one task",
        ("bench", place, "--against", other): "expected models of one task",
        ("bench", place, "--tokens", "4"): "whose rows have one shape; leave --tokens out",
        ("bench", tmp_path): "has no config.json, so it is not an exported model",
    }
    for words, why in cases.items():
        code, out, (line,) = in_process(monkeypatch, capsys, *words)
        assert (code, out) == (2, ""), words
        assert why in line


def test_refusals(run, tmp_path, monkeypatch, capsys):
    other = rows_of((3, 12), np.float32)
    np.savez(tmp_path / "short.npz", x=other.x, y=other.labels)
    like = rows_of((3, 16), np.float32)
    np.savez(tmp_path / "named.npz", x=like.x, y=like.labels)
    cases = {
        (
            "--format",
            "hf",
        ): "a net on arrays, which --format hf does not support; use --format onnx",
        ("--format", "gguf"): "which --format gguf does not support",
        ("--format", "onnx", "--base", "x"): "has no base; leave --base out",
        ("--format", "onnx", "--device", "x"): "unknown device 'x'",
        ("--format", "onnx", "--quantize", "int9"): "did you mean 'int8'",
        (
            "--format",
            "onnx",
            "--rows",
            tmp_path / "short.npz",
        ): "rows of shape [3, 12], but float32",
        (
            "--format",
            "onnx",
            "--rows",
            tmp_path / "named.npz",
        ): "has the class '0', which the model",
        ("--format", "onnx", "--rows", tmp_path / "gone.npz"): "found nothing there",
    }
    for words, why in cases.items():
        words = ("export", run, "--to", tmp_path / "new" / "model", *words)
        code, out, (line,) = in_process(monkeypatch, capsys, *words)
        assert (code, out) == (2, "")
        assert why in line
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("end", [KeyboardInterrupt, BadInput("outside"), OSError("full")])
def test_an_export_that_ends_early_leaves_nothing(exported, tmp_path, monkeypatch, end):
    _, data, _ = exported("pictures")

    def parity(*_):
        raise end

    monkeypatch.setattr(onnx_net, "_parity", parity)
    net, shape, _ = ROWS["pictures"]
    model = NetModel(net=net, weights=empty(net, shape, 3).state_dict())
    (tmp_path / "kept").mkdir()
    with pytest.raises((KeyboardInterrupt, BadInput)):
        onnx_net.export(
            model, data, tmp_path / "kept" / "a" / "b", name="x", record=RECORD, quantize="none"
        )
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]


def test_fit_takes_nets(run, monkeypatch, capsys):
    """Predicted, and with the size of the graph as memory, so that nothing is timed."""
    opened = []
    monkeypatch.setattr(fit, "peak_memory_bytes", lambda place, **_: weight_bytes(place))
    real = onnx_net.data_of
    monkeypatch.setattr(onnx_net, "data_of", lambda *a: opened.append(a) or real(*a))
    words = ("fit", run, "--device-kind", "tx2", "--memory", "1MB", "--json")
    code, out, lines = in_process(monkeypatch, capsys, *words)
    found = json.loads(out)
    assert (code, lines, len(opened)) == (0, [], 1)
    by_numbers = {one["quantize"]: one for one in found["candidates"]}
    assert {"none", "fp16"} <= {*by_numbers} and found["tokens"] is None
    parity = onnx_net.data_of(recipe_of(run), recorded(run), None)
    assert found["rows"] == len(parity.raw)
    for one in found["candidates"]:
        assert one["alike"] == 4 and one["predicted"]  # two devices, global and dense
    # CNN-H on [3, 16]: products of its layers, twice each, at 30 % of 0.87 TFLOPS, fp32 at half of
    # it, and half of 1/120 s for each of its blocks
    with FlopCounterMode(display=False) as counter:
        blocks = empty("cnn-h", (3, 16), 3)
        blocks.eval()(torch.zeros(1, 3, 16))
    expected = 2 * counter.get_total_flops() / (0.3 * 0.87e12) + len(blocks) / 240
    assert by_numbers["none"]["latency_seconds"] == pytest.approx(expected)
    assert "is a net on arrays" in found["refused"]["run as hf"]
    code, out, (line,) = in_process(monkeypatch, capsys, *words[:5], "1kB")
    assert code == 2 and "nothing fits 0.001 MB at batch 1; nearest is" in line


def test_a_net_needs_its_training_rows(run, tmp_path):
    recipe, record = recipe_of(run), recorded(run)
    assert len(onnx_net.data_of(recipe, record, None).raw) == 8
    assert len(onnx_net.data_of(recipe, record, recipe.task.data).raw) == 40
    others = rows_of((3, 16), np.float32, seed=3)
    np.savez(tmp_path / "others.npz", x=others.x, y=others.labels)
    for place, why in (("others.npz", "has changed since"), ("gone.npz", "are not available")):
        task = recipe.task.model_copy(update={"data": str(tmp_path / place)})
        with pytest.raises(BadInput, match=why):
            onnx_net.data_of(dataclasses.replace(recipe, task=task), record, None)
