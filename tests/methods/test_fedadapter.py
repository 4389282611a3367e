"""FedAdapter: three branches of equal time, and the best of them goes on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import Lab, Spy, bits, toy_task

from fedspine.core.checks import Asked, Terms, why_unusable
from fedspine.core.device import Device
from fedspine.core.errors import BadInput
from fedspine.core.fleet import NoMemory
from fedspine.lm.load import load
from fedspine.lm.lora import a_name, adapter_rank, b_name
from fedspine.lm.prefix import first_block
from fedspine.lm.score import score
from fedspine.lm.tiny import write_tiny
from fedspine.methods.fedadapter import (
    BRANCHES,
    Branch,
    FedAdapter,
    TrialOrder,
    TrialResult,
    grown,
    score_branches,
)

LAYERS = 3
TOY = replace(FedAdapter.toy(), steps=1, batch=8)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The toy task on a tiny BERT of three blocks."""
    folder = write_tiny(tmp_path_factory.mktemp("deep") / "bert", "bert", layers=LAYERS)
    return toy_task(*load(str(folder), kind="classification", classes=3), rounds=8)


@pytest.fixture
def bench(deep, tmp_path):
    lab = Lab(deep, tmp_path / "lab", kinds=("tx2", "nx", "agx"))
    yield lab
    lab.close()


def rigged(spies, *, accuracies=None, seconds=None):
    """A fleet in which branches are as right, or as slow, as said."""

    def scripted(reply):
        if isinstance(reply.value, TrialResult) and accuracies is not None:
            known = {name: accuracies[name] for name in reply.value.accuracies}
            return replace(reply, value=replace(reply.value, accuracies=known))
        if not isinstance(reply.value, TrialResult) and seconds is not None:
            took = seconds[reply.order.branch]
            return replace(reply, cost=replace(reply.cost, seconds=took))
        return reply

    return lambda fleet: spies.append(Spy(fleet, reply=scripted)) or spies[-1]


def sizes(state):
    return {name: (branch.depth, branch.width) for name, branch in state.branches.items()}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"present": (1, 4), "wider": (1, 6), "deeper": (2, 4)}),
        ({"depth": 0}, {"present": (0, 4), "deeper": (2, 4)}),
        ({"depth": 3}, {"present": (3, 4), "wider": (3, 6)}),
        ({"depth": 3, "width": 8}, {"present": (3, 8)}),
        ({"width": 7}, {"present": (1, 7), "wider": (1, 8), "deeper": (2, 7)}),
    ],
)
def test_what_is_tried(deep, settings, expected):
    state = replace(TOY, **settings).start(deep, np.random.default_rng(0))
    assert sizes(state) == expected
    for branch in state.branches.values():
        model = replace(TOY.deploy(state), adapter=branch.adapter)
        assert first_block(deep.base.layout, model) == LAYERS - branch.depth
        assert adapter_rank(branch.adapter) == (branch.width if branch.depth else 0)


def test_what_is_new_computes_what_was_there(deep):
    layout, rng = deep.base.layout, np.random.default_rng(0)
    old = grown(layout, {}, 1, 4, rng)
    old = {name: tensor + 0.05 for name, tensor in old.items()}  # B is not zero
    for depth, width in ((1, 6), (2, 4), (3, 8)):
        new = grown(layout, old, depth, width, rng)
        for site in layout.sites:
            a, b = a_name(site.path), b_name(site.path)
            assert (a in new) == (site.layer >= LAYERS - depth)
            if a in old:
                assert torch.equal(new[a][:4], old[a]) and torch.equal(new[b][:, :4], old[b])
                assert not new[b][:, 4:].any() and new[a].shape[0] == width
            elif a in new:
                assert not new[b].any() and bool(new[a].any(1).all())


@pytest.mark.parametrize(
    ("accuracies", "winner"),
    [
        ({"present": 0.5, "wider": 0.6, "deeper": 0.7}, "deeper"),
        ({"present": 0.5, "wider": 0.6, "deeper": 0.4}, "wider"),
        ({"present": 0.6, "wider": 0.6, "deeper": 0.6}, "present"),
        ({"present": 0.5, "wider": 0.6, "deeper": 0.6}, "wider"),
    ],
)
def test_all_branches_inherit_the_winner(bench, accuracies, winner):
    spies = []
    around = rigged(spies, accuracies=accuracies, seconds=dict.fromkeys(BRANCHES, 1.0))
    state = bench.run(TOY, rounds=2, around=around)
    tried = [order for _, order in spies[-1].orders if isinstance(order, TrialOrder)]
    assert len(tried) == 3 and state.trial == 1  # one for each device
    best = tried[0].adapters[winner]
    grew = {"present": (1, 4), "wider": (1, 6), "deeper": (2, 4)}[winner]
    assert sizes(state)["present"] == grew
    for branch in state.branches.values():
        assert (branch.exchanges, branch.seconds) == (0, 0.0)
        for name, tensor in best.items():
            shape = tuple(map(slice, tensor.shape))
            assert torch.equal(branch.adapter[name][shape].half(), tensor), name
        assert bits(branch.head) == bits(state.branches["present"].head)
    (note,) = [row["values"] for row in bench.rows("note") if "winner" in row["values"]]
    assert note["winner"] == winner and (note["depth"], note["rank"]) == grew
    assert note["trial"] == pytest.approx(accuracies)


