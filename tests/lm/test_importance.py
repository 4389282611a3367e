"""Importance of units: against a dense computation, its moving average, and what removing a unit
really does.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tolerances import FP16, rounding
from torch import nn

from fedspine.core.device import Device
from fedspine.core.message import pack, unpack
from fedspine.lm.base import Model
from fedspine.lm.importance import (
    Criterion,
    Scores,
    ballot,
    magnitude_scores,
    mixed,
    normalised,
    on_wire,
    random_scores,
    score_units,
    smooth,
    tally,
)
from fedspine.lm.importance_tracker import Scoring
from fedspine.lm.lora import a_name, b_name, fresh
from fedspine.lm.score import score
from fedspine.lm.structure import Structure, cut_adapter, full, kept_columns, kept_rows
from fedspine.lm.tune import tune
from fedspine.lm.tuning import Tuning

SCALE = 2.0


def scores(heads, channels=((0.0,),)):
    return Scores(heads=torch.tensor(heads), channels=torch.tensor(channels))


def trainable(base, rng, structure):
    """A model with a random adapter whose tensors ask for gradients."""
    adapter = fresh(base.layout.sites, 3, rng)
    for name in adapter:
        if name.endswith("lora_B"):
            adapter[name] = torch.from_numpy(
                rng.normal(0, 0.1, tuple(adapter[name].shape)).astype(np.float32)
            )
    adapter = cut_adapter(adapter, base.layout.sites, structure)
    adapter = {name: tensor.clone().requires_grad_() for name, tensor in adapter.items()}
    return Model(structure=structure, adapter=adapter, head=base.initial_head(rng), scale=SCALE)


def partly(layout):
    """A structure without the first head and two channels of the second layer."""
    structure = full(layout)
    structure.heads[1, 0] = False
    structure.channels[1, [3, 9]] = False
    return structure


def dense_scores(base, model, criterion):
    """The same scores, written down unit by unit from the formula of the specification."""
    layout = base.layout
    found = Scores(
        heads=torch.zeros(layout.layers, layout.heads),
        channels=torch.zeros(layout.layers, layout.channels),
    )
    for site in layout.sites:
        a, b = model.adapter[a_name(site.path)], model.adapter[b_name(site.path)]
        estimate = b.grad @ a + b @ a.grad - criterion.cross * b.grad @ a.grad
        entries = estimate * (base.slice(site.path, model.structure)[0] + model.scale * b @ a)
        entries = entries.square() if criterion.square else entries.abs()
        lines = entries.sum(1) if site.row_units else entries.sum(0)
        if criterion.normalise:
            lines = lines / lines.norm()
        kept = (
            kept_rows(site, model.structure)
            if site.row_units
            else kept_columns(site, model.structure)
        )
        units = found.heads if "heads" in (site.row_units, site.column_units) else found.channels
        for line, value in zip(kept.tolist(), lines.tolist(), strict=True):
            units[site.layer, line // site.per_unit] += value
    return found


@pytest.mark.parametrize(
    "criterion", [Criterion(), Criterion(square=True, cross=0.7), Criterion(normalise=True)]
)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_scores_are_those_of_the_formula(task, decoder, architecture, cut, criterion):
    base = task.base if architecture == "bert" else decoder[0]
    rng = np.random.default_rng(0)
    model = trainable(base, rng, partly(base.layout) if cut else full(base.layout))
    for tensor in model.adapter.values():
        tensor.grad = torch.from_numpy(rng.standard_normal(tuple(tensor.shape)).astype(np.float32))
    ours = score_units(base, model, criterion)
    with torch.no_grad():
        theirs = dense_scores(base, model, criterion)
    off = rounding(4 * 8 * base.layout.width)  # four projections of up to 8 lines of a head each
    torch.testing.assert_close(ours.heads, theirs.heads, rtol=off, atol=0)
    torch.testing.assert_close(ours.channels, theirs.channels, rtol=off, atol=0)
    assert bool(((ours.heads > 0) == model.structure.heads).all())
    assert bool(((ours.channels > 0) == model.structure.channels).all())


def units_of(site, kind):
    """Whether this site's rows or columns belong to units of this kind."""
    return kind in (site.row_units, site.column_units)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_magnitudes_are_norms_of_all_that_goes_with_a_unit(task, decoder, architecture, cut):
    base = task.base if architecture == "bert" else decoder[0]
    layout = base.layout
    model = trainable(base, np.random.default_rng(0), partly(layout) if cut else full(layout))
    found = magnitude_scores(base, model)
    for kind, scores, kept in (
        ("heads", found.heads, model.structure.heads),
        ("channels", found.channels, model.structure.channels),
    ):
        for layer, unit in np.ndindex(tuple(scores.shape)):
            if not kept[layer, unit]:
                assert scores[layer, unit] == 0
                continue
            place, entries = int(kept[layer, :unit].sum()), []
            for site in (
                site for site in layout.sites if site.layer == layer and units_of(site, kind)
            ):
                weight = base.slice(site.path, model.structure)[0].double()
                a, b = (
                    model.adapter[a_name(site.path)].double(),
                    model.adapter[b_name(site.path)].double(),
                )
                lines = slice(place * site.per_unit, (place + 1) * site.per_unit)
                effective = (weight + SCALE * b @ a).detach()
                entries.append(
                    (effective[lines] if site.row_units else effective[:, lines]).flatten()
                )
            assert float(scores[layer, unit]) == pytest.approx(
                float(torch.cat(entries).norm()),
                # that of a sum of squares, of which the root halves it
                rel=rounding(sum(len(part) for part in entries)) / 2,
            )


