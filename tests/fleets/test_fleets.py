"""All that a fleet promises, on the simulated one; the wrapper that loses and delays; the pool of
workers.
"""

import math
import os
import re
import signal
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import Unlucky, bits

from fedspine.core.device import find_work, name_of, on_device
from fedspine.core.errors import BadInput
from fedspine.core.fleet import Idle
from fedspine.core.message import message, pack
from fedspine.execution.workers import WorkerLost, WorkFailed
from fedspine.fleets.lossy import Lossy
from fedspine.fleets.simulated import profiles

TERA = 1e12


@message
class Job:
    flops: float = TERA
    load: str = ""


@message
class Done:
    device: str
    times: int  # this device has served, by its own memory
    draw: float
    rows: int


@on_device
def do(device, job):
    """Count in memory, draw, and take as long as the job says."""
    times = device.memory.get("times", 0) + 1
    device.memory["times"] = times
    device.spend(flops=job.flops, launches=1, samples=3, memory_bytes=1000 * times)
    return Done(
        device=device.id, times=times, draw=float(device.rng.random()), rows=len(device.data)
    )


@on_device
def nap(device, job):
    """As `do`, after 50 ms on the wall."""
    time.sleep(0.05)
    return do(device, job)


@on_device
def fail(device, job):
    raise RuntimeError("the work itself is broken")


@on_device
def die(device, job):
    """End the worker process, as the kernel does when memory is short: always, or until the file
    `job.load` has so many characters as `times` says.
    """
    if device.id == "nx-02":
        path, _, times = job.load.partition(":")
        deaths = Path(path).read_text() if path else ""
        if not path or len(deaths) < int(times):
            if path:
                Path(path).write_text(deaths + "x")
            os.kill(os.getpid(), signal.SIGKILL)
    return do(device, job)


@on_device
def keep_and_die(device, job):
    """Keep something in the process for the next ask, before which the process dies once."""
    first = "times" not in device.memory
    if device.id == "nx-02" and not first and device.kept is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    done = do(device, job)
    device.keep(done.times, 8)
    return done


class Lazy(Mapping):
    """Orders that are built when they are read, and remember that."""

    def __init__(self, ids):
        self.ids, self.read = list(ids), []

    def __getitem__(self, id):
        self.read.append(id)
        return Job()

    def __iter__(self):
        return iter(self.ids)

    def __len__(self):
        return len(self.ids)


def everyone(fleet, job=None):
    return {device.id: job or Job() for device in fleet.devices}


# ask


def test_ask_answers_in_the_order_of_the_orders(lab):
    bench = lab()
    ids = bench.ids[::-1]
    replies = bench.fleet.ask(do, {id: Job() for id in ids})
    assert [reply.device for reply in replies] == [reply.value.device for reply in replies] == ids
    assert {reply.device: reply.value.rows for reply in replies} == {
        profile.id: profile.examples for profile in bench.fleet.devices
    }


def test_ask_moves_the_clock_by_the_slowest(lab):
    fleet = lab().fleet
    first = fleet.ask(do, everyone(fleet))
    assert fleet.now == max(reply.cost.seconds for reply in first)
    second = fleet.ask(do, everyone(fleet))
    assert fleet.now == max(r.cost.seconds for r in first) + max(r.cost.seconds for r in second)
    assert fleet.ask(do, {}) == []


def test_seconds_are_those_of_the_hardware(lab):
    bench = lab()
    for round in range(2):
        bench.fleet.begin_round(round)
        for ask in range(2):
            for index, reply in enumerate(bench.fleet.ask(do, everyone(bench.fleet))):
                timing = bench.hardware.seconds(
                    index,
                    round=round,
                    ask=2 * round + ask,
                    flops=TERA,
                    launches=1,
                    bytes_down=pack(Job()).bytes,
                    bytes_up=reply.cost.bytes_up,
                )
                assert reply.cost.seconds == timing.total
                assert reply.cost.bytes_down == pack(Job()).bytes
                assert reply.cost.bytes_up == pack(reply.value).bytes
                assert (reply.cost.flops, reply.cost.peak_memory_bytes) == (
                    TERA,
                    1000 * (2 * round + ask + 1),
                )


