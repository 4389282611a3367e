"""MergeSFL as a whole: what it must equal, what its control does with devices and labels, and what
it refuses.
"""

import dataclasses
import math
import tomllib

import numpy as np
import pytest
import torch
from toy import KINDS, Lab, Spy, bits, toy_task

from fedspine.control.batch_timing import SHORTER
from fedspine.control.split_parts import (
    Equal,
    Everyone,
    Genetic,
    LeastWaiting,
    RandomDevices,
    Regulated,
    WithinRound,
)
from fedspine.core.errors import BadInput
from fedspine.core.fleet import AllLost
from fedspine.core.logit_adjustment import LabelSkew, Unadjusted
from fedspine.lm.lora import b_name
from fedspine.lm.tune import losses_of
from fedspine.methods.mergesfl import MergeSfl
from fedspine.methods.mergesfl_plus import MergeSflPlus
from fedspine.runs.config import recipe
from fedspine.split.averaging import LastRound
from fedspine.split.batches import drawn, rows_at
from fedspine.split.cut import split_model_of
from fedspine.split.joining import AtOnce, Late
from fedspine.split.label_distribution import logit_adjustments
from fedspine.split.messages import Ended, Forwarded

# plain SGD on what is sent unrounded, so that the split can be compared with no split
SGD = {
    "cut": 1,
    "rank": 4,
    "steps": 1,
    "batch": 16,
    "optimiser": "sgd",
    "learning_rate": 0.3,
    "decay": 1.0,
    "weight_decay": 0.0,
    "clip": 0.0,
    "precision": "fp32",
}
PAPER = MergeSfl(**SGD, selection=Genetic(budget_rows=80))
PLAIN = MergeSflPlus(
    **SGD,
    selection=LeastWaiting(budget_rows=80),
    batches=WithinRound(fill_tokens=False),
    logit_adjustment=Unadjusted(),
    client_lr_multiplier=1.0,
)
# all that is ours switched off, which leaves the paper's form
OFF = {
    "logit_adjustment": Unadjusted(),
    "client_lr_multiplier": 1.0,
    "averaging": LastRound(),
    "selection": Genetic(),
    "batches": Regulated(),
    "joining": AtOnce(),
}
EPS = 2.0**-24  # half a unit in the last place of fp32, relative


def run(bench, method, rounds=1):
    """The state after some rounds, and all orders of batches by round: what each device was to
    take.
    """
    spies = []
    state = bench.run(
        method, rounds=rounds, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1]
    )
    batches = [
        {id: order.batch for id, order in spy.orders if type(order).__name__ == "Begin"}
        for spy in spies
    ]
    return state, batches


def started(method, bench):
    """Both halves' weights at the start, as a lab's run makes them."""
    return method.start(bench.task, np.random.default_rng([bench.seed, 1])).model


def batch_of(bench, id, batch, asks, step):
    """The inputs that a device takes at a step of a round that began with its ask number `asks`."""
    index = bench.ids.index(id)
    seed = int(np.random.default_rng((bench.seed, index, asks)).integers(2**31))
    data = bench.task.train.take(bench.shares[index])
    return data.batch(rows_at(len(data), batch, seed, step), int(data.lengths.max()))


def trained(model):
    """Copies of all that is trained, which want gradients."""
    return {
        name: tensor.clone().requires_grad_()
        for name, tensor in {**model.adapter, **model.head}.items()
    }


def centralised(bench, start, batches, *, steps=1, asks=1, rate=0.3):
    """What SGD makes of the unsplit model on the union of all devices' batches."""
    base, weights = bench.task.base, trained(start)
    for step in range(steps):
        parts = [batch_of(bench, id, batch, asks, step) for id, batch in batches.items()]
        width = max(part["input_ids"].shape[1] for part in parts)
        inputs = {
            name: torch.cat([_padded(name, part[name], width) for part in parts])
            for name in parts[0]
        }
        adapter = {name: weights[name] for name in start.adapter}
        head = {name: weights[name] for name in start.head}
        module = base.fit(dataclasses.replace(start, adapter=adapter, head=head))
        losses_of(module, inputs, 1).sum().backward()
        with torch.no_grad():
            for leaf in weights.values():
                leaf -= rate * leaf.grad
                leaf.grad = None
    return weights


def _padded(name, tensor, width):
    if tensor.dim() == 1:
        return tensor
    filling = -100 if name == "labels" else 0
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=filling)


