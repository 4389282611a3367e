"""What scoring units costs: by hand from shapes, against the products that run, and charged to
nobody who does not score.
"""

import dataclasses

import numpy as np
import pytest
import torch
from test_tune import ROBERTA, cut_to, device_on, model_on
from torch.utils.flop_counter import FlopCounterMode

from fedspine.lm.cost import NO_SCORING, ScoringCost, training_memory_bytes
from fedspine.lm.importance_sources import AtRandom, ByMagnitude, scoring_cost, tune_and_score
from fedspine.lm.importance_tracker import Scoring
from fedspine.lm.scoring_cost import tracking_cost
from fedspine.lm.structure import full, sparsity
from fedspine.lm.tune import batches, tune
from fedspine.lm.tuning import Tuning
from fedspine.methods import all_methods

BLOCK = 7_077_888  # weights of a block of RoBERTa-base: four of 768 x 768, two of 768 x 3072
READ = 768 * 768 + 768 * 3072  # of these in the two layers that read units
WIDE = 4 * 768 * 3072  # bytes of its largest matrix in fp32
TOKENS, LARGEST, UPDATES, RANK = 20_000, 4096, 10, 16
GRADIENT = ScoringCost(float(UPDATES * 12 * BLOCK * (6 * RANK + 5)), 0, 2 * WIDE)
COLUMNS = 12 * (768 + 3072)  # columns of all layers that read units
BY_OUTPUT = 3 * TOKENS * COLUMNS + UPDATES * 12 * READ * (2 * RANK + 4)
BY_GATE = 2 * TOKENS * COLUMNS


@pytest.mark.parametrize(
    ("scoring", "cost"),
    [
        (None, NO_SCORING),
        (Scoring(), GRADIENT),
        (Scoring(square=True, normalise=True), GRADIENT),
        (
            Scoring(cross=1.0),
            ScoringCost(float(UPDATES * 12 * BLOCK * (8 * RANK + 7)), 0, 3 * WIDE),
        ),
        (Scoring(of="activation"), ScoringCost(float(BY_OUTPUT), 8 * LARGEST * 3072, WIDE)),
        (Scoring(of="gate"), ScoringCost(float(BY_GATE), 6 * LARGEST * 3072, 0)),
        (Scoring(of="blend"), ScoringCost(float(BY_OUTPUT + BY_GATE), 8 * LARGEST * 3072, WIDE)),
    ],
)
def test_tracking_by_hand(scoring, cost):
    shapes = {"rank": RANK, "tokens": TOKENS, "largest": LARGEST, "updates": UPDATES}
    assert tracking_cost(ROBERTA, full(ROBERTA), scoring, **shapes) == cost


def test_what_is_pruned_is_not_scored():
    half = cut_to(ROBERTA, 0.5)
    shapes = {"rank": RANK, "tokens": 0, "largest": 0, "updates": 1}
    found = tracking_cost(ROBERTA, half, Scoring(), **shapes)
    # to the grain of whole channels
    kept = 12 * BLOCK * (1 - sparsity(ROBERTA, half))
    assert found.flops == pytest.approx(kept * (6 * RANK + 5), rel=1e-12)
    assert found.bytes_after == 2 * 4 * 768 * int(half.channels.sum(1).max())


def test_magnitude_is_read_once_and_chance_costs_nothing():
    for steps in (1, 20):
        cost = scoring_cost(ByMagnitude(), ROBERTA, full(ROBERTA), rank=RANK, steps=steps)
        assert cost == ScoringCost(float(12 * BLOCK * (2 * RANK + 4)), 0, 2 * WIDE)
    assert scoring_cost(AtRandom(), ROBERTA, full(ROBERTA), rank=RANK, steps=20) == NO_SCORING


@pytest.mark.parametrize(("every", "updates"), [(1, 20), (3, 7), (20, 1), (50, 1)])
def test_only_steps_that_score_are_paid(every, updates):
    cost = scoring_cost(
        Scoring(every=every), ROBERTA, full(ROBERTA), rank=RANK, tokens=TOKENS, steps=20
    )
    assert cost.flops == updates * 12 * BLOCK * (6 * RANK + 5)
    gate = Scoring(of="gate", every=every)
    cost = scoring_cost(gate, ROBERTA, full(ROBERTA), rank=RANK, tokens=TOKENS, steps=20)
    assert cost.flops == pytest.approx(2 * TOKENS * updates / 20 * COLUMNS)


def test_memory_is_needed_beside_the_activations_or_after_them():
    def needed(**scoring):
        return training_memory_bytes(
            ROBERTA,
            full(ROBERTA),
            rank=RANK,
            embeddings=0,
            batch=1,
            tokens=1,
            scoring=ScoringCost(**scoring),
        )

    activations = 12 * (768 * 34 + 5 * 12)  # of one token
    assert needed(bytes_beside=1000) == needed() + 1000
    assert needed(bytes_after=activations) == needed()
    assert needed(bytes_after=activations + 1000) == needed() + 1000


# what a device is charged


def products(task, how, tuning):
    """Operations of products that run in a training, and what the device is charged."""
    device = device_on(task)

    def addmm(out, left, right, **_):
        return 2 * left[0] * left[1] * right[1]

    custom = {torch.ops.aten.addmm_: addmm}
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        if how is None:
            tune(device, model_on(task.base), tuning)
        else:
            tune_and_score(device, model_on(task.base), tuning, how, None)
    return counter.get_total_flops(), device


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("source", ["gradient", "activation", "gate", "blend", "magnitude"])
def test_the_products_that_run_are_those_that_are_charged(task, source, every):
    tuning = Tuning(steps=3, batch=8, learning_rate=1e-2)
    how = ByMagnitude() if source == "magnitude" else Scoring(of=source, every=every)
    (without, plain), (with_it, scored) = (products(task, h, tuning) for h in (None, how))
    layout, rank = task.base.layout, 4
    rows = list(batches(task.train, tuning, np.random.default_rng(0)))
    tokens = sum(task.train.batch(chosen)["input_ids"].numel() for chosen in rows[::every])
    updates = len(rows[::every])
    readers = [site for site in layout.sites if site.column_units]
    read = sum(site.rows * site.columns for site in readers)
    columns_read = sum(site.columns for site in readers)
    ran = {
        "gradient": updates * 6 * rank * layout.parameters,
        "activation": updates * 2 * rank * read + 2 * tokens * columns_read,
        "gate": 0,
        "blend": updates * 2 * rank * read + 2 * tokens * columns_read,
        "magnitude": 2 * rank * layout.parameters,
    }[source]
    passes = {
        "gradient": updates * 5 * layout.parameters,
        "activation": updates * 4 * read + tokens * columns_read,
        "gate": 2 * tokens * columns_read,
        "blend": updates * 4 * read + 3 * tokens * columns_read,
        "magnitude": 4 * layout.parameters,
    }[source]
    assert with_it - without == ran
    assert scored.flops - plain.flops == ran + passes


def test_methods_that_do_not_score_pay_for_no_scoring(lab, task):
    layout = task.base.layout
    for name in ("fedlora", "hetlora", "flexlora"):
        bench, method = lab(name), all_methods()[name].toy()
        method = dataclasses.replace(method, steps=1)
        bench.run(method, rounds=1)
        most = max(method.ranks) if name != "fedlora" else method.rank
        for row in bench.rows("exchange"):
            # nothing but a step of training fits below this, whatever the rank and the length
            assert row["peak_memory_bytes"] <= training_memory_bytes(
                layout,
                full(layout),
                rank=most,
                embeddings=task.base.embeddings,
                batch=method.batch,
                tokens=task.max_tokens,
            )
