"""GGUF files of pruned decoders: the PyTorch model's weights in llama.cpp's order, its
tokenizer, and every refusal.
"""

import dataclasses
import importlib
import json
import re
import sys

import numpy as np
import pytest
import torch
from runs import carried_out, in_process, tiny_job
from tiny_models import load, model_on
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tolerances import LOGITS, TINY
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedspine.core.errors import BadInput
from fedspine.data.dataset import Rows
from fedspine.exports import gguf, gguf_file, gguf_tokenizer
from fedspine.exports.hf import export, load_model
from fedspine.exports.of_run import QUANTISATIONS
from fedspine.lm.base import Model
from fedspine.lm.encode import encode
from fedspine.lm.structure import full
from fedspine.lm.tiny import write_tiny

library = pytest.importorskip("gguf")

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TOKENS = [*SPECIAL, *(chr(code) for code in range(33, 127)), "Ġ", "Ċ", "th"]  # as many as rows
TEMPLATE = "{% for m in messages %}{{ m['content'] + '[SEP]' }}{% endfor %}"
TEXTS = ("the cat and the dog", "no", "12 birds, or 13?", "they think of this and that")
CUTS = {  # architecture, heads (with key/value heads) and channels of each layer, id in the file
    "equal": ("llama", [2, 2], [32, 32], "llama"),
    "uniform": ("llama", [1, 1], [32, 32], "llama"),
    "unequal": ("llama", [2, 1], [64, 30], "deci"),
    "mistral": ("mistral", [1, 2], [24, 24], "deci"),
    "qwen2": ("qwen2", [2, 2], [24, 24], "qwen2"),
    "qwen3": ("qwen3", [1, 1], [32, 32], "qwen3"),
}
UNFIT = ["blk.1.attn_output.weight", "blk.1.ffn_down.weight"]  # of "unequal": 16 and 30 columns