def twenty(bench):
    """Bytes up and seconds of twenty exchanges of one device in one round, on a slow link that
    meets no bound.
    """
    device = bench.ids[bench.hardware.link_groups.index(3)]
    bench.fleet.begin_round(0)
    costs = [bench.fleet.ask(do, {device: Job()})[0].cost for _ in range(20)]
    return [(cost.bytes_up, cost.seconds) for cost in costs]


def test_every_exchange_has_a_link_and_a_pace_of_its_own(lab):
    sizes = {size for size, _ in twenty(lab("sizes"))}  # which a draw's digits change by a few
    assert len(sizes) < 5
    for name, truth in (
        ("both", {}),
        ("link", {"compute_jitter": 0.0}),
        ("pace", {"link_jitter": 0.0}),
    ):
        assert len({seconds for _, seconds in twenty(lab(name, **truth))}) == 20, name
    calm = twenty(lab("calm", link_jitter=0.0, compute_jitter=0.0))
    assert len(set(calm)) == len(sizes)  # equal bytes take equal seconds


def test_a_kill_in_a_round_changes_no_exchange(lab):
    killed, whole = lab("killed"), lab("whole")
    for bench in (killed, whole):
        bench.fleet.begin_round(0)
        bench.fleet.ask(do, everyone(bench.fleet))
    killed.save(Once(round=1))
    killed.fleet.begin_round(1)
    killed.fleet.ask(do, everyone(killed.fleet))  # which is forgotten
    killed.close()
    again = lab("killed")
    costs = []
    for bench in (again, whole):
        bench.fleet.begin_round(1)
        replies = [bench.fleet.ask(do, everyone(bench.fleet)) for _ in range(2)]
        costs.append([(reply.device, reply.cost) for reply in chain(*replies)])
    assert costs[0] == costs[1]


def test_every_exchange_pays_one_round_trip(lab):
    trips = (0.5, 1.0, 2.0, 4.0)  # of the four Wi-Fi groups; powers of two, so that sums are exact
    near, far = lab("near"), lab("far", round_trip_seconds=trips)
    group = dict(zip(far.ids, far.hardware.link_groups, strict=True))
    longest = max(trips[each] for each in group.values())
    for bench in (near, far):
        bench.fleet.begin_round(0)
    without, charged = ([b.fleet.ask(do, everyone(b.fleet)) for _ in range(3)] for b in (near, far))
    for before, after in zip(chain(*without), chain(*charged), strict=True):
        more = after.cost.seconds - before.cost.seconds
        assert more == pytest.approx(trips[group[after.device]], rel=1e-12)
    assert far.fleet.now - near.fleet.now <= 3 * longest
    # and so does one that nobody waits for
    for bench in (near, far):
        bench.fleet.send(do, {"nx-03": Job()})
    seconds = [bench.fleet.next().cost.seconds for bench in (near, far)]
    assert seconds[1] - seconds[0] == pytest.approx(trips[group["nx-03"]], rel=1e-12)


def test_without_jitter_and_round_trip_seconds_are_as_by_hand(lab):
    bench = lab(kinds=("agx",), compute_jitter=0.0, link_jitter=0.0)
    bench.fleet.begin_round(0)
    (reply,) = bench.fleet.ask(do, everyone(bench.fleet))
    peak = {0: 11.28, 1: 2.13, 2: 5.49, 3: 7.37, 4: 7.37, 5: 7.37, 6: 7.37, 7: 5.49}
    # one TFLOP at 30 % of the mode's peak, one launch of 1/120 s, and what was packed at the link's
    # mean of the round
    seconds = 1 / (0.3 * peak[bench.hardware.mode(0, 0)]) + 1 / 120
    mean = bench.hardware.mean_mbps(0, round=0)
    bits = 8 * (pack(Job()).bytes + reply.cost.bytes_up)
    assert reply.cost.seconds == pytest.approx(seconds + bits / (1e6 * mean), rel=1e-12)
    foreseen = bench.fleet.foresee(
        bench.ids[0],
        flops=TERA,
        launches=1,
        bytes_down=pack(Job()).bytes,
        bytes_up=reply.cost.bytes_up,
    )
    assert foreseen == reply.cost.seconds