def test_magnitudes_need_no_adapter_and_change_nothing(task):
    rng = np.random.default_rng(0)
    bare = Model(
        structure=full(task.base.layout), adapter={}, head=task.base.initial_head(rng), scale=SCALE
    )
    zero = replace(bare, adapter=fresh(task.base.layout.sites, 2, rng))  # whose B is zero
    before = {path: weight.clone() for path, (weight, _) in task.base.weights.items()}
    torch.testing.assert_close(
        magnitude_scores(task.base, bare).heads, magnitude_scores(task.base, zero).heads
    )
    assert all(torch.equal(task.base.weights[path][0], weight) for path, weight in before.items())


def test_chance_is_uniform_over_what_is_kept_and_repeats(task):
    layout = task.base.layout
    structure = partly(layout)
    first, again, other = (
        random_scores(layout, structure, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.channels, again.channels)
    assert not torch.equal(first.channels, other.channels)
    assert torch.equal(first.heads > 0, structure.heads)
    assert torch.equal(first.channels > 0, structure.channels)
    kept = first.channels[structure.channels]
    # the mean of n uniform draws has standard error sqrt(1/12/n)
    assert float(kept.mean()) == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / len(kept)))
    assert 0 < float(kept.min()) < float(kept.max()) <= 1


def test_the_gradient_estimate_is_that_of_autograd():
    # dL/dB = s G A^T and dL/dA = s B^T G with G = dL/dW, so gB A + B gA = s (G A^T A + B B^T G):
    # against torch's own G.
    rng = np.random.default_rng(1)
    weight, a, b, x = (
        torch.from_numpy(rng.standard_normal(shape)) for shape in ((5, 7), (2, 7), (5, 2), (11, 7))
    )
    effective = (weight + SCALE * b @ a).requires_grad_()
    nn.functional.linear(x, effective).square().sum().backward()
    gradient = effective.grad
    a.requires_grad_(), b.requires_grad_()
    nn.functional.linear(x, weight + SCALE * b @ a).square().sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(
            b.grad @ a + b @ a.grad, SCALE * (gradient @ a.T @ a + b @ b.T @ gradient)
        )


def test_scoring_needs_gradients(task):
    with pytest.raises(ValueError, match="no gradients; score units after a backward pass"):
        score_units(
            task.base, trainable(task.base, np.random.default_rng(0), full(task.base.layout))
        )


