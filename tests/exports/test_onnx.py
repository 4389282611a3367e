"""ONNX folders: the logits of the PyTorch model, quantised weights, a device without fedspine, and
every refusal.
"""

import dataclasses
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx as onnx_module
import onnxruntime
import pytest
import torch
from places import ROOT
from runs import carried_out, in_process, python, tiny_job, write_csv
from tiny_models import LABELS, load, model_on
from tolerances import FP16, LOGITS, TINY
from transformers import AutoTokenizer

from fedspine.core.errors import BadInput
from fedspine.data.dataset import Rows
from fedspine.exports import bench as bench_module
from fedspine.exports import onnx, onnx_graph, onnx_numbers
from fedspine.exports.bench import bench
from fedspine.exports.hf import export, load_model, predict
from fedspine.exports.of_run import QUANTISATIONS
from fedspine.exports.parity_rows import calibration_rows, parity_rows
from fedspine.lm.encode import encode
from fedspine.lm.tiny import VOCABULARY, write_tiny
from fedspine.runs.run_dir import recipe_of
from fedspine.runs.task_record import base_of, recorded

EXAMPLE = ROOT / "examples" / "onnx-classify" / "classify.py"
MODELS = {  # architecture, readout, kind; all with different widths in each layer
    "bert": ("bert", "cls", "classification"),
    "bert pairs": ("bert", "mean", "pair"),
    "pairs apart": ("bert", "bi-encoder", "pair"),
    "roberta": ("roberta", "cls", "classification"),
    "distilbert": ("distilbert", "mean", "classification"),
}


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(" ".join(rng.choice(VOCABULARY[4:40], rng.integers(1, 90))) for _ in range(count))


