"""A fleet of sites: its handling of lost, broken and hostile replies, and its equality with
simulation.

The sites run in this process, behind a link that fails on command; everything else is real.
test_federation.py does the same over NVIDIA FLARE, between processes that are killed.
"""

import json
import os
import shutil
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from flare_federation import MAX_TOKENS, NAMES, SITES, make_place, write_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import in_process
from toy import Lab, Unlucky, bits, toy_task

from fedspine.control.controllers import Fixed
from fedspine.control.split_parts import LeastWaiting
from fedspine.core.aggregation import Mean, NormClip
from fedspine.core.checks import Terms
from fedspine.core.device import find_work, name_of
from fedspine.core.fleet import AllLost, Idle, weights_of
from fedspine.core.message import NotAMessage, message, pack, unpack
from fedspine.core.schema import conforms, work_kinds
from fedspine.core.server_optimiser import FedAvgM, Server
from fedspine.flare.fleet import FlareFleet
from fedspine.flare.framing import MOST_BYTES
from fedspine.flare.run_terms import RunTerms
from fedspine.flare.session import FlareSession
from fedspine.flare.site import DataSection, load_site
from fedspine.flare.site_state import RelayLost, Timeouts
from fedspine.flare.site_worker import SiteWorker, open_site_worker, works_of
from fedspine.flare.wire import NotDone, Opened, Opening, SiteAnswer, SiteOrder, as_array, decoded
from fedspine.fleets.checked import Checked
from fedspine.fleets.semi_async import SemiAsync
from fedspine.lm.content import content_sha256
from fedspine.lm.drift import FedProx
from fedspine.lm.load import load
from fedspine.methods import all_methods, find
from fedspine.methods.fedlora import LoraOrder, LoraResult, tune_adapter
from fedspine.runs.backend import RealSites
from fedspine.split.device import step as split_step
from fedspine.split.messages import Step
from fedspine.storage.records import Records

RUN = "0123456789abcdef" * 2


class LocalLink:
    """Sites in this process. `faults` gives by site the outcomes of the next exchanges, or
    functions that change the reply.
    """

    def __init__(self, workers):
        self.workers, self.faults = workers, {}
        self.relay, self.sites = "relay-0", tuple(sorted(workers))
        self.asked = []  # (site, what was asked), pings as None
        self.gone = 0  # exchanges for which the relay is lost
        # real sites are processes of their own; threads cannot load models concurrently
        self._loading = threading.Lock()

    def connected(self):
        return tuple(sorted(self.workers))

    def exchange(self, site, payload, seconds):
        assert seconds > 0
        if self.gone:
            self.gone -= 1
            raise RelayLost("gone")
        asked = decoded(payload, Opening, SiteOrder)
        self.asked.append((site, asked))
        if isinstance(asked, SiteOrder) and self.faults.get(site):
            fault = self.faults[site].pop(0)
            return (
                (fault, b"")
                if isinstance(fault, str)
                else ("done", fault(self.workers[site].answer(payload)))
            )
        with self._loading if isinstance(asked, Opening) else nullcontext():
            return "done", self.workers[site].answer(payload)

    def ping(self, site, seconds):
        self.asked.append((site, None))
        return site in self.workers

    def mend(self, broken, give_up):
        if broken == self.relay:
            self.relay += "'"
            self.sites = tuple(sorted(self.workers))

    def close(self):
        pass


@pytest.fixture(scope="module")
def ground(tiny_folder, tmp_path_factory):
    """Three sites' folders with the toy task's rows, and the model."""
    return make_place(tmp_path_factory.mktemp("ground"), tiny_folder("bert"))


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load(str(tiny_folder("bert")), kind="classification", classes=len(NAMES))


