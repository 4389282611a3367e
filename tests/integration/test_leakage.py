"""What a server can read from an answer, by the attacks of benchmarks/leakage.py on a tiny model.

The attacks must work where theory says so, on features and on answers about one row; otherwise that
they find nothing in answers about many rows would mean nothing.
"""

import leakage
import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoConfig, AutoModelForTokenClassification

from fedspine.core.task import Examples, Task
from fedspine.lm.load import load
from fedspine.lm.tiny import write_tiny
from fedspine.methods.splitlora import SplitLora

CLASSES, WORDS, PLACES = ("red", "green", "blue"), 8, 10
VOCABULARY, WIDTH = 20_000, 64
OF_CLASS = 30  # words that only rows of one class begin with
ROWS = 32  # the fewest distinct rows behind an answer that a site accepts by default
ADAPTERS = ("fedlora", "fedspine", "linear_probe", "fedavg")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A tiny BERT with a vocabulary that 640 rows do not use up, and rows of words drawn from it."""
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
    return leakage.Scene.of(task, tokenizer.all_special_ids, public=450, pool=1300, candidates=72, seed=0)


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


def scores(found, server, what, attack):
    """The scores of one attack, one for each answer."""
    return next(
        each.scores
        for each in found
        if (each.server, each.what, each.attack) == (server, what, attack)
    )


def test_features_that_left_before_the_first_block_are_the_texts(scene):
    found = leakage.attack_features(scene, SplitLora(cut=0, rank=4), rows=1, answers=6)
    assert np.mean(scores(found, "curious", "tokens", "nearest embedding")) > 0.99
    assert np.mean(scores(found, "curious", "members", "features")) == 1.0
    assert np.mean(scores(found, "curious", "labels", "labels are sent")) == 1.0


def test_an_answer_about_one_row_tells_its_label_its_tokens_and_whether_a_row_is_it(scene):
    found = leakage.attacked(scene, "fedlora", (1, 1), answers=6, shadows=4)
    assert np.mean(scores(found, "curious", "labels", "signs of the bias")) == 1.0
    assert np.mean(scores(found, "curious", "members", "gradient")) == 1.0
    # of an exact gradient, with fewer tokens than the layer is wide
    assert np.mean(scores(found, "hostile", "tokens", "span")) > 0.99
    assert np.mean(scores(found, "hostile", "labels", "counts from the bias")) > 0.99


@pytest.mark.parametrize("method", ADAPTERS)
def test_what_a_method_orders_tells_no_tokens_of_32_rows(scene, method):
    found = leakage.attacked(scene, method, (1, ROWS), answers=8, shadows=2)
    tried = [each for each in found if (each.server, each.what) == ("curious", "tokens")]
    assert tried
    for each in tried:
        # the same tokens held against rows that the answer is not about
        above = np.array(each.scores) - np.array(each.control)
        noise = stats.t.ppf(0.995, len(above) - 1) * above.std(ddof=1) / np.sqrt(len(above))
        assert above.mean() <= noise, f"{method}, {each.attack}: {above.mean():.3f} above chance"
