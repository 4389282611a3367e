"""One table over every registered method: what each of them must do, whatever it is."""

import dataclasses
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toy import TEST_ROWS, Lab, Spy, bits

from fedspine.core.fleet import AllLost
from fedspine.core.message import pack, unpack
from fedspine.fleets.lossy import Lossy
from fedspine.lm.score import score
from fedspine.methods import all_methods

METHODS = all_methods()
SOME = 3  # rounds of the task's five, enough to prune, merge and prune again
# by method, so that what several tests look at is made once for each of them
pytestmark = pytest.mark.parametrize("name", sorted(METHODS), scope="module")


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The recorded first rounds of an undisturbed run with seed 0."""

    states: list[Any]  # before and after each round
    kept: list[bytes]  # what each packed to before the next round began
    spies: list[Spy]  # one for each round
    ids: list[str]
    exchanges: list[dict]
    rounds: list[dict]

    @property
    def state(self):
        return self.states[-1]

    @property
    def values(self):
        """All orders and results."""
        return [value for spy in self.spies for _, value in spy.orders + spy.results]


@pytest.fixture(scope="module")
def bench(name, task, tmp_path_factory):
    made = Lab(task, tmp_path_factory.mktemp("recorded"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def recorded(name, bench):
    method, spies = METHODS[name].toy(), []
    states = [method.start(bench.task, np.random.default_rng([bench.seed, 1]))]
    kept = []
    for round in range(SOME):
        kept.append(bits(states[-1]))
        states.append(
            bench.run(
                method,
                rounds=round + 1,
                state=states[-1],
                around=lambda fleet: spies.append(Spy(fleet)) or spies[-1],
            )
        )
    return Recorded(states, kept, spies, bench.ids, bench.rows("exchange"), bench.rows("round"))


@pytest.fixture(scope="module")
def whole(recorded):
    """The packed state that many tests compare with, computed in this process."""
    return bits(recorded.state)


def nan(value):
    """The message with NaN in its first tensor of floats, that of its head where it has one; itself
    where it has none.
    """
    for field in sorted(vars(value), key=lambda field: field != "head"):
        inside = getattr(value, field)
        broken = inside
        if isinstance(inside, dict) and any(map(torch.is_tensor, inside.values())):
            first = next(iter(inside))
            broken = inside | {first: torch.full_like(inside[first], math.nan)}
        elif torch.is_tensor(inside) and inside.is_floating_point():
            broken = torch.full_like(inside, math.nan)
        elif dataclasses.is_dataclass(inside):
            broken = nan(inside)
        if broken is not inside:
            return replace(value, **{field: broken})
    return value


def nan_loss(value):
    """The message with a loss of NaN; where the server finds the loss, with weights or features of
    NaN.
    """
    return replace(value, loss=math.nan) if "loss" in vars(value) else nan(value)


def test_its_settings_suit_the_toy_task(name, task):
    METHODS[name].toy().check(task)


def test_improves_on_the_toy_task(name, task, recorded):
    # A model that knows nothing of the text cannot get below ln 3 nats on classes of equal size,
    # and its accuracy is a mean of 90 draws at 1/3: standard error sqrt(1/3 * 2/3 / 90) = 0.050,
    # and four of them above is no luck.
    method, start = METHODS[name].toy(), recorded.states[0]
    before = score(task.base, method.deploy(start), task.test)
    luck = 1 / 3 + 4 * math.sqrt(1 / 3 * 2 / 3 / TEST_ROWS)
    models = [method.deploy(recorded.state, id) for id in (None, *recorded.ids)]
    for model in [*models, method.unpruned(recorded.state)]:
        after = score(task.base, model, task.test)
        assert after.mean_loss < min(before.mean_loss, math.log(3))
        assert after.accuracy > luck


def test_another_seed_gives_other_bits(name, lab, recorded):
    assert bits(lab(seed=1).run(METHODS[name].toy(), rounds=1)) != bits(recorded.states[1])


def test_same_seed_same_bits_also_in_worker_processes(name, lab, recorded):
    again = lab(workers=2).run(METHODS[name].toy(), rounds=SOME - 1)
    assert bits(again) == bits(recorded.states[SOME - 1])


def test_resumed_equals_uninterrupted(name, lab, whole):
    method, first = METHODS[name].toy(), lab("killed")
    state = first.run(method, rounds=1)
    first.save(state)
    # a round that was never saved, whose memories and rows must be forgotten
    first.run(method, rounds=2, state=state)
    first.close()
    second = lab("killed")
    assert second.saved.round == 1
    assert bits(second.run(method, rounds=SOME)) == whole


def test_rounds_change_no_state_in_place(recorded):
    assert [bits(state) for state in recorded.states[:-1]] == recorded.kept


def test_messages_round_trip(recorded):
    assert len(recorded.values) >= 2 * len(recorded.ids)
    for value in [recorded.state, *recorded.values]:
        again = unpack(pack(value))
        assert type(again) is type(value)
        assert pack(again).payload == pack(value).payload


def test_recorded_bytes_are_the_bytes_packed(recorded):
    rows, totals = recorded.exchanges, recorded.rounds
    down = [(id, pack(order).bytes) for spy in recorded.spies for id, order in spy.orders]
    up = [(id, pack(result).bytes) for spy in recorded.spies for id, result in spy.results]
    assert [(row["device"], row["bytes_down"]) for row in rows] == down
    assert [(row["device"], row["bytes_up"]) for row in rows] == up
    assert sum(row["bytes_down"] for row in totals) == sum(size for _, size in down)
    assert sum(row["bytes_up"] for row in totals) == sum(size for _, size in up)


def test_what_is_trained_crosses_the_wire_in_fp16_by_default(name, recorded):
    for method in (METHODS[name](), METHODS[name].toy()):
        assert getattr(method, "precision", "fp16") == "fp16"
    seen = set()
    for value in recorded.values:
        for tensor in floats(value):
            if tensor.numel() > 1:  # else it is fp16's power of two for a message
                seen.add(tensor.dtype)
    assert seen == {torch.float16}


def floats(value):
    """All tensors of floats in a message."""
    if torch.is_tensor(value):
        return [value] if value.is_floating_point() else []
    inside = value.values() if isinstance(value, dict) else []
    if dataclasses.is_dataclass(value):
        inside = vars(value).values()
    elif isinstance(value, list | tuple):
        inside = value
    return [tensor for part in inside for tensor in floats(part)]


def test_the_clock_never_goes_back(recorded):
    clock = [now for spy in recorded.spies for now in spy.clock]
    assert clock == sorted(clock)
    ends = [row["now"] for row in recorded.rounds]
    assert all(later > earlier for earlier, later in zip([0.0, *ends], ends, strict=False))


def test_loses_devices_and_goes_on(name, lab, task, recorded):
    method, bench = METHODS[name].toy(), lab()
    # of a device in a round, of which 30 % shall be lost
    exchanges = len(recorded.spies[0].results) // len(bench.ids)
    drop = 1 - (1 - 0.3) ** (1 / exchanges)
    state = bench.run(
        method, around=lambda fleet: Lossy(fleet, drop=drop, delay_seconds=0.1, seed=2)
    )
    lost = [row for row in bench.rows("note") if row["values"].get("left_out") == "lost"]
    asked = task.rounds * len(bench.ids)
    # 30 % of 25 turns, give or take three standard errors of sqrt(0.3 * 0.7 / 25) = 0.092
    assert asked * (0.3 - 3 * 0.092) < len(lost) < asked * (0.3 + 3 * 0.092)
    assert state.round == task.rounds
    assert score(task.base, method.deploy(state), task.test).mean_loss < math.log(3)


def test_all_devices_lost_ends_the_run_in_so_many_words(name, lab):
    with pytest.raises(AllLost, match="5 devices asked, 0 replied"):
        lab().run(METHODS[name].toy(), around=lambda fleet: Lossy(fleet, drop=1.0))


def test_a_device_that_is_not_finite_is_noted_and_left_out(name, lab):
    """In its weights in the first round, in its loss in the second."""

    def breaking(broken):
        def broke(reply):
            return replace(reply, value=broken(reply.value)) if reply.device == "nx-02" else reply

        return broke

    def silencing(broken):
        def silent(reply):  # what holds no floats is as good as before
            breaks = broken(reply.value) is not reply.value
            return None if reply.device == "nx-02" and breaks else reply

        return silent

    def run(bench, change):
        kinds = iter((nan, nan_loss))
        return bench.run(
            METHODS[name].toy(),
            rounds=2,
            around=lambda fleet: Spy(fleet, reply=change(next(kinds))),
        )

    bad = lab("bad")
    assert bits(run(bad, breaking)) == bits(run(lab("silent"), silencing))
    notes = [row["values"] for row in bad.rows("note") if "left_out" in row["values"]]
    assert [
        (note["device"], "finite" in note["left_out"] or "nan" in note["left_out"])
        for note in notes
    ] == [("nx-02", True)] * 2


def test_a_device_recovers_from_a_loss_that_was_not_finite(name, lab):
    rounds = []

    def poison(id, order):
        return nan(order) if id == "nx-02" and len(rounds) <= 2 else order

    method, bench = METHODS[name].toy(), lab()
    state = bench.run(
        method, rounds=4, around=lambda fleet: rounds.append(0) or Spy(fleet, order=poison)
    )
    left_out = [row["round"] for row in bench.rows("note") if "left_out" in row["values"]]
    assert left_out == [0, 1]
    assert math.isfinite(
        score(bench.task.base, method.deploy(state, "nx-02"), bench.task.test).mean_loss
    )


def test_deploys_a_model_for_every_device(name, task, recorded):
    method = METHODS[name].toy()
    inputs = task.test.batch(np.arange(8))
    inputs.pop("labels")
    for state in (method.start(task, np.random.default_rng(0)), recorded.state):
        models = [method.deploy(state, id) for id in (None, *recorded.ids, "never-asked")] + [
            method.unpruned(state)
        ]
        for model in models:
            logits = task.base.fit(model)(**inputs).logits
            assert logits.shape == (8, 3)
            assert bool(torch.isfinite(logits).all())
