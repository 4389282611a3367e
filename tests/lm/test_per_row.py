"""DP-SGD on a device: gradients of single rows, batches of random size, and what is returned."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import fp32_apart, model_on
from toy import bits, toy_task

from fedspine.core.device import Device
from fedspine.core.draws import SeededDraws
from fedspine.core.privacy import Guard, MemoryLedger, Privacy
from fedspine.lm.importance_tracker import Scoring
from fedspine.lm.lora import is_a
from fedspine.lm.per_row import RowGradients, poisson_batches
from fedspine.lm.trainable_stack import TrainableStack
from fedspine.lm.tune import losses_of, tune
from fedspine.lm.tuning import Tuning

TUNING = Tuning(steps=3, batch=16, learning_rate=1e-2)
NOISELESS = Privacy(level="rows", epsilon=None, delta=1e-5, clip=1.0, answers=1)


def device_of(task, terms=NOISELESS, rows=60, seed=(5, 0, 0)):
    memory = {}
    guard = None if terms is None else Guard(terms, SeededDraws(seed), MemoryLedger(terms, memory))
    data = task.train.take(np.arange(rows))
    rng = np.random.default_rng(seed)
    return Device(id="a", data=data, base=task.base, memory=memory, rng=rng, privacy=guard)


def row_by_row(base, model, data, rows):
    """Gradients of one row at a time, by the training code's own backward pass."""
    found = []
    for row in rows:
        stack = TrainableStack(base, [model])
        inputs = data.batch(np.array([row]))
        losses_of(stack.fit(), inputs, 1).sum().backward()
        found.append({name: t.grad for name, t in (stack.adapter | stack.head).items()})
    return found


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_clipped_sums_are_those_of_rows_one_by_one(task, decoder, kind, pruned):
    if kind == "causal-lm":
        task = toy_task(*decoder, rounds=1, kind=kind)
    base, layers = task.base, task.base.layout.layers
    few = ([1] * layers, [3] * layers) if pruned else (None, None)
    model = model_on(base, *few)
    rows = np.arange(0, 40, 5)
    each = row_by_row(base, model, task.train, rows)
    norms = [math.sqrt(sum(float(g.square().sum()) for g in one.values())) for one in each]
    most = float(np.median(norms))  # so that some are clipped and some are not
    names = [*model.adapter, *model.head]
    gradients = RowGradients(base, model, names, task.train, losses_of)
    values = model.adapter | model.head
    made = gradients.clipped_sum(values, rows, most)
    for name in names:
        factors = [min(1.0, most / norm) for norm in norms]
        expected = sum(f * one[name] for f, one in zip(factors, each, strict=True))
        # the backward pass has as many products as the forward pass; 8 rows and 16 tokens add less
        apart = 2 * fp32_apart(base, expected)
        assert float((made[name] - expected).abs().max()) <= apart
        assert float(expected.abs().max()) > 10 * apart


def test_the_sensitivity_is_the_clip_whatever_a_row_holds(task):
    """With a row more, the sum moves by `clip` at most; huge weights have huge gradients."""
    model = model_on(task.base)
    wild = replace(model, head={name: 1e4 * value for name, value in model.head.items()})
    names, values = [*model.adapter, *model.head], wild.adapter | wild.head
    gradients = RowGradients(task.base, wild, names, task.train, losses_of)
    rows, moved = np.arange(12), []
    whole = gradients.clipped_sum(values, rows, 0.5)
    for row in rows:
        without = gradients.clipped_sum(values, rows[rows != row], 0.5)
        squares = [float((whole[n] - without[n]).double().square().sum()) for n in names]
        moved.append(math.sqrt(sum(squares)))
    assert 0.4 < max(moved) < 0.5 * (1 + 1e-4)  # fp32 sums of 12 rows of norm 0.5


