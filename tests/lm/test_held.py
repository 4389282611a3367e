"""Learning-rate schedules, terms against drift, and what a device keeps between two trainings."""

import dataclasses

import numpy as np
import pytest
import torch
from test_tune import model_on
from toy import bits

from fedspine.core.device import Device
from fedspine.core.errors import BadInput
from fedspine.core.logit_adjustment import OwnLabelSkew
from fedspine.execution.together import _kind
from fedspine.lm.drift import FedDyn, FedProx, Free
from fedspine.lm.schedules import Constant, Cosine, Linear
from fedspine.lm.tune import Request, train, tune
from fedspine.lm.tuning import HeldTuning, Tuning, check_tuning, tuning_at
from fedspine.methods.fedlora import FedLora

TOY = FedLora(rank=4, steps=4, batch=8, learning_rate=1e-2)


def device_on(task, memory=None, seed=0):
    rng = np.random.default_rng(seed)
    rows = task.train.take(np.arange(60))
    return Device(
        id="d", data=rows, base=task.base, memory={} if memory is None else memory, rng=rng
    )


def tuned(task, method, device=None, model=None, **asked):
    device = device or device_on(task)
    return tune(device, model or model_on(task.base), tuning_at(method, 0, 4), **asked)


def weights(model):
    return model.adapter | model.head


# --- schedules ---


def test_the_default_is_the_fall_that_there_always_was():
    for round in range(7):
        rate = tuning_at(TOY, round, 7).learning_rate
        assert rate == TOY.learning_rate * (1 - round / 7)
        assert type(tuning_at(TOY, round, 7)) is Tuning


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        (Linear(warmup_rounds=2), [1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4]),
        (Constant(warmup_rounds=1), [1 / 2, 1, 1, 1, 1, 1]),
        (Constant(), [1, 1, 1, 1, 1, 1]),
        (Cosine(warmup_rounds=2), [1 / 3, 2 / 3, 1, (2 + 2**0.5) / 4, 1 / 2, (2 - 2**0.5) / 4]),
        # the same falls, of four fifths of the rate above the fifth that stays
        (Linear(warmup_rounds=2, floor=0.2), [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4]),
        (Cosine(warmup_rounds=3, floor=0.2), [1 / 4, 2 / 4, 3 / 4, 1, 0.8, 0.4]),
        (Linear(floor=1.0), [1, 1, 1, 1, 1, 1]),
    ],
)
def test_rates_of_a_run_of_six_rounds(schedule, shares):
    method = dataclasses.replace(TOY, schedule=schedule)
    tunings = [tuning_at(method, round, 6) for round in range(6)]
    assert [t.learning_rate / TOY.learning_rate for t in tunings] == pytest.approx(shares)
    heads = [t.head_learning_rate / t.learning_rate for t in tunings]
    assert heads == pytest.approx([TOY.head_lr_multiplier] * 6)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"schedule": Cosine(warmup_rounds=-1)}, "schedule.warmup_rounds is -1"),
        ({"schedule": Cosine(floor=-0.1)}, "schedule.floor is -0.1, but 0 to 1 was expected"),
        ({"schedule": Linear(floor=float("nan"))}, "schedule.floor is nan, but 0 to 1"),
        ({"drift": FedProx(mu=0.0)}, "drift.mu is 0, but a positive number"),
        ({"drift": FedDyn(alpha=float("nan"))}, "drift.alpha is nan, but a positive number"),
        ({"logit_adjustment": OwnLabelSkew(share=1.1)}, "share is 1.1, but 0 to 1"),
    ],
)
def test_settings_that_cannot_work(changed, line):
    with pytest.raises(BadInput, match=line):
        check_tuning(dataclasses.replace(TOY, **changed))


# --- logits adjusted by a device's label skew ---

ADJUSTED = dataclasses.replace(TOY, logit_adjustment=OwnLabelSkew())


def device_of(task, rows):
    return dataclasses.replace(device_on(task), data=task.train.take(np.array(rows)))


def test_equal_shares_of_the_labels_adjust_nothing(task):
    labels, classes = task.train.labels, task.base.config.num_labels
    rows = np.concatenate([np.flatnonzero(labels == each)[:12] for each in range(classes)])
    plain, adjusted = (tuned(task, method, device_of(task, rows)) for method in (TOY, ADJUSTED))
    assert bits(weights(plain.model)) == bits(weights(adjusted.model))
    assert plain.loss == adjusted.loss