def test_the_average_has_no_bias_of_its_start():
    first = scores([[3.0, 5.0]])
    assert smooth(None, first, 0.9) is first and first.updates == 1
    # by hand: Adam's 0.9 * (0.1 * 1) + 0.1 * 2 = 0.29, divided by 1 - 0.81, where an uncorrected
    # average has 1.1
    second = smooth(scores([[1.0, 2.0]], [[10.0]]), scores([[2.0, 4.0]], [[20.0]]), 0.9)
    assert second.heads.tolist() == [[pytest.approx(0.29 / 0.19), pytest.approx(0.58 / 0.19)]]
    assert second.channels.tolist() == [[pytest.approx(2.9 / 0.19)]]
    # then 0.9 * 0.29 + 0.1 * 7 = 0.961, divided by 1 - 0.729
    third = smooth(second, scores([[7.0, 7.0]], [[7.0]]), 0.9)
    assert third.heads[0, 0].item() == pytest.approx(0.961 / 0.271)
    assert (second.updates, third.updates) == (2, 3)
    # what is not finite is no update
    assert smooth(third, scores([[math.nan, 7.0]], [[7.0]]), 0.9).updates == 3


@pytest.mark.parametrize(
    ("keep", "weights"), [(0.0, [0.0, 0.0, 1.0]), (0.5, [1 / 7, 2 / 7, 4 / 7]), (1.0, [1 / 3] * 3)]
)
def test_updates_weigh_by_their_age_alone(keep, weights):
    total = sum(weight * value for weight, value in zip(weights, (5.0, 11.0, 17.0), strict=True))
    found = None
    for value in (5.0, 11.0, 17.0):
        found = smooth(found, scores([[value]]), keep)
    assert found.heads.item() == pytest.approx(total)


def test_a_kept_average_goes_on_with_its_count():
    once = smooth(scores([[1.0]]), scores([[2.0]]), 0.9)
    again = unpack(pack(once))
    assert again.updates == 2
    for before in (once, again):
        assert smooth(before, scores([[7.0]]), 0.9).heads.item() == pytest.approx(0.961 / 0.271)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_skipped(bad):
    before = scores([[1.0, 2.0]])
    assert smooth(before, scores([[bad, 9.0]]), 0.9) is before
    assert smooth(before, scores([[9.0, 9.0]], [[bad]]), 0.9) is before
    assert smooth(None, scores([[bad, 9.0]]), 0.9) is None


def test_a_dropped_unit_keeps_its_last_score():
    assert smooth(scores([[1.0, 2.0]]), scores([[0.0, 8.0]]), 0.5).heads.tolist() == [
        [1.0, pytest.approx(6.0)]  # (2 + 2 * 8) / 3
    ]


def test_ballots_have_unit_norm_and_no_vote_for_what_is_gone():
    kept = Structure(
        heads=torch.tensor([[True, True, False]]), channels=torch.tensor([[True, False]])
    )
    vote = ballot(scores([[3.0, 4.0, 100.0]], [[7.0, 1.0]]), kept)
    assert vote.heads.dtype is vote.channels.dtype is torch.float16
    assert vote.heads.tolist() == [
        [pytest.approx(0.6, rel=FP16), pytest.approx(0.8, rel=FP16), 0.0]
    ]
    assert vote.channels.tolist() == [[1.0, 0.0]]
    assert normalised(scores([[0.0, 0.0]])).heads.tolist() == [[0.0, 0.0]]


def test_mixing_weighs_scores_of_unit_norm_whatever_their_precision():
    own, fleet = scores([[3.0, 4.0]], [[2.0, 0.0]]), scores([[0.0, 9.0]], [[0.0, 5.0]])
    for say, heads in ((0.0, [0.6, 0.8]), (0.25, [0.45, 0.85]), (1.0, [0.0, 1.0])):
        found = mixed(own, on_wire(fleet), say)
        assert found.heads.dtype is torch.float32
        assert found.heads.tolist() == [[pytest.approx(value) for value in heads]]
        assert found.channels.tolist() == [[pytest.approx(1 - say), pytest.approx(say)]]
    assert torch.equal(
        mixed(on_wire(own), on_wire(fleet), 0.25).heads, mixed(own, fleet, 0.25).heads
    )