def assert_same_step(found, expected, start, *, off=2e-5):
    """Both moved the weights alike, but for rounding: sums of some 64 to 1000 products, one after
    another in 2 blocks.

    A sum of n terms is off by sqrt(n) roundings of 2^-24 at most times the terms' size, here 32 of
    them, and the chain from the loss to the first block has some ten such sums: 2e-5 of the largest
    entry. The weights themselves are rounded 8 times: by both updates, and in an average of five by
    a product, four additions and a division.
    """
    after, before = {**found.adapter, **found.head}, {**start.adapter, **start.head}
    moved = 0
    for name, leaf in expected.items():
        step = leaf.detach() - before[name]
        moved += int(step.abs().max() > 0)
        allowed = off * step.abs().max() + 8 * EPS * before[name].abs().max()
        assert bool((after[name] - leaf.detach()).abs().max() <= allowed), name
    assert moved >= len(expected) // 2  # an A factor gets no gradient while its B is zero


@pytest.mark.parametrize("form", [PAPER, PLAIN], ids=lambda form: form.name)
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_one_merged_step_is_one_centralised_step(lab, cut, form):
    bench, method = lab(), dataclasses.replace(form, cut=cut)
    start = started(method, bench)
    state, (batches,) = run(bench, method)
    assert len(batches) == len(KINDS)
    assert_same_step(state.model, centralised(bench, start, batches), start)


@pytest.mark.parametrize("form", [PAPER, PLAIN], ids=lambda form: form.name)
def test_so_it_is_with_unequal_batches(lab, form):
    """In round two batches follow the devices' speed; Eq. 17 weighs client models by them."""
    bench = lab()
    first = bench.run(form, rounds=1)
    spy = Spy(bench.fleet)
    bench.fleet.begin_round(1)
    state = form.round(first, spy)
    batches = {id: order.batch for id, order in spy.orders if type(order).__name__ == "Begin"}
    assert len(set(batches.values())) > 2
    # the first round's asks: the look, begin, end
    assert_same_step(state.model, centralised(bench, first.model, batches, asks=3), first.model)


def test_with_one_device_it_is_unsplit_sgd(lab):
    bench, method = lab(kinds=("agx",)), dataclasses.replace(PAPER, steps=4)
    start = started(method, bench)
    state, (batches,) = run(bench, method)
    assert batches == {"agx-00": 16}
    # of four steps
    assert_same_step(state.model, centralised(bench, start, batches, steps=4), start, off=8e-5)