class Sites:
    """A session over local sites, its records, and the fleet."""

    def __init__(self, ground, model, folder, method="fedlora", aggregation=None, **timeouts):
        base, tokenizer = model
        self.link = LocalLink({site: open_site_worker(ground.kits.folder / site) for site in SITES})
        self.path = folder / "records.jsonl"
        terms = RunTerms(
            method=method,
            kind="classification",
            model="tiny",
            model_sha256=content_sha256(base, tokenizer),
            layers=None,
            precision="fp32",
            pooling="cls",
            max_tokens=MAX_TOKENS,
            label_names=NAMES,
        )
        self.session = FlareSession(
            link=self.link,
            base=base,
            terms=terms,
            seed=0,
            run=os.urandom(16).hex(),
            timeouts=Timeouts(**timeouts),
            aggregation=aggregation or Mean(),
        )
        self.fleet = FlareFleet(self.session)
        assert self.fleet.join() == {}
        self.session.records = Records(self.path)
        self.task = toy_task(base, tokenizer, rounds=4)

    def notes(self):
        import json

        self.session.records.flush()
        rows = map(json.loads, self.path.read_text().splitlines())
        return [
            row["values"] for row in rows if row["row"] == "note" and "rank" not in row["values"]
        ]

    def run(self, method, rounds, state=None, quorum=1.0):
        state = state or method.start(self.task, np.random.default_rng([0, 1]))
        for round in range(state.round, rounds):
            self.fleet.begin_round(round)
            fleet, everyone = self.at_quorum(method, quorum), self.fleet.devices
            terms, fewest = Terms.of(self.task), self.fleet.quorum
            checked = Checked(fleet, terms, everyone=everyone, quorum=fewest)
            state = method.round(state, checked)
            self.fleet.end_round(0.0)
        return state

    def at_quorum(self, method, quorum):
        """The fleet as the run loop wraps it for a round."""
        if quorum == 1:
            return self.fleet
        return SemiAsync(
            self.fleet,
            quorum=quorum,
            late_work=method.merges_late,
            in_flight=self.fleet.in_flight,
        )

    def orders(self):
        """The first orders of FedLoRA."""
        sent = {}
        method = find("fedlora").toy()

        class OrderRecorder:
            devices = self.fleet.devices

            def ask(self, work, orders, **_):
                sent.update(orders)
                raise InterruptedError

        with pytest.raises(InterruptedError):
            method.round(method.start(self.task, np.random.default_rng(0)), OrderRecorder())
        return sent

    def close(self):
        self.session.records.close()
        for site in self.session.sites.values():
            site.line.shutdown()


