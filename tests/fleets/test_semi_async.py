"""Rounds that end at a quorum: when an ask returns, where late replies go, and who is busy."""

import math

import pytest
from test_fleets import Job, Once, do, everyone, nap
from toy import bits

from fedspine.core.device import name_of
from fedspine.fleets.lossy import Lossy
from fedspine.fleets.semi_async import GIVEN_UP, SemiAsync

LONG = Job(flops=1e15)  # takes a TX2 many rounds of the others


def at_quorum(bench, quorum=0.7, inner=None):
    """The wrapper of one round, as the run loop makes it."""
    fleet = bench.fleet
    return SemiAsync(
        inner or fleet, quorum=quorum, late_work=name_of(do), in_flight=fleet.in_flight
    )


def rounds(bench, orders_of, count, quorum=0.7, totals=None):
    """So many rounds with these orders; the replies of each."""
    found, totals = [], [] if totals is None else totals
    for round in range(count):
        totals.append(bench.fleet.begin_round(round))
        fleet = at_quorum(bench, quorum)
        found.append(fleet.ask(do, orders_of(fleet)))
        bench.fleet.end_round(0.0)
    return found


def test_an_ask_returns_with_the_reply_that_makes_the_quorum(lab):
    bench = lab()
    bench.fleet.begin_round(0)
    fleet = at_quorum(bench)
    replies = fleet.ask(do, everyone(fleet))
    seconds = sorted(row["seconds"] for row in bench.rows("exchange"))
    enough = math.ceil(0.7 * len(bench.ids))
    assert len(replies) == enough < len(bench.ids)
    assert [reply.cost.seconds for reply in replies] == seconds[:enough]  # as they arrive
    assert fleet.now == seconds[enough - 1]
    assert {reply.late for reply in replies} == {0}


def test_shares_that_are_whole_numbers_of_replies_are_not_rounded_up(lab):
    bench = lab(kinds=("nx",) * 25)
    assert 0.28 * 25 > 7  # by the last bit
    ((*replies,),) = rounds(bench, everyone, 1, quorum=0.28)
    assert len(replies) == 7


def test_a_late_reply_comes_in_a_later_round_with_its_own_order(lab):
    bench = lab()

    def orders_of(fleet):
        return everyone(fleet, Job(load=f"round {bench.records.round}"))

    first, second = rounds(bench, orders_of, 2, totals=(totals := []))
    replied = {reply.device for reply in first}
    (late,) = [reply for reply in second if reply.late]
    assert late.device not in replied and late.late == 1
    assert late.order.load == "round 0"
    assert [(each.late, each.lost) for each in totals] == [(0, 0), (1, 0)]
    assert {reply.order.load for reply in second if not reply.late} == {"round 1"}


def test_a_busy_device_is_not_among_the_devices_and_cannot_be_asked(lab):
    bench = lab()
    bench.fleet.begin_round(0)
    fleet = at_quorum(bench)
    replied = {reply.device for reply in fleet.ask(do, everyone(fleet))}
    (busy,) = set(bench.ids) - replied
    assert {profile.id for profile in fleet.devices} == replied  # in the same round already
    bench.fleet.begin_round(1)
    fleet = at_quorum(bench)
    assert {profile.id for profile in fleet.devices} == replied
    with pytest.raises(LookupError, match=f"{busy} has not replied to an earlier order"):
        fleet.ask(do, {busy: Job()})


def test_where_nobody_is_free_a_round_waits_for_late_replies(lab):
    bench = lab()
    bench.fleet.begin_round(0)
    at_quorum(bench).send(do, everyone(bench.fleet))
    bench.fleet.begin_round(1)
    fleet = at_quorum(bench)
    assert fleet.devices == ()
    replies = fleet.ask(do, {})
    assert len(replies) == 4 and {reply.late for reply in replies} == {1}


def test_a_reply_is_given_up_after_three_rounds_and_left_out_when_it_comes(lab):
    bench, slow, free = lab(), "tx2-00", []
    for round in range(GIVEN_UP + 1):
        bench.fleet.begin_round(round)
        fleet = at_quorum(bench)
        free.append([profile.id for profile in fleet.devices])
        if round == GIVEN_UP:
            bench.fleet.wait(1e6)  # by now the reply is there
        first = round == 0
        replies = fleet.ask(do, {id: LONG if first and id == slow else Job() for id in free[-1]})
    assert [slow in ids for ids in free] == [True, *[False] * (GIVEN_UP - 1), True]
    assert all(reply.order.flops == Job().flops for reply in replies)
    notes = [row["values"] for row in bench.rows("note")]
    assert notes == [{"device": slow, "left_out": "its reply arrived too late"}]


def test_other_work_limits_and_parts_wait_for_all(lab):
    bench = lab()
    bench.fleet.begin_round(0)
    fleet, everybody = at_quorum(bench, quorum=0.2), everyone(bench.fleet)
    ids = list(everybody)
    assert [reply.device for reply in fleet.ask(nap, everybody)] == ids
    assert [reply.device for reply in fleet.ask(do, everybody, within=1e6)] == ids
    assert [reply.device for reply in fleet.only(ids).ask(do, everybody)] == ids
    parts = fleet.together(lambda name, part: part.ask(do, everybody), {"all": ids})
    assert [reply.device for reply in parts["all"]] == ids


def test_a_quorum_of_all_is_the_fleet_itself(lab):
    def asked(name, wrap):
        bench = lab(name)
        bench.fleet.begin_round(0)
        replies = wrap(bench).ask(do, everyone(bench.fleet))
        bench.fleet.end_round(0.0)
        rows = [{**row, "wall_seconds": 0, "server_wall_seconds": 0} for row in bench.rows("round")]
        return [(reply.device, bits(reply.value)) for reply in replies], rows, bench.fleet.now

    assert asked("bare", lambda bench: bench.fleet) == asked("all", lambda b: at_quorum(b, 1.0))


def test_lost_replies_are_waited_for_until_nothing_is_under_way(lab):
    bench = lab()
    bench.fleet.begin_round(0)
    fleet = at_quorum(bench, inner=Lossy(bench.fleet, drop=1.0))
    assert fleet.ask(do, everyone(fleet)) == []
    assert len(fleet.devices) == len(bench.ids)  # nobody is busy: nothing will come any more
    bench.fleet.begin_round(1)
    assert len(at_quorum(bench).devices) == len(bench.ids)


def test_the_future_after_a_snapshot_is_the_same(lab):
    def future(bench):
        found = []
        for round in (1, 2):
            bench.fleet.begin_round(round)
            fleet = at_quorum(bench, quorum=0.4)
            replies = fleet.ask(do, everyone(fleet, Job(load=str(round))))
            found += [
                (reply.device, reply.late, bits(reply.value), bits(reply.order), vars(reply.cost))
                for reply in replies
            ]
        return found, bench.fleet.now

    first = lab("killed")
    first.fleet.begin_round(0)
    at_quorum(first, quorum=0.4).ask(do, everyone(first.fleet, Job(load="0")))
    first.save(Once(round=1))
    expected = future(first)
    assert any(late for _, late, *_ in expected[0])
    first.close()
    second = lab("killed")
    assert second.fleet.in_flight.keys() == {entry.device for entry in second.saved.fleet.pending}
    assert len(second.fleet.in_flight) == 3
    assert future(second) == expected


@pytest.mark.parametrize("quorum", [0.0, 1.1])
def test_a_share_that_is_none_is_refused(lab, quorum):
    with pytest.raises(ValueError, match="expected 0 < quorum <= 1"):
        at_quorum(lab(), quorum)
