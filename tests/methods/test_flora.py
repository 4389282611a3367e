"""FLoRA: stacks whose product is the weighted sum of products, merged alike by server and
devices.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import Lab, Spy, bits

from fedspine.core.aggregation import Mean, Median, MultiKrum, NormClip, TrimmedMean
from fedspine.core.checks import Asked, Terms, why_unusable
from fedspine.core.errors import BadInput
from fedspine.core.message import pack, unpack
from fedspine.core.tensors import half, single
from fedspine.lm.base import Model
from fedspine.lm.lora import a_name, adapter_rank, b_name, fresh, is_a, w_name
from fedspine.lm.structure import full
from fedspine.methods.flora import MERGED, Flora, FloraOrder, stacked

TOY = replace(Flora.toy(), ranks=(1, 2), steps=2)
KINDS = ("tx2", "nx", "agx")


class Recorded:
    """Three rounds with three devices: the states and the orders and results of each round."""

    def __init__(self, bench, rounds=3, lost=None):
        """In round `lost` the reply of the second device does not reach the server."""
        self.bench, self.states = bench, [bench.run(TOY, rounds=0)]
        self.orders, self.results = [], []
        for number in range(rounds):
            spies, quiet = [], bench.ids[1] if number == lost else None

            def recording(fleet, spies=spies, quiet=quiet):
                spies.append(Spy(fleet, reply=lambda r: None if r.device == quiet else r))
                return spies[-1]

            state = bench.run(TOY, rounds=number + 1, around=recording, state=self.states[-1])
            self.states.append(state)
            self.orders.append(dict(spies[0].orders))
            self.results.append(dict(spies[0].results))

    def merged(self, id):
        """What a device has merged by its last order."""
        return unpack(self.bench.fleet._world._memory(id))[MERGED]


@pytest.fixture(scope="module")
def recorded(task, tmp_path_factory):
    bench = Lab(task, tmp_path_factory.mktemp("flora"), kinds=KINDS)
    yield Recorded(bench)
    bench.close()


def test_the_product_of_the_stack_is_the_weighted_sum_of_products(recorded, task):
    results = recorded.results[0].values()
    rows = sum(result.examples for result in results)
    assert len({adapter_rank(result.adapter) for result in results}) == 2
    for site in task.base.layout.sites:
        a, b = a_name(site.path), b_name(site.path)
        parts = [(r.examples / rows, r.adapter[b].double(), r.adapter[a].double()) for r in results]
        expected = sum(share * left @ right for share, left, right in parts)
        # p_k A_k is rounded to fp16 when it is stacked, and the sum when it is merged: half a unit
        # in the last place, 2^-11 of an entry, or 2^-25 below the normal numbers
        wire = sum(
            left.abs() @ (share * right.abs() * 2**-11 + 2**-25) for share, left, right in parts
        )
        off = (recorded.states[1].change[w_name(site.path)].double() - expected).abs()
        assert bool((off <= 1.01 * (wire + expected.abs() * 2**-11 + 2**-25)).all()), site.path
        assert expected.abs().max() > 10 * wire.max()


def test_weights_are_in_a_and_ranks_add_up(task):
    rng = np.random.default_rng(0)
    sites = task.base.layout.sites
    one, two = (fresh(sites, rank, rng) for rank in (2, 3))
    stack, name = stacked([(1.0, one), (3.0, two)]), a_name(sites[0].path)
    assert adapter_rank(stack) == 5
    assert torch.equal(stack[name], torch.cat([0.25 * one[name], 0.75 * two[name]]).half())
    other = b_name(sites[0].path)
    assert torch.equal(stack[other], torch.cat([one[other], two[other]], 1).half())


def test_a_device_gets_the_stack_of_the_last_round_and_has_the_servers_bits(recorded):
    for number, orders in enumerate(recorded.orders):
        for order in orders.values():
            assert list(order.stacks) == ([str(number - 1)] if number else [])
            assert (order.since, order.change) == (max(number - 1, 0), {})
    ranks = [adapter_rank(result.adapter) for result in recorded.results[0].values()]
    (sent,) = recorded.orders[1][recorded.bench.ids[0]].stacks.values()
    assert adapter_rank(sent) == sum(ranks) == recorded.states[1].merged_rank
    for id in recorded.bench.ids:  # by its last order, of the third round
        assert bits(recorded.merged(id).change) == bits(recorded.states[2].change)
        assert recorded.merged(id).rank == recorded.states[2].merged_rank


def test_a_stack_costs_its_ranks_times_the_sides_in_fp16(recorded, task):
    sides = sum(site.rows + site.columns for site in task.base.layout.sites)
    ranks = sum(adapter_rank(result.adapter) for result in recorded.results[0].values())
    id = recorded.bench.ids[0]
    first, second = (pack(recorded.orders[number][id]).bytes for number in (0, 1))
    assert second - first >= 2 * ranks * sides
    # names of the factors and their places: some 200 bytes for each of them
    assert second - first <= 2 * ranks * sides + 200 * 2 * len(task.base.layout.sites)


def test_what_is_deployed_is_the_base_with_the_change(recorded, task):
    state, inputs = recorded.states[3], task.test.batch(np.arange(4))
    inputs.pop("labels")
    plain = Model(structure=full(task.base.layout), adapter={}, head=state.head, scale=TOY.scale)
    with torch.no_grad():
        deployed = task.base.fit(TOY.deploy(state), merge=True)(**inputs).logits
        module = task.base.fit(plain)
        before = module(**inputs).logits
        task.base.add(state.change, TOY.scale)
        changed = module(**inputs).logits
        again = task.base.fit(plain)(**inputs).logits
    assert torch.equal(deployed, changed)  # a product with the identity is exact
    assert torch.equal(before, again) and not torch.equal(before, changed)


def test_the_base_is_trained_on_with_the_change(recorded, task):
    """The loss of a second round is that of a model that has the first one's change."""
    first, second = (
        np.mean([result.loss for result in recorded.results[number].values()]) for number in (0, 2)
    )
    assert second < first