@pytest.mark.parametrize("cut", [1, 2])
def test_with_labels_that_stay_it_is_the_same_step(lab, cut):
    """The head's gradient is averaged by batches, so the U-shape makes the same step as long as all
    start alike.
    """
    bench, method = lab(), dataclasses.replace(PLAIN, labels_stay=True, cut=cut)
    start = started(method, bench)
    spies = []
    state = bench.run(method, rounds=1, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    batches = {id: order.batch for id, order in spies[0].orders if type(order).__name__ == "Begin"}
    # there was no look
    assert_same_step(state.model, centralised(bench, start, batches, asks=0), start)
    assert {getattr(value, "labels", None) for _, value in spies[0].results} == {None}


def test_with_labels_that_stay_one_device_learns_as_unsplit(lab):
    bench, method = lab(kinds=("agx",)), dataclasses.replace(PLAIN, steps=3, labels_stay=True)
    start = started(method, bench)
    state = bench.run(method, rounds=1)
    expected = centralised(bench, start, {"agx-00": 16}, steps=3, asks=0)
    assert_same_step(state.model, expected, start, off=6e-5)  # of three steps


@pytest.fixture
def lm_lab(decoder, tmp_path):
    """A fleet that continues texts, on the tiny Llama."""
    bench = Lab(toy_task(*decoder, rounds=2, kind="causal-lm"), tmp_path / "lm")
    yield bench
    bench.close()


@pytest.mark.parametrize("labels_stay", [False, True])
def test_language_models_count_tokens(lm_lab, labels_stay):
    """Dispatch and averages go by labels counted, so that unequal texts still make one centralised
    step.
    """
    bench = lm_lab
    method = dataclasses.replace(PLAIN, learning_rate=0.1, labels_stay=labels_stay)
    method.check(bench.task)
    start = started(method, bench)
    state, (batches,) = run(bench, method)
    expected = centralised(bench, start, batches, asks=0 if labels_stay else 1, rate=0.1)
    assert_same_step(state.model, expected, start)
    if not labels_stay:
        counted = {id: tuple(shares) for id, shares in state.labels.items()}
        assert len(set(counted.values())) > 1  # lengths stand for labels
        assert all(math.isclose(sum(shares), 1) for shares in counted.values())


def test_linear_rates_with_uniform_weights_go_the_same_way(lab):
    """Section 5 (b): eta d_i / D with plain averages is the centralised step of the client model,
    shorter by Q / (D m).
    """
    plain = lab("plain")
    first = plain.run(PLAIN, rounds=1)  # after which speeds are known, and B factors are not zero
    split_model = split_model_of(plain.task.base, 1, rank=4)
    found = {}
    for name, changed in (("a", {}), ("b", {"lr_scaling": "linear", "client_weights": "uniform"})):
        bench = lab(name)
        bench.run(PLAIN, rounds=1)
        spy = Spy(bench.fleet)
        bench.fleet.begin_round(1)
        after = dataclasses.replace(PLAIN, **changed).round(first, spy)
        batches = [order.batch for _, order in spy.orders if type(order).__name__ == "Begin"]
        before = split_model.parts(first.model)[0]
        found[name] = {
            id: tensor - before[id] for id, tensor in split_model.parts(after.model)[0].items()
        }
    shorter = sum(batches) / (PLAIN.batch * len(batches))
    assert shorter < 0.9  # ten per cent, where 0.004 % are allowed below
    for name, step in found["a"].items():
        # rounding as in assert_same_step, in both; no weight is above 0.2
        allowed = 4e-5 * step.abs().max() + 16 * EPS * 0.2
        assert bool((found["b"][name] - shorter * step).abs().max() <= allowed), name
        assert step.abs().max() > 0


def test_without_rescale_client_models_move_by_their_share(lab):
    split_model = split_model_of(lab("x").task.base, 1, rank=4)
    steps = {}
    for name, rescale in (("with", True), ("without", False)):
        bench = lab(name)
        method = dataclasses.replace(PLAIN, rescale=rescale)
        start = split_model.parts(started(method, bench))[0]
        state, (batches,) = run(bench, method)
        steps[name] = {
            id: tensor - start[id] for id, tensor in split_model.parts(state.model)[0].items()
        }
    assert set(batches.values()) == {16}
    for name, step in steps["with"].items():
        allowed = 4e-5 * step.abs().max() + 16 * EPS * 0.2  # as above
        assert bool((steps["without"][name] - step / 5).abs().max() <= allowed)
    assert max(step.abs().max() for step in steps["with"].values()) > 1e-3


# --- the control ---


def test_batches_follow_the_speed_that_was_measured(lab):
    bench = lab()
    method = dataclasses.replace(MergeSfl.toy(), batch=32, selection=Genetic(budget_rows=1000))
    state, (first, second) = run(bench, method, rounds=2)
    assert set(first.values()) == {32}  # nothing is known yet, so all count as alike
    measured = {}
    for row in bench.rows("exchange"):
        if row["round"] == 0 and row["work"] == "step":
            measured.setdefault(row["device"], []).append(row["seconds"] / first[row["device"]])
    costs = {id: np.mean(seconds) for id, seconds in measured.items()}
    fastest = min(costs, key=costs.get)
    assert second[fastest] == 32
    # Eq. 9 leaves nobody slower than the fastest at D, but for one row at least
    for id, batch in second.items():
        assert batch == 1 or batch * costs[id] <= 32 * costs[fastest] * (1 + 1e-9), id
    (note,) = [
        row["values"]
        for row in bench.rows("note")
        if row["round"] == 1 and "merged_kl" in row["values"]
    ]
    assert note["merged_rows"] == sum(second.values())
    # Eq. 9 rounds batches down, each by less than one row of 32 or of what its speed allows
    lost = np.mean([1 / (batch + 1) for batch in second.values()])
    assert 0 <= note["waiting_planned"] <= lost
    assert all(worker.rounds == 2 for worker in state.workers.values())


def test_the_papers_form_keeps_batches_within_a_round(lab):
    spies = []
    lab().run(MergeSfl.toy(), rounds=2, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    assert {type(order).__name__ for spy in spies for _, order in spy.orders} == {
        "LabelQuery",
        "Begin",
        "Step",
    }


@pytest.mark.parametrize("changed", [{}, {"merging": "in-turn"}, {"batches": Equal()}], ids=str)
def test_with_all_that_is_ours_switched_off_it_is_the_papers_form(lab, changed):
    """The same state, to the bit."""
    paper = dataclasses.replace(MergeSfl.toy(), batch=32, **changed)
    off = dataclasses.replace(MergeSflPlus.toy(), batch=32, **(OFF | changed))
    one, other = lab("paper").run(paper, rounds=2), lab("off").run(off, rounds=2)
    assert bits(one) == bits(other)
    assert bits(paper.deploy(one)) == bits(off.deploy(other))


@pytest.mark.parametrize(
    ("name", "key", "value", "write"),
    [
        ("mergesfl", "labels_stay", True, 'write name = "mergesfl-plus"'),
        (
            "mergesfl",
            "bottom_rate",
            0.5,
            'write name = "mergesfl-plus" and client_lr_multiplier for bottom_rate',
        ),
        ("mergesfl", "keep", 0.5, "write batches.keep"),
        ("mergesfl", "regulate", False, 'write batches.name = "equal" for false'),
        (
            "mergesfl",
            "join_late",
            False,
            'write name = "mergesfl-plus" and joining.name = "at-once" for false',
        ),
        ("mergesfl-plus", "fewest", 3, "write selection.fewest"),
        ("mergesfl-plus", "bottom_weights", "uniform", "write client_weights"),
        ("mergesfl-plus", "calibrate", 0.5, "write logit_adjustment.share"),
        ("adasfl", "keep", 0.5, "write batches.keep"),
        ("pyramidfl", "patience", 0.5, "write selection.patience"),
        ("pyramidfl", "drop_most", 0.5, "write thinning.most"),
    ],
)
def test_the_refusal_of_an_older_recipe_says_what_to_write_now(name, key, value, write):
    with pytest.raises(BadInput) as refused:
        recipe({"method": {"name": name, key: value}})
    assert str(refused.value) == f"method.{key} is no longer a setting of {name}; {write}"


@pytest.mark.parametrize("name", ["mergesfl", "mergesfl-plus", "splitfed_v2"])
@pytest.mark.parametrize(
    ("key", "value", "write"),
    [
        ("logit_adjustment", 0.5, 'logit_adjustment = {name = "label-skew", share = 0.5}'),
        ("selection", "random", 'selection = {name = "random"}'),
    ],
)
def test_the_refusal_of_a_plain_value_names_the_table(name, key, value, write):
    with pytest.raises(BadInput) as refused:
        recipe({"method": {"name": name, key: value}})
    assert f"it is a table now; write {write}" in str(refused.value)
    table = tomllib.loads(write)
    assert getattr(recipe({"method": {"name": name, **table}}).method, key) in (
        LabelSkew(share=0.5),
        RandomDevices(),
    )


UNEQUAL = ("tx2", "tx2", "tx2", "nx", "nx", "nx", "agx", "agx")


def waiting_shares(bench, method, rounds):
    """The share of each round's time that the mean device waited."""
    shares, state = [], method.start(bench.task, np.random.default_rng(0))
    for round in range(rounds):
        before, totals = bench.fleet.now, bench.fleet.begin_round(round)
        state = method.round(state, bench.fleet)
        bench.fleet.end_round(0.0)
        shares.append(totals.waiting_seconds / (bench.fleet.now - before))
    return shares


def test_devices_wait_less_where_batches_follow_the_round(lab):
    """A plan by the rounds before knows nothing in the first, and later nothing of the round's
    links.
    """
    method = dataclasses.replace(
        MergeSflPlus.toy(),
        batch=36,
        steps=16,
        precision="fp32",
        selection=LeastWaiting(budget_rows=400),
    )
    within = waiting_shares(lab("within", kinds=UNEQUAL), method, 3)
    fixed = waiting_shares(
        lab("fixed", kinds=UNEQUAL),
        dataclasses.replace(method, batches=Regulated(), joining=AtOnce()),
        3,
    )
    # not in each round: every exchange has a link of its own, which batches cannot follow
    assert within[0] < fixed[0]
    assert np.mean(within) < np.mean(fixed)


def resized(bench, method, rounds=1):
    """The state after some rounds, and each device's batches by iteration of the last one."""
    spies = []
    state = bench.run(
        method, rounds=rounds, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1]
    )
    return state, sizes_of(spies[-1].orders)


def sizes_of(orders):
    """Each device's batches by iteration, as the server set them in a round."""
    batches = {}
    for id, order in orders:
        match type(order).__name__:
            case "Begin" | "Resized":
                batches.setdefault(id, []).append(order.batch)
            case "Step":
                batches[id].append(batches[id][-1])
    return {id: own[:-1] for id, own in batches.items()}  # the last step ends the round


@pytest.mark.parametrize(
    ("steps", "within", "first"), [(8, True, 4), (7, True, 16), (8, False, 16)]
)
def test_a_long_round_begins_with_a_part_of_its_batches(lab, steps, within, first):
    """By them the round's links become known, for which few rows do; the next batches are halves,
    then whole ones.
    """
    method = dataclasses.replace(
        MergeSflPlus.toy(),
        steps=steps,
        batches=WithinRound(fill_tokens=False) if within else Regulated(),
        selection=LeastWaiting(budget_rows=1000),
        joining=AtOnce(),
    )
    _, batches = resized(lab(), method)
    assert {own[0] for own in batches.values()} == {first}
    assert max(own[1] for own in batches.values()) <= 8 or first == 16
    assert max(own[2] for own in batches.values()) >= SHORTER * 16


@pytest.mark.parametrize(
    ("labels_stay", "fill_tokens"), [(False, False), (True, False), (False, True)]
)
def test_batches_that_change_still_make_the_merged_steps(lab, labels_stay, fill_tokens):
    """Three iterations by hand: one graph through all models, Q/d on gradients, sums of rows as
    weights.
    """
    bench = lab("x")
    method = dataclasses.replace(
        PLAIN,
        steps=3,
        batch=32,
        labels_stay=labels_stay,
        batches=WithinRound(fill_tokens=fill_tokens),
    )
    split_model = split_model_of(bench.task.base, 1, rank=4)
    start = started(method, bench)
    state, batches = resized(bench, method)
    inputs = {
        id: batches_of(bench, id, own, asks=0 if labels_stay else 1) for id, own in batches.items()
    }
    batches = {id: [len(batch["labels"]) for batch in own] for id, own in inputs.items()}
    assert len({rows for own in batches.values() for rows in own}) > 3
    assert any(len(set(own)) > 1 for own in batches.values())
    expected = by_hand(
        split_model, start, inputs, dict.fromkeys(batches, 0), steps=3, labels_stay=labels_stay
    )
    assert_same_step(state.model, expected, start, off=6e-5)  # of three steps


# a client model that is heavy beside a batch's features
STAGGERED = dataclasses.replace(
    PLAIN, steps=8, batch=32, rank=32, learning_rate=0.1, selection=LeastWaiting(budget_rows=400)
)


class Watch(Spy):
    """Knows after how many iterations each device's first features were merged."""

    def __init__(self, fleet):
        super().__init__(fleet)
        self.iterations, self.joined, self.early = 0, {}, set()

    def ask(self, work, orders, **limits):
        self._record(work, orders)
        return super().ask(work, orders, **limits)

    def send(self, work, orders):
        self._record(work, orders)
        if work.__name__ == "end" and self.iterations < 7:
            self.early |= set(orders)
        super().send(work, orders)

    def _record(self, work, orders):
        if work.__name__ in ("step", "resize", "end"):
            for id in orders:
                self.joined.setdefault(id, self.iterations)
        self.iterations += work.__name__ in ("step", "resize")


def test_devices_that_join_late_and_leave_early_still_make_the_merged_steps(lab):
    """By hand, as above, with the devices that are in it in each iteration."""
    bench = lab("x", kinds=UNEQUAL)
    watches = []
    state = bench.run(
        STAGGERED, rounds=1, around=lambda fleet: watches.append(Watch(fleet)) or watches[-1]
    )
    (watch,) = watches
    assert len(set(watch.joined.values())) > 1
    assert watch.early
    sizes = sizes_of(watch.orders)
    inputs = {id: batches_of(bench, id, own, asks=1) for id, own in sizes.items()}
    expected = by_hand(
        split_model_of(bench.task.base, 1, rank=STAGGERED.rank),
        started(STAGGERED, bench),
        inputs,
        watch.joined,
        steps=8,
        rate=STAGGERED.learning_rate,
    )
    assert_same_step(state.model, expected, started(STAGGERED, bench), off=1.6e-4)  # of eight steps
    assert {len(own) for own in inputs.values()} == {len(own) for own in sizes.values()} != {8}


def test_where_the_client_model_is_light_nobody_joins_late(lab):
    watches = []
    around = lambda fleet: watches.append(Watch(fleet)) or watches[-1]  # noqa: E731
    lab("x", kinds=UNEQUAL).run(dataclasses.replace(STAGGERED, rank=2), rounds=1, around=around)
    assert set(watches[0].joined.values()) == {0}
    assert not watches[0].early


def test_devices_wait_less_where_slow_links_join_late(lab):
    method = dataclasses.replace(MergeSflPlus.toy(), steps=16, batch=12, precision="fp32", rank=32)
    late = waiting_shares(lab("late", kinds=UNEQUAL), method, 2)
    together = waiting_shares(
        lab("together", kinds=UNEQUAL), dataclasses.replace(method, joining=AtOnce()), 2
    )
    assert np.mean(late) < np.mean(together)


@pytest.mark.parametrize("lost", ["begin", "step", "end"])
def test_a_device_that_is_lost_while_the_others_go_on_is_not_waited_for(lab, lost):
    """It is asked no more, its replies are dropped, and the other client models count."""
    bench = lab("x", kinds=UNEQUAL)
    watches = []
    bench.run(STAGGERED, rounds=1, around=lambda fleet: watches.append(Watch(fleet)) or watches[-1])
    first, *_, last = sorted(watches[0].joined, key=watches[0].joined.get)
    gone = {"begin": last, "step": first, "end": min(watches[0].early)}[lost]

    class Losing(Watch):
        def next(self):
            reply = super().next()
            came = [value for id, value in self.results if id == gone]
            first = sum(isinstance(value, Forwarded) for value in came) == 1
            kept = {"begin": Forwarded, "end": Ended, "step": Forwarded}[lost]
            lose = (
                reply.device == gone
                and isinstance(reply.value, kept)
                and first == (lost == "begin")
            )
            return self.next() if lose else reply

    spies = []
    state = lab("y", kinds=UNEQUAL).run(
        STAGGERED, rounds=1, around=lambda fleet: spies.append(Losing(fleet)) or spies[-1]
    )
    assert set(state.workers) == set(watches[0].joined) - {gone}
    assert state.round == 1


def by_hand(split_model, start, inputs, joined, steps, labels_stay=False, rate=0.3):
    """The model after so many merged steps of these devices' batches, each from the iteration on in
    which it joined.
    """
    client_model, server_model = (leaves(part) for part in split_model.parts(start))
    ends = (
        {id: leaves({name: server_model[name] for name in split_model.ends}) for id in inputs}
        if labels_stay
        else {}
    )
    client_models = {id: leaves(client_model) for id in inputs}
    for step in range(steps):
        batches = {
            id: own[step - joined[id]]
            for id, own in inputs.items()
            if 0 <= step - joined[id] < len(own)
        }
        rows, total = {id: len(batch["labels"]) for id, batch in batches.items()}, {}
        for id, batch in batches.items():
            features = split_model.client_forward(client_models[id], batch, seed=None)
            total[id] = split_model.server_forward(
                server_model | ends.get(id, {}), features, batch["labels"], seed=None
            ).total.sum()
        (sum(total.values()) / sum(rows.values())).backward()
        scales = [(server_model, 1.0)]
        scales += [
            (own[id], sum(rows.values()) / rows[id])
            for own in (client_models, ends)
            for id in rows
            if own
        ]
        descend(scales, rate)
    counts = {id: sum(len(batch["labels"]) for batch in own) for id, own in inputs.items()}
    mean = lambda each: {  # noqa: E731
        name: sum(counts[id] * own[name] for id, own in each.items()) / sum(counts.values())
        for name in next(iter(each.values()))
    }
    expected = mean(client_models) | {
        name: leaf
        for name, leaf in server_model.items()
        if not ends or name not in split_model.ends
    }
    return expected | (mean(ends) if ends else {})


def leaves(weights):
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in weights.items()}


