"""What a model writes: its likeliest tokens or drawn ones, up to its end; and scores of answers."""

import pytest
import torch
from tiny_models import model_on

from fedspine.lm.answer_scores import exact_match, rouge_l
from fedspine.lm.decoding import Decoding, written


@pytest.fixture(scope="module")
def module(decoder):
    base, _ = decoder
    return base.fit(model_on(base, heads=[1, 2], channels=[40, 24]), merge=True)


PROMPTS = [[2, 50, 60, 7], [2, 44], [2, 61, 62, 63, 41, 40, 55]]


def likeliest(module, ids, count):
    """Token after token, each time from all before it."""
    for _ in range(count):
        with torch.inference_mode():
            ids = [*ids, int(module(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


def test_greedy_writing_takes_the_likeliest_token_each_time(module):
    decoding = Decoding(new_tokens=6)
    together = written(module, PROMPTS, decoding, ends=(), padding=0)
    for prompt, found in zip(PROMPTS, together, strict=True):
        assert found == likeliest(module, prompt, 6)[len(prompt) :]
        assert found == written(module, [prompt], decoding, ends=(), padding=0)[0]


def test_writing_stops_at_an_end(module):
    whole = written(module, PROMPTS, Decoding(new_tokens=6), ends=(), padding=0)
    end = whole[0][3]
    cut = written(module, PROMPTS, Decoding(new_tokens=6), ends=(end,), padding=0)
    for one, other in zip(whole, cut, strict=True):
        assert other == (one[: one.index(end) + 1] if end in one else one)


def test_drawn_tokens_follow_from_the_seed(module):
    def drawn(seed, temperature=1.5):
        return written(module, PROMPTS, Decoding(8, temperature, seed), ends=(), padding=0)

    before = torch.random.get_rng_state()
    assert drawn(1) == drawn(1) != drawn(2)
    # so cold that only the likeliest token is left
    assert (
        drawn(1, 1e-4)
        == drawn(1, 1e-45)
        == written(module, PROMPTS, Decoding(8), ends=(), padding=0)
    )
    assert torch.equal(torch.random.get_rng_state(), before)


# counted by hand: 2 * common words in order / words of both
ROUGE = [
    ("police killed the gunman", "Police kill the gunman.", 2 * 3 / 8),  # Lin 2004, section 3.1
    ("the gunman kill police", "police kill the gunman", 2 * 2 / 8),  # its second candidate
    ("a b c d e", "a c e", 2 * 3 / 8),
    ("x", "y", 0.0),
    ("", "y", 0.0),
    ("!", "!", 0.0),
    ("Same, same.", "same same", 1.0),
]


@pytest.mark.parametrize(("answer", "reference", "expected"), ROUGE)
def test_rouge_l_is_that_of_the_paper(answer, reference, expected):
    assert rouge_l(answer, reference) == pytest.approx(expected)
    assert rouge_l(reference, answer) == pytest.approx(expected)


def test_an_exact_match_is_one_but_for_white_space():
    assert exact_match("a  b\n", "a b") and not exact_match("A b", "a b")