@pytest.fixture
def sites(ground, model, tmp_path):
    made = []

    def make(**settings):
        made.append(Sites(ground, model, tmp_path, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def simulated(ground, model, folder, method, rounds, around=lambda fleet: fleet, **settings):
    """The state of the same run on simulated devices with the same rows and names."""
    lab = Lab(toy_task(*model, rounds=4), folder / "simulated", kinds=("nx",) * 3, **settings)
    lab.shares = tuple(ground.shares[site] for site in SITES)
    lab.workers._workshop = replace(lab.workers._workshop, shares=lab.shares)
    world = lab.fleet._world
    world.profiles = tuple(
        replace(one, id=site) for one, site in zip(world.profiles, SITES, strict=True)
    )
    world.__post_init__()
    lab.fleet = type(lab.fleet)(world)
    try:
        return lab.run(method, rounds=rounds, around=around)
    finally:
        lab.close()


def fixed_rank(name, **changes):
    """A method with toy settings that do not depend on measured seconds."""
    return replace(find(name).toy(), controller=Fixed(rank=4), **changes)


@pytest.mark.parametrize(
    ("method", "how"),
    [(find("fedlora").toy(), Mean()), (fixed_rank("fedspine"), NormClip())],
    ids=["fedlora", "fedspine-norm_clip"],
)
def test_it_gives_the_bits_of_the_simulated_fleet(ground, model, sites, tmp_path, method, how):
    """Over processes that are killed: test_federation.py."""
    found = sites(method=method.name, aggregation=how).run(method, 3)
    expected = simulated(ground, model, tmp_path, method, 3, aggregation=how)
    assert bits(found) == bits(expected)


# --- what is lost ---


@pytest.mark.parametrize("fault", ["died", lambda reply: b""], ids=["before the work", "after it"])
def test_without_the_same_reply_it_ends_in_the_state_of_the_simulation(
    ground, model, sites, tmp_path, fault
):
    here, method, rounds = sites(method="fedspine"), fixed_rank("fedspine"), count()
    here.link.faults["north"] = [lambda reply: reply, fault]
    found = here.run(method, 3)

    def around(fleet):
        return Unlucky(fleet, ["north"] if next(rounds) == 1 else [])

    assert bits(found) == bits(simulated(ground, model, tmp_path, method, 3, around=around))


@pytest.mark.parametrize("outcome", ["died", "late", "unreachable", "refused", "nonsense"])
def test_a_lost_site_is_noted_pinged_and_asked_again_as_if_it_had_not_been_asked(sites, outcome):
    here, method = sites(), find("fedlora").toy()
    here.link.faults["north"] = [outcome]
    state = here.run(method, 2)
    assert [note["device"] for note in here.notes()] == ["north"]
    assert here.notes()[0]["left_out"]
    north = [
        asked
        for site, asked in here.link.asked
        if site == "north" and not isinstance(asked, Opening)
    ]
    assert north[1] is None  # pinged before it got work again
    assert [(order.version, order.seed) for order in north if order] == [
        (1, (0, 1, 0)),
        (1, (0, 1, 0)),
    ]
    assert state.round == 2


def _not_finite(payload):
    reply = unpack(payload)
    result = unpack(reply.result.tobytes())
    spoilt = replace(
        result, adapter={name: tensor * float("nan") for name, tensor in result.adapter.items()}
    )
    return pack(replace(reply, result=as_array(pack(spoilt).payload))).payload


def _reshaped(payload):
    reply = unpack(payload)
    result = unpack(reply.result.tobytes())
    spoilt = replace(result, adapter={name: tensor[:1] for name, tensor in result.adapter.items()})
    return pack(replace(reply, result=as_array(pack(spoilt).payload))).payload


def _another_type(payload):
    return pack(
        replace(unpack(payload), result=as_array(pack(NotDone(reason="work failed")).payload))
    ).payload


def _one_byte_up(payload):
    """The same bytes as an array of one row, of which a method would plan by one byte."""
    reply = unpack(payload)
    return pack(replace(reply, result=reply.result[None])).payload


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_not_finite, "not finite"),
        (_reshaped, "was expected"),
        (_another_type, "expected LoraResult, got NotDone"),
        (_one_byte_up, "expected uint8 [bytes], got uint8 of shape (1, "),
        (lambda payload: payload[:-7], "cannot be read"),
        (lambda payload: b"", "cannot be read"),
        (lambda payload: pack(Opened(examples=1, memory_bytes=1)).payload, "cannot be read"),
    ],
)
def test_a_reply_that_cannot_be_used_is_noted_and_the_round_goes_on_without_it(
    ground, model, sites, tmp_path, fault, words
):
    here, method = sites(), find("fedlora").toy()
    here.link.faults["west"] = [fault]
    state = here.run(method, 1)
    assert any(words in str(note["left_out"]) for note in here.notes())
    assert torch.isfinite(torch.cat([tensor.flatten() for tensor in state.adapter.values()])).all()
    assert here.run(method, 2, state).round == 2


def with_terms(ground, site, **terms):
    """The worker of a site with these `[allow]` terms."""
    folder = ground.kits.folder / site
    own = load_site(folder)
    return SiteWorker(replace(own, allow=own.allow.model_copy(update=terms)), folder)


def test_a_site_that_refuses_an_order_says_why_and_is_not_lost(ground, sites):
    here, method = sites(), find("fedlora").toy()
    here.link.workers["north"] = with_terms(ground, "north", most_steps=4)
    state = here.run(method, 2)
    why = "refuses the order: expected at most 4 steps, got 8 (allow.most_steps of its"
    notes = here.notes()
    assert [note["device"] for note in notes] == ["north", "north"]
    assert all(why in note["left_out"] for note in notes)
    assert not here.session.sites["north"].missed
    assert all(asked is not None for _, asked in here.link.asked)  # no site is pinged
    assert here.session.sites["east"].asks == 2
    for site in SITES:
        here.link.workers[site] = with_terms(ground, site, most_steps=4)
    with pytest.raises(
        AllLost, match=r"0 of 3 sites asked replied.*one refuses .*allow.most_steps"
    ):
        here.run(method, 3, state)


