"""ONNX graphs of language models: one step per token with a key/value cache, quantised weights,
and the chat example without fedspine.
"""

import dataclasses
import json
import math
import re
import shutil
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from places import ROOT
from runs import python
from tiny_models import load, model_on
from tolerances import CERTAIN, FP16, LOGITS, TINY

from fedspine.core.errors import BadInput
from fedspine.data.dataset import Rows
from fedspine.exports import bench, decoder_parity, of_run, onnx, onnx_decoder, onnx_numbers
from fedspine.exports.hf import export, load_model, predict
from fedspine.exports.onnx_graph import Graph
from fedspine.exports.predict import answered
from fedspine.lm.decoding import Decoding, written
from fedspine.lm.encode import encode
from fedspine.lm.tiny import VOCABULARY, write_tiny

EXAMPLE = ROOT / "examples" / "onnx-chat" / "chat.py"
HEADS, CHANNELS, WINDOW = (2, 1), (64, 30), 5
TEMPLATE = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
WORDS = VOCABULARY[4:40]
LABELS = ("red", "green", "blue")


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(" ".join(rng.choice(WORDS, rng.integers(1, 50))) for _ in range(count))


def merged(root, architecture, layers, *, kind="causal-lm", **changed):
    """The folder that an export starts from, and encoded rows."""
    labels = () if kind == "causal-lm" else LABELS
    place = str(write_tiny(root / "tiny", architecture, layers=layers))
    base, tokenizer = load(place, kind=kind, classes=3)
    for name, value in changed.items():
        setattr(base.config, name, value)
    tokenizer.chat_template = TEMPLATE
    model = model_on(base, list(HEADS[:layers]), list(CHANNELS[:layers]))
    about = {"labels": labels, "kind": kind, "chat": not labels}
    source = export(base, model, tokenizer, root / "hf", max_tokens=32, name="toy", **about)
    return source, encode(tokenizer, Rows(texts(12), None, None, {}), kind, 32, scored=True)


@pytest.fixture(scope="module", autouse=True)
def _no_process_for_memory():
    """test_onnx.py measures the memory of a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "peak_memory_bytes", lambda folder, tokens: 1)
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folders of a Mistral with a window and different widths in each layer, and the parity."""
    root = tmp_path_factory.mktemp("decoder")
    source, examples = merged(root, "mistral", 2, sliding_window=WINDOW)
    parity = onnx_decoder.export(source, root / "onnx", examples=examples, rows_from="texts")
    return source, root / "onnx", parity, examples


def test_the_graph_gives_the_logits(exported):
    source, folder, parity, examples = exported
    assert parity.largest_difference <= LOGITS
    assert parity.largest_logit < decoder_parity.LARGE
    assert (parity.equal_tokens, parity.equal_continuations) == (1, 1)
    assert (parity.rows, parity.tokens_compared) == (len(examples), int(examples.lengths.sum()))
    # e to the mean loss, so its relative error is the loss's own
    loss = math.log(parity.perplexity_before)
    assert parity.perplexity == pytest.approx(parity.perplexity_before, rel=TINY * loss)
    assert json.loads((folder / "parity.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(parity))
    )
    assert {file.name for file in folder.iterdir()} == {
        *("README.md", "chat_template.jinja", "config.json", "generation_config.json"),
        *("model.onnx", "parity.json", "tokenizer.json", "tokenizer_config.json"),
    }
    ours, theirs = load_model(source), load_model(folder)
    assert theirs == dataclasses.replace(ours, module=theirs.module, tokenizer=theirs.tokenizer)


def test_names_and_free_dimensions(exported):
    session = onnxruntime.InferenceSession(str(exported[1] / "model.onnx"))
    parts = [(i, part) for i in range(2) for part in ("key", "value")]
    assert {one.name: one.shape for one in session.get_inputs()} == {
        "input_ids": ["rows", "tokens"],
        "attention_mask": ["rows", "past + tokens"],
    } | {f"past_key_values.{i}.{part}": ["rows", HEADS[i], "past", 8] for i, part in parts}
    assert {one.name: one.shape for one in session.get_outputs()} == {
        "logits": ["rows", "tokens", len(VOCABULARY)]
    } | {f"present.{i}.{part}": ["rows", HEADS[i], "past + tokens", 8] for i, part in parts}
    assert session.get_modelmeta().custom_metadata_map["task"] == "causal-lm"


def test_one_token_at_a_time_behind_padding(exported):
    """Rows of unequal length, left-padded, as when several are continued."""
    source, folder, _, _ = exported
    ids = torch.from_numpy(np.random.default_rng(0).integers(4, 40, (3, 12)))
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :2] = 0, 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.inference_mode():
        module = load_model(source).module
        expected = module(input_ids=ids, attention_mask=mask, position_ids=places).logits
    graph, cache, found = load_model(folder).module, None, []
    for step in range(ids.shape[1]):
        out = graph(ids[:, step : step + 1], mask[:, : step + 1], cache)
        cache, found = out.past_key_values, [*found, out.logits]
    inside = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[inside], expected[inside], atol=TINY, rtol=TINY)


def test_it_writes_what_the_model_writes(exported):
    source, folder, _, _ = exported
    ours, theirs = load_model(source), load_model(folder)
    for settings in ({}, {"temperature": 1.0, "seed": 3}):
        both = [predict(one, texts(3, seed=1), new_tokens=12, **settings) for one in (ours, theirs)]
        assert both[0] == both[1]