def test_orders_are_built_as_they_are_served(lab):
    bench = lab()
    orders = Lazy(bench.ids)
    bench.fleet.ask(do, orders)
    assert orders.read == bench.ids  # each once, in order


def test_memory_and_randomness_belong_to_the_device_and_its_asks(lab):
    def draws(name, rounds):
        fleet = lab(name).fleet
        return [
            [(r.value.times, r.value.draw) for r in fleet.ask(do, orders(fleet))]
            for orders in rounds
        ]

    both = draws("both", [everyone, everyone])
    assert [[times for times, _ in replies] for replies in both] == [[1] * 5, [2] * 5]
    assert len({draw for replies in both for _, draw in replies}) == 10
    # whoever else is asked, and in which order, makes no difference
    alone = draws(
        "alone",
        [lambda fleet: {"nx-03": Job()}, lambda fleet: dict(reversed(everyone(fleet).items()))],
    )
    assert alone[0] == [both[0][3]]
    assert alone[1][1] == both[1][3]
    assert alone[1][0] == both[0][4]


def test_late_replies_are_absent_and_charged(lab):
    bench = lab()
    jobs = everyone(bench.fleet) | {"nx-02": Job(flops=1e6 * TERA)}
    replies = bench.fleet.ask(do, jobs, within=20.0)
    assert [reply.device for reply in replies] == [id for id in bench.ids if id != "nx-02"]
    assert bench.fleet.now == 20.0
    rows = {row["device"]: row for row in bench.rows("exchange")}
    assert rows["nx-02"]["lost"]
    assert rows["nx-02"]["bytes_down"] == pack(jobs["nx-02"]).bytes
    assert rows["nx-02"]["bytes_up"] == rows["nx-03"]["bytes_up"] > 0
    assert not any(rows[reply.device]["lost"] for reply in replies)
    # its work has left no trace in its memory, as that of a real site
    assert [r.value.times for r in bench.fleet.ask(do, {"nx-02": Job()})] == [1]


def test_within_is_a_limit_and_no_delay(lab):
    fleet = lab().fleet
    replies = fleet.ask(do, everyone(fleet), within=1e6)
    assert len(replies) == 5
    assert fleet.now == max(reply.cost.seconds for reply in replies)


def test_a_device_is_unknown(lab):
    fleet = lab().fleet
    for reach in (
        lambda: fleet.ask(do, {"nx-99": Job()}),
        lambda: fleet.send(do, {"nx-99": Job()}),
    ):
        with pytest.raises(
            LookupError, match="nx-99 is not in this part of the fleet, which has 5 devices"
        ):
            reach()
    with pytest.raises(LookupError, match="nx-99"):
        fleet.only(["nx-02", "nx-99"])


def test_only_marked_work_is_served(lab):
    with pytest.raises(TypeError, match="decorate it with @on_device"):
        lab().fleet.ask(print, {"nx-02": Job()})
    with pytest.raises(LookupError, match="os:system is no work"):
        find_work("os:system")
    with pytest.raises(TypeError, match="at the top of its module"):
        on_device(lambda device, job: job)
    assert find_work(name_of(do)) is do


# send and next


def test_replies_arrive_one_by_one_in_order_of_time(lab):
    bench = lab()
    bench.fleet.send(do, everyone(bench.fleet))
    assert bench.fleet.now == 0.0
    arrivals = []
    for _ in bench.ids:
        reply = bench.fleet.next()
        arrivals.append(reply.device)
        assert bench.fleet.now == reply.cost.seconds
    assert sorted(arrivals) == sorted(bench.ids)
    assert arrivals != bench.ids, "the slow TX2 come first in the fleet, so arrival must differ"
    with pytest.raises(Idle, match="send an order first"):
        bench.fleet.next()


def test_a_reply_that_waited_does_not_turn_the_clock_back(lab):
    fleet = lab().fleet
    fleet.send(do, {"agx-04": Job()})
    fleet.wait(1000.0)
    assert fleet.next().device == "agx-04"
    assert fleet.now == 1000.0


def test_next_is_for_the_part_that_asks(lab):
    fleet = lab().fleet
    fleet.send(do, everyone(fleet))
    part = fleet.only(["tx2-00"])
    assert part.next().device == "tx2-00"
    with pytest.raises(Idle):
        part.next()
    assert fleet.next().device != "tx2-00"


