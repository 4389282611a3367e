"""Dialogues: answers alone are learnt, prompts are as the model is asked, and packed texts do not
see each other.
"""

import math

import numpy as np
import pytest
import torch
from tiny_models import fp32_apart, model_on
from tolerances import TINY

from fedspine.core.device import Device
from fedspine.core.errors import BadInput
from fedspine.core.task import IGNORED
from fedspine.data.dataset import Dialogue, Rows
from fedspine.lm.content import content_sha256
from fedspine.lm.dialogues import PLAIN, encode_dialogues, end_of_answers, prompt_ids
from fedspine.lm.encode import encode
from fedspine.lm.load import load
from fedspine.lm.packing import packed
from fedspine.lm.score import score
from fedspine.lm.tokens import tokens
from fedspine.lm.tune import losses_of, tune
from fedspine.lm.tuning import Tuning

END = 3  # [SEP] of the tiny tokenizers
EACH = "{% for m in messages %}[CLS]{{ m['role'] }}: {{ m['content'].strip() }}[SEP]\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}[CLS]assistant: {% endif %}"
TEMPLATES = {
    "plain": None,
    "asks with a prefix of the whole": EACH + ASKS,
    # as of models that think: the whole has an empty thought, or the question opens one
    "writes more before an answer": EACH.replace(
        "{{ m['content']", "{% if m['role'] == 'assistant' %}(at) {% endif %}{{ m['content']"
    )
    + ASKS,
    "asks with more than the whole has": EACH + ASKS.replace("assistant: ", "assistant: (on "),
    "has no end": EACH.replace("[SEP]", "") + ASKS,
}


@pytest.fixture
def tokenizer(tiny_folder):
    """One that a test may change."""
    return load(str(tiny_folder("llama")), kind="causal-lm")[1]


def asked(prompt, answer, where="a row"):
    return Dialogue((("user", prompt), ("assistant", answer)), where)


def rows_of(data):
    """The tokens of each row, and those that count."""
    for row in range(len(data)):
        labels = data.batch([row])["labels"][0].tolist()
        ids = data.ids[data.offsets[row] : data.offsets[row + 1]].tolist()
        yield ids, [id for id in labels if id != IGNORED]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_and_its_end_are_learnt_after_what_asks_for_it(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    data = encode_dialogues(tokenizer, [asked("good of", " the bad one\n")], 64)
    ((ids, learnt),) = rows_of(data)
    answer = tokenizer("the bad one", add_special_tokens=False)["input_ids"]
    assert learnt == [*answer, END]
    assert ids == prompt_ids(tokenizer, [("user", "good of")]) + learnt
    assert end_of_answers(tokenizer) == END
    assert data.predicted([0]).tolist() == [len(learnt)]
    assert data.prompt(0).tolist() == prompt_ids(tokenizer, [("user", "good of")])


def test_plain_prompts_are_lines(tokenizer):
    prompt = tokenizer.decode(prompt_ids(tokenizer, [("user", "good")]))
    assert prompt == "[CLS] good" and tokenizer.chat_template == PLAIN
    said = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "bad"}]
    whole = tokenizer.apply_chat_template(said, tokenize=False)
    assert whole == "[CLS]good\nbad[SEP]"


LONG = Dialogue(
    (
        ("system", "very"), ("user", "good"), ("assistant", "bad"), ("user", "on"),
        ("assistant", "small at"),
    )
)  # fmt: skip


def test_answers_of_one_dialogue_share_a_row(tokenizer):
    tokenizer.chat_template = TEMPLATES["asks with a prefix of the whole"]
    ((ids, learnt),) = rows_of(encode_dialogues(tokenizer, [LONG], 64))
    assert tokenizer.decode(learnt) == "bad [SEP] small at [SEP]"
    assert ids[: -len(learnt) + 2] == prompt_ids(tokenizer, LONG.messages[:4])


def test_where_a_template_forgets_each_answer_has_its_row(tokenizer):
    tokenizer.chat_template = TEMPLATES["asks with more than the whole has"]
    data = encode_dialogues(tokenizer, [asked("of", "to"), LONG], 64)
    found = list(rows_of(data))
    assert [tokenizer.decode(learnt) for _, learnt in found] == [
        "to [SEP]",
        "bad [SEP]",
        "small at [SEP]",
    ]
    assert data.sources.tolist() == [0, 1, 1]
    assert found[2][0][:-3] == prompt_ids(tokenizer, LONG.messages[:4])


def test_a_prompt_that_fills_the_window_is_left_out(tokenizer):
    full = asked("good " * 40, "bad")
    length = len(prompt_ids(tokenizer, [("user", "good of")]))
    data = encode_dialogues(tokenizer, [full, asked("good of", "the bad one"), full], length + 1)
    ((ids, learnt),) = rows_of(data)
    assert data.sources.tolist() == [1] and len(ids) == length + 1
    assert learnt == tokenizer("the", add_special_tokens=False)["input_ids"]
    with pytest.raises(BadInput, match=r"no prompt leaves room .*task.max_tokens = 20; raise it"):
        encode_dialogues(tokenizer, [full], 20)


def test_a_template_that_fails_names_the_row(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    ) + EACH
    failing = Dialogue(LONG.messages, "row 7 of the train set")
    with pytest.raises(BadInput, match=r"fails on row 7 of the train set \(.*no system here") as e:
        encode_dialogues(tokenizer, [asked("of", "to"), failing], 64)
    assert "\n" not in str(e.value)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(BadInput, match="leaves the answer of a row out"):
        encode_dialogues(tokenizer, [asked("of", "to")], 64)
    tokenizer.chat_template = "{% if messages[-1]['role'] == 'assistant' %}" + EACH + "{% endif %}"
    with pytest.raises(BadInput, match="nothing before the answer of row 7 of the train set"):
        encode_dialogues(tokenizer, [failing], 64)


