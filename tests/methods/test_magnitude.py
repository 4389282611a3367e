"""Magnitude pruning with FedLoRA: FedLoRA without pruning, FedSpine's control, and weights that
decide who goes.
"""

import dataclasses

import pytest
import torch
from toy import bits, reached

from fedspine.control.controllers import Fixed
from fedspine.core.errors import BadInput
from fedspine.lm import importance_sources
from fedspine.lm.importance import magnitude_scores
from fedspine.lm.structure import cut_adapter, full, shrink, sparsity
from fedspine.methods.fedlora import FedLora
from fedspine.methods.fedspine import FedSpine
from fedspine.methods.magnitude import MagnitudePruning

TOY = MagnitudePruning.toy()
SHARED = {
    name: getattr(TOY, name) for name in ("steps", "batch", "learning_rate", "head_lr_multiplier")
}


def test_without_pruning_it_is_fedlora(lab):
    pruned = lab("magnitude").run(dataclasses.replace(TOY, sparsity=0.0), rounds=2)
    plain = lab("lora").run(FedLora(rank=TOY.rank, **SHARED), rounds=2)
    assert bits(pruned.adapter) == bits(plain.adapter)
    assert bits(pruned.head) == bits(plain.head)


def test_it_is_fedspine_by_magnitude_on_the_cubic_at_one_rank(lab):
    spine = FedSpine(
        ranks=(TOY.rank,),
        controller=Fixed(rank=TOY.rank, ratio=0.0),  # as the schedule demands
        floor=1.0,
        importance=importance_sources.Magnitude(),
        aggregation="zeropad",
        warmup=TOY.warmup,
        until=TOY.until,
        **SHARED,
    )
    first, second = lab("magnitude"), lab("spine")
    ours, theirs = first.run(TOY), second.run(spine)
    for id in (None, *first.ids, "never-asked"):
        assert bits(TOY.deploy(ours, id)) == bits(spine.deploy(theirs, id))


def test_the_smallest_units_go(lab, task):
    # with a learning rate next to nothing all devices keep the base's weights, whose sizes anyone
    # can look up
    method = dataclasses.replace(TOY, learning_rate=1e-9)
    bench = lab()
    state = bench.run(method)
    whole = method.unpruned(state)
    scores = magnitude_scores(task.base, dataclasses.replace(whole, adapter={}))
    structure = shrink(
        task.base.layout,
        full(task.base.layout),
        (scores.heads, scores.channels),
        sparsity=0.5,
        target=0.5,
    )
    layout = task.base.layout
    assert sparsity(layout, structure) == pytest.approx(reached(layout, 0.5))
    for id in (None, *bench.ids):
        model = method.deploy(state, id)
        assert torch.equal(model.structure.heads, structure.heads)
        assert torch.equal(model.structure.channels, structure.channels)
        assert bits(model.adapter) == bits(
            cut_adapter(state.adapter, task.base.layout.sites, structure)
        )


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"sparsity": -0.1}, "sparsity is -0.1, but 0 to 0.95"),
        ({"rank": 0}, "has rank 0"),
        ({"global_importance_weight": 2.0}, "global_importance_weight is 2.0, but 0 to 1"),
        ({"until": 1.5}, "warmup < until"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(task, settings, complaint):
    with pytest.raises(BadInput, match=complaint):
        dataclasses.replace(TOY, **settings).check(task)
