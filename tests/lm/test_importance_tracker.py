"""Importance that is tracked while a model trains: each source against its definition."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tolerances import TINY
from torch.nn.functional import cross_entropy

from fedspine.core.device import Device
from fedspine.lm.base import Model
from fedspine.lm.importance import geometric_mean
from fedspine.lm.importance_tracker import ImportanceTracker, Scoring
from fedspine.lm.lora import a_name, b_name, fresh
from fedspine.lm.structure import cut_adapter, full, kept_columns
from fedspine.lm.trainable_stack import TrainableStack
from fedspine.lm.tune import losses_of, tune
from fedspine.lm.tuning import Tuning

ROWS = np.arange(12)


def model_of(base, *, cut):
    """A model with a random adapter and head, whole or without a head and two channels of its
    second layer.
    """
    rng, structure = np.random.default_rng(0), full(base.layout)
    if cut:
        structure.heads[1, 0] = False
        structure.channels[1, [3, 9]] = False
    adapter = fresh(base.layout.sites, 3, rng)
    for name in (name for name in adapter if name.endswith("lora_B")):
        adapter[name] = torch.from_numpy(
            rng.normal(0, 0.1, tuple(adapter[name].shape)).astype(np.float32)
        )
    adapter = cut_adapter(adapter, base.layout.sites, structure)
    return Model(structure=structure, adapter=adapter, head=base.initial_head(rng), scale=2.0)


def tracked_scores(task, model, of):
    """The importance after one step, and the leaves it was read from."""
    stack = TrainableStack(task.base, [model])
    module, inputs = stack.fit(), task.train.batch(ROWS)
    with ImportanceTracker(stack, Scoring(of=of), [None]) as tracker:
        tracker.before_forward(0, inputs["attention_mask"])
        losses_of(module, dict(inputs), 1).sum().backward()
        tracker.update(0)
    return tracker.scores[0], stack


def units_of(layout, structure):
    """Every reader with the columns, among those kept, of each of its units: site, layer, unit,
    columns.
    """
    for site in layout.sites:
        if site.column_units:
            owners = kept_columns(site, structure) // site.per_unit
            for unit in owners.unique().tolist():
                yield site, unit, (owners == unit).nonzero().squeeze(1)


def of_unit(scores, site, unit):
    return (scores.heads if site.column_units == "heads" else scores.channels)[site.layer, unit]


def same_within_layers(scores, expected, *, rel, off=0.0):
    """The same but for one factor by layer and kind of unit, in which every layer has unit norm; an
    expected number may be off by a share `rel` and by `off`.
    """
    by_row = {}
    for (site, unit), value in expected.items():
        by_row.setdefault((site.path, site.layer), []).append((of_unit(scores, site, unit), value))
    for pairs in by_row.values():
        found, wanted = (torch.tensor([float(pair[i]) for pair in pairs]) for i in (0, 1))
        size = float(wanted.norm())
        torch.testing.assert_close(found, wanted / size, rtol=rel, atol=off / size)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "pruned"])
def test_a_gate_is_the_slope_of_each_rows_loss(task, cut):
    model = model_of(task.base, cut=cut)
    scores, _ = tracked_scores(task, model, "gate")
    module, inputs = task.base.fit(model), task.train.batch(ROWS)
    labels = inputs.pop("labels")

    def losses(site, columns, factor):
        def scaled(_, args):
            x = args[0].clone()
            x[..., columns] *= factor
            return (x,)

        hook = module.get_submodule(site.path).register_forward_pre_hook(scaled)
        with torch.no_grad():
            found = cross_entropy(module(**inputs).logits, labels, reduction="none")
        hook.remove()
        return found.double()

    step, expected = 0.02, {}
    for site, unit, columns in units_of(task.base.layout, model.structure):
        slopes = (losses(site, columns, 1 + step) - losses(site, columns, 1 - step)) / (2 * step)
        expected[site, unit] = slopes.square().sum().sqrt()
    # a third derivative of six times the slope would make them off by a share step^2; and losses
    # near 1 are rounded
    off = TINY / (2 * step) * math.sqrt(len(ROWS))
    same_within_layers(scores, expected, rel=step**2, off=off)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "pruned"])
def test_activation_is_what_a_unit_adds_to_its_layers_output(task, cut):
    model = model_of(task.base, cut=cut)
    scores, _ = tracked_scores(task, model, "activation")
    module, inputs, entered = task.base.fit(model), task.train.batch(ROWS), {}
    tokens = inputs["attention_mask"].bool()
    assert not tokens.all()  # padding is there, and must not count
    readers = [site for site in task.base.layout.sites if site.column_units]
    hooks = [
        module.get_submodule(site.path).register_forward_pre_hook(
            lambda _, args, path=site.path: entered.update({path: args[0][tokens]})
        )
        for site in readers
    ]
    with torch.no_grad():
        module(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
    for hook in hooks:
        hook.remove()
    expected = {}
    for site, unit, columns in units_of(task.base.layout, model.structure):
        product = model.adapter[b_name(site.path)] @ model.adapter[a_name(site.path)]
        weight = task.base.slice(site.path, model.structure)[0] + model.scale * product
        added = [
            torch.outer(entered[site.path][:, c], weight[:, c]).square().sum()
            for c in columns.tolist()
        ]
        expected[site, unit] = torch.stack(added).sum().sqrt()
    same_within_layers(scores, expected, rel=TINY)


def test_a_blend_is_the_geometric_mean_of_both(task):
    model = model_of(task.base, cut=True)
    gate, activation, blend = (
        tracked_scores(task, model, of)[0] for of in ("gate", "activation", "blend")
    )
    wanted = geometric_mean(activation, gate)
    torch.testing.assert_close(blend.heads, wanted.heads)
    torch.testing.assert_close(blend.channels, wanted.channels)
    assert torch.equal(blend.channels > 0, model.structure.channels)  # what is gone has none


@pytest.mark.parametrize("of", ["activation", "gate", "blend"])
@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_tracking_changes_nothing_that_is_trained(task, decoder, kind, of):
    from toy import toy_task

    job = task if kind == "classification" else toy_task(*decoder, rounds=1, kind=kind)
    tuning = Tuning(steps=3, batch=4, learning_rate=1e-3)

    def tuned(scoring):
        device = Device(
            id="d", data=job.train, base=job.base, memory={}, rng=np.random.default_rng(0)
        )
        rng = np.random.default_rng(1)
        whole = full(job.base.layout)
        start = Model(
            structure=whole,
            adapter=fresh(job.base.layout.sites, 2, rng),
            head=job.base.initial_head(rng),
            scale=2.0,
        )
        return tune(device, start, tuning, scoring=scoring)

    plain, tracked = tuned(None), tuned(Scoring(of=of, every=2))
    assert all(
        torch.equal(plain.model.adapter[name], tensor)
        for name, tensor in tracked.model.adapter.items()
    )
    assert tracked.scores is not None
    assert bool((tracked.scores.channels > 0).any()) and bool(
        torch.isfinite(tracked.scores.heads).all()
    )
    linears = [job.base.skeleton.get_submodule(site.path) for site in job.base.layout.sites]
    assert not any(linear._forward_pre_hooks for linear in linears)  # all hooks are removed


def test_hooks_are_removed_when_training_fails(task):
    stack = TrainableStack(task.base, [model_of(task.base, cut=False)])
    with (
        pytest.raises(RuntimeError, match="stop"),
        ImportanceTracker(stack, Scoring(of="gate"), [None]),
    ):
        raise RuntimeError("stop")
    assert not any(linear._forward_pre_hooks for _, linear in stack.readers())


def test_only_due_steps_are_recorded(task):
    device = Device(
        id="d", data=task.train, base=task.base, memory={}, rng=np.random.default_rng(0)
    )
    model, tuning = model_of(task.base, cut=False), Tuning(steps=4, batch=4, learning_rate=1e-3)
    every, first = (
        tune(
            replace(device, rng=np.random.default_rng(0)),
            model,
            tuning,
            scoring=Scoring(of="gate", every=n),
        ).scores
        for n in (1, 4)
    )
    once = tune(
        replace(device, rng=np.random.default_rng(0)),
        model,
        replace(tuning, steps=4),
        scoring=Scoring(of="gate", every=9),
    ).scores
    assert torch.equal(first.channels, once.channels) and not torch.equal(
        every.channels, first.channels
    )
