"""Pairs read by a bi-encoder: the logits of two passes by hand, what its methods, charges and
exports make of it, and who cannot.
"""

import dataclasses
import re

import numpy as np
import pytest
import torch
from tiny_models import LABELS
from tiny_models import model_on as pruned_on
from tolerances import TINY
from toy import TEST_ROWS, TRAIN_ROWS, Lab, bits
from transformers import AutoModel

from fedspine.core.errors import BadInput
from fedspine.core.task import Task
from fedspine.data.dataset import Rows
from fedspine.exports import hf
from fedspine.exports.peft import write_adapter
from fedspine.lm import weightless
from fedspine.lm.base import Model
from fedspine.lm.encode import encode
from fedspine.lm.load import load
from fedspine.lm.prefix import activations, entering
from fedspine.lm.score import score, score_together
from fedspine.lm.structure import full
from fedspine.lm.tokens import tokens
from fedspine.lm.tuning import HeadTraining
from fedspine.methods import all_methods
from fedspine.pruning.head_start import features
from fedspine.runs.config import recipe
from fedspine.runs.plan import plan

MOST = 16
FIRSTS = ("a good model", "bad", "the very small one", "good " * 40)
SECONDS = ("not bad at all, you see", "x", "12 words", "one")
WORDS = ("good", "bad", "small", "the", "to", "of", "for", "and", "on")
# two blocks of sums of at most 64 products each, of size 1: a few hundred roundings of 6e-8
APART = 3e-5


def rows(firsts=FIRSTS, seconds=SECONDS):
    return Rows(firsts, seconds, np.arange(len(firsts)) % 3, {})


@pytest.fixture(scope="module")
def opened(tiny_folder):
    """A function that loads a tiny encoder as a bi-encoder of three classes."""

    def opened(architecture="bert", pooling="bi-encoder"):
        return load(str(tiny_folder(architecture)), kind="pair", classes=3, pooling=pooling)

    return opened


def plain(base, seed=0):
    """A model without an adapter."""
    head = base.initial_head(np.random.default_rng(seed))
    return Model(structure=full(base.layout), adapter={}, head=head, scale=1.0)


def inputs_of(tokenizer, given):
    data = encode(tokenizer, given, "pair", MOST, bi_encoder=True)
    inputs = data.batch(np.arange(len(given.texts)))
    inputs.pop("labels")
    return data, inputs


def read_by_hand(folder, tokenizer, given):
    """[u, v, |u - v|] of each pair from the stock backbone, text by text without padding."""
    stock = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def mean(text):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=MOST)
        return stock(**inputs).last_hidden_state[0].mean(0)

    with torch.no_grad():
        pairs = zip(given.texts, given.pairs, strict=True)
        means = [(mean(first), mean(second)) for first, second in pairs]
        return torch.stack([torch.cat([u, v, (u - v).abs()]) for u, v in means])


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_two_passes_in_one(tiny_folder, opened, architecture):
    base, tokenizer = opened(architecture)
    model = plain(base)
    data, inputs = inputs_of(tokenizer, rows())
    read = read_by_hand(tiny_folder(architecture), tokenizer, rows())
    weight, bias = model.head["classifier.weight"], model.head["classifier.bias"]
    assert weight.shape == (3, 3 * base.layout.width)
    expected = read @ weight.T + bias
    with torch.no_grad():
        found = base.fit(model)(**inputs).logits
    torch.testing.assert_close(found, expected, atol=APART, rtol=0)
    torch.testing.assert_close(features(base, inputs), read, atol=APART, rtol=0)
    # the blocks from activations that were kept
    stored = activations(base, model, data, 1)
    module, entry = base.fit(model), base.start_at(1)
    entry.hidden = entering(base, data, stored, np.arange(len(data)), data.width(range(len(data))))
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs).logits, expected, atol=APART, rtol=0)


def test_each_text_is_cut_for_itself(opened):
    _, tokenizer = opened()
    data, _ = inputs_of(tokenizer, rows())
    for row in range(len(data)):
        ids, segments = (
            array[data.offsets[row] : data.offsets[row + 1]] for array in (data.ids, data.segments)
        )
        for text, of in ((rows().texts[row], 0), (rows().pairs[row], 1)):
            alone = tokenizer(text, truncation=True, max_length=MOST)["input_ids"]
            assert ids[segments == of].tolist() == alone
    assert data.lengths[3] == MOST + len(tokenizer("one")["input_ids"])


def test_kept_tokens_are_those_of_the_readout(opened, tmp_path):
    _, tokenizer = opened()
    for bi_encoder in (False, True):
        for _ in range(2):
            kept = tokens(tokenizer, rows(), "pair", MOST, bi_encoder=bi_encoder, folder=tmp_path)
            made = encode(tokenizer, rows(), "pair", MOST, bi_encoder=bi_encoder)
            assert kept.ids.tolist() == made.ids.tolist()
            assert kept.segments.tolist() == made.segments.tolist()


def test_several_models_in_one_pass(opened):
    base, tokenizer = opened()
    data, _ = inputs_of(tokenizer, rows())
    models = [pruned_on(base, [4, 4], [64, 64]), pruned_on(base, [4, 2], [24, 30])]
    for one, model in zip(score_together(base, models, data), models, strict=True):
        # merged against unmerged products, in fp32
        assert one.loss == pytest.approx(score(base, model, data).loss, rel=TINY)


def test_without_weights_it_is_as_large(tiny_folder, opened):
    base, _ = opened()
    bare = weightless.load(str(tiny_folder("bert")), kind="pair", classes=3, pooling="bi-encoder")
    assert [layer.weight.shape for layer in bare.head] == [
        layer.weight.shape for layer in base.head
    ]
    assert (bare.embeddings, bare.pooling) == (base.embeddings, "bi-encoder")