def descend(scales, rate=0.3):
    """A step of SGD of all these weights, each with its own factor on the gradient."""
    with torch.no_grad():
        for weights, scale in scales:
            for leaf in weights.values():
                if leaf.grad is not None:
                    leaf -= rate * scale * leaf.grad
                    leaf.grad = None


def batches_of(bench, id, sizes, asks):
    """As `batch_of`, for batches of different sizes, in rows or tokens."""
    index = bench.ids.index(id)
    seed = int(np.random.default_rng((bench.seed, index, asks)).integers(2**31))
    data = bench.task.train.take(bench.shares[index])
    found = [drawn(data.lengths, sizes[0], seed)]
    for size in sizes[1:]:
        found.append(drawn(data.lengths, size, seed, found[-1].taken, found[-1].left))
    return [data.batch(batch.rows) for batch in found]


def test_texts_take_the_tokens_that_the_server_sets_and_devices_wait_less(lab):
    """Few rows of unequal length take now more time, now less; filled to a number of tokens they
    take the same.
    """
    method = dataclasses.replace(
        MergeSflPlus.toy(), steps=16, batch=12, precision="fp32", joining=AtOnce()
    )
    spies = []
    lab("spied", kinds=UNEQUAL).run(
        method, rounds=1, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1]
    )
    batches = {}
    for (id, order), (_, result) in zip(spies[0].orders, spies[0].results, strict=True):
        if type(order).__name__ == "Resized":
            batches[id] = order.batch
        if id in batches and type(result).__name__ == "Forwarded":
            tokens, rows = int(result.features.mask.sum()), len(result.features.mask)
            assert rows <= batches[id].rows
            assert tokens <= batches[id].tokens or rows == 1
    assert len(batches) == len(UNEQUAL)
    filled = waiting_shares(lab("filled", kinds=UNEQUAL), method, 2)
    rows = waiting_shares(
        lab("rows", kinds=UNEQUAL),
        dataclasses.replace(method, batches=WithinRound(fill_tokens=False)),
        2,
    )
    assert np.mean(filled) < np.mean(rows)