def test_tokens_of_another_template_are_stored_for_themselves(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.setenv("FEDSPINE_CACHE", str(tmp_path))
    base, tokenizer = load(str(tiny_folder("llama")), kind="causal-lm")
    rows = Rows(("good\nbad",), None, None, {}, (asked("good", "bad"),))
    found, digests = [], [content_sha256(base, tokenizer)]
    for template in (None, EACH + ASKS, EACH + ASKS):
        tokenizer.chat_template = template
        found.append(tokens(tokenizer, rows, "causal-lm", 32))
        digests.append(content_sha256(base, tokenizer))
    assert len(found[0].ids) < len(found[1].ids) == len(found[2].ids)
    assert found[2].counted.tolist() == found[1].counted.tolist()
    assert digests[0] == digests[1] != digests[2]
    assert len(encode(tokenizer, Rows(("good",), None, None, {}), "causal-lm", 32)) == 1


# --- packing ---

WORDS = "the good bad small very not of to in is for on with at and"


@pytest.fixture(scope="module")
def some(decoder):
    """A base and short dialogues of many lengths."""
    base, tokenizer = decoder
    rng = np.random.default_rng(0)
    said = [" ".join(rng.choice(WORDS.split(), n)) for n in rng.integers(1, 9, 24)]
    dialogues = [asked(*pair) for pair in zip(said[::2], said[1::2], strict=True)]
    return base, encode_dialogues(tokenizer, dialogues, 32)


SHARES = (np.arange(0, 7), np.arange(7, 12))


def test_packed_texts_have_the_logits_that_they_have_alone(some):
    base, data = some
    together, shares = packed(data, SHARES, 32)
    assert together.lengths.max() <= 32 and len(together) < len(data) == 12
    for share, own in zip(shares, SHARES, strict=True):
        assert set(together.sources[share]) <= set(own)
    assert sorted(together.ids.tolist()) == sorted(data.ids.tolist())
    model = model_on(base)
    module = base.fit(model)

    def logits(examples):
        """By the tokens of a text up to each place, which are its own."""
        found = {}
        for row in range(0, len(examples), 2):
            batch = examples.batch(np.arange(row, min(row + 2, len(examples))))
            inputs = {name: batch[name] for name in batch if name != "labels"}
            if "position_ids" in inputs:
                del inputs["attention_mask"]
            with torch.inference_mode():
                out = module(**inputs).logits
            places = inputs.get("position_ids", torch.arange(out.shape[1]).expand(out.shape[:2]))
            for one, ids, place in zip(out, inputs["input_ids"], places, strict=True):
                begin = 0
                for at in range(len(ids)):
                    begin = at if place[at] == 0 else begin
                    found[tuple(ids[begin : at + 1].tolist())] = one[at]
        return found

    alone, packed_ones = logits(data), logits(together)
    keys = {
        tuple(data.ids[begin : at + 1].tolist())
        for begin, end in zip(data.offsets[:-1], data.offsets[1:], strict=True)
        for at in range(begin, end)
    }
    off = max(float((alone[key] - packed_ones[key]).abs().max()) for key in keys)
    assert off < fp32_apart(base, torch.stack(list(alone.values())))


def test_packed_texts_lose_what_they_lose_alone(some):
    base, data = some
    together, _ = packed(data, SHARES, 32)
    assert int(together.counted.sum()) == int(data.counted.sum())
    model = model_on(base)
    alone, all_together = (score(base, model, each) for each in (data, together))
    assert alone.count == all_together.count == int(data.counted.sum())
    assert all_together.loss == pytest.approx(alone.loss, rel=TINY)  # rounding
    everything = together.batch(np.arange(len(together)))
    loss = float(losses_of(base.fit(model), everything, 1))
    assert loss == pytest.approx(alone.loss / alone.count, rel=TINY)
    # what enters a block, as it is computed for frozen blocks
    inside = everything["attention_mask"].bool()
    sums = []
    for batch in (everything, data.batch(np.arange(len(data)))):
        base.fit(model)
        hidden = base.below(1, {n: t for n, t in batch.items() if n != "labels"})
        sums.append(hidden[batch["attention_mask"].bool()].double().sum(0))
        assert hidden.isfinite().all()
    torch.testing.assert_close(*sums, rtol=0, atol=TINY * float(inside.sum()))


def test_texts_are_packed_without_their_first_token(decoder):
    base, tokenizer = decoder
    rows = Rows(("good bad", "of to in", "is", "on"), None, None, {})
    data = encode(tokenizer, rows, "causal-lm", 16)
    together, (share,) = packed(data, [np.arange(4)], 16)
    assert len(together) == 1 == len(share)
    assert int(together.counted.sum()) == int(data.predicted(np.arange(4)).sum())
    model = model_on(base)
    assert score(base, model, together).loss == pytest.approx(
        score(base, model, data).loss, rel=TINY
    )


def test_a_device_learns_from_packed_rows(some):
    base, data = some
    together, shares = packed(data, SHARES, 32)
    own = together.take(shares[0])
    assert own.positions.shape == own.ids.shape == own.counted.shape
    device = Device(id="a", data=own, base=base, memory={}, rng=np.random.default_rng(0))
    start = model_on(base)
    tuned = tune(device, start, Tuning(steps=20, batch=2, learning_rate=5e-3))
    assert math.isfinite(tuned.loss)
    # a tenth is 10,000 times what rounding moves a loss by (`tolerances.TINY`)
    assert score(base, tuned.model, own).loss < 0.9 * score(base, start, own).loss
