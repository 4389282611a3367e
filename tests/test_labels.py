"""Logit adjustment: what a device's labels and the fleet's make of it, and that FedSpine's devices learn with it."""

import dataclasses

import numpy as np
import pytest
import torch
from test_tune import device_on
from toy import toy_task

from fedspine.lm.labels import UNSEEN, Adjusting, added, label_counts, logit_shift
from fedspine.methods.fedspine import FedSpine


def test_counts_are_those_of_the_labels(task, decoder):
    counts = label_counts(device_on(task))
    assert counts.tolist() == [(task.train.labels == label).sum() for label in range(3)]
    assert label_counts(device_on(toy_task(*decoder, rounds=1, kind="causal-lm"))) is None


def test_a_device_like_the_fleet_trains_as_ever():
    shift = logit_shift(torch.tensor([6.0, 2.0]), Adjusting(tau=0.8, fleet=torch.tensor([300.0, 100.0])))
    torch.testing.assert_close(shift, torch.zeros(2))


def test_a_class_that_a_device_lacks_counts_as_half_a_row():
    fleet = torch.tensor([10.0, 10.0])
    shift = logit_shift(torch.tensor([4.0, 0.0]), Adjusting(tau=2.0, fleet=fleet))
    own = np.array([4.0, UNSEEN])
    assert shift.tolist() == pytest.approx((2 * np.log(own / own.sum() / 0.5)).tolist(), rel=1e-6)


def test_nothing_is_added_before_the_fleet_is_known():
    own = torch.tensor([1.0, 2.0])
    assert logit_shift(own, None) is None
    assert logit_shift(own, Adjusting(tau=1.0, fleet=None)) is None
    assert logit_shift(None, Adjusting(tau=1.0, fleet=own)) is None


def test_counts_add_up_over_those_who_told():
    assert added(None, [None, None]) is None
    known = torch.tensor([1.0, 0.0])
    assert added(known, [None, torch.tensor([2.0, 5.0])]).tolist() == [3.0, 5.0]
    for odd in ([1.0, 1.0, 1.0], [-1.0, 2.0], [float("nan"), 1.0]):
        assert added(known, [torch.tensor(odd)]).tolist() == [1.0, 0.0]


def test_the_fleet_learns_its_labels_and_without_adjustment_nobody_tells(lab):
    states = {}
    for tau in (0.0, 1.0):
        bench = lab(str(tau))
        states[tau] = bench.run(dataclasses.replace(FedSpine.toy(), logit_adjustment=tau), rounds=3)
    assert states[0.0].labels is None
    assert float(states[1.0].labels.sum()) == 3 * sum(map(len, bench.shares))  # all devices tell in each round
    assert any(not torch.equal(head, states[1.0].head[name]) for name, head in states[0.0].head.items())
