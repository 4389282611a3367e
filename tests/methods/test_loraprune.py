"""LoRAPrune with FedLoRA: FedLoRA without pruning, FedSpine without choices, and one schedule for
every device.
"""

import dataclasses
import math

import numpy as np
import pytest
from toy import Spy, bits, reached

from fedspine.control.controllers import Fixed
from fedspine.control.plan import cubic_floor
from fedspine.core.errors import BadInput
from fedspine.fleets.lossy import Lossy
from fedspine.lm.importance_sources import Gradient
from fedspine.lm.structure import full, is_full, sparsity
from fedspine.methods.fedlora import FedLora
from fedspine.methods.fedspine_plus import FedSpinePlus
from fedspine.methods.loraprune import LoraPrune

TOY = LoraPrune.toy()
SHARED = {
    name: getattr(TOY, name) for name in ("steps", "batch", "learning_rate", "head_lr_multiplier")
}


def test_without_pruning_it_is_fedlora(lab):
    pruned = lab("loraprune").run(dataclasses.replace(TOY, sparsity=0.0), rounds=2)
    plain = lab("lora").run(FedLora(rank=TOY.rank, **SHARED), rounds=2)
    assert bits(pruned.adapter) == bits(plain.adapter)
    assert bits(pruned.head) == bits(plain.head)


@pytest.mark.parametrize("global_importance_weight", [0.0, 0.5])
def test_it_is_fedspine_on_the_cubic_at_one_rank(lab, global_importance_weight):
    spine = FedSpinePlus(
        ranks=(TOY.rank,),
        controller=Fixed(rank=TOY.rank, ratio=0.0),  # as the schedule demands
        floor=1.0,
        importance=Gradient(),
        head_start="random",
        aggregation="zeropad",
        warmup=TOY.warmup,
        until=TOY.until,
        global_importance_weight=global_importance_weight,
        **SHARED,
    )
    method, first, second = (
        dataclasses.replace(TOY, global_importance_weight=global_importance_weight),
        lab("loraprune"),
        lab("spine"),
    )
    ours, theirs = first.run(method), second.run(spine)
    for id in (None, *first.ids, "never-asked"):
        assert bits(method.deploy(ours, id)) == bits(spine.deploy(theirs, id))
        assert not is_full(method.deploy(ours, id).structure)
    assert bits(method.unpruned(ours)) == bits(spine.unpruned(theirs))


def test_importance_settings_reach_the_devices(lab):
    plain, spies = lab("plain").run(TOY, rounds=3), []
    importance = Gradient(square=True, normalise=True, cross=1.0)
    squared = lab("squared").run(
        dataclasses.replace(TOY, importance=importance),
        rounds=3,
        around=lambda fleet: spies.append(Spy(fleet)) or spies[-1],
    )
    asked = {bits(order.scoring) for spy in spies for _, order in spy.orders}
    assert asked == {bits(importance.order)}
    assert bits(plain.structures) != bits(squared.structures)


def test_every_device_is_asked_for_the_sparsity_of_the_schedule(lab, task):
    bench, spies = lab(), []
    bench.run(TOY, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    last = {}
    for round, spy in enumerate(spies):
        due = cubic_floor(
            round, task.rounds, TOY.sparsity, warmup=TOY.warmup, until=TOY.until, share=1.0
        )
        assert {order.sparsity for _, order in spy.orders} == {due if round else 0.0}
        for id, result in spy.results:
            assert not bool(
                (result.structure.channels & ~last.get(id, full(task.base.layout)).channels).any()
            )
            last[id] = result.structure
    # each prunes by what it saw itself
    assert len({bits(structure) for structure in last.values()}) > 1


@pytest.mark.parametrize(("target", "drop"), [(0.3, 0.3), (0.5, 0.0)])
def test_every_device_ends_at_the_target(lab, task, target, drop):
    method, bench, layout = dataclasses.replace(TOY, sparsity=target), lab(), task.base.layout
    state = bench.run(method, around=lambda fleet: Lossy(fleet, drop=drop))
    for id in (None, *bench.ids, "never-asked"):
        structure = method.deploy(state, id).structure
        assert sparsity(layout, structure) == pytest.approx(reached(layout, target))
    assert is_full(method.unpruned(state).structure)


def test_nothing_is_pruned_at_the_start(task):
    state = TOY.start(task, np.random.default_rng(0))
    assert is_full(TOY.deploy(state).structure)
    assert is_full(TOY.deploy(state, "nx-02").structure)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"sparsity": 0.96}, "sparsity is 0.96, but 0 to 0.95"),
        ({"sparsity": math.nan}, "sparsity is nan"),
        ({"sparsity": 0.95}, "lower the target"),
        ({"rank": 64}, "has rank 64, but .* is 32 wide; choose 1 to 32"),
        ({"global_importance_weight": -0.5}, "global_importance_weight is -0.5, but 0 to 1"),
        ({"warmup": 0.8}, "warmup < until"),
        ({"importance": Gradient(every=0)}, "importance.every is 0"),
        ({"importance": Gradient(keep=1.5)}, "importance.keep is 1.5, but 0 to 1"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(task, settings, complaint):
    with pytest.raises(BadInput, match=complaint):
        dataclasses.replace(TOY, **settings).check(task)