def test_a_cohort_gets_pending_replies_of_all_devices(lab):
    fleet = lab().fleet
    fleet.cohort(["tx2-00"]).send(do, {"tx2-00": Job()})
    cohort = fleet.cohort(["nx-03"])
    assert [profile.id for profile in cohort.devices] == ["nx-03"]
    with pytest.raises(LookupError, match="tx2-00"):
        cohort.send(do, {"tx2-00": Job()})
    assert cohort.next().device == "tx2-00"


# parts


def test_a_part_has_the_same_clock(lab):
    fleet = lab().fleet
    part = fleet.only(["nx-03", "tx2-00"])
    assert [profile.id for profile in part.devices] == ["tx2-00", "nx-03"]
    part.ask(do, everyone(part))
    assert part.now == fleet.now > 0
    with pytest.raises(LookupError, match="agx-04"):
        part.ask(do, {"agx-04": Job()})


def test_groups_run_side_by_side(lab):
    fleet = lab().fleet
    fleet.wait(5.0)
    seen = {}

    def job(name, part):
        started = part.now
        for _ in range({"slow": 3, "fast": 1}[name]):
            part.ask(do, everyone(part))
        seen[name] = (started, part.now - started)
        return len(part.devices)

    sizes = fleet.together(job, {"slow": ["tx2-00", "tx2-01"], "fast": ["agx-04"]})
    assert sizes == {"slow": 2, "fast": 1}
    assert seen["slow"][0] == seen["fast"][0] == 5.0
    assert seen["slow"][1] > seen["fast"][1]
    assert fleet.now == pytest.approx(5.0 + seen["slow"][1])
    before = fleet.now
    assert fleet.together(job, {}) == {}
    assert fleet.now == before


def test_notes_and_waiting(lab):
    bench = lab()
    bench.fleet.wait(2.5)
    bench.fleet.only(["nx-02"]).note(device="nx-02", loss=math.nan, ranks=(1, 2))
    (row,) = bench.rows("note")
    assert row == {
        "row": "note",
        "round": 0,
        "now": 2.5,
        "values": {"device": "nx-02", "loss": None, "ranks": [1, 2]},
    }


def test_a_round_adds_up(lab):
    bench = lab()
    totals = bench.fleet.begin_round(4)
    replies = bench.fleet.ask(do, everyone(bench.fleet), within=1e6)
    bench.fleet.end_round(0.5)
    (row,) = bench.rows("round")
    seconds = [reply.cost.seconds for reply in replies]
    assert row["round"] == 4
    assert (row["devices"], row["lost"], totals.samples, totals.peak_memory_bytes) == (
        5,
        0,
        15,
        1000,
    )
    assert row["waiting_seconds"] == pytest.approx(max(seconds) - np.mean(seconds))
    assert row["bytes_up"] == sum(reply.cost.bytes_up for reply in replies)
    assert row["bytes_down"] == sum(reply.cost.bytes_down for reply in replies)


def test_devices_that_are_sent_orders_wait_until_the_next_one_or_the_rounds_end(lab):
    bench = lab()
    totals = bench.fleet.begin_round(0)
    fleet = bench.fleet.only(["tx2-00", "agx-04"])
    fleet.send(do, everyone(fleet))
    fast, slow = fleet.next(), fleet.next()
    assert (fast.device, slow.device) == ("agx-04", "tx2-00")
    bench.fleet.wait(2.0)
    # the other one waits for it, as for all that comes after
    (again,) = fleet.ask(do, {"tx2-00": Job()})
    bench.fleet.wait(3.0)
    fleet.send(do, {"agx-04": Job()})
    ended = bench.fleet.now  # before what was sent last arrives: nobody knows of its end
    bench.fleet.end_round(0.0)
    of_fast = ended - fast.cost.seconds
    of_slow = ended - slow.cost.seconds - again.cost.seconds
    assert totals.waiting_seconds == pytest.approx((of_fast + of_slow) / 2)
    later = bench.fleet.begin_round(1)
    bench.fleet.end_round(0.0)
    assert later.waiting_seconds == 0


