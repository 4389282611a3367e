"""Fed-HeLLo: some blocks are trained, the others take part as they are."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import Lab, Spy, bits, toy_task

from fedspine.core.checks import Asked, Terms, why_unusable
from fedspine.core.device import Device
from fedspine.core.errors import BadInput
from fedspine.core.fleet import NoMemory
from fedspine.core.tensors import half
from fedspine.lm.cost import SINGLE, adapter_width, frozen_adapter
from fedspine.lm.forecast import depth_bytes
from fedspine.lm.load import load
from fedspine.lm.lora import a_name, b_name, of_blocks
from fedspine.lm.structure import full
from fedspine.lm.tiny import write_tiny
from fedspine.lm.tuning import Tuning
from fedspine.methods.fed_hello import BlocksOrder, FedHello, tune_blocks
from fedspine.methods.fedlora import FedLora

LAYERS = 3
TOY = replace(FedHello.toy(), steps=2)
KINDS = ("tx2", "agx")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The toy task on a tiny BERT of three blocks."""
    folder = write_tiny(tmp_path_factory.mktemp("deep") / "bert", "bert", layers=LAYERS)
    return toy_task(*load(str(folder), kind="classification", classes=3), rounds=4)


@pytest.fixture
def bench(deep, tmp_path):
    built = []

    def make(name="lab", **settings):
        built.append(Lab(deep, tmp_path / name, **{"kinds": KINDS} | settings))
        return built[-1]

    yield make
    for each in built:
        each.close()


def device_of(task):
    return Device(
        id="d",
        data=task.train.take(np.arange(40)),
        base=task.base,
        rng=np.random.default_rng(0),
        memory={},
    )


def order_of(task, blocks):
    state = TOY.start(task, np.random.default_rng(0))
    adapter = {  # B is not zero, so that what is frozen takes part
        name: tensor if name.endswith("lora_A") else torch.full_like(tensor, 0.01)
        for name, tensor in state.adapter.items()
    }
    return BlocksOrder(
        adapter=half(adapter),
        head=half(state.head),
        scale=2.0,
        blocks=blocks,
        tuning=Tuning(steps=2, batch=8, learning_rate=1e-2),
    )


def test_with_all_blocks_it_is_fedlora(bench):
    shared = {name: getattr(TOY, name) for name in ("rank", "steps", "batch", "learning_rate")}
    ours = bench("ours").run(replace(TOY, shares=(1.0,)), rounds=2)
    theirs = bench("theirs").run(FedLora(**shared, head_lr_multiplier=1.0), rounds=2)
    assert bits(ours.adapter) == bits(theirs.adapter)
    assert bits(ours.head) == bits(theirs.head)


@pytest.mark.parametrize("blocks", [(0,), (1,), (0, 2)])
def test_only_the_trained_blocks_change_and_come_back(deep, blocks, monkeypatch):
    from fedspine.lm import lora

    kept, backward = [], lora._Adapted.backward

    def watched(ctx, grad):
        flat, narrow = ctx.saved_tensors
        found = backward(ctx, grad)
        kept.append((flat is not None, narrow is not None, found[3] is not None))
        return found

    monkeypatch.setattr(lora._Adapted, "backward", staticmethod(watched))
    order = order_of(deep, blocks)
    result = tune_blocks(device_of(deep), order)
    layout = deep.base.layout
    assert result.adapter.keys() == of_blocks(layout, order.adapter, blocks).keys()
    for name, tensor in result.adapter.items():
        assert not torch.equal(tensor, order.adapter[name]), name
    # a frozen factor has no gradient and keeps nothing for one; below the lowest there is no pass
    sites = [len([s for s in layout.sites if s.layer == block]) for block in range(LAYERS)]
    reached = sum(sites[min(blocks) :])
    trained = sum(sites[block] for block in blocks)
    assert len(kept) == order.tuning.steps * reached
    assert kept.count((True, True, True)) == order.tuning.steps * trained
    assert kept.count((False, False, False)) == order.tuning.steps * (reached - trained)


def test_frozen_adapters_take_part(deep):
    order = order_of(deep, (2,))
    without = {
        name: torch.zeros_like(tensor) if name.endswith("lora_B") and ".0." in name else tensor
        for name, tensor in order.adapter.items()
    }
    one, other = (
        tune_blocks(device_of(deep), each) for each in (order, replace(order, adapter=without))
    )
    assert one.loss != other.loss