def test_a_rate_that_follows_the_batch_does_so_within_a_round(lab):
    method = dataclasses.replace(
        MergeSflPlus.toy(), steps=3, batch=32, lr_scaling="linear", client_weights="uniform"
    )
    method = dataclasses.replace(method, batches=WithinRound(fill_tokens=False))
    spies = []
    lab("x").run(method, rounds=1, around=lambda fleet: spies.append(Spy(fleet)) or spies[-1])
    orders = [order for _, order in spies[0].orders if type(order).__name__ == "Resized"]
    assert any(order.optimising for order in orders)
    for order in orders:
        if order.optimising is not None:
            rate = method.learning_rate * method.client_lr_multiplier * order.batch / 32
            assert order.optimising.learning_rate == pytest.approx(rate)


def test_the_rate_of_client_models_scales_their_step(lab):
    """Plain SGD: a quarter of the rate is a quarter of the step; the server model's is the same."""
    before = started(PLAIN, lab("start"))
    whole, _ = run(lab("whole"), dataclasses.replace(PLAIN, cut=2))
    quarter, _ = run(lab("quarter"), dataclasses.replace(PLAIN, cut=2, client_lr_multiplier=0.25))
    for (
        name,
        tensor,
    ) in (
        before.adapter.items()
    ):  # with cut = 2 all adapters are in the client model, the head is the server model
        step = whole.model.adapter[name] - tensor
        allowed = 8 * EPS * tensor.abs().max()
        # a quarter is exact, so only the sums with the weights round
        assert bool(
            (quarter.model.adapter[name] - tensor - 0.25 * step).abs().max()
            <= allowed + 8 * EPS * step.abs().max()
        )
    assert bits(whole.model.head) == bits(quarter.model.head)
    assert bits(whole.model.adapter) != bits(quarter.model.adapter)


