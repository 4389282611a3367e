"""Prune after training: FedLoRA to the last bit, then each device pruned once by its scores."""

import dataclasses

import numpy as np
import pytest
import torch
from toy import Lab, Spy, bits, reached

from fedspine.core.errors import BadInput
from fedspine.lm.importance_sources import Gradient, Magnitude, RandomImportance
from fedspine.lm.structure import cut_adapter, full, is_full, shrink, sparsity
from fedspine.methods.fedlora import FedLora
from fedspine.methods.prune_after import PruneAfter

TOY = dataclasses.replace(PruneAfter.toy(), sparsity=0.5)
LORA = FedLora(
    rank=TOY.rank,
    steps=TOY.steps,
    batch=TOY.batch,
    learning_rate=TOY.learning_rate,
    head_lr_multiplier=TOY.head_lr_multiplier,
)


@pytest.fixture(scope="module")
def whole(task, tmp_path_factory):
    """The state after all rounds, and what each of them said."""
    bench, spies = Lab(task, tmp_path_factory.mktemp("whole")), []
    yield bench.run(TOY, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1]), spies
    bench.close()


def test_it_trains_as_fedlora_does(whole, lab):
    ours, _ = whole
    assert bits(TOY.unpruned(ours)) == bits(LORA.unpruned(lab("lora").run(LORA)))


def test_without_pruning_it_is_fedlora(lab):
    method, bench = dataclasses.replace(TOY, sparsity=0.0), lab("after")
    ours, theirs = bench.run(method, rounds=2), lab("lora").run(LORA, rounds=2)
    for id in (None, *bench.ids, "never-asked"):
        assert bits(method.deploy(ours, id)) == bits(LORA.deploy(theirs, id))


def test_each_device_is_pruned_once_by_the_scores_it_sent_last(whole, task):
    (state, spies), layout = whole, task.base.layout
    assert all(is_full(result.structure) for spy in spies for _, result in spy.results)
    found = set()
    for id, result in spies[-1].results:
        votes = (result.scores.heads, result.scores.channels)
        structure = shrink(layout, full(layout), votes, sparsity=TOY.sparsity, target=TOY.sparsity)
        model = TOY.deploy(state, id)
        assert torch.equal(model.structure.heads, structure.heads)
        assert torch.equal(model.structure.channels, structure.channels)
        assert bits(model.adapter) == bits(
            cut_adapter(TOY.unpruned(state).adapter, layout.sites, structure)
        )
        found.add(bits(structure))
    assert len(found) > 1


def test_what_is_deployed_is_pruned_to_the_target_at_any_time(lab, task):
    bench, layout = lab(), task.base.layout
    # nothing is known yet
    assert is_full(TOY.deploy(TOY.start(task, np.random.default_rng(0))).structure)
    state = bench.run(TOY, rounds=1)
    for id in (None, *bench.ids, "never-asked"):
        structure = TOY.deploy(state, id).structure
        assert sparsity(layout, structure) == pytest.approx(reached(layout, TOY.sparsity))
    assert is_full(TOY.unpruned(state).structure)


def test_the_fleet_decides_for_all_where_it_has_all_the_weight(lab):
    method, bench = dataclasses.replace(TOY, global_importance_weight=1.0), lab()
    state = bench.run(method, rounds=2)
    assert len({bits(method.deploy(state, id)) for id in (None, *bench.ids)}) == 1


def test_the_last_rounds_tune_what_is_pruned(lab, task):
    method, bench, spies = dataclasses.replace(TOY, recover=2), lab(), []
    state = bench.run(method, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    layout = task.base.layout
    for round, spy in enumerate(spies):
        recovering = round >= task.rounds - 2
        expected = pytest.approx(reached(layout, TOY.sparsity)) if recovering else 0.0
        assert [sparsity(layout, result.structure) for _, result in spy.results] == [expected] * 5
    for id, result in spies[-1].results:
        assert bits(method.deploy(state, id).structure) == bits(result.structure)


def test_importance_can_be_magnitude_or_chance(lab):
    structures = {
        bits(method.deploy(lab(importance.name).run(method, rounds=2), "nx-02").structure)
        for importance in (Gradient(), Magnitude(), RandomImportance())
        for method in [dataclasses.replace(TOY, importance=importance)]
    }
    assert len(structures) == 3


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"sparsity": 0.95}, "lower the target"),
        ({"recover": 5}, "recover is 5, but 0 to 4 was expected"),
        ({"recover": -1}, "recover is -1, but 0 to 4"),
        ({"importance": Gradient(every=0)}, "importance.every is 0"),
        ({"global_importance_weight": 1.5}, "global_importance_weight is 1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(task, settings, complaint):
    with pytest.raises(BadInput, match=complaint):
        dataclasses.replace(TOY, **settings).check(task)