def rows_of(kind, count=48):
    return Rows(texts(count), texts(count, seed=1) if kind == "pair" else None, None, {})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function that gives the folders of one of MODELS, as hf and as onnx, and the parity."""
    root, made = tmp_path_factory.mktemp("onnx"), {}

    def folders(name):
        if name not in made:
            made[name] = make(root / name.replace(" ", "-"), *MODELS[name])
        return made[name]

    return folders


def make(root, architecture, pooling, kind):
    place = str(write_tiny(root / "tiny", architecture))
    base, tokenizer = load(place, kind=kind, classes=3, pooling=pooling)
    model, about = model_on(base, [4, 2], [24, 30]), {"labels": LABELS, "kind": kind}
    stock = export(base, model, tokenizer, root / "hf", max_tokens=64, name="toy", **about)
    examples = encode(tokenizer, rows_of(kind), kind, 64, bi_encoder=pooling == "bi-encoder")
    with pytest.MonkeyPatch.context() as patch:  # tests of exports of a run measure it
        patch.setattr(bench_module, "peak_memory_bytes", lambda folder, tokens: 1)
        parity = onnx.export(stock, root / "onnx", examples=examples, rows_from="texts")
    return stock, root / "onnx", parity


def inputs_of(tokenizer, rows, kind, bi_encoder=False):
    inputs = encode(tokenizer, rows, kind, 64, bi_encoder=bi_encoder).batch(range(len(rows)))
    del inputs["labels"]  # these rows have none
    return inputs


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_gives_the_logits(exported, name):
    stock, folder, parity = exported(name)
    assert parity.largest_difference <= LOGITS
    assert (parity.equal_predictions, parity.rows) == (1, 48)
    written = json.loads((folder / "parity.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(parity)))
    ours, theirs = load_model(stock), load_model(folder)
    assert theirs == dataclasses.replace(ours, module=theirs.module, tokenizer=theirs.tokenizer)
    # numbers of rows and tokens other than the traced ones, padded and not
    for count in (1, 5):
        rows = rows_of(ours.kind, count)
        inputs = inputs_of(ours.tokenizer, rows, ours.kind, ours.bi_encoder)
        with torch.inference_mode():
            expected = ours.module(**inputs).logits
        found = theirs.module(**inputs).logits
        torch.testing.assert_close(found, expected, atol=TINY, rtol=TINY)
    assert predict(theirs, rows.texts, rows.pairs) == [
        dataclasses.replace(one, probability=pytest.approx(one.probability, abs=TINY))
        for one in predict(ours, rows.texts, rows.pairs)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_the_runtime_finds_no_slow_kernel_to_use(exported, name, tmp_path):
    stock, folder, _ = exported(name)
    attends = load_model(stock).module.config._attn_implementation
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    kinds = {node.op_type for node in onnx_module.load(tmp_path / "optimised.onnx").graph.node}
    # both take longer than what they stand for: benchmarks/results/onnx.md
    assert not kinds & {"SkipLayerNormalization", "IsNaN"} and "LayerNormalization" in kinds
    loaded = load_model(stock).module
    onnx.write_graph(loaded, tmp_path / "again.onnx", segments=MODELS[name][2] == "pair")
    assert loaded.config._attn_implementation == attends != "eager"


def test_a_graph_tells_nothing_of_the_machine_that_wrote_it(exported):
    _, folder, _ = exported("bert")
    for file in folder.iterdir():
        assert b".py" not in file.read_bytes() or file.name == "README.md", file
        assert str(folder.parent).encode() not in file.read_bytes(), file


@pytest.mark.parametrize(("how", "bytes_each"), [("fp16", 2), ("int8", 1), ("int8-static", 1)])
def test_smaller_numbers(exported, tmp_path, how, bytes_each):
    _, folder, _ = exported("distilbert")
    smaller = shutil.copytree(folder, tmp_path / how)
    rows = encode(load_model(folder).tokenizer, rows_of("classification"), "classification", 64)
    feeds = onnx.calibration_feeds(smaller / "model.onnx", rows)
    onnx_numbers.quantise(smaller / "model.onnx", how, feeds)
    before, after = load_model(folder), load_model(smaller)
    inputs = inputs_of(before.tokenizer, rows_of("classification", 8), "classification")
    whole, rounded = before.module(**inputs).logits, after.module(**inputs).logits
    # weights and inputs of the 14 products that a row goes through are rounded independently: by
    # half a unit of 11 bits, or by half a step of 255 over a range of eight deviations. The eight
    # are assumed, with room for other processors: int8 was off by at most 0.014 on one.
    share = (FP16 if how == "fp16" else 8 / 255 / 2) * (2 * 14) ** 0.5
    apart = (rounded - whole).square().mean().sqrt() / whole.square().mean().sqrt()
    assert 0 < apart < share
    size = [(place / "model.onnx").stat().st_size for place in (folder, smaller)]
    # the file is smaller by at least the pruned weights of the blocks
    assert size[0] - size[1] > (4 - bytes_each) * before.block_parameters
    assert set(QUANTISATIONS["onnx"]) == set(onnx_numbers.QUANTISERS)


def test_what_cannot_be_calibrated_is_reported(exported, tmp_path):
    _, folder, _ = exported("distilbert")
    graph = Path(shutil.copy(folder / "model.onnx", tmp_path))
    with pytest.raises(
        BadInput, match="needs calibration rows, and there are none; use --quantize int8"
    ):
        onnx_numbers.quantise(graph, "int8-static")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BadInput, match=r"cannot convert this graph to int8 \("):
        onnx_numbers.quantise(graph, "int8")


def test_a_graph_outside_its_tolerance_is_refused(exported, tmp_path, monkeypatch):
    stock, _, _ = exported("bert")
    _, other, _ = exported("distilbert")

    def wrong(module, path, signature, facts):
        shutil.copyfile(other / "model.onnx", path)

    monkeypatch.setattr(onnx_graph, "write", wrong)
    tokenizer = AutoTokenizer.from_pretrained(stock)
    options = {"examples": encode(tokenizer, rows_of("classification"), "classification", 64)}
    with pytest.raises(BadInput, match=r"in a logit, more than the 0\.0001 allowed, on 48 rows"):
        onnx.export(stock, tmp_path / "x", rows_from="texts", **options)
    with pytest.raises(BadInput, match=r"of 48 rows \(texts\); 99\.5%, or at most 0\.5 points"):
        onnx.export(stock, tmp_path / "x", rows_from="texts", quantize="int8", **options)
    with pytest.raises(BadInput, match="exists already"):
        onnx.export(stock, stock, rows_from="texts", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_tolerance(exported):
    _, _, good = exported("bert")
    nan = dataclasses.replace(good, largest_difference=float("nan"))
    with pytest.raises(BadInput, match="off by nan in a logit"):
        nan.check()
    int8 = dataclasses.replace(good, quantize="int8", largest_difference=1.0)
    few = dataclasses.replace(int8, equal_predictions=0.99)
    as_right = dataclasses.replace(few, accuracy=0.746, accuracy_before=0.748)
    for one in (good, int8, as_right):
        one.check()
    assert "accuracy 74.6% (before: 74.8%)" in as_right.line
    for one in (few, dataclasses.replace(as_right, accuracy=0.74)):
        with pytest.raises(BadInput, match=r"predicts the same for 99\.0% of 48 rows"):
            one.check()


def test_a_damaged_graph_is_refused(exported, tmp_path):
    _, folder, _ = exported("bert")
    torn = shutil.copytree(folder, tmp_path / "torn")
    graph = torn / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(BadInput, match="export the model again"):
        load_model(torn)


def code_of(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def test_a_device_needs_no_fedspine(exported):
    _, folder, _ = exported("roberta")
    rows = texts(3, seed=2)
    done = python(EXAMPLE, folder, *rows)
    assert done.returncode == 0, done.stderr
    answers = zip(predict_in(folder, rows), rows, strict=True)
    assert done.stdout.splitlines() == [f"{one.label}\t{text}" for one, text in answers]
    assert EXAMPLE.read_text().endswith(code_of(folder))
    assert "import fedspine" not in EXAMPLE.read_text()


def predict_in(folder, rows, pairs=None):
    return predict(load_model(folder), rows, pairs)


@pytest.mark.parametrize("name", ["bert pairs", "pairs apart"])
def test_the_readme_of_a_model_of_pairs(exported, monkeypatch, capsys, name):
    _, folder, _ = exported(name)
    rows, pairs = texts(4, seed=3), texts(4, seed=4)
    both = [text for pair in zip(rows, pairs, strict=True) for text in pair]
    monkeypatch.setattr(sys, "argv", ["x", str(folder), *both])
    exec(code_of(folder), {})
    found = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert found == [one.label for one in predict_in(folder, rows, pairs)]


def test_bench_takes_a_graph(exported):
    stock, folder, _ = exported("bert")
    found = bench(folder, tokens=8, repeats=1)
    assert found.file_bytes == (folder / "model.onnx").stat().st_size
    assert found.parameters == load_model(stock).parameters
    assert set(found.latency_seconds) == {1, 32}
    assert found.peak_memory_bytes > found.file_bytes


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "fedspine.exports.onnx_graph")
    with pytest.raises(BadInput, match=re.escape("pip install 'fedspine[onnx]'")):
        importlib.import_module("fedspine.exports.onnx_graph").check_installed()


# --- from a run ---


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """A run of the tiny job, and its data."""
    root = tmp_path_factory.mktemp("run")
    data = write_csv(root / "rows.csv")
    job = tiny_job(tiny_folder("bert"), data, method__steps=20, method__learning_rate=1e-2)
    carried_out("run", *job, "--out", root / "run", "--json")
    return root / "run", data


@pytest.mark.parametrize("quantize", ["none", "int8-static"])
def test_export_of_a_run(run, tmp_path, monkeypatch, capsys, quantize):
    def command(*words):
        code, out, lines = in_process(monkeypatch, capsys, *words)
        assert (code, lines) == (0, [])
        return out

    to, options = tmp_path / "model", ("--device", "nx-01")
    words = ("export", run[0], *options, "--to", to, "--format", "onnx", "--quantize", quantize)
    out = command(*words)
    assert "parity on 16 rows (test rows of the run): logits within" in out
    parity = json.loads((to / "parity.json").read_text())
    assert (parity["quantize"], parity["equal_predictions"]) == (quantize, 1)
    assert parity["peak_memory_bytes"] > parity["bytes"]
    command("export", run[0], *options, "--to", tmp_path / "hf", "--no-parity", "--json")
    answers = [
        [one["label"] for one in json.loads(command(*words, "--json"))["predictions"]]
        for words in (("predict", place, *TEXTS) for place in (to, tmp_path / "hf"))
    ]
    assert answers[0] == answers[1]
    assert {file.name for file in to.iterdir()} == {
        *("README.md", "config.json", "model.onnx", "parity.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


TEXTS = ("good the very", "bad not small")


def test_a_classifier_on_a_decoder_is_no_gguf_file(tiny_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    data = write_csv(tmp_path / "rows.csv")
    job = tiny_job(tiny_folder("llama"), data, run__rounds=1, fleet__per_round=1)
    carried_out("run", *job, "--out", tmp_path / "run", "--json")
    words = ("export", tmp_path / "run", "--to", tmp_path / "model", "--format", "gguf")
    code, out, (line,) = in_process(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert "this llama was tuned as a classifier; use --format hf, --format onnx" in line
    assert not (tmp_path / "model").exists()


def test_an_encoder_is_no_gguf_file(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    words = ("export", run[0], "--to", tmp_path / "model", "--format", "gguf")
    code, out, (line,) = in_process(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert "bert is an encoder; use --format hf, --format onnx or --format peft" in line
    assert not (tmp_path / "model").exists()


def test_rows_to_compare_on(run, tmp_path):
    folder, data = run
    recipe, record = recipe_of(folder), recorded(folder)
    tokenizer = AutoTokenizer.from_pretrained(base_of(folder))

    def found(recipe, place=None):
        examples, rows_from = parity_rows(recipe, record, tokenizer, place, onnx.ROWS)
        return len(examples), rows_from

    assert found(recipe) == (16, "test rows of the run")
    assert found(recipe, str(data)) == (80, "rows of rows.csv")
    more = write_csv(tmp_path / "more.csv", rows=2000)
    assert found(recipe, str(more)) == (1000, "rows of more.csv")
    for other in (more, tmp_path / "gone.csv"):  # other test rows, and none
        task = recipe.task.model_copy(update={"data": str(other)})
        count, rows_from = found(dataclasses.replace(recipe, task=task))
        assert (count, rows_from.split(",")[0]) == (64, "random words")
    with pytest.raises(BadInput, match="gone.csv"):
        found(recipe, str(tmp_path / "gone.csv"))


def test_rows_to_calibrate_on(run, tmp_path):
    folder, _ = run
    recipe, record = recipe_of(folder), recorded(folder)
    tokenizer = AutoTokenizer.from_pretrained(base_of(folder))
    assert len(calibration_rows(recipe, record, tokenizer, 1000)) == 64
    assert len(calibration_rows(recipe, record, tokenizer, 10)) == 10
    on_devices = dataclasses.replace(record, splits={"test": record.splits["test"]})
    with pytest.raises(BadInput, match="training rows, which are on its devices; use"):
        calibration_rows(recipe, on_devices, tokenizer, 10)
    others = write_csv(tmp_path / "others.csv", rows=50)
    for place, why in ((others, "has changed since"), (tmp_path / "gone.csv", "not available")):
        task = recipe.task.model_copy(update={"data": str(place)})
        with pytest.raises(BadInput, match=why):
            calibration_rows(dataclasses.replace(recipe, task=task), record, tokenizer, 10)