def spelt(folder):
    """Give a tiny decoder a byte-level BPE tokenizer, as Llama-type models have."""
    ids = {token: index for index, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(ids, [("t", "h")], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A function that gives the merged folder of one of CUTS, and its encoded rows."""
    root, made = tmp_path_factory.mktemp("gguf"), {}

    def folder(name):
        if name not in made:
            architecture, heads, channels, _ = CUTS[name]
            place = spelt(write_tiny(root / f"tiny-{name}", architecture))
            base, tokenizer = load(str(place), kind="causal-lm")
            model = model_on(base, heads, channels)
            about = {"labels": (), "kind": "causal-lm", "max_tokens": 32, "name": "toy"}
            made[name] = (
                export(base, model, tokenizer, root / name, **about),
                encode(tokenizer, Rows(TEXTS, None, None, {}), "causal-lm", 32, scored=True),
            )
        return made[name]

    return folder


def written(merged, name, to, **options):
    source, examples = merged(name)
    return gguf.export(source, to, examples=examples, rows_from="texts", **options)


def read(folder):
    """Fields and dequantised tensors of a file, by name."""
    reader = library.GGUFReader(folder / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: library.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "f16") for name in CUTS), ("equal", "q8_0"), ("unequal", "q8_0")],
)
def test_the_file_holds_the_model(merged, tmp_path, name, how):
    _, heads, channels, architecture = CUTS[name]
    parity = written(merged, name, tmp_path / "x", quantize=how)
    assert parity.relative_difference <= parity.allowed_difference
    assert (parity.rows, parity.tokens) == (4, int(merged(name)[1].lengths.sum()))
    # e to the mean loss, which moves by no more than logits do
    assert parity.perplexity == pytest.approx(
        parity.perplexity_before, rel=parity.allowed_difference
    )
    assert parity.architecture == architecture
    assert list(parity.stored_f16) == (UNFIT if (name, how) == ("unequal", "q8_0") else [])
    report = json.loads((tmp_path / "x" / "parity.json").read_text())
    assert report == json.loads(json.dumps(dataclasses.asdict(parity)))
    assert {file.name for file in (tmp_path / "x").iterdir()} == {
        *("model.gguf", "parity.json", "README.md", "tokenizer")
    }

    fields, tensors = read(tmp_path / "x")
    sizes = {
        "attention.head_count": [2 * kept for kept in heads],
        "attention.head_count_kv": heads,
        "feed_forward_length": channels,
    }
    for key, each in sizes.items():
        assert fields[f"{architecture}.{key}"] == (each if architecture == "deci" else each[0])
    module = load_model(merged(name)[0]).module
    for layer, block in enumerate(module.model.layers):
        query = block.self_attn.q_proj.weight.numpy()
        if architecture in ("llama", "deci"):
            half = block.self_attn.head_dim // 2
            # row i is rotated with row i + half, and llama.cpp has the two side by side
            order = [row + second for row in range(half) for second in (0, half)]
            query = query.reshape(-1, 2 * half, query.shape[-1])[:, order].reshape(query.shape)
        for part, weight in (("attn_q", query), ("ffn_down", block.mlp.down_proj.weight.numpy())):
            # half a unit in the last place; half a step, whose length is a number in F16
            error = 2.0**-11 + (1 / 254 if how == "q8_0" else 0)
            found = tensors[f"blk.{layer}.{part}.weight"]
            assert np.abs(found - weight).max() <= error * np.abs(weight).max()
    assert set(QUANTISATIONS["gguf"]) == set(gguf.STORED)
    assert set(gguf_file.FILE_TYPES) == set(gguf.ROUNDING) == set(gguf.STORED) - {"q4_k_m"}


def test_a_plain_file_is_a_model_to_tune(merged, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSPINE_CACHE", str(tmp_path / "cache"))
    parity = written(merged, "equal", tmp_path / "x")
    base, tokenizer = load(str(tmp_path / "x" / "model.gguf"), kind="causal-lm")
    assert tokenizer.chat_template == TEMPLATE
    ours = load_model(merged("equal")[0])
    text = TEXTS[0]
    ids = ours.tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer(text)["input_ids"] == ids[0].tolist()
    fitted = base.fit(Model(structure=full(base.layout), adapter={}, head={}, scale=1.0))
    with torch.inference_mode():
        found = fitted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        expected = ours.module(input_ids=ids).logits
    assert float((found - expected).abs().max()) <= 2 * parity.largest_difference


def test_the_tokenizer_is_in_the_file(merged, tmp_path):
    written(merged, "unequal", tmp_path / "x")
    fields, _ = read(tmp_path / "x")
    found = {
        name.removeprefix("tokenizer."): value
        for name, value in fields.items()
        if name.startswith("tokenizer.")
    }
    assert found == {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": TOKENS,
        "ggml.token_type": [3] * 4 + [1] * 97,
        "ggml.merges": ["t h"],
        "ggml.bos_token_id": 2,
        "ggml.eos_token_id": 3,
        "ggml.unknown_token_id": 1,
        "ggml.padding_token_id": 0,
        "ggml.add_bos_token": True,
        "ggml.add_eos_token": False,
        "chat_template": TEMPLATE,
    }
    source = merged("unequal")[0]
    tokenizer = AutoTokenizer.from_pretrained(source)
    vocabulary = gguf_tokenizer.vocabulary(source, tokenizer, len(TOKENS), chat=True)
    assert vocabulary.special == {"bos": 2, "eos": 3, "unk": 1, "pad": 0, "eot": 3}


def test_a_tokenizer_of_sentencepiece(tmp_path):
    words = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁ab"]
    description = {
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "vocab": {word: index for index, word in enumerate(words)},
            "merges": [["a", "b"], ["▁", "ab"]],
        },
        "added_tokens": [{"id": i, "content": words[i], "special": True} for i in range(3)],
        "normalizer": {"type": "Prepend", "prepend": "▁"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(description["model"]["vocab"], [])), eos_token="</s>"
    )
    found = gguf_tokenizer.vocabulary(tmp_path, fast, rows=10, chat=False)
    assert (found.model, found.pre, found.space_prefix) == ("llama", "default", True)
    assert found.tokens == (*words, "[PAD9]")
    assert found.types == (2, 3, 3, 6, 1, 1, 1, 1, 1, 5)
    # earlier merges have higher scores, and single characters the lowest
    assert found.scores == (*(-2.0,) * 7, 0.0, -1.0, -2.0)
    assert (found.merges, found.special) == ((), {"eos": 2})
    description["model"]["byte_fallback"] = False
    split = {"type": "Split", "pattern": {"Regex": "x"}}
    for steps, message in (
        (None, "kind BPE, and llama.cpp reads"),
        (
            {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]},
            "supported ones of llama.cpp .gpt-2, ",
        ),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(description | {"pre_tokenizer": steps}))
        with pytest.raises(BadInput, match=message):
            gguf_tokenizer.vocabulary(tmp_path, fast, rows=10, chat=False)


# --- refusals ---


def test_a_file_outside_its_tolerance_is_refused(merged, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="exists already"):
        written(merged, "equal", tmp_path)
    monkeypatch.setattr(gguf_file, "paired", lambda weight, head_dim: weight)
    for name in ("equal", "unequal"):
        with pytest.raises(
            BadInput, match=r"the logits of the F16 file are off by .* of their spread"
        ):
            written(merged, name, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_the_tolerance(merged, tmp_path):
    good = written(merged, "equal", tmp_path / "x")
    far = dataclasses.replace(good, relative_difference=0.5)
    for one in (good, far):  # whose greedy tokens are all equal
        one.check()
    nan = dataclasses.replace(good, relative_difference=float("nan"))
    few = dataclasses.replace(far, equal_tokens=0.99)
    for one, why in ((nan, "nan of .* 100.0%"), (few, "0.5 of .* 99.0%")):
        with pytest.raises(BadInput, match=why):
            one.check()
    assert "F16, architecture llama" in good.line


def test_what_llama_cpp_cannot_read_is_named(merged, tmp_path):
    words = write_tiny(tmp_path / "words", "llama")
    with pytest.raises(BadInput, match="kind WordPiece, and llama.cpp reads"):
        gguf_tokenizer.vocabulary(words, AutoTokenizer.from_pretrained(words), 101, chat=False)
    config = load_model(merged("equal")[0]).module.config
    unequal = gguf_file.Widths(heads=(4, 2), key_heads=(2, 1), channels=(64, 64))
    for change, message in (
        ({"model_type": "gemma"}, "GGUF supports llama, mistral, qwen2, qwen3, not gemma"),
        ({"model_type": "qwen2"}, "qwen2 only with all its heads and equally many channels in "),
        ({"attention_bias": True}, "llama has biases"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"scaled positions \(yarn\)"),
    ):
        other = type("Config", (), config.to_dict() | {"model_type": "llama"} | change)
        with pytest.raises(BadInput, match=message):
            gguf_file.id_of(other, unequal)
    equal = gguf_file.Widths(heads=(2, 2), key_heads=(1, 1), channels=(64, 64))
    with pytest.raises(BadInput, match="qwen2 only with all its heads"):
        gguf_file.id_of(type("Config", (), config.to_dict() | {"model_type": "qwen2"}), equal)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "fedspine.exports.gguf_file")
    with pytest.raises(BadInput, match=re.escape("pip install 'fedspine[gguf]'")):
        importlib.import_module("fedspine.exports.gguf_file")


# --- from a run ---


def test_export_of_a_run(tmp_path, monkeypatch, capsys):
    def command(*words):
        return in_process(monkeypatch, capsys, "export", run, "--format", "gguf", *words)

    data, run, to = tmp_path / "rows.jsonl", tmp_path / "run", tmp_path / "model"
    rows = [f"{text} {row}" for row in range(10) for text in TEXTS]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    model = spelt(write_tiny(tmp_path / "tiny", "llama"))
    job = tiny_job(model, data, task__kind="causal-lm", run__rounds=1, fleet__per_round=1)
    carried_out("run", *job, "--out", run, "--json")
    code, out, lines = command("--to", to, "--quantize", "q8_0")
    assert (code, lines) == (0, [])
    assert "(test rows of the run): logits within" in out
    parity = json.loads((to / "parity.json").read_text())
    assert (parity["quantize"], parity["architecture"]) == ("q8_0", "llama")
    code, out, _ = in_process(monkeypatch, capsys, "predict", to, "the cat")
    assert code == 0 and "continuation" in out
    # formats for PyTorch are compared, too
    for words in (("hf",), ("peft", "--with-base")):
        export = ("export", run, "--to", tmp_path / words[0], "--json", "--format", *words)
        code, out, _ = in_process(monkeypatch, capsys, *export)
        parity = json.loads(out)["parity"]
        assert code == 0 and 0 < parity["largest_difference"] < LOGITS
        assert (parity["equal_tokens"], parity["equal_continuations"]) == (1, 1)
        # e to a mean over tokens of losses near 4, in which roundings average out
        assert parity["perplexity"] == pytest.approx(parity["perplexity_before"], rel=TINY)