def test_branches_have_equal_time(bench):
    """Five exchanges of a second each are the window: two of two seconds fit, one of three."""
    spies = []
    seconds = {"present": 1.0, "wider": 2.0, "deeper": 3.0}
    around = rigged(spies, seconds=seconds)
    state = bench.run(replace(TOY, trial_rounds=5), rounds=4, around=around)
    per_round = [sorted({order.branch for _, order in spy.orders}) for spy in spies]
    assert per_round == [["deeper", "present", "wider"], ["present", "wider"], ["present"],
                         ["present"]]  # fmt: skip
    assert all(len({id for id, _ in spy.orders}) == 3 for spy in spies)  # nobody rests
    assert {name: branch.exchanges for name, branch in state.branches.items()} == {
        "present": 4,
        "wider": 2,
        "deeper": 1,
    }
    assert state.branches["wider"].seconds == 4.0
    first, second = (dict(spy.orders) for spy in spies[:2])
    assert {id: order.branch for id, order in first.items()} != {
        id: order.branch for id, order in second.items()
    }


def test_time_that_is_left_is_counted_from_what_was_measured():
    def branch(exchanges, seconds):
        return Branch(depth=1, width=4, adapter={}, head={}, exchanges=exchanges, seconds=seconds)

    present = branch(2, 4.0)  # ten seconds for five
    assert branch(0, 0.0).has_time(present, 5)
    assert branch(4, 8.0).has_time(present, 5)
    assert not branch(3, 9.0).has_time(present, 5)
    assert branch(2, 9.0).has_time(branch(0, 0.0), 5)  # nothing is known of the window


def test_accuracies_are_those_of_the_models(deep):
    method, rng = replace(TOY, trial_rows=40), np.random.default_rng(5)
    state = method.start(deep, np.random.default_rng(0))
    half = {name: {k: t.half() for k, t in b.adapter.items()} for name, b in state.branches.items()}
    heads = {
        name: {k: (t + 0.1 * i).half() for k, t in branch.head.items()}
        for i, (name, branch) in enumerate(state.branches.items())
    }
    data = deep.train.take(np.arange(60))
    device = Device(id="d", data=data, base=deep.base, rng=rng, memory={}, fewest_rows=1)
    result = score_branches(device, TrialOrder(adapters=half, heads=heads, scale=2.0, rows=40))
    chosen = data.take(np.random.default_rng(5).permutation(60)[:40])
    for name in state.branches:
        model = replace(
            method.deploy(state),
            adapter={k: t.float() for k, t in half[name].items()},
            head={k: t.float() for k, t in heads[name].items()},
        )
        assert result.accuracies[name] == score(deep.base, model, chosen).accuracy
    assert device.rows_used == 40 and device.flops > 0


def test_results_of_a_trial_are_checked(deep):
    asked = Asked(Terms.of(deep), rows=60)
    order = TrialOrder(adapters={"present": {}}, heads={"present": {}}, scale=2.0, rows=4)
    asked = replace(asked, order=order)
    assert (
        why_unusable(TrialResult(accuracies={"present": 0.5}, examples=60), TrialResult, asked)
        is None
    )
    for wrong in ({}, {"present": 1.5}, {"present": float("nan")}, {"wider": 0.5}):
        assert why_unusable(TrialResult(accuracies=wrong, examples=60), TrialResult, asked)
    assert why_unusable(TrialResult(accuracies={"present": 0.5}, examples=9), TrialResult, asked)


def test_a_device_without_memory_for_a_deeper_branch_goes_to_another(bench, deep):
    state = TOY.start(deep, np.random.default_rng([0, 1]))
    sizes = (state.layout, state.embeddings, state.max_tokens)
    needed = {
        name: TOY._training_bytes(*sizes, branch.depth, branch.width)
        for name, branch in state.branches.items()
    }
    assert needed["present"] < needed["wider"] < needed["deeper"]

    class Small(Spy):
        @property
        def devices(self):
            first, *others = self._fleet.devices
            room = int(needed["present"] / 0.8) + 1
            return (replace(first, memory_bytes=room), *others)

    spies = []
    bench.run(TOY, rounds=2, around=lambda fleet: spies.append(Small(fleet)) or spies[-1])
    mine = [o.branch for spy in spies for id, o in spy.orders
            if id == bench.ids[0] and not isinstance(o, TrialOrder)]  # fmt: skip
    assert mine == ["present", "present"]

    class None_(Spy):
        @property
        def devices(self):
            return tuple(replace(each, memory_bytes=1) for each in self._fleet.devices)

    with pytest.raises(NoMemory, match="even one block"):
        bench.run(TOY, rounds=3, around=None_, state=state)


def test_what_was_trained_for_an_earlier_trial_is_left_out(bench):
    spies = []
    bench.run(TOY, rounds=1, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    state = TOY.start(bench.task, np.random.default_rng([0, 1]))
    (id, order), *_ = spies[0].orders
    from fedspine.core.fleet import Cost, Reply

    reply = Reply(id, dict(spies[0].results)[id], Cost(1, 1, 1.0, 1, 1.0), order, late=1)
    assert list(TOY._replies_by_branch(state, bench.fleet, [reply])) == [order.branch]
    assert TOY._replies_by_branch(replace(state, trial=1), bench.fleet, [reply]) == {}
    assert bench.rows("note")[-1]["values"] == {"device": id, "left_out": "its trial is over"}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"depth": 4}, "0 to 3 blocks"),
        ({"depth": -1}, "0 to 3 blocks"),
        ({"width": 0}, "method.width has rank 0"),
        ({"largest_width": 64}, "method.largest_width has rank 64"),
        ({"width": 8, "largest_width": 4}, "largest_width is 4, below method.width = 8"),
        ({"width_step": 0}, "width_step is 0"),
        ({"trial_rounds": 0}, "trial_rounds is 0"),
        ({"trial_rows": 0}, "trial_rows is 0"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(deep, settings, complaint):
    with pytest.raises(BadInput, match=complaint) as error:
        replace(TOY, **settings).check(deep)
    assert "\n" not in str(error.value)