def test_a_gradient_that_is_not_finite_counts_as_none(task):
    model = model_on(task.base)
    broken = replace(
        model, head={name: torch.full_like(t, math.nan) for name, t in model.head.items()}
    )
    names, values = [*model.adapter, *model.head], broken.adapter | broken.head
    gradients = RowGradients(task.base, broken, names, task.train, losses_of)
    made = gradients.clipped_sum(values, np.arange(5), 1.0)
    assert all(not tensor.any() for tensor in made.values())


def test_poisson_batches_take_each_row_alone_with_its_probability():
    rows, rate, steps = 50, 0.3, 4000
    taken = np.zeros((steps, rows), bool)
    for step, chosen in enumerate(poisson_batches(rows, rate, steps, SeededDraws((0,)))):
        taken[step, chosen] = True
    shares, deviation = taken.mean(0), math.sqrt(rate * (1 - rate) / steps)
    assert np.abs(shares - rate).max() < 5 * deviation
    # sizes are binomial, so batches are of random size and rows do not compete for places
    sizes = taken.sum(1)
    expected = steps * stats.binom.pmf(np.arange(rows + 1), rows, rate)
    common = expected >= 5
    observed = np.bincount(sizes, minlength=rows + 1)
    tail = [observed[~common].sum()], [expected[~common].sum()]
    chi = stats.chisquare(
        [*observed[common], *tail[0]], [*expected[common], *tail[1]], sum_check=False
    )
    assert chi.pvalue > 1e-6
    assert np.abs(np.corrcoef(taken[:, :10].T) - np.eye(10)).max() < 5 / math.sqrt(steps)


def test_a_private_device_learns_and_tells_no_loss(task):
    model = model_on(task.base)
    result = tune(device_of(task), model, TUNING)
    assert result.loss is None and result.scores is None
    assert all(not torch.equal(result.model.head[n], t) for n, t in model.head.items())


def test_noise_follows_from_the_seed_and_is_counted(task):
    terms = Privacy(level="rows", epsilon=1.0, delta=1e-5, clip=1.0, answers=3)
    model, device = model_on(task.base), device_of(task, terms)
    plain = tune(device_of(task), model, TUNING).model
    noisy = tune(device, model, TUNING).model
    assert any(not torch.equal(noisy.adapter[n], t) for n, t in plain.adapter.items())
    assert 0 < device.privacy.epsilon < 1.0  # of one answer of three
    again = tune(device_of(task, terms), model, TUNING).model
    assert bits(again) == bits(noisy)
    other = tune(device_of(task, terms, seed=(5, 0, 1)), model, TUNING).model
    assert bits(other) != bits(noisy)


@pytest.mark.parametrize("level", ["rows", "devices"])
def test_frozen_factors_stay_and_get_no_noise(task, level):
    terms = replace(NOISELESS, level=level, epsilon=8.0)
    model = model_on(task.base)
    made = tune(device_of(task, terms), model, TUNING, freeze_a=True).model
    for name, factor in model.adapter.items():
        assert torch.equal(made.adapter[name], factor) == is_a(name)


@pytest.mark.parametrize("few", [None, 1], ids=["whole", "pruned"])
def test_what_a_private_device_returns_moved_by_the_clip(task, few):
    """Device level without noise: the joint norm over all that leaves, whatever was pruned."""
    layers = task.base.layout.layers
    model = model_on(task.base, few and [few] * layers, few and [3] * layers)
    terms = replace(NOISELESS, level="devices", clip=0.01)
    made = tune(device_of(task, terms), model, TUNING).model
    pairs = [(made.adapter[n], t) for n, t in model.adapter.items()]
    pairs += [(made.head[n], t) for n, t in model.head.items()]
    moved = math.sqrt(sum(float((new - old).double().square().sum()) for new, old in pairs))
    # adding the update to fp32 weights of size up to 1 rounds each of them by 2^-25 at most
    numbers = sum(old.numel() for _, old in pairs)
    assert moved == pytest.approx(0.01, abs=2.0**-24 * math.sqrt(numbers))


def test_importance_of_rows_is_not_to_be_had(task):
    with pytest.raises(ValueError, match="have no noise"):
        tune(device_of(task), model_on(task.base), TUNING, scoring=Scoring(every=1))
