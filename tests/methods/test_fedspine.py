"""What FedSpine promises beyond what every method does: sparsity, memory limits, and what a device
may have missed.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from toy import Spy, reached

from fedspine.control.controllers import Fixed, SUcb
from fedspine.control.plan import Plan, cubic_floor
from fedspine.control.sparsity import counts
from fedspine.core.device import Device
from fedspine.core.errors import BadInput
from fedspine.fleets.lossy import Lossy
from fedspine.lm.cost import training_memory_bytes
from fedspine.lm.forecast import USABLE_MEMORY
from fedspine.lm.importance_sources import Gradient, scoring_cost
from fedspine.lm.lora import a_name, b_name
from fedspine.lm.structure import cut_adapter, full, is_full, sparsity
from fedspine.methods.fedspine import FedSpine
from fedspine.methods.fedspine_plus import FedSpinePlus
from fedspine.pruning.device import SpineOrder, prune_and_tune

TOY = FedSpine.toy()


@pytest.fixture
def order(task):
    """An order to prune to 0.3 on the way to 0.5, built by the method itself."""
    state = TOY.start(task, np.random.default_rng(0))
    return TOY._order(state, "d", Plan(sparsity=0.3, rank=4, action=None, progress=0.0))


def device(task, memory):
    return Device(
        id="d", data=task.train, base=task.base, memory=memory, rng=np.random.default_rng(0)
    )


def poisoned(order: SpineOrder):
    return dataclasses.replace(
        order, head={name: tensor * math.nan for name, tensor in order.head.items()}
    )


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("target", [0.3, 0.5])
def test_every_device_ends_at_the_target(lab, task, target, drop):
    method, bench, layout = dataclasses.replace(TOY, sparsity=target), lab(), task.base.layout
    state = bench.run(method, around=lambda fleet: Lossy(fleet, drop=drop))
    for id in (None, *bench.ids, "never-asked"):
        structure = method.deploy(state, id).structure
        assert sparsity(layout, structure) == pytest.approx(reached(layout, target))
    assert is_full(method.unpruned(state).structure)


def test_structures_only_shrink_and_follow_the_schedule(lab, task):
    bench, spies = lab(), []
    bench.run(TOY, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    last, asked = {}, {}
    for round, spy in enumerate(spies):
        for (id, sent), (_, result) in zip(spy.orders, spy.results, strict=True):
            assert not bool(
                (result.structure.channels & ~last.get(id, full(task.base.layout)).channels).any()
            )
            due = cubic_floor(
                round, task.rounds, 0.5, warmup=TOY.warmup, until=TOY.until, share=TOY.floor
            )
            assert sent.sparsity >= max(asked.get(id, 0.0), due)
            last[id], asked[id] = result.structure, sent.sparsity


def test_nothing_is_pruned_before_its_importance_is_known(task, order):
    first = device(task, {})
    assert math.isnan(prune_and_tune(first, poisoned(order)).loss)
    second = device(task, first.memory)
    # that round gave no scores, and this one its first
    assert is_full(prune_and_tune(second, order).structure)
    third, layout = device(task, second.memory), task.base.layout
    expected = layout.shape.sparsity(*counts(layout.shape, 0.3, target=0.5))
    structure = prune_and_tune(third, order).structure
    assert sparsity(layout, structure) == pytest.approx(expected)


def test_what_a_lost_reply_pruned_stays_pruned(task, order):
    one = device(task, {})
    prune_and_tune(one, order)  # learns its importance
    further = dataclasses.replace(order, sparsity=0.5)
    # whose reply never reaches the server, which goes on from the full structure
    lost = prune_and_tune(one, further)
    replied = prune_and_tune(one, order)
    assert torch.equal(replied.structure.heads, lost.structure.heads)
    assert torch.equal(replied.structure.channels, lost.structure.channels)
    assert {name: tensor.shape for name, tensor in replied.adapter.items()} == {
        name: tensor.shape for name, tensor in lost.adapter.items()
    }


def test_a_device_reports_the_loss_of_its_last_good_round(task, order):
    one = device(task, {})
    good = prune_and_tune(one, order)
    assert good.loss_before is None
    assert prune_and_tune(one, poisoned(order)).loss_before == good.loss
    assert prune_and_tune(one, order).loss_before == good.loss


def test_devices_get_the_best_adapter_of_their_rank(lab, task):
    state = lab().run(TOY, rounds=4)
    id, structure = next(iter(state.structures.items()))
    rank = 2
    sent = TOY._order(state, id, Plan(sparsity=0.5, rank=rank, action=None, progress=0.0)).adapter
    wide = cut_adapter(state.adapter, task.base.layout.sites, structure)
    for site in task.base.layout.sites:
        a, b = a_name(site.path), b_name(site.path)
        whole = (wide[b] @ wide[a]).double()
        best = float(torch.linalg.svdvals(whole)[rank:].norm())
        left = float((sent[b].double() @ sent[a].double() - whole).norm())
        # the wire's fp16 is off by 2^-11 of each factor
        assert left <= best + 2 * 2**-11 * float(sent[b].double().norm() * sent[a].double().norm())


class Small(Spy):
    """A fleet whose first device has only so much memory, and whose second has none to speak of."""

    memory_bytes = 0

    @property
    def devices(self):
        first, second, *others = self._fleet.devices
        shrunk = (
            dataclasses.replace(first, memory_bytes=self.memory_bytes),
            dataclasses.replace(second, memory_bytes=1),
        )
        return (*shrunk, *others)


def test_the_rank_fits_the_memory(lab, task):
    bench, spies = lab(), []
    needed = [
        training_memory_bytes(
            task.base.layout,
            full(task.base.layout),
            rank=rank,
            embeddings=task.base.embeddings,
            batch=TOY.batch,
            tokens=task.max_tokens,
            scoring=scoring_cost(
                TOY.importance.order,
                task.base.layout,
                full(task.base.layout),
                rank=rank,
                largest=TOY.batch * task.max_tokens,
                steps=TOY.steps,
            ),
        )
        for rank in TOY.ranks
    ]
    # the smallest rank fits, the next does not
    Small.memory_bytes = math.ceil(needed[0] / USABLE_MEMORY)
    assert USABLE_MEMORY * Small.memory_bytes < needed[1]
    method = dataclasses.replace(TOY, sparsity=0.0)
    bench.run(method, rounds=3, around=lambda fleet: spies.append(Small(fleet)) or spies[-1])
    ranks, first = {id: set() for id in bench.ids}, a_name(task.base.layout.sites[0].path)
    for id, sent in (each for spy in spies for each in spy.orders):
        ranks[id].add(sent.adapter[first].shape[0])
    assert ranks["tx2-00"] == {TOY.ranks[0]}
    assert ranks["tx2-01"] == set()
    assert max(set.union(*ranks.values())) > TOY.ranks[0]
    left_out = [row["values"] for row in bench.rows("note") if "left_out" in row["values"]]
    assert left_out == [{"device": "tx2-01", "left_out": "no rank fits its memory"}] * 3


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"sparsity": -0.1}, "sparsity is -0.1, but 0 to 0.95"),
        ({"sparsity": 0.96}, "sparsity is 0.96, but 0 to 0.95"),
        ({"sparsity": 0.95}, "lower the target"),
        ({"ranks": ()}, "rising ranks without repeats"),
        ({"ranks": (8, 4)}, "rising ranks without repeats"),
        ({"ranks": (4, 64)}, "has rank 64, but .* is 32 wide; choose 1 to 32"),
        ({"ranks": (0, 4)}, "has rank 0"),
        ({"warmup": 0.8}, "warmup < until"),
        ({"most_per_round": 0.0}, "most_per_round is 0.0"),
        ({"importance": Gradient(every=0)}, "importance.every is 0"),
        ({"controller": SUcb(discount=1.5)}, "controller.discount is 1.5"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(task, settings, complaint):
    with pytest.raises(BadInput, match=complaint):
        dataclasses.replace(TOY, **settings).check(task)


@pytest.mark.parametrize("weight", [0.0, 0.9])
def test_a_newcomer_prunes_by_the_fleets_scores_where_these_have_weight(task, lab, weight):
    """Asked for the first time in the last round, when all others are at the target."""
    bench = lab()
    method = dataclasses.replace(
        FedSpinePlus.toy(), global_importance_weight=weight, controller=Fixed(rank=4)
    )
    *others, newcomer = bench.ids
    state = method.start(task, np.random.default_rng(0))
    for round in range(task.rounds):
        last = round == task.rounds - 1
        bench.fleet.begin_round(round)
        state = method.round(state, bench.fleet.only([newcomer] if last else others))
        bench.fleet.end_round(0.0)
    layout = task.base.layout
    found = {id: sparsity(layout, structure) for id, structure in state.structures.items()}
    expected = pytest.approx(reached(layout, method.sparsity))
    assert [found[id] for id in others] == [expected] * len(others)
    assert found[newcomer] == (expected if weight else 0)
