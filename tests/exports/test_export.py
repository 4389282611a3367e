"""Exported folders: equal logits, stock transformers where possible, predictions, and every
refusal.
"""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    KINDS,
    LABELS,
    TEXTS,
    fp32_apart,
    labels_for,
    logits,
    minilm,
    model_on,
    stories,
    tiny,
)
from tolerances import LOGITS, TINY
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fedspine.core.errors import BadInput
from fedspine.exports.hf import Continued, Labelled, export, load_model, predict
from fedspine.lm.encode import encode
from fedspine.lm.load import load as load_base
from fedspine.lm.score import score, score_module
from fedspine.lm.structure import sparsity
from fedspine.lm.tiny import write_tiny

SIZES = {  # kept heads (as a share) and channels of the two layers
    "full": ((1, 1), (64, 64)),
    "equal": ((0.5, 0.5), (24, 24)),
    "channels": ((1, 1), (24, 24)),
    "unequal": ((1, 0.5), (24, 30)),
}


def exported(folder, name, kind, size, **options):
    """A tiny model's base, tokenizer, pruned model and the folder of its export."""
    base, tokenizer = tiny(folder, name, kind)
    shares, channels = SIZES[size]
    model = model_on(base, [int(share * base.layout.heads) for share in shares], list(channels))
    out = folder / "export"
    export(
        base,
        model,
        tokenizer,
        out,
        labels=labels_for(kind),
        kind=kind,
        max_tokens=64,
        name="toy",
        **options,
    )
    return base, tokenizer, model, out


def stock(folder, kind):
    auto = AutoModelForCausalLM if kind == "causal-lm" else AutoModelForSequenceClassification
    return auto.from_pretrained(folder)


def entry(folder):
    return json.loads((folder / "config.json").read_text())["fedspine"]


def test_whoever_may_read_the_folder_may_read_its_files(tmp_path):
    before = os.umask(0o022)
    try:
        *_, folder = exported(tmp_path, "bert", "classification", "full")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_logits_come_back(tmp_path, name, kind, size):
    base, tokenizer, model, folder = exported(tmp_path, name, kind, size)
    expected = logits(base.fit(model), tokenizer)
    loaded, apart = load_model(folder), fp32_apart(base, expected)
    torch.testing.assert_close(
        logits(loaded.module, loaded.tokenizer), expected, atol=apart, rtol=0
    )
    assert loaded.sparsity == pytest.approx(sparsity(base.layout, model.structure))
    assert 1 - loaded.block_parameters / base.layout.parameters == pytest.approx(loaded.sparsity)
    assert loaded.parameters == sum(
        tensor.numel() for tensor in load_file(folder / "model.safetensors").values()
    )
    assert {
        type(layer) for layer in loaded.module.modules() if "Linear" in type(layer).__name__
    } == {torch.nn.Linear}

    # BERT-like models have no configuration for fewer heads of the same size; unequal layers have
    # none anywhere
    expressible = size in ("full", "channels") or (size == "equal" and base.layout.decoder)
    assert entry(folder)["stock"] is expressible
    if expressible:
        module, own = stock(folder, kind), AutoTokenizer.from_pretrained(folder)
        torch.testing.assert_close(logits(module, own), expected, atol=apart, rtol=0)
        if kind != "causal-lm":
            assert module.config.id2label == dict(enumerate(LABELS))
            assert module.config.label2id == {name: i for i, name in enumerate(LABELS)}
        assert "Stock transformers loads it" in (folder / "README.md").read_text()
    else:
        with pytest.raises(RuntimeError, match=r"(?i)mismatch"):
            stock(folder, kind)


def test_real_minilm_comes_back(tmp_path):
    base, tokenizer = minilm()
    model = model_on(base, [6] * 6, [768] * 6, rank=8)
    labels = tuple("abcdefgh")
    folder = export(
        base,
        model,
        tokenizer,
        tmp_path / "e",
        labels=labels,
        kind="classification",
        max_tokens=64,
        name="m",
    )
    loaded = load_model(folder)
    expected = logits(base.fit(model), tokenizer)
    torch.testing.assert_close(
        logits(loaded.module, loaded.tokenizer), expected, atol=fp32_apart(base, expected), rtol=0
    )
    assert loaded.sparsity == 0.5
    # 6 layers of 4 projections of 384 x 384 and 2 of 384 x 1536, half of it gone
    assert loaded.block_parameters == 6 * (4 * 384 * 384 + 2 * 384 * 1536) // 2