def test_a_run_that_the_sites_terms_contradict_ends_before_a_row_is_read(
    ground, sites, tmp_path, monkeypatch, capsys
):
    here = sites()
    here.link.workers = {site: with_terms(ground, site, largest_batch=8) for site in SITES}
    for worker in here.link.workers.values():
        worker._site = replace(worker._site, data=DataSection(path="nowhere.csv"))
    monkeypatch.setattr(RealSites, "_connected", lambda backend: setlink(backend, here.link))
    recipe = write_recipe(
        ground, tmp_path / "r.toml", method={"name": "fedlora"}, run={"precision": "fp32"}
    )
    at_sites = ("--fleet", ground.kits.folder / "admin", "--sites", len(SITES))
    folder = tmp_path / "run"
    code, out, lines = in_process(
        monkeypatch, capsys, "run", recipe, *at_sites, "--out", folder, "--json"
    )
    assert (code, out) == (2, "")
    expected = "expected at most 8 rows of a step, got 32 (allow.largest_batch of its"
    line = lines[-1]
    assert line.startswith("fedspine: 3 of 3 sites take no part: east: ")
    assert line.count(expected) == 3
    assert not folder.exists()


def setlink(backend, link):
    backend._link = link
    return link


def test_fewer_replies_than_the_quorum_stop_the_run(sites):
    here, method = sites(quorum=2), find("fedlora").toy()
    here.link.faults = {"east": ["died"]}
    state = here.run(method, 1)
    here.link.faults = {"east": ["died"], "west": ["late"]}
    with pytest.raises(AllLost, match="1 of 3 sites asked replied, but the quorum is 2"):
        here.run(method, 2, state)


def test_a_run_waits_for_its_quorum_no_longer_than_its_timeout(sites):
    here, method = sites(quorum=3, outage=0.5), find("fedlora").toy()
    del here.link.workers["east"]
    here.session.sites["east"].missed = True
    with pytest.raises(AllLost, match="2 sites answer, but the quorum is 3"):
        here.run(method, 1)


def test_a_relay_that_is_lost_is_replaced_and_the_orders_are_sent_again(
    ground, model, sites, tmp_path
):
    here, method = sites(), find("fedlora").toy()
    state = here.run(method, 1)
    here.link.gone = 2  # of three orders
    state = here.run(method, 3, state)
    assert here.link.relay != "relay-0"
    assert here.notes()
    assert all(list(note) == ["relay"] for note in here.notes())
    assert bits(state) == bits(simulated(ground, model, tmp_path, method, 3))


def test_the_new_workers_of_a_new_relay_may_come_up_slower_than_an_order_may_take(
    sites, ground, monkeypatch
):
    here, method = sites(within=2.0), find("fedlora").toy()
    state, mend, exchange = here.run(method, 1), here.link.mend, here.link.exchange

    def mended(broken, give_up):
        if broken == here.link.relay:
            here.link.workers = {
                site: open_site_worker(ground.kits.folder / site) for site in SITES
            }
        mend(broken, give_up)

    def slowly(site, payload, seconds):
        if isinstance(decoded(payload, Opening, SiteOrder), Opening):
            time.sleep(2.5)
        return exchange(site, payload, seconds)

    monkeypatch.setattr(here.link, "mend", mended)
    monkeypatch.setattr(here.link, "exchange", slowly)
    here.link.gone = 3
    here.run(method, 2, state)
    assert {key for note in here.notes() for key in note} == {"relay"}  # and no site was left out


def test_a_worker_that_was_replaced_is_opened_again_within_the_ask(ground, model, sites, tmp_path):
    here, method = sites(), find("fedlora").toy()
    state = here.run(method, 1)
    here.link.workers["north"] = open_site_worker(ground.kits.folder / "north")
    assert bits(here.run(method, 3, state)) == bits(simulated(ground, model, tmp_path, method, 3))


def test_a_site_that_lost_its_memory_starts_anew_and_that_is_noted(ground, sites):
    here, method = (
        sites(method="fedspine"),
        replace(find("fedspine").toy(), controller=Fixed(rank=4)),
    )
    state = here.run(method, 2)
    shutil.rmtree(ground.kits.folder / "west" / "memory" / here.session.run)
    (ground.kits.folder / "west" / "memory" / here.session.run).mkdir()
    assert here.run(method, 4, state).round == 4
    assert {"device": "west", "memory": "lost; it starts afresh"} in here.notes()


def test_a_site_that_joins_later_takes_part_from_the_next_round_on(ground, sites):
    here, method = sites(), find("fedlora").toy()
    late = here.link.workers.pop("west")
    del here.session.sites["west"]
    here.link.sites = ("east", "north")
    state = here.run(method, 1)
    here.link.workers["west"] = late
    here.run(method, 2, state)
    assert [profile.id for profile in here.fleet.devices] == ["east", "north", "west"]
    assert here.session.sites["west"].asks == 1