def test_the_servers_own_time_is_shown_apart(lab):
    class Slow(Lazy):
        def __getitem__(self, id):
            time.sleep(0.02)  # the server builds an order
            return super().__getitem__(id)

    bench = lab()
    started = time.perf_counter()
    totals = bench.fleet.begin_round(0)
    bench.fleet.ask(nap, Slow(bench.ids))  # 0.1 s of orders, 0.25 s of naps
    bench.fleet.send(nap, Slow(bench.ids))
    time.sleep(0.1)
    wall = time.perf_counter() - started
    now = bench.fleet.now
    bench.fleet.end_round(wall)
    (row,) = bench.rows("round")
    # twice 0.1 s of orders and 0.1 s between, of all but the 0.5 s in which devices nap
    assert 0.3 <= row["server_wall_seconds"] <= row["wall_seconds"] - 0.5
    assert totals.server_wall_seconds == row["server_wall_seconds"]
    assert bench.fleet.now == now  # it is on no virtual clock


def test_data_must_be_there_for_every_device():
    with pytest.raises(BadInput, match="2 devices were expected to hold data, 1 do"):
        profiles(["nx", "nx"], [3])


# going on after a kill


def test_the_future_after_a_snapshot_is_the_same(lab):
    def future(fleet):
        events = [(fleet.next(), fleet.now) for _ in range(2)]
        fleet.send(do, {"tx2-01": Job()})
        events += [(fleet.next(), fleet.now) for _ in range(2)]
        events += [(reply, fleet.now) for reply in fleet.ask(do, everyone(fleet))]
        return [(reply.device, bits(reply.value), vars(reply.cost), now) for reply, now in events]

    first = lab("killed")
    first.fleet.ask(do, everyone(first.fleet))
    first.fleet.send(do, {id: Job() for id in ("tx2-00", "nx-02", "nx-03", "agx-04")})
    first.fleet.next()
    first.save(Once(round=1))
    expected = future(first.fleet)
    first.close()
    second = lab("killed")
    assert second.saved.state.round == 1
    assert len(second.saved.fleet.pending) == 3
    assert future(second.fleet) == expected


@message
class Once:
    """The least state that a store keeps."""

    round: int


# losses and delays


def lossy(bench, **settings):
    return Lossy(bench.fleet, **settings)


def test_losses_are_absent_and_noted(lab):
    bench = lab()
    fleet = lossy(bench, drop=0.5, seed=1)
    asked = answered = 0
    for _ in range(12):
        asked += len(bench.ids)
        answered += len(fleet.ask(do, everyone(fleet)))
    notes = [row["values"] for row in bench.rows("note")]
    assert len(notes) == asked - answered
    assert all(note["left_out"] == "lost" and note["device"] in bench.ids for note in notes)
    # a fair coin 60 times: 30 with a standard error of sqrt(60)/2 = 3.9; four of them
    assert abs(answered - 30) < 4 * 3.9
    # half of the losses come before the order arrives, so more work was done than replies
    # arrived
    served = len(bench.rows("exchange"))
    assert answered < served < asked


def test_losses_follow_the_seed_and_the_time(lab):
    def replied(name, seed):
        fleet = lossy(lab(name), drop=0.5, seed=seed)
        return [[reply.device for reply in fleet.ask(do, everyone(fleet))] for _ in range(4)]

    first = replied("first", 1)
    assert first == replied("again", 1) != replied("other", 2)
    assert len({tuple(devices) for devices in first}) > 1


def test_asking_again_is_another_chance_even_if_no_time_passed(lab):
    fleet = lossy(lab(), drop=0.9)
    # 200 tries at one in ten: silence for ever has probability 0.9^200 < 1e-9, unless nothing is
    # drawn anew
    assert any(fleet.ask(do, {"nx-02": Job()}) for _ in range(200))


def fleet_ids(fleet):
    return [profile.id for profile in fleet.devices]


def sent_and_lost(fleet):
    unlucky = Unlucky(fleet, fleet_ids(fleet))
    unlucky.send(do, everyone(fleet))
    with pytest.raises(Idle):
        unlucky.next()


