"""Several devices trained in one batched pass: the same as one after another but for rounding,
whatever their sizes.
"""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from tolerances import TINY
from toy import Lab, bits, toy_task

from fedspine.core.device import Call, Device, name_of, on_device, serve
from fedspine.core.message import Tensors, message, pack, unpack
from fedspine.execution import together as module
from fedspine.execution.scoring import Deployment, marks, score_models
from fedspine.execution.together import serve_together
from fedspine.execution.workers import ScoreJob, Workshop
from fedspine.lm.base import Model
from fedspine.lm.importance import Scores
from fedspine.lm.importance_tracker import Scoring
from fedspine.lm.lora import fresh
from fedspine.lm.score import score, score_together
from fedspine.lm.structure import Structure, cut_adapter, full, shrink
from fedspine.lm.trainable_stack import TrainableStack
from fedspine.lm.tune import losses_of, train, tune
from fedspine.lm.tuning import Tuning
from fedspine.methods.fedlora import FedLora
from fedspine.methods.fedspine import FedSpine
from fedspine.methods.hetlora import HetLora

TUNING = Tuning(steps=6, batch=8, learning_rate=1e-2, head_learning_rate=2e-2)

# At a rate of next to nothing the weights stay where they are, so losses and scores are those of
# the same weights and differ by rounding alone; at the rate above AdamW turns that rounding into
# steps, which differ from one processor to the next.
STILL = replace(TUNING, learning_rate=1e-9, head_learning_rate=1e-9)


@message
class Exercise:
    model: Model
    tuning: Tuning
    scoring: Scoring | None


@message
class Trained:
    adapter: Tensors
    head: Tensors
    loss: float
    scores: Scores | None


@on_device
def train_once(device: Device, job: Exercise) -> Trained:
    trace = tune(device, job.model, job.tuning, scoring=job.scoring)
    return Trained(
        adapter=trace.model.adapter, head=trace.model.head, loss=trace.loss, scores=trace.scores
    )


@on_device
def train_twice(device: Device, job: Exercise) -> Trained:
    again = tune(device, job.model, job.tuning).model
    return train_once(device, replace(job, model=again))


@on_device
def fail(device: Device, job: Exercise) -> Trained:
    raise ArithmeticError(f"{device.id} cannot")


def models(base, ranks, targets):
    """Models of these ranks and sparsities, with adapters that already do something."""
    layout, rng = base.layout, np.random.default_rng(0)
    head = base.initial_head(rng)
    for rank, target in zip(ranks, targets, strict=True):
        structure = full(layout)
        if target:
            scores = tuple(torch.rand(kept.shape) for kept in (structure.heads, structure.channels))
            structure = shrink(layout, structure, scores, sparsity=target, target=target)
        adapter = {
            name: t + 0.01 if name.endswith("B") else t
            for name, t in fresh(layout.sites, rank, rng).items()
        }
        yield Model(
            structure=structure,
            adapter=cut_adapter(adapter, layout.sites, structure),
            head=head,
            scale=2.0,
        )


def calls(task, models, work=train_once, tuning=TUNING, scoring=None):
    """A call for each model, on devices that hold different rows."""
    shares = np.array_split(np.random.default_rng(3).permutation(len(task.train)), 5)
    for i, model in enumerate(models):
        order = pack(Exercise(model=model, tuning=tuning, scoring=scoring)).payload
        call = Call(
            device=f"d{i}", index=i, work=name_of(work), order=order, memory=None, seed=(1, i)
        )
        yield call, task.train.take(shares[i])


def both_ways(task, jobs):
    """What each call gives on its own and together with the others: call, `Served` and `Served`."""
    jobs = list(jobs)
    alone = [serve(call, task.base, data) for call, data in jobs]
    return zip(
        [call for call, _ in jobs],
        alone,
        serve_together([call for call, _ in jobs], task.base, [data for _, data in jobs]),
        strict=True,
    )


def assert_alike(call, alone, together):
    """The same cost and shapes, and a change of the same direction and size.

    AdamW divides a gradient by its own size, so rounding of one near zero moves an entry by up to a
    learning rate; what is exact are gradients and the losses of the same weights, which
    `test_gradients_together_are_those_alone` and `test_losses_together_are_those_alone` compare.
    Rounding was measured to make up 1 % of the change, and rows of another device more than 100 %.
    """
    before, first, second = unpack(call.order).model, unpack(alone.result), unpack(together.result)
    apart, moved = 0.0, 0.0
    for name, tensor in (first.adapter | first.head).items():
        other = (second.adapter | second.head)[name]
        assert tensor.shape == other.shape
        apart += float((tensor - other).square().sum())
        moved += float((tensor - (before.adapter | before.head)[name]).square().sum())
    assert apart < 0.05**2 * moved
    assert costs(alone) == costs(together)