# --- asking in other ways ---


def test_replies_that_were_sent_for_come_as_they_arrive(sites):
    here = sites()
    orders = here.orders()
    here.link.faults["north"] = ["died"]
    here.fleet.begin_round(0)
    here.fleet.send(tune_adapter, orders)
    first = here.fleet.only(["west"]).next()
    assert first.device == "west"
    assert here.fleet.next().device == "east"
    with pytest.raises(Idle):
        here.fleet.next()


def test_a_cohort_gets_pending_replies_of_all_devices(sites):
    here = sites()
    here.fleet.begin_round(0)
    here.fleet.send(tune_adapter, here.orders())
    cohort = here.fleet.cohort(["west"])
    assert [profile.id for profile in cohort.devices] == ["west"]
    assert {cohort.next().device for _ in SITES} == set(SITES)


@pytest.mark.parametrize(
    "method",
    [find("fedlora").toy(), fixed_rank("fedspine-plus", head_start="random")],
    ids=lambda m: m.name,
)
def test_a_round_need_not_wait_for_every_site(sites, method):
    here, merged = sites(method=method.name), set()
    here.fleet.note = lambda **values: merged.add(values["device"])  # of each reply
    here.run(method, 4, quorum=0.6)
    assert merged == set(SITES)  # late replies are merged later
    assert len(here.fleet.in_flight) <= 1
    orders = sum(isinstance(asked, SiteOrder) for _, asked in here.link.asked)
    assert 2 * len(SITES) <= orders < 4 * len(SITES)  # sites with pending replies are not asked


def test_a_round_that_does_not_wait_for_all_needs_the_quorum_too(sites):
    here = sites(method="fedspine-plus", quorum=2)
    here.link.faults = {"east": ["died"], "north": ["died"]}
    with pytest.raises(AllLost, match="1 of 3 sites asked replied, but the quorum is 2"):
        here.run(fixed_rank("fedspine-plus", head_start="random"), 1, quorum=0.6)


def test_in_split_learning_a_slow_site_joins_late_and_one_that_dies_is_not_waited_for(sites):
    def slowly(reply):
        time.sleep(1.0)
        return reply

    here = sites(method="mergesfl-plus")
    here.link.faults = {
        "east": [lambda reply: reply, slowly],
        "north": [lambda reply: reply] * 4 + ["died"],
    }
    few = LeastWaiting(fewest=3, budget_rows=100)
    method = replace(find("mergesfl-plus").toy(), steps=30, selection=few, rank=64)
    state = here.run(method, 1)
    assert set(state.workers) == {"east", "west"}
    here.session.records.flush()
    rows = [json.loads(line) for line in here.path.read_text().splitlines()]
    exchanges = {
        site: [row["work"] for row in rows if row["row"] == "exchange" and row["device"] == site]
        for site in SITES
    }
    assert all(works[:2] == ["label_distribution", "begin"] for works in exchanges.values())
    assert exchanges["east"][-1] == exchanges["west"][-1] == "end"
    assert len(exchanges["east"]) < len(exchanges["west"]) == 32  # labels, begin, 29 steps, end
    (round,) = [row for row in rows if row["row"] == "round"]
    assert 0 < round["waiting_seconds"] < round["now"]


def test_a_part_does_not_reach_beyond_itself_and_groups_run_side_by_side(sites):
    here = sites()
    orders = here.orders()
    part = here.fleet.only(["north", "east"])
    assert [profile.id for profile in part.devices] == ["east", "north"]
    with pytest.raises(LookupError):
        part.ask(tune_adapter, {"west": orders["west"]})
    meeting = threading.Barrier(2, timeout=60)

    def job(name, group):
        meeting.wait()
        return [
            reply.device
            for reply in group.ask(tune_adapter, {p.id: orders[p.id] for p in group.devices})
        ]

    here.fleet.begin_round(0)
    assert here.fleet.together(job, {"a": ["west"], "b": ["east", "north"]}) == {
        "a": ["west"],
        "b": ["east", "north"],
    }