def test_a_device_whose_reply_was_lost_gets_all_again(lab):
    """The server cannot know whether the device has merged what the lost reply answers."""
    recorded = Recorded(lab("lost", kinds=KINDS), rounds=4, lost=1)
    lost = recorded.bench.ids[1]
    since = [{id: order.since for id, order in orders.items()} for orders in recorded.orders]
    assert since[2] == {id: 0 if id == lost else 1 for id in recorded.bench.ids}
    assert list(recorded.orders[2][lost].stacks) == ["0", "1"]
    assert set(since[3].values()) == {2}
    for id in recorded.bench.ids:
        assert bits(recorded.merged(id).change) == bits(recorded.states[3].change)


def test_the_whole_change_is_sent_where_it_is_shorter(lab):
    """Ranks of 40 in a model 32 wide."""
    method, bench, spies = replace(Flora.toy(), ranks=(8,), steps=1), lab(), []
    state = bench.run(method, rounds=2, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    assert state.merged_rank == 32 and state.stacks == {}
    assert all(order.change and not order.stacks for _, order in spies[1].orders)


def test_an_order_that_does_not_fit_what_a_device_has_is_refused(recorded, task):
    asked = Asked(Terms.of(task), rows=100)
    order = recorded.orders[2][recorded.bench.ids[0]]
    assert why_unusable(order, FloraOrder, asked) is None
    for wrong in (
        {"since": 3},
        {"since": 0},
        {"stacks": {}},
        {"stacks": {"7": order.stacks["1"]}},
        {"stacks": {"1": half(single(order.stacks["1"])) | {"x": torch.zeros(1).half()}}},
        {"change": recorded.states[2].change},
        {"rank": 0},
        {"merged_rank": -1},
        {"merged_rank": adapter_rank(order.stacks["1"]) - 1},  # before anything is merged
    ):
        assert why_unusable(replace(order, **wrong), FloraOrder, asked), wrong
    many = {str(number): order.stacks["1"] for number in range(50)}
    endless = replace(order, since=0, round=50, stacks=many, merged_rank=32)
    assert why_unusable(endless, FloraOrder, asked) == "the stacks are larger than the whole change"
    dense = replace(order, since=0, stacks={}, change=recorded.states[2].change)
    assert "merged_rank" in why_unusable(dense, FloraOrder, asked)  # which a site's terms bound
    assert why_unusable(replace(dense, merged_rank=32), FloraOrder, asked) is None


def test_the_predicted_rank_is_the_models_width_to_which_the_merged_rank_grows(recorded, task):
    assert TOY.predicted_reads(task.base).merged == 32
    ranks = [recorded.orders[number][recorded.bench.ids[0]].reads.merged for number in range(3)]
    assert ranks == [max(state.merged_rank, ranks[0]) for state in recorded.states[:3]]
    assert ranks[0] < ranks[1] < ranks[2]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"ranks": (8, 8)}, "rising ranks without repeats"),
        ({"ranks": (0,)}, "has rank 0"),
        ({"ranks": (4, 64)}, "has rank 64, but .* is 32 wide; choose 1 to 32"),
        ({"largest_rank_gib": 0.0}, "largest_rank_gib is 0.0, but a positive"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(task, settings, complaint):
    with pytest.raises(BadInput, match=complaint):
        replace(TOY, **settings).check(task)


@pytest.mark.parametrize("how", [Median(), TrimmedMean(share=0.2)], ids=lambda how: how.name)
def test_the_middle_of_products_has_no_stack_so_the_whole_change_is_sent(how, lab, task):
    recorded = Recorded(lab("middle", kinds=KINDS, aggregation=how), rounds=2)
    first, second = recorded.states[1:]
    products = [
        {
            site.path: result.adapter[b_name(site.path)].float()
            @ result.adapter[a_name(site.path)].float()
            for site in task.base.layout.sites
        }
        for result in recorded.results[0].values()
    ]
    for site in task.base.layout.sites:
        middle = torch.stack([product[site.path] for product in products]).median(0).values
        assert torch.equal(first.change[w_name(site.path)], middle.half())
    assert (first.stacks, second.stacks) == ({}, {})
    for order in recorded.orders[1].values():
        assert (order.since, order.stacks) == (0, {})
        assert bits(order.change) == bits(first.change)
    for id in recorded.bench.ids:
        assert bits(recorded.merged(id).change) == bits(first.change)


def test_what_is_left_out_is_in_no_stack_and_what_is_bounded_is_shorter(lab, task):
    outlier = KINDS.index("nx")

    def far(fleet):
        def stretch(reply):
            if reply.device != fleet.devices[outlier].id:
                return reply
            wide = {
                name: tensor if is_a(name) else 50 * tensor
                for name, tensor in reply.value.adapter.items()
            }
            return replace(reply, value=replace(reply.value, adapter=wide))

        return Spy(fleet, reply=stretch)

    ranks = {}
    for how in (Mean(), NormClip(), MultiKrum()):
        bench = lab(how.name, kinds=KINDS * 2, aggregation=how)
        (stack,) = bench.run(TOY, rounds=1, around=far).stacks.values()
        ranks[how.name] = adapter_rank(stack)
        notes = [row["values"] for row in bench.rows("note")]
        shares = {n["device"]: n["share"] for n in notes if n.get("bounded") == "adapter"}
        if how == NormClip():  # to the median norm, at which the others are, or a little above
            assert shares[bench.ids[outlier]] < 1 / 25
        if how == MultiKrum():
            assert shares == {bench.ids[outlier]: 0.0}
            left_out = [n["rank"] for n in notes if "rank" in n][outlier]
    assert ranks["norm_clip"] == ranks["mean"]
    assert ranks["multi_krum"] == ranks["mean"] - left_out


@pytest.mark.parametrize("how", [Median(), MultiKrum(), NormClip()], ids=lambda how: how.name)
def test_too_few_replies_merge_nothing(how, lab, task):
    bench = lab("few", kinds=KINDS, aggregation=how)

    def alone(fleet):
        first = fleet.devices[0].id
        return Spy(fleet, reply=lambda reply: reply if reply.device == first else None)

    state = bench.run(TOY, rounds=2, around=alone)
    assert all(bool((weight == 0).all()) for weight in state.change.values())
    assert state.round == 2