def costs(served):
    return served.flops, served.launches, served.samples, served.peak_memory_bytes


@pytest.fixture
def sizes(monkeypatch):
    """How many models were trained in each pass."""
    seen = []
    monkeypatch.setattr(
        module, "train", lambda requests: (seen.append(len(requests)), train(requests))[1]
    )
    return seen


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
@pytest.mark.parametrize(
    ("ranks", "targets"),
    [
        ((4, 4, 4), (0, 0, 0)),
        ((2, 4, 3), (0, 0, 0)),
        ((4, 4, 4), (0.5, 0, 0.3)),
        ((2, 4, 1), (0.5, 0.5, 0.0)),
    ],
    ids=["equal", "ranks", "structures", "both"],
)
def test_together_is_one_after_another(task, decoder, sizes, kind, ranks, targets):
    task = task if kind == "classification" else toy_task(*decoder, rounds=1, kind=kind)
    for each in both_ways(task, calls(task, models(task.base, ranks, targets))):
        assert_alike(*each)
    assert sizes == [3]


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_gradients_together_are_those_alone(task, decoder, kind):
    task = task if kind == "classification" else toy_task(*decoder, rounds=1, kind=kind)
    trio = list(models(task.base, (2, 4, 3), (0.5, 0, 0.3)))
    rows = [np.arange(5) + 5 * i for i in range(3)]
    width = max(task.train.width(chosen) for chosen in rows)
    parts = [task.train.batch(chosen, width) for chosen in rows]
    stacked = TrainableStack(task.base, trio)
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    losses = losses_of(stacked.fit(), joined, 3)
    losses.sum().backward()
    for i, (model, inputs) in enumerate(zip(trio, parts, strict=True)):
        single = TrainableStack(task.base, [model])
        loss = losses_of(single.fit(), inputs, 1)
        loss.sum().backward()
        assert losses[i].item() == pytest.approx(loss.item(), rel=TINY)
        # over all tensors: some have a gradient of zero, of which only rounding is left
        apart = size = 0.0
        for name, leaf in (single.adapter | single.head).items():
            own = (stacked.adapter | stacked.head)[name].grad[i][
                tuple(slice(size) for size in leaf.shape)
            ]
            apart += (own - leaf.grad).square().sum().item()
            size += leaf.grad.square().sum().item()
        # forward and back are three times the sums, but in a norm the roundings average out: the
        # root of 3 is left of the five standard deviations in TINY
        assert apart**0.5 < TINY * size**0.5


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_losses_together_are_those_alone(task, decoder, kind):
    task = task if kind == "classification" else toy_task(*decoder, rounds=1, kind=kind)
    jobs = calls(task, models(task.base, (2, 4, 1), (0.5, 0.5, 0.0)), tuning=STILL)
    for _, alone, together in both_ways(task, jobs):
        expected = unpack(alone.result).loss
        assert unpack(together.result).loss == pytest.approx(expected, rel=TINY)


@pytest.mark.parametrize("of", ["gradient", "blend"])
def test_importance_is_followed_together(task, of):
    scoring = Scoring(of=of, every=2)
    jobs = calls(task, models(task.base, (4, 4, 2), (0, 0.5, 0.3)), tuning=STILL, scoring=scoring)
    for _, alone, together in both_ways(task, jobs):
        first, second = unpack(alone.result).scores, unpack(together.result).scores
        for mine, theirs in ((first.heads, second.heads), (first.channels, second.channels)):
            # of products of two gradients, or of an activation and one
            assert float((mine - theirs).norm()) < 2 * TINY * float(mine.norm())
            assert torch.equal(mine == 0, theirs == 0)
        assert costs(alone) == costs(together)


def test_work_may_train_more_than_once_and_in_groups(task, sizes):
    slow = replace(TUNING, learning_rate=1e-3, head_learning_rate=1e-3)
    slower = replace(slow, learning_rate=5e-4)
    some = list(
        calls(task, list(models(task.base, (4,) * 4, (0,) * 4)), work=train_twice, tuning=slower)
    )
    others = list(calls(task, list(models(task.base, (4,) * 4, (0,) * 4)), tuning=slow))
    for each in both_ways(task, [some[0], others[1], some[2], others[3]]):
        assert_alike(*each)
    assert sizes == [2, 2, 2]  # two that train twice, and once the two that train otherwise