def test_logit_adjustment_takes_off_what_a_devices_labels_tell():
    """Nothing for a device whose labels are the fleet's, whatever those are."""
    alike = logit_adjustments({"a": np.array([0.25, 0.75]), "b": np.array([0.25, 0.75])}, 0.9)
    assert alike["a"].tolist() == alike["b"].tolist() == pytest.approx([0.0, 0.0])
    missing = logit_adjustments(
        {"a": np.array([0.5, 0.5, 0.0]), "b": np.array([0.5, 0.5, 0.0])}, 0.9
    )
    assert missing["a"].tolist() == pytest.approx([0.0, 0.0, 0.0])  # a class that nobody holds
    skewed = logit_adjustments({"a": np.array([1.0, 0.0]), "b": np.array([0.0, 1.0])}, 0.95)
    assert skewed["a"].tolist() == pytest.approx([math.log(1.95), math.log(0.05)])
    assert skewed["b"].tolist() == pytest.approx([math.log(0.05), math.log(1.95)])


def test_regulated_within_a_resumed_run_is_the_uninterrupted_one(lab):
    method = dataclasses.replace(MergeSflPlus.toy(), batch=32)
    whole = lab("whole").run(method, rounds=3)
    first = lab("parts")
    first.save(first.run(method, rounds=1))
    first.close()
    again = lab("parts")
    assert again.saved.state.fixed_seconds > 0
    assert bits(again.run(method, rounds=3)) == bits(whole)


