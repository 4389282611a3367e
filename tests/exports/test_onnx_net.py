"""ONNX graphs of convolutional nets: rows of the data in, logits of the PyTorch net out, and
every refusal.
"""

import dataclasses
import json
import re
import shutil
import sys

import numpy as np
import onnxruntime
import pytest
from runs import carried_out, in_process

from fedspine.core.errors import BadInput
from fedspine.data.dataset import ArrayRows
from fedspine.exports import onnx_net, onnx_numbers
from fedspine.exports.load import load_model
from fedspine.exports.onnx_graph import Graph
from fedspine.exports.onnx_net import NetData
from fedspine.nets.load import load
from fedspine.nets.net import NetModel
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
    assert parity.largest_difference <= 1e-4
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


def test_loading_it_as_a_transformer_is_refused(exported):
    folder, _, _ = exported("pictures")
    with pytest.raises(BadInput, match="is a net on arrays for ONNX Runtime; run its model.onnx"):
        load_model(folder)


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
    assert {file.name for file in (tmp_path / "x").iterdir()} == {
        *("README.md", "model.onnx", "parity.json")
    }


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
        ): "rows of shape [3, 12], and the",
        ("--format", "onnx", "--rows", tmp_path / "named.npz"): "has the class '0', which the run",
        ("--format", "onnx", "--rows", tmp_path / "gone.npz"): "found nothing there",
    }
    for words, why in cases.items():
        words = ("export", run, "--to", tmp_path / "model", *words)
        code, out, (line,) = in_process(monkeypatch, capsys, *words)
        assert (code, out) == (2, "")
        assert why in line
        assert not (tmp_path / "model").exists()


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
