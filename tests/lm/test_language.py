"""Language modelling: texts have an end that is learnt, each token counts once, and nothing to
predict is no error.
"""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import model_on, stories
from tokenizers import processors
from tolerances import TINY
from torch import nn
from toy import MAX_TOKENS, Lab, toy_rows, toy_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedspine.core.device import Device
from fedspine.core.task import IGNORED, Examples
from fedspine.data.dataset import Rows
from fedspine.exports.hf import export
from fedspine.exports.load import Loaded, load_model
from fedspine.exports.predict import _ends, predict
from fedspine.lm.base import Model
from fedspine.lm.content import content_sha256
from fedspine.lm.encode import encode
from fedspine.lm.fits import settle_end
from fedspine.lm.load import load as load_base
from fedspine.lm.lora import fresh
from fedspine.lm.score import Score, score, score_module, score_together
from fedspine.lm.structure import full
from fedspine.lm.tokens import tokens
from fedspine.lm.tune import losses_of, tune
from fedspine.lm.tuning import Tuning
from fedspine.methods import find
from fedspine.split.cut import split_model_of

BEGIN, END = 2, 3  # of the tiny tokenizers
WORDS = "the good bad small very not of to in is for on with at and"


def of(*texts):
    return Rows(texts=texts, pairs=None, labels=None, columns={})


def texts_of(examples):
    """The token ids of each row."""
    return [part.tolist() for part in np.split(examples.ids, examples.offsets[1:-1])]


def fresh_decoder(tiny_folder, name="llama"):
    """A tokenizer that a test may change."""
    return load_base(str(tiny_folder(name)), kind="causal-lm")


def device_on(base, data):
    return Device(id="a", data=data, base=base, memory={}, rng=np.random.default_rng(0))


# --- the end of a text ---


def adding_ends(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", BEGIN), ("[SEP]", END)]
    )


def adding_nothing(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )


@pytest.mark.parametrize(
    ("change", "begins"),
    [(lambda tokenizer: None, [BEGIN]), (adding_ends, [BEGIN]), (adding_nothing, [])],
    ids=["begins only", "begins and ends", "neither"],
)
@pytest.mark.parametrize("text", ["good, not bad", "good, not bad [SEP]"])
def test_each_text_has_one_end(tiny_folder, change, begins, text):
    _, tokenizer = fresh_decoder(tiny_folder)
    words = tokenizer("good, not bad", add_special_tokens=False)["input_ids"]
    change(tokenizer)
    twice = change is adding_ends and text.endswith("[SEP]")  # in the text, and by the tokenizer
    expected = [*begins, *words, *[END] * twice]
    assert texts_of(encode(tokenizer, of(text), "causal-lm", 32)) == [[*expected, END]]
    assert texts_of(encode(tokenizer, of(text), "causal-lm", 32, ended=False)) == [expected]


def test_a_tokenizer_without_an_end_adds_none(tiny_folder):
    _, tokenizer = fresh_decoder(tiny_folder)
    tokenizer.eos_token = None
    plain = tokenizer("good")["input_ids"]
    assert texts_of(encode(tokenizer, of("good"), "causal-lm", 32)) == [plain]


def test_classes_are_distinguished_from_texts(tiny_folder):
    _, tokenizer = fresh_decoder(tiny_folder)
    rows = dataclasses.replace(of("good"), labels=np.array([0]))
    plain = tokenizer("good")["input_ids"]
    for scored in (False, True):
        found = encode(tokenizer, rows, "classification", 32, scored=scored)
        assert texts_of(found) == [plain] and found.context is None