def test_without_regulation_batches_are_equal(lab):
    _, (_, second) = run(lab(), dataclasses.replace(MergeSfl.toy(), batches=Equal()), rounds=2)
    assert len(set(second.values())) == 1


def test_it_chooses_devices_for_their_labels(lab):
    """Of a fleet whose devices hold one class each it takes all classes."""
    bench = lab(kinds=("nx",) * 9)
    labels = bench.task.train.labels
    of_class = [np.flatnonzero(labels == i) for i in range(3)]
    shares = tuple(of_class[i % 3][:20] for i in range(9))
    bench.shares = shares
    workshop = bench.workers._workshop
    bench.workers._workshop = dataclasses.replace(workshop, shares=shares)
    method = dataclasses.replace(MergeSfl.toy(), selection=Genetic(fewest=3, most=3), steps=1)
    state, (batches,) = run(bench, method)
    assert {bench.ids.index(id) % 3 for id in batches} == {0, 1, 2}
    (note,) = [row["values"] for row in bench.rows("note") if "merged_kl" in row["values"]]
    assert note["merged_kl"] < 1e-12
    assert len(state.labels) == 9
    assert set(state.workers) == set(batches)  # only they took part
    run(bench, dataclasses.replace(method, selection=Genetic(fewest=1, most=1), steps=9))
    merged = [
        row["values"]["round_kl"] for row in bench.rows("note") if "round_kl" in row["values"]
    ]
    assert merged == [
        pytest.approx(0, abs=1e-12),
        pytest.approx(math.log(3)),
    ]  # all classes, and one of three


def test_labels_are_asked_for_once(lab):
    bench = lab()
    bench.run(MergeSfl.toy(), rounds=2)
    looks = [row["round"] for row in bench.rows("exchange") if row["work"] == "label_distribution"]
    assert looks == [0] * len(bench.ids)


def test_a_device_without_memory_for_a_row_is_left_out(lab):
    bench = lab()
    split_model = split_model_of(bench.task.base, 1, rank=4)
    needs = [split_model.memory_bytes("client", rows, bench.task.max_tokens) for rows in (1, 7)]
    small = {bench.ids[0]: needs[0] - 1, bench.ids[1]: needs[1]}

    class Narrow(Spy):
        @property
        def devices(self):
            return tuple(
                dataclasses.replace(
                    profile, memory_bytes=small.get(profile.id, profile.memory_bytes)
                )
                for profile in self._fleet.devices
            )

    spies = []
    bench.run(
        MergeSfl.toy(), rounds=1, around=lambda fleet: spies.append(Narrow(fleet)) or spies[-1]
    )
    batches = {id: order.batch for id, order in spies[0].orders if type(order).__name__ == "Begin"}
    assert bench.ids[0] not in batches
    assert batches[bench.ids[1]] == 7
    notes = [row["values"] for row in bench.rows("note") if "left_out" in row["values"]]
    assert notes == [{"device": bench.ids[0], "left_out": "one row does not fit its memory"}]
    small |= dict.fromkeys(bench.ids, 1)
    with pytest.raises(AllLost, match="has the memory for one row"):
        lab("none").run(MergeSfl.toy(), rounds=1, around=Narrow)