@pytest.mark.parametrize(("how", "bytes_each"), [("fp16", 2), ("int8", 1), ("int8-static", 1)])
def test_smaller_numbers(exported, tmp_path, how, bytes_each):
    _, folder, _, examples = exported
    smaller = shutil.copytree(folder, tmp_path / how)
    feeds = onnx.calibration_feeds(smaller / "model.onnx", examples)
    onnx_numbers.quantise(smaller / "model.onnx", how, feeds)
    before, after = load_model(folder), load_model(smaller)
    ids = torch.from_numpy(np.random.default_rng(0).integers(4, 40, (2, 9)))
    whole, rounded = before.module(ids), after.module(ids)
    # weights and inputs of the 13 products that a token goes through are rounded independently: by
    # half a unit of 11 bits, or by half a step of 255 over a range of eight deviations. The eight
    # are assumed, with room for other processors: int8 was off by at most 0.057 on one.
    share = (FP16 if how == "fp16" else 8 / 255 / 2) * (2 * 13) ** 0.5
    off = (rounded.logits - whole.logits).square().mean().sqrt() / whole.logits.std()
    assert 0 < off < share
    half = rounded.past_key_values.layers[0].keys.dtype is torch.float16
    assert half == (how == "fp16")
    assert len(predict(after, ["good"], new_tokens=4)) == 1
    size = [(place / "model.onnx").stat().st_size for place in (folder, smaller)]
    assert size[0] - size[1] > (4 - bytes_each) * before.block_parameters


def test_an_angle_keeps_its_fraction_in_fp16(exported, tmp_path):
    """The angle of token 4000 would be up to 1 off in fp16, which has 11 bits."""
    _, folder, _, _ = exported
    smaller = shutil.copytree(folder, tmp_path / "fp16")
    onnx_numbers.quantise(smaller / "model.onnx", "fp16")
    rng, past = np.random.default_rng(0), 4001
    inputs = {
        "input_ids": np.array([[7, 8, 9, 10]]),
        "attention_mask": np.ones((1, past + 4), np.int64),
    } | {
        f"past_key_values.{i}.{part}": rng.normal(size=(1, heads, past, 8)).astype(np.float16)
        for i, heads in enumerate(HEADS)
        for part in ("key", "value")
    }
    found = []
    for place, type in ((folder, np.float32), (smaller, np.float16)):
        caches = {name: one.astype(type) for name, one in inputs.items() if name.startswith("past")}
        found.append(Graph(place / "model.onnx").logits(inputs | caches))
    # weights and inputs of the 13 products that a token goes through are rounded to fp16
    assert np.abs(found[0] - found[1]).max() < CERTAIN * math.sqrt(2 * 13) * FP16 * found[0].std()


def test_the_tolerance(exported):
    good = exported[2]
    far = dataclasses.replace(good, largest_difference=2e-4)
    nan = dataclasses.replace(good, largest_difference=float("nan"))
    few = dataclasses.replace(good, equal_tokens=0.99)
    for one, why in ((far, "off by 0.0002"), (nan, "off by nan"), (few, "99.0% of the greedy")):
        with pytest.raises(BadInput, match=why):
            one.check()
    near = dataclasses.replace(few, quantize="int8", perplexity=1.04 * good.perplexity_before)
    large = dataclasses.replace(far, largest_logit=30.0)
    for one in (good, large, dataclasses.replace(far, quantize="int8"), near):
        one.check()
    worse = dataclasses.replace(near, perplexity=1.06 * good.perplexity_before)
    for one in (worse, dataclasses.replace(near, relative_difference=float("nan"))):
        with pytest.raises(BadInput, match=r"the int8 model has 99\.0% of the greedy tokens equal"):
            one.check()
    assert "ms for a new token" in good.line


# --- on a device ---


def test_the_example_chats(exported):
    source, folder, _, _ = exported
    lines = texts(2, seed=5)
    done = python(EXAMPLE, folder, input="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    messages, loaded = [], load_model(source)
    for line in lines:
        messages.append(("user", line))
        turn = answered(loaded, messages, Decoding(40))
        messages.append(("assistant", turn.answer))
    found = done.stdout.splitlines()
    # the example's limit of an answer is longer than this model's context
    assert [one[: len(answer)] for one, (_, answer) in zip(found, messages[1::2], strict=True)] == [
        answer for _, answer in messages[1::2]
    ]
    assert "import fedspine" not in EXAMPLE.read_text()


def test_the_readme_continues_a_text(exported, monkeypatch, capsys):
    source, folder, _, _ = exported
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.setattr(sys, "argv", ["x", str(folder), "good and bad"])
    exec(code, {})
    loaded = load_model(source)
    prompt = loaded.tokenizer("good and bad")["input_ids"]
    (new,) = written(loaded.module, [prompt], Decoding(40), ends=[3], padding=0)
    expected = loaded.tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == expected


# --- other models ---


def test_heads_wider_than_their_share(tmp_path):
    source, examples = merged(tmp_path, "qwen3", 1)
    parity = onnx_decoder.export(source, tmp_path / "x", examples=examples, rows_from="texts")
    assert parity.largest_difference <= LOGITS


def test_a_classifier_on_a_decoder(tmp_path):
    source, examples = merged(tmp_path, "qwen2", 1, kind="classification")
    parity = onnx.export(source, tmp_path / "x", examples=examples, rows_from="texts")
    assert (parity.equal_predictions, parity.rows) == (1, 12)
    rows = texts(3, seed=2)
    labels = [
        [one.label for one in predict(load_model(place), rows)]
        for place in (source, tmp_path / "x")
    ]
    assert labels[0] == labels[1]


def test_a_language_model_goes_to_its_exporter():
    assert of_run._other_runtime("onnx", "causal-lm") is onnx_decoder
    assert of_run._other_runtime("onnx", "pair") is onnx