def test_a_fleet_goes_on_from_its_snapshot(ground, model, sites, tmp_path):
    method = find("fedlora").toy()
    here = sites()
    state = here.run(method, 2)
    kept = unpack(pack(here.fleet.snapshot()))
    here.run(method, 3, state)  # which a kill undoes
    again = sites()
    again.fleet.restore(kept, {})
    assert bits(again.run(method, 4, state)) == bits(simulated(ground, model, tmp_path, method, 4))
    assert again.fleet.now > kept.now


def test_the_servers_moments_and_what_sites_keep_outlive_a_snapshot(ground, model, sites, tmp_path):
    method = replace(find("fedlora").toy(), steps=2, drift=FedProx(mu=0.1), keep_optimiser=True)
    here = sites()
    here.session.server = Server(FedAvgM())
    state = here.run(method, 2)
    kept = unpack(pack(here.fleet.snapshot()))
    here.run(method, 3, state)  # which a kill undoes
    again = sites()
    again.session.server = Server(FedAvgM())
    again.fleet.restore(kept, {})
    whole = simulated(ground, model, tmp_path, method, 3, server=Server(FedAvgM()))
    assert bits(again.run(method, 3, state)) == bits(whole)


def test_orders_under_way_are_sent_again_after_a_resume(sites):
    here = sites()
    here.fleet.begin_round(0)
    here.fleet.send(tune_adapter, here.orders())
    taken = here.fleet.next()
    kept = unpack(pack(here.fleet.snapshot()))
    again = sites()
    again.fleet.restore(kept, {})
    again.fleet.begin_round(1)
    assert again.fleet.in_flight == {id: 1 for id in SITES if id != taken.device}
    rest = [again.fleet.next(), again.fleet.next()]
    assert {reply.device for reply in rest} | {taken.device} == set(SITES)
    assert taken.late == 0 and {reply.late for reply in rest} == {1}
    assert {bits(reply.order) for reply in rest} == {bits(taken.order)}  # the first ones are equal
    assert again.fleet.in_flight == {}


# --- what is decoded ---


def test_every_work_and_message_declares_types_that_can_be_checked():
    for name in all_methods():
        for work in works_of(name):
            assert len(work_kinds(find_work(work))) == 2


@pytest.fixture(scope="module")
def payloads(ground, model, tmp_path_factory):
    here = Sites(ground, model, tmp_path_factory.mktemp("payloads"))
    order = here.orders()["east"]
    asked = SiteOrder(
        run=here.session.run,
        work=name_of(tune_adapter),
        order=as_array(pack(order).payload),
        seed=(0, 0, 0),
        round=0,
        memory=None,
        version=1,
        needed=(),
    )
    reply = here.link.workers["east"].answer(pack(asked).payload)
    here.close()
    sent = [
        pack(value).payload
        for value in (asked, Opening(run=here.session.run, terms=here.session.terms), order)
    ]
    return [
        *sent,
        reply,
        unpack(reply).result.tobytes(),
        pack(NotDone(reason="refused", detail="no")).payload,
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(2**70),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ("tuple", "dict", "tensor", "array", "bits", "message", "fields", "00000")
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
KINDS = (Opening, SiteOrder, Opened, SiteAnswer, NotDone, LoraOrder, LoraResult)


@settings(max_examples=450)  # each of them spoils six payloads in four ways: 10,800 cases
@given(
    places=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=6),
    share=st.floats(0, 1, exclude_max=True),
    junk=st.binary(min_size=1, max_size=64),
    path=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    value=JSON,
)
def test_whatever_bytes_come_a_message_of_the_expected_type_is_read_or_none(
    payloads, places, share, junk, path, value
):
    for payload in payloads:
        changed = bytearray(payload)
        for place, byte in places:
            changed[place % len(changed)] = byte
        cut, longer = payload[: int(share * len(payload))], junk + payload[int(share * 64) :]
        for spoilt in (bytes(changed), cut, longer, _regrown(payload, path, value)):
            try:
                read = decoded(spoilt, *KINDS)
            except NotAMessage:
                continue
            assert any(type(read) is kind and conforms(read, kind) for kind in KINDS)


def _regrown(payload, path, value):
    """The payload with another value in its tree, where the path leads."""
    length = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + length])
    node = tree = json.loads(header["__metadata__"]["fedspine"])
    for step in path:
        parent, keys = node, list(node) if isinstance(node, dict) else range(len(node))
        key = keys[step % len(keys)]
        node = parent[key]
        if not isinstance(node, dict | list) or not node:
            break
    parent[key] = value
    return _packed_anew(payload, header, json.dumps(tree))


