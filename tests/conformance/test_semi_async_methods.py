"""One table over every method: those that merge late replies, on a fleet that ends rounds at a
quorum; the others are refused before the first round.
"""

import math

import numpy as np
import pytest
from toy import TEST_ROWS, Spy, bits

from fedspine.core.errors import BadInput, listed
from fedspine.fleets.lossy import Lossy
from fedspine.fleets.semi_async import SemiAsync
from fedspine.lm.score import score
from fedspine.methods import all_methods
from fedspine.runs.config import Recipe

METHODS = all_methods()
MERGING = sorted(name for name, cls in METHODS.items() if cls.merges_late is not None)
WAITING = sorted(METHODS.keys() - set(MERGING))
# that merge changes of an adapter, of products over unequal shapes, and of whole models
OF_EACH_KIND = ("fedlora", "fedspine-plus", "pyramidfl")
QUORUM = 0.7  # of five devices: a round ends at the fourth reply
SOME = 3  # rounds of the five of the task


def at_quorum(name, bench, quorum=QUORUM, inner=lambda fleet: fleet):
    """Wraps the fleet for each round, as the run loop does."""
    return lambda fleet: SemiAsync(
        inner(fleet),
        quorum=quorum,
        late_work=METHODS[name].merges_late,
        in_flight=bench.fleet.in_flight,
    )


@pytest.mark.parametrize("name", MERGING)
def test_learns_where_rounds_end_at_a_quorum(name, lab, task):
    """Every late reply is merged in a later round or still under way at the end."""
    method, bench, spies = METHODS[name].toy(), lab(), []

    def recording(fleet):
        spies.append(Spy(fleet))
        return spies[-1]

    start = method.start(task, np.random.default_rng([0, 1]))
    state = bench.run(method, rounds=SOME, around=at_quorum(name, bench, inner=recording))
    sent, came = sum(len(spy.orders) for spy in spies), sum(len(spy.results) for spy in spies)
    assert came + len(bench.fleet.in_flight) == sent
    late_work = method.merges_late.partition(":")[2]
    asked = sum(row["work"] == late_work for row in bench.rows("exchange"))
    assert asked < SOME * len(bench.ids)  # in some round somebody was busy
    assert len({id for spy in spies for id, _ in spy.results}) == len(bench.ids)
    before = score(task.base, method.deploy(start), task.test)
    luck = 1 / 3 + 4 * math.sqrt(1 / 3 * 2 / 3 / TEST_ROWS)  # as in test_every_method.py
    after = score(task.base, method.deploy(state), task.test)
    assert after.mean_loss < min(before.mean_loss, math.log(3))
    assert after.accuracy > luck


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_resumed_equals_uninterrupted(name, lab):
    method, first = METHODS[name].toy(), lab("killed")
    around = at_quorum(name, first)
    saved = first.run(method, rounds=1, around=around)
    first.save(saved)
    assert first.fleet.in_flight  # an order is kept with what was saved
    expected = bits(first.run(method, rounds=SOME, around=around, state=saved))
    first.close()
    second = lab("killed")
    assert bits(second.run(method, rounds=SOME, around=at_quorum(name, second))) == expected


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_a_quorum_of_all_changes_no_bit(name, lab):
    method, bare, wrapped = METHODS[name].toy(), lab("bare"), lab("wrapped")
    one = bare.run(method, rounds=2)
    other = wrapped.run(method, rounds=2, around=at_quorum(name, wrapped, quorum=1.0))
    assert bits(one) == bits(other)


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_loses_devices_and_goes_on(name, lab, task):
    method, bench = METHODS[name].toy(), lab()
    # with this seed no round of any method loses all of its replies, which would end the run
    lossy = at_quorum(name, bench, inner=lambda fleet: Lossy(fleet, drop=0.2, seed=2))
    state = bench.run(method, around=lossy)
    assert any(row["values"].get("left_out") == "lost" for row in bench.rows("note"))
    assert state.round == task.rounds
    assert score(task.base, method.deploy(state), task.test).mean_loss < math.log(3)


@pytest.mark.parametrize("name", WAITING)
def test_a_method_that_needs_all_replies_is_refused(name):
    able = f"choose one of {listed(MERGING)}"
    with pytest.raises(BadInput) as refused:
        Recipe(method=name, quorum=QUORUM)
    assert str(refused.value) == (
        f"fleet.quorum is 0.7, but {name} needs all replies of a round; set it to 1, or {able}"
    )
    assert Recipe(method=name, quorum=1.0).fleet.quorum == 1
