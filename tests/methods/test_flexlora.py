"""FlexLoRA: the mean of products, its best factors at every rank, and scales that differ between
ranks.
"""

import dataclasses
import math

import pytest
import torch
from toy import Spy, bits

from fedspine.core.errors import BadInput
from fedspine.lm.lora import a_name, b_name, cut_rank
from fedspine.lm.training_account import rank_of
from fedspine.methods.fedlora import FedLora
from fedspine.methods.fedspine import FedSpine
from fedspine.methods.flexlora import FlexLora

TOY = FlexLora.toy()
SHARED = {
    name: getattr(TOY, name) for name in ("steps", "batch", "learning_rate", "head_lr_multiplier")
}
ALPHA = 16.0


def product(adapter, site):
    return adapter[b_name(site.path)].double() @ adapter[a_name(site.path)].double()


def rounding(adapter, site):
    """How far an entry of B A may be off where A and B were rounded to fp16: half a unit in the
    last place of each, 2^-11 of it, or 2^-25 below the normal numbers; 1 % for second-order terms.
    """
    a, b = adapter[a_name(site.path)].double().abs(), adapter[b_name(site.path)].double().abs()
    off_a, off_b = a * 2**-11 + 2**-25, b * 2**-11 + 2**-25
    return 1.01 * (off_b @ a + b @ off_a)


def one_round(bench, method, rounds=1):
    """The state before and after the last of so many rounds, its orders and results."""
    spies = []
    before = bench.run(method, rounds=rounds - 1)
    bench.fleet.begin_round(rounds - 1)
    after = method.round(before, spies.append(Spy(bench.fleet)) or spies[-1])
    return before, after, dict(spies[-1].orders), dict(spies[-1].results)


@pytest.mark.parametrize("rank", [3, 8])
def test_one_device_at_one_rank_is_fedlora_in_product_space(lab, task, rank):
    ours = lab("ours", kinds=("agx",)).run(FlexLora(ranks=(rank,), **SHARED), rounds=1)
    theirs = lab("theirs", kinds=("agx",)).run(FedLora(rank=rank, **SHARED), rounds=1)
    for site in task.base.layout.sites:
        expected = product(theirs.adapter, site)
        # both got the same fp16 reply, and a product of this rank loses nothing by an SVD but some
        # 32 roundings of 2^-24 of the largest entry
        allowed = 32 * 2**-24 * expected.norm()
        assert bool(((product(ours.adapter, site) - expected).abs() <= allowed).all()), site.path
        assert expected.abs().max() > 10 * allowed
    assert bits(ours.head) == bits(theirs.head)


def test_at_one_rank_it_is_fedspine_that_does_not_prune_and_aggregates_as_flexlora(lab):
    ours = lab("ours").run(FlexLora(ranks=(4,), **SHARED), rounds=3)
    theirs = lab("theirs").run(
        FedSpine(sparsity=0.0, ranks=(4,), aggregation="flexlora", **SHARED), rounds=3
    )
    assert bits(ours.adapter) == bits(theirs.adapter)
    assert bits(ours.head) == bits(theirs.head)


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_the_server_keeps_the_best_of_the_weighted_mean_of_scaled_products(lab, task, alpha):
    bench = lab()
    method = dataclasses.replace(TOY, alpha=alpha)
    _, after, orders, results = one_round(bench, method)
    scales = {id: order.scale for id, order in orders.items()}
    if alpha:
        assert scales == {id: ALPHA / after.ranks[id] for id in bench.ids}
        assert len(set(scales.values())) > 1
    rows = sum(result.examples for result in results.values())
    for site in task.base.layout.sites:
        mean = sum(
            result.examples / rows * scales[id] / method.scale * product(result.adapter, site)
            for id, result in results.items()
        )
        left, values, right = torch.linalg.svd(mean)
        best = left[:, :8] @ values[:8].diag() @ right[:8]
        # of the largest entry: 5 products and an SVD in fp32, some 32 roundings of 2^-24 each
        torch.testing.assert_close(
            product(after.adapter, site), best, rtol=0, atol=32 * 5 * 2**-24 * float(mean.norm())
        )


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_a_device_is_sent_the_best_of_its_rank_at_its_own_scale(lab, task, alpha):
    method = dataclasses.replace(TOY, alpha=alpha)
    before, _, orders, _ = one_round(lab(), method, rounds=2)
    assert len({before.ranks[id] for id in orders}) > 1
    for id, order in orders.items():
        rank = before.ranks[id]
        for site in task.base.layout.sites:
            whole, sent = product(before.adapter, site), product(order.adapter, site)
            tail = torch.linalg.svdvals(whole)[rank:].norm()  # no matrix of this rank is nearer
            off = order.scale / method.scale * sent - whole
            wire = order.scale / method.scale * rounding(order.adapter, site).norm()
            assert order.adapter[a_name(site.path)].shape[0] == rank
            assert float(off.norm()) <= float(tail + wire) + 32 * 2**-24 * float(whole.norm())


def test_deploys_the_rank_of_the_device(lab):
    bench = lab()
    state = bench.run(TOY, rounds=1)
    assert len(set(state.ranks.values())) > 1
    for id in bench.ids:
        model = TOY.deploy(state, id)
        assert rank_of(model) == state.ranks[id]
        assert bits(model.adapter) == bits(cut_rank(state.adapter, state.ranks[id]))
    assert rank_of(TOY.unpruned(state)) == TOY.ranks[-1]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"ranks": (8, 8)}, "rising ranks without repeats"),
        ({"ranks": (4, 64)}, "has rank 64, but .* is 32 wide; choose 1 to 32"),
        ({"largest_rank_gib": -1.0}, "largest_rank_gib is -1.0, but a positive"),
        ({"alpha": -16.0}, "alpha is -16.0, but a positive number, or 0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(task, settings, complaint):
    with pytest.raises(BadInput, match=complaint):
        dataclasses.replace(TOY, **settings).check(task)