def test_a_skewed_device_trains_as_if_its_head_knew_its_shares(task):
    """An adjusted logit is that of a head whose bias has the skew, which is taken back after
    training.
    """
    rows = [
        *np.flatnonzero(task.train.labels == 0)[:30],
        *np.flatnonzero(task.train.labels == 1)[:6],
    ]
    share, classes = 0.95, task.base.config.num_labels
    shares = np.bincount(task.train.labels[rows], minlength=classes) / len(rows)
    skew = torch.tensor(np.log(1 - share + share * shares * classes)).float()
    model = model_on(task.base)
    (bias,) = [name for name in model.head if name.endswith("classifier.bias")]
    shifted = dataclasses.replace(model, head=model.head | {bias: model.head[bias] + skew})
    part = dataclasses.replace(ADJUSTED, logit_adjustment=OwnLabelSkew(share=share))
    plain, adjusted = (dataclasses.replace(each, weight_decay=0.0) for each in (TOY, part))
    by_hand = tuned(task, plain, device_of(task, rows), shifted).model
    found = tuned(task, adjusted, device_of(task, rows), model).model
    assert not torch.allclose(found.head[bias], by_hand.head[bias], atol=0.1)
    expected = weights(by_hand) | {bias: by_hand.head[bias] - skew}
    for name, tensor in weights(found).items():
        assert torch.allclose(tensor, expected[name], atol=1e-2 * TOY.learning_rate)


def test_a_device_of_one_class_teaches_nothing(task):
    rows = np.flatnonzero(task.train.labels == 0)[:40]
    method = dataclasses.replace(ADJUSTED, weight_decay=0.0)
    model = model_on(task.base)
    found = tuned(task, method, device_of(task, rows), model)
    assert bits(weights(found.model)) == bits(weights(model))
    assert found.loss > 0.1  # that of the plain logits


# --- terms against drift ---


def test_fedprox_adds_its_term_to_the_gradient(task):
    """One step of SGD could be compared by hand, but devices have AdamW: so the same training with
    the term as a penalty of the method's own.
    """
    model, mu = model_on(task.base), 3.0
    sent = weights(model)

    def by_hand(trained):
        return mu / 2 * sum((trained[name] - sent[name]).square().sum() for name in sent)

    prox = tuned(task, dataclasses.replace(TOY, drift=FedProx(mu=mu)))
    own = tuned(task, TOY, penalty=by_hand)
    free = tuned(task, TOY)
    for name, tensor in weights(prox.model).items():
        # a step of AdamW divides by the size of a gradient, so that a last bit of one whose entries
        # nearly cancel may move an entry by a share of the rate; nearly all are equal to the bit
        assert torch.allclose(tensor, weights(own.model)[name], atol=1e-2 * TOY.learning_rate)
    assert distance(prox.model, model) < distance(free.model, model)


def distance(one, other):
    return float(
        sum(
            (weights(one)[n].double() - t.double()).square().sum()
            for n, t in weights(other).items()
        )
    )


def test_a_penalty_of_the_method_is_added_to_fedproxs(task):
    method, nothing = dataclasses.replace(TOY, drift=FedProx(mu=1.0)), []

    def seen(trained):
        nothing.append(len(trained))
        return 0.0 * sum(tensor.sum() for tensor in trained.values())

    first, second = tuned(task, method), tuned(task, method, penalty=seen)
    assert len(nothing) == TOY.steps
    assert bits(first.model) == bits(second.model)


def test_feddyn_keeps_what_each_training_moved(task):
    alpha, device, model = 0.5, device_on(task), model_on(task.base)
    method = dataclasses.replace(TOY, drift=FedDyn(alpha=alpha))
    first = tuned(task, method, device, model)
    kept = device.memory["drift"]
    for name, tensor in weights(first.model).items():
        expected = -alpha * (tensor - weights(model)[name])
        assert torch.equal(kept[name], expected)
    second = tuned(task, method, device, first.model)
    for name, tensor in weights(second.model).items():
        expected = kept[name] - alpha * (tensor - weights(first.model)[name])
        assert torch.equal(device.memory["drift"][name], expected)


def test_terms_are_charged_to_the_device(task):
    numbers = sum(tensor.numel() for tensor in weights(model_on(task.base)).values())
    spent = {}
    for drift in (Free(), FedProx(), FedDyn()):
        device = device_on(task)
        tuned(task, dataclasses.replace(TOY, drift=drift), device)
        spent[drift.name] = (device.peak_memory_bytes, device.flops)
    memory, flops = spent["none"]
    # fp32 copies: of what was received, for FedDyn also of its g
    assert spent["fedprox"] == (memory + 4 * numbers, flops + TOY.steps * 3 * numbers)
    assert spent["feddyn"] == (memory + 8 * numbers, flops + TOY.steps * 4 * numbers)