def test_of_a_text_its_first_half_is_continued(decoder):
    _, tokenizer = decoder
    found = encode(tokenizer, of("good bad small big", ""), "causal-lm", 32)
    whole = [*tokenizer("good bad small big")["input_ids"], END]
    assert found.prompt(0).tolist() == whole[: len(whole) // 2]
    assert len(found.prompt(1)) == 1


# --- windows ---


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(4, 20), st.booleans())
def test_each_token_but_the_first_is_predicted_once(decoder, lengths, size, scored):
    _, tokenizer = decoder
    words = WORDS.split()
    texts = [" ".join(words[i % len(words)] for i in range(length)) for length in lengths]
    found = encode(tokenizer, of(*texts), "causal-lm", size, scored=scored)
    assert found.lengths.max() <= size
    for text, written in enumerate(texts):
        whole = [*tokenizer(written)["input_ids"], END]
        mine = np.flatnonzero(found.sources == text)
        labels = found.batch(mine)["labels"][:, 1:]
        predicted = labels[labels != IGNORED].tolist()
        assert predicted == whole[1:]
        assert int(found.predicted(mine).sum()) == len(whole) - 1
        # only the first window begins a text
        assert [texts_of(found)[row][0] == BEGIN for row in mine] == [True] + [False] * (
            len(mine) - 1
        )
        if scored:
            assert (found.context[mine[1:]] == size // 2).all()


@pytest.mark.parametrize("words", [3, 12, 13, 14, 40, 61])
def test_scoring_is_that_of_the_guide(tiny_folder, words):
    """Against the loop of "Perplexity of fixed-length models" in the docs of transformers."""
    base, tokenizer = fresh_decoder(tiny_folder)
    text = " ".join((WORDS.split() * 5)[:words])
    model, size, stride = model_on(base), 12, 6
    module = base.fit(model, merge=True)
    ids = torch.tensor([[*tokenizer(text)["input_ids"], END]])
    total, counted, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + size, ids.shape[1])
        window, target = ids[:, begin:end], ids[:, begin:end].clone()
        target[:, : -(end - before)] = IGNORED
        with torch.inference_mode():
            logits = module(input_ids=window, attention_mask=torch.ones_like(window)).logits
        total += float(
            nn.functional.cross_entropy(logits[0, :-1].float(), target[0, 1:], reduction="sum")
        )
        counted += int((target[0, 1:] != IGNORED).sum())
        before = end
        if end == ids.shape[1]:
            break
    data = encode(tokenizer, of(text), "causal-lm", size, scored=True)
    for batch in (1, 32):
        found = score(base, model, data, batch=batch)
        assert found.count == counted == ids.shape[1] - 1
        assert found.loss == pytest.approx(total, rel=TINY)  # padding rounds otherwise


def test_more_context_is_another_score_of_the_same_tokens(decoder):
    base, tokenizer = decoder
    rows = of(*(" ".join(toy_rows(6, seed).texts) for seed in range(4)))
    plain, strided = (
        encode(tokenizer, rows, "causal-lm", MAX_TOKENS, scored=scored) for scored in (False, True)
    )
    assert len(strided) > len(plain)
    model = model_on(base)
    scores = [score(base, model, data) for data in (plain, strided)]
    assert scores[0].count == scores[1].count and scores[0].loss != scores[1].loss
    # one pass through several models counts the same tokens
    both = score_together(base, [model, model_on(base, seed=1)], strided)
    assert both[0].count == scores[1].count
    assert both[0].loss == pytest.approx(scores[1].loss, rel=TINY)


