"""HetLoRA: ranks by device, the pressure on the last directions, shrinking, and weights by norm."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from tolerances import rounding
from toy import Spy, bits

from fedspine.core.device import Call, Device, name_of, serve
from fedspine.core.errors import BadInput
from fedspine.core.message import pack, unpack
from fedspine.core.tensors import half, single
from fedspine.execution.together import serve_together
from fedspine.lm.base import Model
from fedspine.lm.lora import a_name, b_name, cut_rank, fresh
from fedspine.lm.structure import full
from fedspine.lm.training_account import rank_of
from fedspine.lm.tune import tune
from fedspine.lm.tuning import tuning_at
from fedspine.lm.unequal_ranks import rank_of_device
from fedspine.methods.fedlora import FedLora
from fedspine.methods.fedspine import FedSpine
from fedspine.methods.hetlora import HetLora, HetLoraOrder, tail, tune_and_shrink

TOY = HetLora.toy()
SHARED = {
    name: getattr(TOY, name) for name in ("steps", "batch", "learning_rate", "head_lr_multiplier")
}
GIB = 2**30


def recording(spies):
    return lambda fleet: spies.append(Spy(fleet)) or spies[-1]


def orders_of(spies):
    return [each for spy in spies for each in spy.orders]


def trained_adapter(task, rank, seed=3):
    """An adapter whose B is no longer zero."""
    rng = np.random.default_rng(seed)
    adapter = fresh(task.base.layout.sites, rank, rng)
    return {
        name: tensor
        if name.endswith("lora_A")
        else torch.from_numpy(rng.normal(0, 0.05, tuple(tensor.shape)).astype(np.float32))
        for name, tensor in adapter.items()
    }


def order_of(task, adapter, method, *, shrunk):
    return HetLoraOrder(
        adapter=half(adapter),
        head=half(task.base.initial_head(np.random.default_rng(4))),
        scale=method.scale,
        rank=rank_of(
            Model(structure=full(task.base.layout), adapter=adapter, head={}, scale=method.scale)
        ),
        shrunk=shrunk,
        penalty=method.penalty,
        tuning=tuning_at(method, 0, 5),
    )


def device_of(task):
    return Device(
        id="x",
        data=task.train.take(np.arange(60)),
        base=task.base,
        memory={},
        rng=np.random.default_rng(5),
    )


@pytest.mark.parametrize("rank", [3, 8])
def test_at_one_rank_weighed_by_rows_it_is_fedlora(lab, rank):
    # the smallest rank is never shrunk, so neither penalty nor decay has anything to act on
    method = HetLora(ranks=(rank,), weigh_by="examples", penalty=7.0, decay=0.5, **SHARED)
    ours = lab("ours").run(method, rounds=3)
    theirs = lab("theirs").run(FedLora(rank=rank, **SHARED), rounds=3)
    assert bits(ours.adapter) == bits(theirs.adapter)
    assert bits(ours.head) == bits(theirs.head)


def test_at_one_rank_it_is_fedspine_that_does_not_prune_and_aggregates_as_hetlora(lab):
    ours = lab("ours").run(HetLora(ranks=(4,), **SHARED), rounds=3)
    theirs = lab("theirs").run(
        FedSpine(sparsity=0.0, ranks=(4,), aggregation="hetlora", **SHARED), rounds=3
    )
    assert bits(ours.adapter) == bits(theirs.adapter)
    assert bits(ours.head) == bits(theirs.head)


@pytest.mark.parametrize(
    ("gib", "rank"),
    # of 16 GiB for rank 16: 8 earn a half, 1 a sixteenth, which no rank is as small as
    [(1, 2), (2, 2), (4, 4), (8, 8), (15.9, 8), (16, 16), (64, 16)],
)
def test_rank_follows_declared_memory(gib, rank):
    method = HetLora(ranks=(2, 4, 8, 16), largest_rank_gib=16.0)
    assert rank_of_device(method, "any", int(gib * GIB), seed=0) == rank


def test_drawn_ranks_depend_on_device_and_seed_alone_and_are_equally_likely():
    method = HetLora(ranks=(2, 4, 8, 16), rank_by="random")
    drawn = [rank_of_device(method, f"nx-{i:03d}", GIB, seed=1) for i in range(400)]
    assert drawn == [rank_of_device(method, f"nx-{i:03d}", 64 * GIB, seed=1) for i in range(400)]
    assert drawn != [rank_of_device(method, f"nx-{i:03d}", GIB, seed=2) for i in range(400)]
    for rank in method.ranks:
        # a quarter of 400 draws, give or take four standard errors of sqrt(400 * 1/4 * 3/4)
        assert abs(drawn.count(rank) - 100) < 4 * math.sqrt(400 * 3 / 16)


def test_a_device_gets_the_first_directions_of_the_common_adapter(lab):
    bench, spies = lab(), []
    method = HetLora(ranks=(2, 8), **SHARED)
    before = bench.run(method, rounds=1)
    bench.fleet.begin_round(1)
    method.round(before, recording(spies)(bench.fleet))
    for id, order in orders_of(spies):
        rank = 8 if id.startswith("agx") else 2  # 8 of 32 GiB earn a quarter of rank 8
        assert order.rank == rank
        assert bits(order.adapter) == bits(half(cut_rank(before.adapter, rank)))


def test_factors_are_averaged_by_the_norm_of_their_product(lab, task):
    bench, spies = lab(), []
    state = bench.run(TOY, rounds=1, around=recording(spies))
    results = [result for spy in spies for _, result in spy.results]
    assert len({result.rank for result in results}) > 1

    def norm(result):
        squares = (
            (
                result.adapter[b_name(site.path)].double()
                @ result.adapter[a_name(site.path)].double()
            )
            .square()
            .sum()
            for site in task.base.layout.sites
        )
        return float(sum(squares)) ** 0.5

    total, largest = sum(map(norm, results)), max(result.rank for result in results)
    for site in task.base.layout.sites:
        name = b_name(site.path)
        expected = torch.zeros(site.rows, largest, dtype=torch.float64)
        for result in results:
            expected[:, : result.rank] += norm(result) / total * result.adapter[name].double()
        # weights, products and sums in fp32 round once each
        off = rounding(3 * len(results), float(expected.abs().max()))
        torch.testing.assert_close(
            state.adapter[name][:, :largest].double(), expected, rtol=0, atol=off
        )


def test_the_tail_is_the_product_of_its_norms(task):
    layout, adapter = task.base.layout, trained_adapter(task, 6)
    expected = sum(
        float(adapter[b_name(site.path)][:, 4:].norm() * adapter[a_name(site.path)][4:].norm())
        for site in layout.sites
    )
    # norms of two factors' columns, of 64 numbers at most
    assert float(tail(layout, adapter, 4)) == pytest.approx(expected, rel=rounding(2 * 2 * 64))
    assert float(tail(layout, adapter, 6)) == 0.0


def test_a_tail_that_shrinks_is_given_up_and_one_that_grows_is_kept(task):
    small = dataclasses.replace(TOY, penalty=100.0)  # so that the tail falls whatever the text says
    given_up = tune_and_shrink(
        device_of(task), order_of(task, trained_adapter(task, 6), small, shrunk=4)
    )
    assert given_up.rank == 4
    assert {
        tensor.shape[0] for name, tensor in given_up.adapter.items() if name.endswith("lora_A")
    } == {4}
    # its tail is zero and can only grow
    untrained = fresh(task.base.layout.sites, 6, np.random.default_rng(0))
    kept = tune_and_shrink(device_of(task), order_of(task, untrained, TOY, shrunk=4))
    assert kept.rank == 6
    assert {
        tensor.shape[1] for name, tensor in kept.adapter.items() if name.endswith("lora_B")
    } == {6}


def test_the_penalty_presses_the_tail_and_is_no_part_of_the_loss_reported(task):
    layout, adapter = task.base.layout, trained_adapter(task, 6)
    one_step = dataclasses.replace(TOY, steps=1)
    results = {}
    for penalty in (0.0, 10.0):
        order = order_of(task, adapter, dataclasses.replace(one_step, penalty=penalty), shrunk=4)
        model = Model(
            structure=full(layout),
            adapter=single(order.adapter),
            head=single(order.head),
            scale=order.scale,
        )
        pressure = (lambda factors, by=penalty: by * tail(layout, factors, 4)) if penalty else None
        results[penalty] = tune(device_of(task), model, order.tuning, penalty=pressure)
        assert bits(half(cut_rank(results[penalty].model.adapter, 4))) == bits(
            cut_rank(tune_and_shrink(device_of(task), order).adapter, 4)
        )
    assert results[0.0].loss == results[10.0].loss  # of the only step, before anything is pressed
    free, pressed = (tail(layout, results[penalty].model.adapter, 4) for penalty in (0.0, 10.0))
    assert pressed < min(free, tail(layout, adapter, 4))


def test_each_device_is_pressed_by_its_own_tail_when_several_train_together(task):
    method = dataclasses.replace(TOY, penalty=1.0)
    tails = {0: (6, 4), 1: (3, 2), 2: (5, 5)}  # rank, and what it would shrink to
    orders = [
        order_of(task, trained_adapter(task, rank), method, shrunk=shrunk)
        for rank, shrunk in tails.values()
    ]
    calls = [
        Call(
            device=f"d{i}",
            index=i,
            work=name_of(tune_and_shrink),
            order=pack(o).payload,
            memory=None,
            seed=(1, i),
        )
        for i, o in enumerate(orders)
    ]
    shares = [task.train.take(np.arange(40 * i, 40 * i + 40)) for i in tails]
    alone = [serve(call, task.base, rows) for call, rows in zip(calls, shares, strict=True)]
    together = serve_together(calls, task.base, shares)
    for first, second in (
        (unpack(a.result), unpack(b.result)) for a, b in zip(alone, together, strict=True)
    ):
        assert first.rank == second.rank
        for name, tensor in first.adapter.items():
            # AdamW divides a gradient by its own size: rounding of one near zero moves an entry by
            # a learning rate
            difference = (tensor.float() - second.adapter[name].float()).abs()
            assert float(difference.mean()) < 1e-3 * TOY.learning_rate, name


def test_the_server_remembers_who_gave_up_rank(lab):
    bench, spies = lab(), []
    method = dataclasses.replace(
        TOY, penalty=100.0, decay=0.75, ranks=(2, 8), largest_rank_gib=8.0, rank_by="memory"
    )
    state = bench.run(method, rounds=5, around=recording(spies))
    ranks = {id: [order.rank for who, order in orders_of(spies) if who == id] for id in bench.ids}
    # everybody starts at 8; a B of zeros cannot shrink, so the first round keeps it; then 6, 4 (3/4
    # of 6 is 4.5), 3
    assert ranks == {id: [8, 8, 6, 4, 3] for id in bench.ids}
    assert set(state.ranks.values()) == {2}
    assert all(
        order.shrunk == max(math.floor(0.75 * order.rank), 2) for _, order in orders_of(spies)
    )
    for id in bench.ids:
        assert rank_of(method.deploy(state, id)) == 2
    assert rank_of(method.unpruned(state)) == 8


def test_without_decay_nobody_gives_up_rank(lab):
    method = dataclasses.replace(
        TOY, penalty=100.0, decay=1.0, ranks=(2, 8), largest_rank_gib=8.0, rank_by="memory"
    )
    state = lab().run(method, rounds=3)
    assert set(state.ranks.values()) == {8}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"ranks": ()}, "rising ranks without repeats"),
        ({"ranks": (8, 4)}, "rising ranks without repeats"),
        ({"ranks": (4, 64)}, "has rank 64, but .* is 32 wide; choose 1 to 32"),
        ({"largest_rank_gib": 0.0}, "largest_rank_gib is 0.0, but a positive"),
        ({"penalty": -1.0}, "penalty is -1.0, but it cannot be negative"),
        ({"penalty": math.nan}, "penalty is nan"),
        ({"decay": 0.0}, "decay is 0.0, but a share above 0"),
        ({"decay": 1.1}, "decay is 1.1"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(task, settings, complaint):
    with pytest.raises(BadInput, match=complaint):
        dataclasses.replace(TOY, **settings).check(task)