# --- what a device keeps ---


def test_a_kept_optimiser_is_one_training_cut_in_two(task):
    """Two trainings of one step each on the same rows as one of two steps."""
    rows = device_on(task).data.take(np.zeros(8, np.int64))  # all batches are alike
    twice = dataclasses.replace(TOY, steps=2, schedule=Constant())
    once = dataclasses.replace(twice, steps=1, keep_optimiser=True)
    whole = tuned(task, twice, dataclasses.replace(device_on(task), data=rows))
    device, model = dataclasses.replace(device_on(task), data=rows), model_on(task.base)
    for _ in range(2):
        model = tuned(task, once, device, model).model
    assert device.memory["optimiser"].steps == 2
    assert bits(model) == bits(whole.model)
    forgetful = model_on(task.base)
    for _ in range(2):
        forgetful = tuned(
            task, dataclasses.replace(once, keep_optimiser=False), device, forgetful
        ).model
    assert bits(forgetful) != bits(whole.model)


def test_devices_in_one_pass_go_on_with_their_own_moments(task):
    method, alone = dataclasses.replace(TOY, keep_optimiser=True), []
    tuning = tuning_at(method, 0, 4)
    devices = [device_on(task, seed=seed) for seed in (1, 2)]
    for device in devices:
        tuned(task, method, device)
    begun = [device.memory["optimiser"] for device in devices]
    for seed, moments in zip((1, 2), begun, strict=True):
        device = device_on(task, {"optimiser": moments}, seed=seed)
        alone.append((tuned(task, method, device).model, device.memory["optimiser"]))
    requests = [
        Request(
            device_on(task, seed=seed),
            model_on(task.base),
            tuning,
            moments=moments,
            keeps_moments=True,
        )
        for seed, moments in zip((1, 2), begun, strict=True)
    ]
    assert _kind(requests[0]) == _kind(requests[1])
    younger = dataclasses.replace(requests[0], moments=None)
    assert _kind(younger) != _kind(requests[1])
    for (_, moments), together in zip(alone, train(requests), strict=True):
        assert together.moments.steps == moments.steps == 2 * TOY.steps
        for name, tensor in moments.first.items():
            # the same sums in another order: a gradient's entries are below 1, and rounding of
            # some hundred products of 2^-24 each comes to less than 1e-5
            assert torch.allclose(tensor, together.moments.first[name], atol=1e-5)


def test_a_training_that_was_not_finite_is_not_kept(task):
    method = dataclasses.replace(TOY, keep_optimiser=True, drift=FedDyn(), personal_head=True)
    device, broken = device_on(task), model_on(task.base)
    broken = dataclasses.replace(broken, head={n: t * torch.nan for n, t in broken.head.items()})
    tuned(task, method, device, broken)
    assert device.memory == {}


def test_a_personal_head_stays_whatever_comes(task):
    method, device = dataclasses.replace(TOY, personal_head=True), device_on(task)
    first = tuned(task, method, device)
    assert bits(device.memory["head"]) == bits(first.model.head)
    other = dataclasses.replace(first.model, head=model_on(task.base, seed=5).head)
    second, third = (
        tuned(task, method, device_on(task, dict(device.memory), seed=3), model)
        for model in (other, first.model)
    )
    assert bits(second.model) == bits(third.model)


def test_predicted_reads_have_the_penalty_and_the_whole_rate(task):
    method = dataclasses.replace(TOY, drift=FedProx(mu=0.2), schedule=Cosine(warmup_rounds=3))
    assert tuning_at(TOY, 0, 4).reads.descent.penalty == 0
    assert tuning_at(method, 0, 4).reads.descent.penalty == 0.2
    descent = method.predicted_reads(task.base).descent
    assert descent.penalty == 0.2
    assert descent.learning_rates == TOY.predicted_reads(task.base).descent.learning_rates


def test_orders_are_as_short_as_before_unless_more_is_asked(task):
    assert type(tuning_at(TOY, 0, 4)) is Tuning
    held = tuning_at(dataclasses.replace(TOY, drift=FedProx(mu=0.2)), 0, 4)
    assert isinstance(held, HeldTuning)
    assert (held.proximal, held.dynamic, held.keep_optimiser) == (0.2, False, False)