def test_cost_is_of_what_is_trained(deep):
    """Against an adapter that is trained from block 1 on: block 0 takes a forward product more,
    block 2 no gradient of its factors.
    """
    layout, structure = deep.base.layout, full(deep.base.layout)
    width = adapter_width(layout, structure) // LAYERS
    assert frozen_adapter(layout, structure, [4] * LAYERS, (1,)) == (
        0,
        SINGLE * (4 - 3 * 4) * width,
    )
    assert frozen_adapter(layout, structure, [4] * LAYERS, (0,)) == (
        -2 * 2 * 4 * width,
        -SINGLE * 3 * 2 * 4 * width,
    )
    assert frozen_adapter(layout, structure, [4] * LAYERS, (0, 1, 2)) == (0, 0)
    spent = []
    for blocks in ((0,), (0, 1, 2), (2,)):
        device = device_of(deep)
        tune_blocks(device, order_of(deep, blocks))
        spent.append((device.flops, device.peak_memory_bytes))
    lowest, whole, top = spent
    assert top < lowest < whole and top[1] < lowest[1] < whole[1]


def test_blocks_are_means_over_those_who_trained_them(bench):
    spies, lab = [], bench(kinds=("tx2", "nx", "agx"))
    method = replace(TOY, shares=(0.3, 1.0), pattern="inverted", share_by="memory")
    state = lab.run(method, rounds=1, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    assert sorted(len(order.blocks) for _, order in spies[0].orders) == [1, 1, 3]
    results = [value for _, value in spies[0].results]
    for name, tensor in state.adapter.items():
        trained = [value for value in results if name in value.adapter]
        rows = sum(value.examples for value in trained)
        mean = sum(value.examples * value.adapter[name].float() for value in trained) / rows
        torch.testing.assert_close(tensor, mean)


def test_memory_bounds_the_blocks(bench, deep):
    needed = depth_bytes(
        deep.base.layout,
        TOY.rank,
        embeddings=deep.base.embeddings,
        batch=TOY.batch,
        tokens=deep.max_tokens,
    )

    class Small(Spy):
        @property
        def devices(self):
            first, second = self._fleet.devices
            return (
                replace(first, memory_bytes=int(needed[0] / 0.8) + 1),
                replace(second, memory_bytes=1),
            )

    lab, spies = bench(), []
    method = replace(TOY, pattern="triangle", shares=(1.0,))
    lab.run(method, rounds=1, around=lambda fleet: spies.append(Small(fleet)) or spies[-1])
    assert [(id, order.blocks) for id, order in spies[0].orders] == [(lab.ids[0], (LAYERS - 1,))]
    (note,) = [row["values"] for row in lab.rows("note") if "left_out" in row["values"]]
    assert note == {"device": lab.ids[1], "left_out": "no depth fits its memory"}

    class None_(Small):
        @property
        def devices(self):
            return tuple(replace(each, memory_bytes=1) for each in self._fleet.devices)

    with pytest.raises(NoMemory, match="even one block"):
        bench("none").run(method, rounds=1, around=None_)


@pytest.mark.parametrize("blocks", [(), (3,), (-1,), (1, 0), (1, 1), tuple(range(99))])
def test_orders_of_other_blocks_are_refused(deep, blocks):
    order = order_of(deep, (1,))
    asked = Asked(Terms.of(deep), rows=40)
    assert why_unusable(order, BlocksOrder, asked) is None
    assert why_unusable(replace(order, blocks=blocks), BlocksOrder, asked)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"shares": ()}, "rising shares of the blocks"),
        ({"shares": (0.0, 1.0)}, "rising shares of the blocks"),
        ({"shares": (0.5, 1.5)}, "rising shares of the blocks"),
        ({"shares": (1.0, 0.5)}, "rising shares of the blocks"),
        ({"shares": (float("nan"),)}, "rising shares of the blocks"),
        ({"largest_share_gib": 0.0}, "largest_share_gib is 0.0"),
        ({"rank": 0}, "method.rank"),
        ({"rank": 64}, "method.rank"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(deep, settings, complaint):
    with pytest.raises(BadInput, match=complaint) as error:
        replace(TOY, **settings).check(deep)
    assert "\n" not in str(error.value)


def test_drawn_blocks_change_from_round_to_round(bench):
    spies, lab = [], bench()
    method = replace(TOY, randomised=True, shares=(0.3,))
    lab.run(method, rounds=4, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    drawn = {(id, order.blocks) for spy in spies for id, order in spy.orders}
    assert len(drawn) > len(lab.ids)
    names = {a_name(site.path): b_name(site.path) for site in lab.task.base.layout.sites}
    assert all(b in value.adapter for spy in spies for _, value in spy.results
               for a, b in names.items() if a in value.adapter)  # fmt: skip