def test_one_that_diverges_leaves_the_others_alone(task):
    good, bad, other = models(task.base, (4, 4, 4), (0, 0, 0))
    broken = replace(bad, head={name: t * float("nan") for name, t in bad.head.items()})
    first, (_, alone, together), third = both_ways(task, calls(task, [good, broken, other]))
    assert_alike(*first)
    assert_alike(*third)
    assert np.isnan(unpack(together.result).loss)
    assert costs(alone) == costs(together)  # both end with the first step
    assert together.samples == TUNING.batch


def test_a_failure_is_the_failure_of_all(task):
    jobs = [
        *calls(task, models(task.base, (4,), (0,))),
        *calls(task, models(task.base, (4,), (0,)), work=fail),
    ]
    before = threading.active_count()
    with pytest.raises(ArithmeticError, match="d0 cannot"):
        serve_together([call for call, _ in jobs], task.base, [data for _, data in jobs])
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before  # nobody waits for ever


@pytest.mark.parametrize("method", [FedLora.toy(), FedSpine.toy()], ids=["fedlora", "fedspine"])
def test_a_run_together_has_the_same_bits_for_any_number_of_workers(task, tmp_path, method):
    states = []
    for workers in (0, 2):
        lab = Lab(task, tmp_path / str(workers), workers=workers, together=3)
        try:
            states.append(bits(lab.run(method, rounds=3)))
        finally:
            lab.close()
    assert states[0] == states[1]


def test_a_padded_unit_stays_zero(task):
    small, whole = models(task.base, (2, 4), (0.5, 0))
    stack = TrainableStack(task.base, [small, whole])
    rows = np.arange(4)
    inputs = {name: torch.cat([tensor, tensor]) for name, tensor in task.train.batch(rows).items()}
    losses_of(stack.fit(), inputs, 2).sum().backward()
    for name, tensor in stack.adapter.items():
        outside = torch.ones_like(tensor[0], dtype=torch.bool)
        outside[tuple(slice(size) for size in small.adapter[name].shape)] = False
        assert not tensor.grad[0][outside].any(), name
        assert tensor.grad[0].any() and tensor.grad[1].any(), name


def test_structures_need_not_nest(task):
    layout = task.base.layout
    left, right = full(layout), full(layout)
    left = Structure(heads=left.heads.clone(), channels=left.channels.clone())
    right = Structure(heads=right.heads.clone(), channels=right.channels.clone())
    left.channels[:, ::2] = False
    right.channels[:, 1::2] = False
    left.heads[:, 0] = False
    right.heads[:, -1] = False
    rng = np.random.default_rng(0)
    adapter, head = fresh(layout.sites, 3, rng), task.base.initial_head(rng)
    pair = [
        Model(structure=s, adapter=cut_adapter(adapter, layout.sites, s), head=head, scale=2.0)
        for s in (left, right)
    ]
    for each in both_ways(task, calls(task, pair)):
        assert_alike(*each)


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_scores_together_are_those_alone(task, decoder, kind):
    task = task if kind == "classification" else toy_task(*decoder, rounds=1, kind=kind)
    structure = next(models(task.base, (2,), (0.5,))).structure
    wide = list(models(task.base, (2, 4, 3), (0, 0, 0)))
    sites = task.base.layout.sites
    trio = [
        replace(m, structure=structure, adapter=cut_adapter(m.adapter, sites, structure))
        for m in wide
    ]
    trio[1] = replace(trio[1], head={name: tensor + 0.1 for name, tensor in trio[1].head.items()})
    for model, found in zip(trio, score_together(task.base, trio, task.test), strict=True):
        alone = score(task.base, model, task.test)
        assert found.mean_loss == pytest.approx(alone.mean_loss, rel=TINY)
        # no two logits of these rows are so near that rounding would swap them
        assert (found.count, found.correct) == (alone.count, alone.correct)


def test_marks_are_the_same_for_models_scored_together(task, tmp_path, monkeypatch):
    asked = []
    do = Workshop.do
    monkeypatch.setattr(
        Workshop,
        "do",
        lambda self, job: (
            isinstance(job, ScoreJob) and asked.append(len(job.models)),
            do(self, job),
        )[1],
    )
    found, state, method = [], None, HetLora.toy()
    for together in (1, 3):
        lab = Lab(task, tmp_path / str(together), together=together)
        try:
            # trained once, as AdamW makes steps of rounding
            state = state or method.round(method.start(task, np.random.default_rng(0)), lab.fleet)
            deployment = Deployment(method, state, tuple(lab.ids))
            found.append(marks(score_models(deployment, task, lab.workers, 60), task.kind))
        finally:
            lab.close()
    first, second = found
    assert max(asked) > 1
    assert second == {key: pytest.approx(value, rel=TINY) for key, value in first.items()}