def test_real_stories_comes_back_and_writes(tmp_path):
    base, tokenizer = stories()
    model = model_on(base, [4, 3, 4, 2, 4], [172, 100, 172, 80, 172], rank=2)
    folder = export(
        base,
        model,
        tokenizer,
        tmp_path / "e",
        labels=(),
        kind="causal-lm",
        max_tokens=128,
        name="s",
    )
    loaded = load_model(folder)
    expected = logits(base.fit(model), tokenizer)
    torch.testing.assert_close(
        logits(loaded.module, loaded.tokenizer), expected, atol=LOGITS, rtol=0
    )
    untouched = model_on(base)
    untouched = type(model)(structure=untouched.structure, adapter={}, head={}, scale=1.0)
    export(
        base,
        untouched,
        tokenizer,
        tmp_path / "full",
        labels=(),
        kind="causal-lm",
        max_tokens=128,
        name="s",
    )
    (found,) = predict(load_model(tmp_path / "full"), ["Once upon a time"])
    assert found.continuation.startswith(
        ", there was a little girl named Lily. She loved to play outside"
    )


def test_tied_embeddings_are_stock(tmp_path):
    source = write_tiny(tmp_path / "tied", "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    base, tokenizer = load_base(str(source), kind="causal-lm")
    model = model_on(base, [1, 1], [24, 24])
    export(
        base,
        model,
        tokenizer,
        tmp_path / "out",
        labels=(),
        kind="causal-lm",
        max_tokens=64,
        name="toy",
    )
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored
    module = stock(tmp_path / "out", "causal-lm")
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert sum(p.numel() for p in module.parameters()) == sum(t.numel() for t in stored.values())
    assert load_model(tmp_path / "out").parameters == sum(t.numel() for t in stored.values())
    assert entry(tmp_path / "out")["stock"] is True
    expected = logits(base.fit(model), tokenizer)
    torch.testing.assert_close(
        logits(module, tokenizer), expected, atol=fp32_apart(base, expected), rtol=0
    )


def test_heads_that_do_not_divide_the_width_are_not_stock(tmp_path):
    base, tokenizer = stories()  # width 64; 3 of 4 key/value heads leave 6 query heads
    model = model_on(base, [3] * 5, [100] * 5)
    folder = export(
        base,
        model,
        tokenizer,
        tmp_path / "e",
        labels=(),
        kind="causal-lm",
        max_tokens=128,
        name="s",
    )
    assert entry(folder)["stock"] is False
    expected = logits(base.fit(model), tokenizer)
    torch.testing.assert_close(
        logits(load_model(folder).module, tokenizer), expected, atol=LOGITS, rtol=0
    )


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_generation_with_a_cache_equals_none(tmp_path, name):
    _, tokenizer, _, folder = exported(tmp_path, name, "causal-lm", "unequal")
    loaded = load_model(folder)
    ids = tokenizer(["the good model"], return_tensors="pt")["input_ids"]
    options = {
        "max_new_tokens": 20,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    cached, plain = (loaded.module.generate(ids, use_cache=use, **options) for use in (True, False))
    assert cached.tolist() == plain.tolist()
    assert cached.shape[1] > ids.shape[1]


def test_without_the_adapter(tmp_path):
    base, tokenizer, model, folder = exported(
        tmp_path, "bert", "classification", "unequal", merge=False
    )
    bare = type(model)(structure=model.structure, adapter={}, head=model.head, scale=1.0)
    expected = logits(base.fit(bare), tokenizer)
    torch.testing.assert_close(
        logits(load_model(folder).module, tokenizer), expected, atol=TINY, rtol=0
    )
    assert entry(folder)["merged"] is False


def test_labels_and_their_probabilities(tmp_path):
    base, tokenizer, model, folder = exported(tmp_path, "roberta", "classification", "unequal")
    found = predict(load_model(folder), TEXTS)
    for text, one in zip(TEXTS, found, strict=True):
        alone = logits(base.fit(model), tokenizer, [text])[0].softmax(-1)
        assert one == Labelled(
            LABELS[int(alone.argmax())], pytest.approx(float(alone.max()), abs=TINY)
        )
    config = AutoConfig.from_pretrained(folder)
    assert config.id2label == dict(enumerate(LABELS))
    assert config.architectures == ["RobertaForSequenceClassification"]


def test_pairs(tmp_path):
    base, tokenizer = tiny(tmp_path, "bert")
    model = model_on(base, [2, 4], [24, 30])
    export(
        base,
        model,
        tokenizer,
        tmp_path / "e",
        labels=LABELS,
        kind="pair",
        max_tokens=64,
        name="toy",
    )
    loaded = load_model(tmp_path / "e")
    inputs = tokenizer(["a small one"], ["the bad"], return_tensors="pt")
    with torch.inference_mode():
        alone = base.fit(model)(**inputs).logits[0].softmax(-1)
    (found,) = predict(loaded, ["a small one"], ["the bad"])
    assert found.probability == pytest.approx(float(alone.max()), abs=TINY)
    with pytest.raises(BadInput, match="reads pairs"):
        predict(loaded, ["alone"])
    with pytest.raises(BadInput, match="got 1 texts and 2 second texts"):
        predict(loaded, ["one"], ["two", "three"])


def test_continuations(tmp_path):
    base, tokenizer, model, folder = exported(tmp_path, "llama", "causal-lm", "unequal")
    from fedspine.data.dataset import Rows

    loaded = load_model(folder)
    found = predict(loaded, ["the good model", ""])
    rows = encode(
        tokenizer, Rows(("the good model",), None, None, {}), "causal-lm", 64, ended=False
    )
    assert found[0].mean_loss == pytest.approx(score(base, model, rows).mean_loss, rel=TINY)
    assert score_module(loaded.module, rows).count == len(rows.ids) - 1
    assert isinstance(found[1], Continued)
    assert math.isnan(found[1].mean_loss)
    assert predict(loaded, []) == []


def test_a_folder_is_never_overwritten_and_nothing_is_left_behind(tmp_path):
    base, tokenizer, model, folder = exported(tmp_path, "bert", "classification", "full")
    with pytest.raises(BadInput, match="exists already"):
        export(
            base,
            model,
            tokenizer,
            folder,
            labels=LABELS,
            kind="classification",
            max_tokens=64,
            name="toy",
        )

    class Broken:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(BadInput, match="No space left"):
        export(
            base,
            model,
            Broken(),
            tmp_path / "f",
            labels=LABELS,
            kind="classification",
            max_tokens=64,
            name="toy",
        )
    assert {path.name for path in tmp_path.iterdir()} == {"export", "tiny-bert"}
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.glob("*.json"))


def test_wrong_precision_and_labels_are_refused(tmp_path):
    folder = write_tiny(tmp_path / "bert", "bert")
    base, tokenizer = load_base(str(folder), kind="classification", classes=3, precision="bf16")
    options = {"kind": "classification", "max_tokens": 64, "name": "toy"}
    with pytest.raises(BadInput, match="fp32"):
        export(base, model_on(base), tokenizer, tmp_path / "e", labels=LABELS, **options)
    base, tokenizer = load_base(str(folder), kind="classification", classes=3)
    with pytest.raises(BadInput, match="got 2 labels for a head of 3"):
        export(base, model_on(base), tokenizer, tmp_path / "e", labels=("a", "b"), **options)


def test_refusals_of_load(tmp_path):
    exported(tmp_path, "bert", "classification", "unequal")
    with pytest.raises(BadInput, match="is not a folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"no config\.json"):
        load_model(tmp_path / "empty")
    with pytest.raises(BadInput, match="not an export of fedspine"):
        load_model(tmp_path / "tiny-bert")


def test_refusals_of_damaged_exports(tmp_path):
    _, _, _, folder = exported(tmp_path, "bert", "classification", "unequal")
    weights, config = folder / "model.safetensors", folder / "config.json"
    good, settings = weights.read_bytes(), json.loads(config.read_text())
    # copies, because the mapped file is about to change
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}

    weights.write_bytes(good[: len(good) // 2])
    with pytest.raises(BadInput, match="damaged"):
        load_model(folder)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != "classifier.bias"}, weights
    )
    with pytest.raises(BadInput, match=r"lacks 1 of \d+ tensors, such as classifier\.bias"):
        load_model(folder)
    save_file(tensors | {"extra": torch.zeros(1)}, weights)
    with pytest.raises(BadInput, match="does not have, such as extra"):
        load_model(folder)
    save_file(tensors | {"classifier.bias": torch.zeros(7)}, weights)
    with pytest.raises(BadInput, match=r"classifier\.bias in shape \(7,\), but \(3,\)"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(BadInput, match="is missing"):
        load_model(folder)

    for change, message in (
        ({"format": 99}, "export format 99"),
        ({"heads": ["four", 2]}, "damaged"),
        ({"heads": [4]}, "sizes of 1 of 2 layers"),
    ):
        config.write_text(json.dumps(settings | {"fedspine": settings["fedspine"] | change}))
        with pytest.raises(BadInput, match=message):
            load_model(folder)
    config.write_text("{")
    with pytest.raises(BadInput, match="cannot be read"):
        load_model(folder)


def test_a_path_that_cannot_be_is_refused(tmp_path):
    base, tokenizer = tiny(tmp_path, "bert")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        export(
            base,
            model_on(base),
            tokenizer,
            tmp_path / "file" / "e",
            labels=LABELS,
            kind="classification",
            max_tokens=64,
            name="toy",
        )