@pytest.mark.parametrize(
    "unanswered",
    [
        lambda fleet: fleet.ask(do, everyone(fleet, Job(flops=1e6 * TERA)), within=20.0),
        lambda fleet: Unlucky(fleet, seconds=1e6).ask(do, everyone(fleet), within=20.0),
        lambda fleet: Unlucky(fleet, fleet_ids(fleet)).ask(do, everyone(fleet)),
        sent_and_lost,
    ],
    ids=["late", "delayed", "lost", "sent and lost"],
)
def test_a_device_whose_reply_does_not_arrive_goes_on_as_if_it_had_not_been_asked(lab, unanswered):
    def asked(fleet):
        return [(reply.value.times, reply.value.draw) for reply in fleet.ask(do, everyone(fleet))]

    plain, bench = lab("plain"), lab("unlucky")
    expected = [asked(plain.fleet), asked(plain.fleet)]
    first = asked(bench.fleet)
    assert not unanswered(bench.fleet)
    assert [first, asked(bench.fleet)] == expected
    rows = [row for row in bench.rows("exchange") if row["device"] == "nx-02"]
    assert [row["lost"] for row in rows] == [False, True, False]
    assert rows[1]["seconds"] != rows[2]["seconds"]  # each exchange draws its own time


def test_groups_lose_independently(lab):
    fleet, lost = lossy(lab(), drop=0.5), []
    for _ in range(8):
        replied = fleet.together(
            lambda name, part: bool(part.ask(do, everyone(part))),
            {"one": ["nx-02"], "other": ["nx-03"]},
        )
        lost.append(replied["one"] == replied["other"])
    assert 0 < sum(lost) < 8


def test_delays_come_on_top(lab):
    plain, late = lab("plain").fleet, lossy(lab("late"), delay_seconds=50.0)
    first, second = plain.ask(do, everyone(plain)), late.ask(do, everyone(late))
    extra = [b.cost.seconds - a.cost.seconds for a, b in zip(first, second, strict=True)]
    assert min(extra) > 0
    assert len(set(extra)) == 5
    # the mean of five exponentials: 50 with a standard error of 22, never a tenth
    assert np.mean(extra) > 5
    assert late.now == pytest.approx(max(reply.cost.seconds for reply in second))


def test_delays_make_late(lab):
    fleet = lossy(lab(), delay_seconds=1e6)
    assert fleet.ask(do, everyone(fleet), within=50.0) == []
    assert fleet.now == pytest.approx(50.0)


def test_whoever_is_lost_is_waited_for_until_the_time_is_up(lab):
    patient, hurried = lossy(lab("patient"), drop=1.0), lossy(lab("hurried"), drop=1.0)
    assert hurried.ask(do, everyone(hurried), within=30.0) == []
    assert hurried.now == pytest.approx(30.0)
    assert patient.ask(do, everyone(patient)) == []
    assert math.isfinite(patient.now)


def test_sent_orders_are_lost_too(lab):
    bench = lab()
    fleet = lossy(bench, drop=0.5, seed=2)
    replied = 0
    for _ in range(12):
        fleet.send(do, everyone(fleet))
        try:
            while fleet.next():
                replied += 1
        except Idle:
            pass
    assert abs(replied - 30) < 4 * 3.9  # as for ask
    assert len(bench.rows("note")) == 60 - replied
    assert replied < len(bench.rows("exchange")) < 60


def test_a_lossy_fleet_is_a_fleet(lab):
    bench = lab()
    fleet = lossy(bench, drop=0.0)
    assert fleet.devices == bench.fleet.devices
    part = fleet.only(["nx-02"])
    assert isinstance(part, Lossy)
    part.wait(3.0)
    assert fleet.now == part.now == 3.0
    orders = Lazy(bench.ids)
    fleet.ask(do, orders)
    assert orders.read == bench.ids
    for settings in ({"drop": 1.5}, {"drop": -0.1}, {"delay_seconds": -1.0}):
        with pytest.raises(ValueError, match="0 <= drop <= 1"):
            lossy(bench, **settings)


# notes