def test_a_batch_is_never_larger_than_a_devices_data(lab):
    _, (batches,) = run(lab("some"), dataclasses.replace(MergeSfl.toy(), batch=60, steps=1))
    assert list(batches.values()) == [40, 50, 60, 60, 60]  # they hold 40, 50, 60, 70 and 80 rows


@pytest.mark.parametrize(
    "changed",
    [
        {"merging": "in-turn"},
        {"merging": "copies"},
        {"selection": RandomDevices(fewest=2)},
        {"selection": Everyone()},
        {"batches": WithinRound(tune=False)},
        {"client_weights": "uniform"},
        {"precision": "int8"},
        {"labels_stay": True},
        {"optimiser": "sgd", "learning_rate": 0.3, "decay": 0.9, "lowest": 0.1},
        {"cut": 0},
        {"logit_adjustment": Unadjusted()},
        {"client_lr_multiplier": 1.0},
    ],
    ids=str,
)
def test_every_variant_learns_something_else(lab, task, changed):
    # more than two of the devices hold
    plain = dataclasses.replace(
        MergeSflPlus.toy(), selection=LeastWaiting(fewest=2), steps=2, batch=60
    )
    method = dataclasses.replace(plain, **changed)
    method.check(task)
    state = lab("changed").run(method, rounds=1)
    other = lab("toy").run(plain, rounds=1)
    assert all(torch.isfinite(tensor).all() for tensor in state.model.adapter.values())
    moved = [
        tensor.abs().max()
        for name, tensor in state.model.adapter.items()
        if name == b_name(name[: -len(".lora_B")])
    ]
    assert max(moved) > 0
    # these devices' labels are near the fleet's, so there is nothing to tune
    if changed != {"batches": WithinRound(tune=False)}:
        assert bits(state.model) != bits(other.model)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"cut": 3}, "after block 3, but this model has 2 blocks"),
        ({"cut": -2}, "after block -2"),
        ({"batch": 301}, "hold 300 rows"),
        ({"batch": 0}, "at least 1"),
        ({"steps": 0}, "at least 1"),
        ({"selection": LeastWaiting(budget_rows=-1)}, "selection.budget_rows is -1"),
        ({"batches": WithinRound(keep=1.0)}, "batches.keep is 1.0"),
        ({"selection": RandomDevices(fewest=6, most=5)}, "devices a round"),
        ({"selection": Genetic(population=1)}, "selection.population is 1"),
        ({"batches": Regulated(divergence=-0.1)}, "batches.divergence is -0.1"),
        ({"joining": Late(quorum=0.0)}, "joining.quorum is 0.0"),
        ({"labels_stay": True, "merging": "copies"}, "needs merged features"),
        ({"rank": 100}, "rank"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"logit_adjustment": LabelSkew(share=1.0)}, "logit_adjustment.share is 1.0"),
        ({"client_lr_multiplier": 0.0}, "client_lr_multiplier is 0.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_before_the_first_round(task, changed, match):
    with pytest.raises(BadInput, match=match):
        dataclasses.replace(MergeSflPlus.toy(), **changed).check(task)


def test_what_is_deployed_is_the_mean_of_all_rounds_models(lab):
    """Against weights worked out by hand: after t rounds the newest counts 4 / (t + 3) (Shamir and
    Zhang 2013, eta = 3).
    """
    counts = [[1], [0.2, 0.8], [0.2 / 3, 0.8 / 3, 2 / 3]]
    bench, models = lab("averaged"), []
    method, alone = (
        MergeSflPlus.toy(),
        dataclasses.replace(MergeSflPlus.toy(), averaging=LastRound()),
    )
    state = method.start(bench.task, np.random.default_rng(0))
    for round, weights in enumerate(counts):
        bench.fleet.begin_round(round)
        state = method.round(state, bench.fleet)
        models.append(state.model)
        deployed = method.deploy(state)
        for name, tensor in deployed.adapter.items():
            expected = sum(
                weight * model.adapter[name] for weight, model in zip(weights, models, strict=True)
            )
            torch.testing.assert_close(tensor, expected, rtol=8 * EPS, atol=8 * EPS)
        assert (bits(deployed.head) == bits(state.model.head)) == (round == 0)
        bench.fleet.end_round(0.0)
    bench = lab("alone")
    bench.fleet.begin_round(0)
    state = alone.round(alone.start(bench.task, np.random.default_rng(0)), bench.fleet)
    assert alone.deploy(state) is state.model
