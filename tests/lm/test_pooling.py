"""What a classifier reads: the mean of the tokens or the model's own head, as the model was made
for.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_models import LABELS, TEXTS, as_its_readme_says, fp32_apart, logits
from tiny_models import model_on as random_model
from tolerances import TINY
from transformers import AutoModel, AutoModelForTokenClassification, AutoTokenizer

from fedspine.core.task import Examples
from fedspine.exports import hf
from fedspine.exports.adapter import Origin, export_adapter
from fedspine.lm.base import Model
from fedspine.lm.load import load, pooling_for
from fedspine.lm.lora import fresh
from fedspine.lm.pooling import mean_of_tokens
from fedspine.lm.score import score, score_together
from fedspine.lm.structure import full
from fedspine.runs.assemble import settled
from fedspine.runs.config import recipe

CLASSES = 3


@pytest.fixture
def encoder(tiny_folder, tmp_path):
    """A function that writes a tiny encoder as a plain backbone, which has no task head."""

    def write(model_type="bert", pooling=None):
        folder = tmp_path / f"{model_type}-{pooling}"
        shutil.copytree(tiny_folder(model_type), folder)
        AutoModel.from_pretrained(folder).save_pretrained(folder)
        if pooling is not None:
            (folder / "1_Pooling").mkdir()
            said = {
                f"pooling_mode_{name}": name == pooling for name in ("mean_tokens", "cls_token")
            }
            (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))
        return str(folder)

    return write


def examples(lengths=(3, 7, 5)):
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 100, sum(lengths)).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Examples(ids, offsets, np.array([0, 1, 2]), None, padding=0)


def model_on(base, seed=0):
    rng = np.random.default_rng(seed)
    adapter = fresh(base.layout.sites, 2, rng)
    adapter = {name: factor + 0.05 for name, factor in adapter.items()}
    return Model(
        structure=full(base.layout), adapter=adapter, head=base.initial_head(rng), scale=2.0
    )


@pytest.mark.parametrize(
    ("model_type", "stated", "expected"),
    [
        ("bert", "mean_tokens", "mean"),
        ("bert", "cls_token", "cls"),
        ("bert", None, "mean"),
        ("roberta", None, "mean"),
        ("distilbert", None, "mean"),
    ],
)
def test_a_model_is_read_as_it_was_made_for(encoder, model_type, stated, expected) -> None:
    assert pooling_for(encoder(model_type, stated)) == expected


@pytest.mark.parametrize(
    ("stated", "method", "expected"),
    [
        ("mean_tokens", "fedlora", "bi-encoder"),
        ("mean_tokens", "mergesfl", "mean"),  # which cannot read texts apart
        ("cls_token", "fedlora", "cls"),
        (None, "fedlora", "mean"),
    ],
)
def test_models_that_embed_sentences_by_their_mean_read_pairs_apart(
    encoder, stated, method, expected
) -> None:
    task = {"model": encoder("bert", stated), "kind": "pair"}
    begun, _ = settled(recipe({"task": task, "method": {"name": method}}))
    assert begun.task.pooling == expected
    base, _ = load(task["model"], kind="pair", classes=CLASSES)
    assert base.pooling == (
        "mean" if stated is None else pooling_for(task["model"], bi_encoder=True)
    )


def test_classifiers_and_decoders_keep_their_own_head(tiny_folder) -> None:
    assert pooling_for(str(tiny_folder("bert"))) == "cls"
    assert pooling_for(str(tiny_folder("llama"))) == "cls"


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "llama", "qwen3"])
def test_the_head_is_one_linear_layer_over_the_mean_of_the_true_tokens(
    tiny_folder, model_type
) -> None:
    """Logits by hand from the stock backbone, row by row without padding."""
    folder = str(tiny_folder(model_type))
    base, _ = load(folder, kind="classification", classes=CLASSES, pooling="mean")
    head = base.initial_head(np.random.default_rng(1))
    (weight, bias) = (next(t for t in head.values() if t.dim() == d) for d in (2, 1))
    assert sum(t.numel() for t in head.values()) == CLASSES * (base.layout.width + 1)
    data = examples()
    module = base.fit(Model(structure=full(base.layout), adapter={}, head=head, scale=1.0))
    inputs = data.batch(np.arange(3))
    inputs.pop("labels")
    with torch.no_grad():
        found = module(**inputs).logits
        stock = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        for row in range(3):
            ids = torch.from_numpy(data.ids[data.offsets[row] : data.offsets[row + 1]]).long()
            mean = stock(input_ids=ids[None]).last_hidden_state[0].mean(0)
            torch.testing.assert_close(found[row], mean @ weight.T + bias, atol=TINY, rtol=TINY)


def test_a_stock_token_classifier_has_the_same_logits(tiny_folder) -> None:
    """The mean of token logits is the linear layer of the mean token: what makes exports stock
    models.
    """
    folder = str(tiny_folder("bert"))
    base, _ = load(folder, kind="classification", classes=CLASSES, pooling="mean")
    stock = AutoModelForTokenClassification.from_pretrained(
        folder, num_labels=CLASSES, dtype=torch.float32, ignore_mismatched_sizes=True
    ).eval()
    head = {f"classifier.{name}": p.detach() for name, p in stock.classifier.named_parameters()}
    inputs = examples().batch(np.arange(3))
    inputs.pop("labels")
    with torch.no_grad():
        ours = base.fit(Model(structure=full(base.layout), adapter={}, head=head, scale=1.0))
        ours = ours(**inputs).logits
        theirs = mean_of_tokens(stock(**inputs).logits, inputs["attention_mask"])
    torch.testing.assert_close(ours, theirs, atol=TINY, rtol=TINY)


def test_several_models_in_one_pass_are_read_alike(encoder) -> None:
    base, _ = load(encoder(), kind="classification", classes=CLASSES)
    models = [model_on(base, seed) for seed in (1, 2)]
    together = score_together(base, models, examples())
    for one, model in zip(together, models, strict=True):
        alone = score(base, model, examples())
        assert one.correct == alone.correct
        # merged against unmerged products, in fp32
        assert one.loss == pytest.approx(alone.loss, rel=TINY)


def test_without_a_mask_all_tokens_count(encoder) -> None:
    base, _ = load(encoder(), kind="classification", classes=CLASSES)
    module = base.fit(model_on(base))
    ids = torch.full((2, 5), 7)
    with torch.no_grad():
        all_of_them = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        # sums of five numbers, in another order
        torch.testing.assert_close(module(input_ids=ids).logits, all_of_them, atol=1e-6, rtol=1e-6)
    assert module.config.num_labels == CLASSES


def test_a_row_of_no_token_is_no_division_by_zero() -> None:
    values = torch.ones(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert mean_of_tokens(values, mask).tolist() == [[1.0] * 4, [0.0] * 4]


ABOUT = {"labels": LABELS, "kind": "classification", "max_tokens": 64, "name": "toy"}


def mean_logits(module, tokenizer):
    """What the README of an export tells a user of stock tools to compute."""
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        return mean_of_tokens(module(**inputs).logits, inputs["attention_mask"])


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "llama"])
def test_a_stock_token_classifier_loads_an_export(tiny_folder, tmp_path, model_type) -> None:
    folder = str(tiny_folder(model_type))
    base, tokenizer = load(folder, kind="classification", classes=CLASSES, pooling="mean")
    model = random_model(base, channels=[24, 24])
    expected = logits(base.fit(model), tokenizer).clone()
    apart = fp32_apart(base, expected)
    made = hf.export(base, model, tokenizer, tmp_path / "made", **ABOUT)
    stock = AutoModelForTokenClassification.from_pretrained(made).eval()
    assert stock.config.id2label == dict(enumerate(LABELS))
    found = mean_logits(stock, AutoTokenizer.from_pretrained(made))
    torch.testing.assert_close(found, expected, atol=apart, rtol=0)
    assert "(logits * mask).sum(1) / mask.sum(1)" in (made / "README.md").read_text()
    ours = hf.load_model(made)
    torch.testing.assert_close(logits(ours.module, ours.tokenizer), expected, atol=apart, rtol=0)
    best = [LABELS[index] for index in expected.argmax(1).tolist()]
    assert [each.label for each in hf.predict(ours, TEXTS)] == best


# PEFT asks transformers for something by its old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("with_base", [False, True])
def test_stock_peft_loads_an_adapter(tiny_folder, tmp_path, monkeypatch, with_base) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    place = str(tiny_folder("bert"))
    base, tokenizer = load(place, kind="classification", classes=CLASSES, pooling="mean")
    model = random_model(base, channels=[24, 24] if with_base else None)
    made = export_adapter(
        base,
        model,
        tokenizer,
        tmp_path / "adapter",
        origin=Origin(place, cut=False),
        with_base=with_base,
        **ABOUT,
    )
    expected = logits(base.fit(model), tokenizer).clone()
    monkeypatch.chdir(tiny_folder("bert").parent)
    module, tokenizer = as_its_readme_says(made)
    assert type(module).__name__ == "PeftModelForTokenClassification"
    found = mean_logits(module, tokenizer)
    torch.testing.assert_close(found, expected, atol=fp32_apart(base, expected), rtol=0)
    assert module.config.id2label == dict(enumerate(LABELS))