def _packed_anew(payload, header, tree):
    header["__metadata__"]["fedspine"] = tree
    head = json.dumps(header).encode()
    return (
        len(head).to_bytes(8, "little")
        + head
        + payload[8 + int.from_bytes(payload[:8], "little") :]
    )


def test_what_is_too_large_is_not_read():
    with pytest.raises(NotAMessage, match=f"at most {MOST_BYTES}"):
        decoded(bytes(MOST_BYTES + 1), Opened)


@message
class Bits:
    mask: torch.Tensor


def test_few_bytes_cannot_claim_many_bits():
    import json

    payload = pack(Bits(mask=torch.ones(3, 3, dtype=torch.bool))).payload
    for shape in ([2**40], [-3, -3], [1], [3, 3, 2]):
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        claimed = header["__metadata__"]["fedspine"].replace("[3,3]", json.dumps(shape))
        with pytest.raises(NotAMessage, match="cannot be of shape"):
            unpack(_packed_anew(payload, header, claimed))


# --- what sites declare, and orders that no device could serve ---


def declaring(here, site, **numbers):
    """Make a site declare numbers other than its own."""
    answer = here.link.workers[site].answer

    def lie(payload):
        reply = unpack(answer(payload))
        return pack(replace(reply, **numbers) if isinstance(reply, Opened) else reply).payload

    here.link.workers[site].answer = lie


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"examples": 10**9}, "it declares 1000000000 rows, the others"),
        ({"examples": -(10**6)}, "it declares examples of -1000000, but 1 to 2147483648"),
        ({"examples": 0}, "it declares examples of 0"),
        ({"examples": 2**31 + 1}, "it declares examples of 2147483649"),
        ({"examples": 2**200}, "it declares examples of a number of 201 bits"),
        ({"examples": float("nan")}, "cannot be read"),
        ({"memory_bytes": -1}, "it declares memory_bytes of -1"),
    ],
)
def test_a_site_that_declares_what_cannot_be_is_refused_by_name(sites, numbers, words):
    here, method = sites(), find("fedlora").toy()
    declaring(here, "north", **numbers)
    here.session.sites = {}
    refused = here.fleet.join()
    assert list(refused) == ["north"]
    assert words in refused["north"] and "\n" not in refused["north"]
    assert sorted(here.session.sites) == ["east", "west"]
    assert here.run(method, 1).round == 1


def test_a_site_with_most_of_the_rows_counts_for_no_more_than_the_others_together(sites):
    here = sites()
    declaring(here, "north", examples=10**4)
    here.session.sites = {}
    assert here.fleet.join() == {}
    rows = {profile.id: profile.examples for profile in here.fleet.devices}
    weights = weights_of(here.fleet, rows)
    assert weights["north"] == weights["east"] + weights["west"]
    assert (weights["east"], weights["west"]) == (rows["east"], rows["west"])


def test_an_order_that_no_device_could_serve_is_refused_and_the_reply_says_why(sites):
    here = sites()
    order = next(iter(here.orders().values()))
    wrong = {
        "east": replace(order, tuning=replace(order.tuning, learning_rate=-1.0)),
        "north": replace(order, head={}),
        "west": replace(order, adapter={k: v * float("nan") for k, v in order.adapter.items()}),
    }
    here.fleet.begin_round(0)
    with pytest.raises(AllLost, match="0 of 3 sites asked replied"):
        here.fleet.ask(tune_adapter, wrong)
    assert {note["device"]: note["left_out"] for note in here.notes()} == {
        "east": "cannot use the order: learning_rate is -1, but it cannot be negative",
        "north": "cannot use the order: head has 0 tensors of other names; 4 were expected",
        "west": "cannot use the order: an entry of adapter is not finite",
    }
    assert len(here.fleet.ask(tune_adapter, here.orders())) == 3  # all are there as before


def test_a_step_of_a_round_that_never_began_is_refused(sites):
    here = sites(method="splitfed_v1")
    here.fleet.begin_round(0)
    with pytest.raises(AllLost):
        here.fleet.ask(split_step, {"east": Step(gradient=None)})
    assert here.notes()[0]["left_out"] == (
        "cannot use the order: got a step before the first order of a round"
    )