# --- methods


def pair_rows(count, seed):
    """Two texts of five words of one of three themes each, and whether the themes are the same."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    themes = [WORDS[i : i + 3] for i in (0, 3, 6)]
    first = rng.integers(0, 3, count)
    second = np.where(labels == 1, first, (first + rng.integers(1, 3, count)) % 3)
    texts, pairs = (
        tuple(" ".join(rng.choice(themes[theme], 5)) for theme in side) for side in (first, second)
    )
    return Rows(texts, pairs, labels, {})


@pytest.fixture(scope="module")
def pair_task(tiny_folder):
    base, tokenizer = load(str(tiny_folder("bert")), kind="pair", classes=2, pooling="bi-encoder")
    train, test = (
        encode(tokenizer, pair_rows(count, seed), "pair", MOST, bi_encoder=True)
        for count, seed in ((TRAIN_ROWS, 0), (TEST_ROWS, 1))
    )
    names = ("other", "same")
    return Task("pair", base, train, test, names, max_tokens=2 * MOST, rounds=2, turns=0.0)


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_every_adapter_method_trains_it_and_split_methods_refuse(pair_task, tmp_path, name):
    """A round from class means where there are any, with every order and reply checked."""
    method = all_methods()[name].toy()
    if not isinstance(method, HeadTraining):
        with pytest.raises(BadInput, match='task.pooling is "bi-encoder"'):
            method.check(pair_task)
        return
    if "head_start" in {field.name for field in dataclasses.fields(method)}:
        method = dataclasses.replace(method, head_start="class-means")
    method.check(pair_task)
    lab = Lab(pair_task, tmp_path / "lab", kinds=("tx2", "agx"))
    model = method.deploy(lab.run(method, rounds=1), lab.ids[0])
    assert np.isfinite(score(pair_task.base, model, pair_task.test).loss)
    lab.close()


def test_a_resumed_run_equals_an_uninterrupted_one(pair_task, tmp_path):
    method, states = all_methods()["fedspine-plus"].toy(), []
    for folder, stops in (("whole", [2]), ("resumed", [1, 2])):
        for rounds in stops:
            lab = Lab(pair_task, tmp_path / folder, kinds=("tx2", "agx"))
            state = lab.run(method, rounds=rounds)
            lab.save(state)
            lab.close()
        states.append(bits(state))
    assert states[0] == states[1]


def test_what_cannot_be_read_so_is_told_in_one_line(tiny_folder):
    for load_one in (load, weightless.load):
        with pytest.raises(BadInput, match='task.kind is "classification"; set it to "mean"'):
            load_one(
                str(tiny_folder("bert")), kind="classification", classes=3, pooling="bi-encoder"
            )
        with pytest.raises(BadInput, match="the model is a decoder"):
            load_one(str(tiny_folder("llama")), kind="pair", classes=3, pooling="bi-encoder")


# --- charges


def test_a_plan_charges_both_passes(tiny_folder):
    """The memory and the operations of rows twice as long."""

    def planned(**task):
        tables = {"model": str(tiny_folder("bert")), "kind": "pair", **task}
        made = recipe({"task": tables, "method": {"name": "fedlora", "batch": 4, "steps": 2}})
        found = plan(made, classes=3)
        trainings = [kind.training for kind in found.kinds]
        return found.tokens, [(t.flops, t.peak_memory_bytes) for t in trainings], found.remarks

    joint = planned(pooling="mean", max_tokens=32)
    bi_encoder = planned(pooling="bi-encoder", max_tokens=16)
    assert bi_encoder[:2] == joint[:2]
    assert "2 x 16 = 32 tokens" in str(bi_encoder[2])


# --- exports


def exported(opened, tmp_path, heads=(4, 4), channels=(24, 24)):
    """A model of the encoder, its export, and its logits on the pairs."""
    base, tokenizer = opened()
    model = pruned_on(base, list(heads), list(channels))
    about = {"labels": LABELS, "kind": "pair", "max_tokens": MOST, "name": "toy"}
    made = hf.export(base, model, tokenizer, tmp_path / "made", **about)
    with torch.no_grad():
        expected = base.fit(model)(**inputs_of(tokenizer, rows())[1]).logits.clone()
    return base, model, made, expected


def code_of(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def test_an_export_as_its_readme_computes_it(opened, tmp_path, monkeypatch):
    _, _, made, expected = exported(opened, tmp_path)
    monkeypatch.chdir(made)
    names = {}
    exec(code_of(made), names)
    found = names["logits"](list(FIRSTS), list(SECONDS))
    torch.testing.assert_close(found, expected, atol=APART, rtol=APART)


@pytest.mark.parametrize("channels", [(24, 24), (24, 30)])
def test_our_loader_predicts_with_an_export(opened, tmp_path, channels):
    _, _, made, expected = exported(opened, tmp_path, channels=channels)
    loaded = hf.load_model(made)
    assert [each.label for each in hf.predict(loaded, FIRSTS, SECONDS)] == [
        LABELS[best] for best in expected.argmax(1)
    ]
    best = [each.probability for each in hf.predict(loaded, FIRSTS, SECONDS)]
    torch.testing.assert_close(
        torch.tensor(best), expected.softmax(-1).amax(-1), atol=APART, rtol=0
    )
    assert ("AutoModel.from_pretrained(folder)" in (made / "README.md").read_text()) == (
        channels == (24, 24)
    )


def test_peft_has_no_class_for_it(opened, tmp_path):
    base, _ = opened()
    with pytest.raises(BadInput, match="use --format hf"):
        write_adapter(tmp_path / "adapter", pruned_on(base, [4, 4], [64, 64]), base, "base")