def test_a_tally_is_a_moving_average_in_which_gone_counts_as_nothing():
    first = tally(None, [scores([[1.0, 0.0]]), scores([[0.0, 0.5]])])
    assert first.heads.tolist() == [[0.5, 0.25]]
    second = tally(first, [scores([[1.0, 0.0]])])
    # (0.9 * 0.5 + 1) / (0.9 + 1), and 0.9 * 0.25 / 1.9 for the unit that is gone
    assert second.heads.tolist() == [[pytest.approx(1.45 / 1.9), pytest.approx(0.225 / 1.9)]]


def test_no_round_of_a_tally_weighs_more_than_a_later_one():
    # by hand: after nine rounds the first weighs 0.9^8 (1 - 0.9) / (1 - 0.9^9) = 0.0703, and not
    # 0.9^8 = 0.43
    found = None
    for vote in [1.0] + [0.0] * 8:
        found = tally(found, [scores([[vote]])])
    assert found.heads.item() == pytest.approx(0.9**8 * 0.1 / (1 - 0.9**9))
    assert found.updates == 9


def test_importance_predicts_what_removal_costs(task):
    # The specification's check on a synthetic network found a rank correlation of 0.82. Here: two
    # layers of 64 channels; unrelated rankings would correlate by 0 with a standard error of
    # 1/sqrt(2 * 63) = 0.089 in the mean over layers, so four of them (0.36) are no luck.
    rng = np.random.default_rng(2)
    layout = task.base.layout
    model = Model(
        structure=full(layout),
        adapter=fresh(layout.sites, 4, rng),
        head=task.base.initial_head(rng),
        scale=SCALE,
    )
    device = Device(id="d", data=task.train, base=task.base, memory={}, rng=rng)
    for _ in range(2):
        tuning = Tuning(steps=20, batch=16, learning_rate=1e-2)
        trace = tune(device, model, tuning, scoring=Scoring())
        model = trace.model
    whole = score(task.base, model, task.train).mean_loss
    correlations = []
    for layer in range(layout.layers):
        costs = []
        for channel in range(layout.channels):
            structure = full(layout)
            structure.channels[layer, channel] = False
            adapter = cut_adapter(model.adapter, layout.sites, structure)
            without = Model(structure=structure, adapter=adapter, head=model.head, scale=SCALE)
            costs.append(abs(score(task.base, without, task.train, batch=300).mean_loss - whole))
        correlations.append(rank_correlation(trace.scores.channels[layer].numpy(), np.array(costs)))
    assert np.mean(correlations) > 4 / math.sqrt(2 * 63)


def rank_correlation(first, second):
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def traced(task, **settings):
    rng = np.random.default_rng(3)
    model = Model(
        structure=full(task.base.layout),
        adapter=fresh(task.base.layout.sites, 4, rng),
        head=task.base.initial_head(rng),
        scale=SCALE,
    )
    device = Device(id="d", data=task.train, base=task.base, memory={}, rng=rng)
    tuning = Tuning(
        **{"steps": 4, "batch": 8, "learning_rate": 1e-2, "clip": settings.pop("clip", 1.0)}
    )
    return tune(device, model, tuning, **settings)


def test_scores_follow_training_without_changing_it(task):
    plain, followed, seldom = (
        traced(task, scoring=scoring) for scoring in (None, Scoring(), Scoring(every=3))
    )
    assert plain.scores is None
    assert all(
        torch.equal(plain.model.adapter[name], tensor)
        for name, tensor in followed.model.adapter.items()
    )
    assert not torch.equal(followed.scores.heads, seldom.scores.heads)


def test_scores_are_read_before_clipping(task):
    # only the first step is scored, so all that the clip could change is the gradient that the
    # scores are read off
    tight, loose = (traced(task, scoring=Scoring(every=99), clip=clip) for clip in (1e-6, 1e6))
    assert torch.equal(tight.scores.channels, loose.scores.channels)