def test_a_note_holds_numbers_as_numbers_and_refuses_what_no_record_can_state(lab):
    bench = lab()
    bench.fleet.note(
        device=np.str_("nx-02"),
        loss=torch.tensor(0.5, dtype=torch.bfloat16),
        rank=np.int64(4),
        share=np.float32("nan"),
        each={"nx-02": (np.array(1), np.bool_(True), None)},
    )
    refused = {
        "Tensor of shape (2,)": torch.zeros(2),
        "ndarray of shape (1, 2)": np.zeros((1, 2)),
        "set": {1},
        "PosixPath": Path("x"),
        "complex": np.complex64(1),
        "tuple": {(1, 2): 3},
    }
    for what, value in refused.items():
        with pytest.raises(BadInput, match=re.escape(f"note got each with a {what}, but numbers")):
            bench.fleet.note(device="nx-02", each=[value])
    each = {"nx-02": [1, True, None]}
    said = {"device": "nx-02", "loss": 0.5, "rank": 4, "share": None, "each": each}
    assert [row["values"] for row in bench.rows("note")] == [said]


# worker processes


def test_workers_give_what_this_process_gives(lab):
    alone, two = lab("alone").fleet, lab("two", workers=2).fleet
    for _ in range(2):
        first, second = (fleet.ask(do, everyone(fleet)) for fleet in (alone, two))
        assert [(r.device, bits(r.value), r.cost) for r in first] == [
            (r.device, bits(r.value), r.cost) for r in second
        ]


def test_a_worker_that_always_dies_at_work_stops_the_run(lab):
    bench = lab(workers=2)
    line = "3 worker processes in a row ended without a reply to the same work, the last by SIGKILL"
    with pytest.raises(WorkerLost, match=line):
        bench.fleet.ask(die, everyone(bench.fleet))
    assert (
        bench.workers.lost
        == ["a worker process ended by SIGKILL, perhaps for its memory; another does its work"] * 2
    )


def replies_of(fleet, work, load=""):
    replies = fleet.ask(work, everyone(fleet, Job(load=load)))
    return [(reply.device, bits(reply.value)) for reply in replies]


@pytest.mark.parametrize("times", [1, 2])
def test_a_worker_that_is_killed_is_replaced_and_its_devices_are_asked_again(lab, tmp_path, times):
    alone, two = lab("alone").fleet, lab("two", workers=2)
    load = f"{tmp_path / 'deaths'}:{times}"
    (tmp_path / "deaths").write_text("x" * times)
    expected = [replies_of(alone, die, load) for _ in range(3)]
    (tmp_path / "deaths").write_text("")
    assert [replies_of(two.fleet, die, load) for _ in range(3)] == expected
    assert (tmp_path / "deaths").read_text() == "x" * times
    assert len(two.workers.lost) == times
    assert len(two.workers._processes) == 2
    assert all(process.is_alive() for process in two.workers._processes)


def test_workers_that_died_in_between_are_replaced(lab):
    alone, bench = lab("alone").fleet, lab("two", workers=2)
    first = [replies_of(fleet, do) for fleet in (alone, bench.fleet)]
    for process in bench.workers._processes:
        process.kill()
        process.join()
    second = [replies_of(fleet, do) for fleet in (alone, bench.fleet)]
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert len(bench.workers.lost) == 2


def test_what_a_dead_worker_kept_only_saved_time(lab):
    bench = lab(workers=2)
    found = [
        [reply.value.times for reply in bench.fleet.ask(keep_and_die, everyone(bench.fleet))]
        for _ in range(3)
    ]
    assert found == [[times] * len(bench.ids) for times in (1, 2, 3)]
    # its first ask keeps nothing of a dead one; the second and the third kill a worker once each
    assert len(bench.workers.lost) == 2


def test_a_failure_in_a_worker_says_what_failed(lab):
    fleet = lab(workers=2).fleet
    with pytest.raises(WorkFailed, match="the work itself is broken") as caught:
        fleet.ask(fail, everyone(fleet))
    assert not caught.value.of_machine
    with pytest.raises(RuntimeError, match="the work itself is broken"):
        lab("here").fleet.ask(fail, {"nx-02": Job()})


def test_workers_end_when_they_are_closed(lab):
    bench = lab(workers=2)
    bench.fleet.ask(do, everyone(bench.fleet))
    processes = list(bench.workers._processes)
    started = time.monotonic()
    bench.workers.close()
    assert not any(process.is_alive() for process in processes)
    assert time.monotonic() - started < 4.0  # none had to be waited for until its time was up