def test_context_is_taken_and_stored_with_its_rows(tmp_path, monkeypatch, decoder):
    monkeypatch.setenv("FEDSPINE_CACHE", str(tmp_path))
    _, tokenizer = decoder
    rows = of(" ".join(toy_rows(9, 0).texts), "good")
    made = encode(tokenizer, rows, "causal-lm", MAX_TOKENS, scored=True)
    for _ in range(2):
        stored = tokens(tokenizer, rows, "causal-lm", MAX_TOKENS, scored=True)
        assert stored.context.tolist() == made.context.tolist()
    trained = tokens(tokenizer, rows, "causal-lm", MAX_TOKENS)
    assert trained.context is None and len(trained) < len(made)
    chosen = np.array([len(made) - 1, 2, 0])
    part = made.take(chosen)
    assert part.context.tolist() == [0, MAX_TOKENS // 2, 0]
    assert part.batch([0, 1, 2])["labels"].equal(made.batch(chosen)["labels"])


def test_another_end_is_stored_for_itself(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.setenv("FEDSPINE_CACHE", str(tmp_path))
    base, tokenizer = fresh_decoder(tiny_folder)
    rows, content = of("good", "bad"), content_sha256(base, tokenizer)
    before = texts_of(tokens(tokenizer, rows, "causal-lm", 8))
    tokenizer.eos_token = "[UNK]"
    after = texts_of(tokens(tokenizer, rows, "causal-lm", 8))
    assert [row[:-1] for row in before] == [row[:-1] for row in after]
    assert {row[-1] for row in before} == {END} and {row[-1] for row in after} == {1}
    # two machines that end texts otherwise do not hold the same model
    assert content_sha256(base, tokenizer) != content


# --- an end that is also the padding ---


@pytest.fixture
def padded_by_ends(tiny_folder):
    base, tokenizer = fresh_decoder(tiny_folder)
    tokenizer.pad_token = tokenizer.eos_token
    base.config.pad_token_id = tokenizer.pad_token_id
    data = encode(tokenizer, of("good", "the very small one, not for you", "bad"), "causal-lm", 32)
    assert data.padding == END and len(set(data.lengths.tolist())) > 1
    return base, data


def test_the_real_end_counts_where_padding_does_not(padded_by_ends):
    base, data = padded_by_ends
    everything = np.arange(len(data))
    labels = data.batch(everything)["labels"]
    assert (labels == END).sum() == len(data)  # one for each text, none for padding
    count = int(data.lengths.sum()) - len(data)
    model = model_on(base)
    module = base.fit(model)
    alone = [losses_of(module, data.batch([row]), 1) for row in everything]
    sums = sum(float(loss) * (data.lengths[row] - 1) for row, loss in enumerate(alone))
    together = float(losses_of(module, data.batch(everything), 1)) * count
    assert together == pytest.approx(sums, rel=TINY)
    found = score_module(module, data)
    assert found.count == count and found.loss == pytest.approx(sums, rel=TINY)
    split_model = split_model_of(base, 1, rank=3)
    client_model, server_model = split_model.parts(model)
    batch = data.batch(everything)
    features = split_model.client_forward(client_model, batch, seed=0)
    losses = split_model.server_forward(server_model, features, batch["labels"], seed=0)
    assert losses.counted.tolist() == (data.lengths - 1).tolist()
    assert float(losses.total.detach().sum()) == pytest.approx(sums, rel=TINY)


# --- nothing to predict ---


def lone(count, *others):
    """Rows of one token, and others: as of a tokenizer that begins and ends nothing."""
    rows = [[7]] * count + [list(row) for row in others]
    return Examples(
        ids=np.array([i for row in rows for i in row], np.int32),
        offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
        labels=None,
        segments=None,
        padding=0,
    )


def test_a_batch_without_a_label_loses_nothing_and_teaches_nothing(decoder):
    base, _ = decoder
    model = model_on(base)
    for factor in model.adapter.values():
        factor.requires_grad_()
    loss = losses_of(base.fit(model), lone(4).batch([0, 1, 2, 3]), 2)
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert not any(factor.grad.any() for factor in model.adapter.values())


def test_steps_without_a_label_are_not_in_the_mean_loss(decoder):
    base, _ = decoder
    text, tuning = (2, 50, 60, 7, 3), Tuning(steps=4, batch=1, learning_rate=1e-9, weight_decay=0.0)
    both = tune(device_on(base, lone(1, text)), model_on(base), tuning)
    alone = tune(device_on(base, lone(0, text)), model_on(base), tuning)
    assert both.loss == pytest.approx(alone.loss, rel=TINY)  # half the steps had nothing to say
    nothing = tune(device_on(base, lone(3)), model_on(base), tuning)
    assert nothing.loss == 0.0
    assert all(factor.isfinite().all() for factor in nothing.model.adapter.values())


def test_scoring_nothing_is_no_number_and_no_error(decoder):
    base, _ = decoder
    found = score(base, model_on(base), lone(3))
    assert found == Score(loss=0.0, correct=0, count=0)
    assert math.isnan(found.mean_loss) and math.isnan(found.accuracy)
    text = (2, 50, 60, 7, 3)
    mixed, alone = (score(base, model_on(base), lone(count, text)) for count in (3, 0))
    assert mixed.count == alone.count == 4 and mixed.loss == pytest.approx(alone.loss, rel=TINY)


def test_a_text_without_a_token_is_no_error(decoder):
    base, _ = decoder
    empty = lone(0, (), (2, 50, 60, 3), ())
    found = score(base, model_on(base), empty, batch=1)
    assert found.count == 3 and math.isfinite(found.loss)
    tuning = Tuning(steps=6, batch=1, learning_rate=1e-2)
    trace = tune(device_on(base, empty), model_on(base), tuning)
    assert math.isfinite(trace.loss)
    assert all(factor.isfinite().all() for factor in trace.model.adapter.values())


@pytest.mark.parametrize("everyone", [False, True], ids=["one device", "all devices"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fedlora", {}),
        ("fedspine", {}),
        ("fedavg", {}),
        ("pyramidfl", {}),
        ("mergesfl", {}),
        ("mergesfl", {"merging": "copies"}),
        ("mergesfl-plus", {"labels_stay": True}),
        ("splitfed_v2", {}),
        ("locfedmix", {}),
    ],
    ids=str,
)
def test_devices_with_nothing_to_predict_break_no_round(
    decoder, tmp_path, name, settings, everyone
):
    task = toy_task(*decoder, rounds=2, kind="causal-lm")
    lab = Lab(task, tmp_path / "lab", kinds=("tx2", "agx"))
    try:
        mute = np.arange(len(task.train)) if everyone else lab.shares[0]
        rows = texts_of(task.train)
        for row in mute:
            rows[row] = rows[row][:1]
        silent = dataclasses.replace(lone(0, *rows), padding=task.train.padding)
        lab.workers._workshop = dataclasses.replace(
            lab.workers._workshop, task=dataclasses.replace(task, train=silent)
        )
        method = dataclasses.replace(find(name).toy(), **settings)
        lab.fleet.begin_round(0)
        state = method.round(method.start(task, np.random.default_rng(0)), lab.fleet)
        model = method.deploy(state)
        lab.records.flush()
        assert all(t.isfinite().all() for t in model.adapter.values())
        assert "left_out" not in lab.records_path.read_text()
        assert score(task.base, model, task.test).count
    finally:
        lab.close()


# --- a model that stops ---

NAMES = ("Tom", "Lily", "Ben", "Mia", "Sam", "Sue", "Max", "Tim")
THINGS = ("red ball", "big dog", "small cat", "blue car")
SHORT = tuple(f"{name} had a {thing}. {name} was very happy." for name in NAMES for thing in THINGS)


@pytest.fixture(scope="module")
def short_stories():
    """A model that really writes, tuned on stories of two sentences with and without their end."""
    base, tokenizer = stories()
    tuned = {}
    for ended in (True, False):
        data = encode(tokenizer, of(*SHORT), "causal-lm", 64, ended=ended)
        adapter = fresh(base.layout.sites, 8, np.random.default_rng(0))
        start = Model(structure=full(base.layout), adapter=adapter, head={}, scale=2.0)
        tuning = Tuning(steps=20, batch=16, learning_rate=5e-3)
        tuned[ended] = tune(device_on(base, data), start, tuning).model
    untuned = Model(structure=full(base.layout), adapter={}, head={}, scale=1.0)
    return base, tokenizer, tuned | {None: untuned}


PROMPTS = ["Kim had a", "Once upon a time"]


def test_a_model_tuned_on_texts_with_an_end_stops(short_stories, tmp_path):
    base, tokenizer, models = short_stories
    found = {}
    for ended, model in models.items():
        folder = export(
            base,
            model,
            tokenizer,
            tmp_path / str(ended),
            labels=(),
            kind="causal-lm",
            max_tokens=64,
            name="stories",
        )
        found[ended] = predict(load_model(folder), PROMPTS, new_tokens=80)
    assert [one.ended for one in found[None]] == [False, False]  # stories of its own are longer
    assert [one.ended for one in found[False]] == [False, False]
    assert [one.ended for one in found[True]] == [True, True]
    assert all(one.continuation.endswith("was very happy.") for one in found[True])
    assert all(one.continuation.count("happy") > 3 for one in found[False])


def test_a_stock_model_stops_there_too(short_stories, tmp_path):
    base, tokenizer, models = short_stories
    folder = export(
        base,
        models[True],
        tokenizer,
        tmp_path / "out",
        labels=(),
        kind="causal-lm",
        max_tokens=64,
        name="stories",
    )
    module, stock = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    whole = module.generate(
        **stock(PROMPTS[0], return_tensors="pt"), max_new_tokens=80, do_sample=False
    )
    assert whole[0, -1] == stock.eos_token_id
    assert stock.decode(whole[0], skip_special_tokens=True).endswith("was very happy.")


def test_an_end_token_with_the_row_of_others_is_replaced(tiny_folder):
    _, tokenizer = stories()
    assert tokenizer.eos_token == "<s>"  # </s> has the same row as 170 others that were never used
    base, own = fresh_decoder(tiny_folder)
    assert own.eos_token_id == base.config.eos_token_id == END  # random rows differ
    module = base.whole_skeleton()
    with torch.no_grad():
        kept = module.lm_head.weight.clone()
        module.lm_head.weight[5] = module.lm_head.weight[END]
        settle_end(own, module)
        assert own.eos_token_id == base.config.eos_token_id == BEGIN
        module.lm_head.weight.copy_(kept)


def test_a_prompt_leaves_room_for_what_is_written(tiny_folder):
    base, tokenizer = fresh_decoder(tiny_folder)
    seen = []

    def generate(input_ids, **settings):
        seen.append((input_ids[0].tolist(), settings))
        return torch.cat([input_ids, torch.tensor([[7, END]])], 1)

    module = base.fit(model_on(base), merge=True)
    module.generate = generate
    loaded = Loaded(module, tokenizer, "causal-lm", (), 128, 0.0, 0, 0)
    text = " ".join((WORDS.split() * 12)[:150])
    whole = tokenizer(text)["input_ids"]
    (found,) = predict(loaded, [text], new_tokens=30)
    (prompt, settings), *_ = seen
    assert prompt == whole[-98:]  # of 128 positions
    assert settings["eos_token_id"] == [END] and settings["max_new_tokens"] == 30
    assert found.ended and math.isfinite(found.mean_loss)
    predict(dataclasses.replace(loaded, max_tokens=20), [text], new_tokens=30)
    assert seen[-1][0] == whole[-20:]
    del module.generate


def test_what_ends_a_continuation_is_also_what_the_model_says(tiny_folder):
    _, tokenizer = fresh_decoder(tiny_folder)
    module = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[9, END]))
    loaded = Loaded(module, tokenizer, "causal-lm", (), 64, 0.0, 0, 0)
    assert _ends(loaded) == [END, 9]
    module.generation_config.eos_token_id = None
    assert _ends(loaded) == [END]
    tokenizer.eos_token = None
    assert _ends(loaded) == []
