"""The worker process of a site: what it serves, what it keeps, and what happens if it is killed,
hangs or fails.
"""

import errno
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from flare_federation import MAX_TOKENS, NAMES, labelled
from runs import python
from toy import toy_rows

import fedspine.methods.fedlora as fedlora
import fedspine.pruning.head_start as head_start
from fedspine.core.device import Call, name_of, serve
from fedspine.core.errors import BadInput
from fedspine.core.message import pack
from fedspine.flare.provision import write_site_file
from fedspine.flare.run_terms import RunTerms
from fedspine.flare.site import load_site, open_site
from fedspine.flare.site_disk import MEMORY, RUNS_KEPT
from fedspine.flare.site_secret import SECRET
from fedspine.flare.site_worker import open_site_worker, works_of
from fedspine.flare.wire import NotDone, Opened, Opening, SiteAnswer, SiteOrder, as_array, decoded
from fedspine.flare.worker_process import LOG, WorkerProcess
from fedspine.lm.content import content_sha256
from fedspine.lm.load import load
from fedspine.pruning.device import prune_and_tune

RUN = "0123456789abcdef" * 2
SECONDS = 120.0  # for a worker to start and work on a busy machine


@pytest.fixture(scope="module")
def kit(tiny_folder, tmp_path_factory):
    """The folder of a site with a few rows of the toy task."""
    folder = tmp_path_factory.mktemp("site")
    pq.write_table(labelled(toy_rows(40, 0)), folder / "rows.parquet")
    write_site_file(
        folder,
        name="east",
        data={"path": "rows.parquet"},
        models={"tiny": str(tiny_folder("bert"))},
        # more steps than any test waits for; without noise, like the direct calls here
        allow={"most_steps": 100_000, "noise": 0.0},
    )
    (folder / SECRET).touch(0o600)  # empty: the draws of a simulation
    return folder


@pytest.fixture(scope="module")
def terms(tiny_folder):
    base, tokenizer = load(str(tiny_folder("bert")), kind="classification", classes=len(NAMES))
    return RunTerms(
        method="fedlora",
        kind="classification",
        model="tiny",
        model_sha256=content_sha256(base, tokenizer),
        layers=None,
        precision="fp32",
        pooling="cls",
        max_tokens=MAX_TOKENS,
        label_names=NAMES,
    )


@pytest.fixture(scope="module")
def order(task):
    """An order of FedLoRA's first round."""
    method = fedlora.FedLora.toy()
    state = method.start(task, np.random.default_rng(0))
    sent = {}

    class OrderRecorder:
        devices = ()

        def ask(self, work, orders, **_):
            sent.update(orders)
            raise StopIteration

    OrderRecorder.devices = (type("Profile", (), {"id": "east"}),)
    with pytest.raises(StopIteration):
        method.round(state, OrderRecorder())
    return sent["east"]


def asked(
    order, *, run=RUN, work=fedlora.tune_adapter, seed=(0, 0, 0), memory=None, version=1, needed=()
):
    named = work if isinstance(work, str) else name_of(work)
    payload = order if isinstance(order, bytes) else pack(order).payload
    return SiteOrder(
        run=run,
        work=named,
        order=as_array(payload),
        seed=seed,
        round=0,
        memory=memory,
        version=version,
        needed=needed,
    )


def ask_worker(process, message, seconds=SECONDS):
    """The outcome of an exchange and the decoded reply."""
    outcome, reply = process.exchange(pack(message).payload, seconds)
    return outcome, decoded(reply, Opened, SiteAnswer, NotDone) if outcome == "done" else None


def answer(worker, message):
    return decoded(worker.answer(pack(message).payload), Opened, SiteAnswer, NotDone)


@pytest.fixture
def worker(kit, terms):
    """The site's worker in this process, with the run open."""
    made = open_site_worker(kit)
    assert isinstance(answer(made, Opening(run=RUN, terms=terms)), Opened)
    return made


@pytest.fixture(scope="module")
def supervised(kit):
    """One worker at a time, since each takes seconds to start."""
    made = WorkerProcess(kit)
    yield made
    made.close()


@pytest.fixture
def process(supervised, terms):
    """The current worker, with the run open."""
    assert ask_worker(supervised, Opening(run=RUN, terms=terms))[1].examples == 40
    return supervised


# --- what it serves ---


def test_a_reply_has_the_bytes_of_the_same_call_here(worker, order, kit, terms):
    came = answer(worker, asked(order))
    holding = open_site(load_site(kit), terms)
    call = Call("east", 0, name_of(fedlora.tune_adapter), pack(order).payload, None, (0, 0, 0))
    here = serve(call, holding.base, holding.examples)
    assert came.result.tobytes() == here.result
    assert (came.samples, came.flops) == (here.samples, here.flops)


def test_an_ask_may_be_repeated_and_works_from_the_memory_it_names(worker, order):
    first, again = (answer(worker, asked(order, version=5)) for _ in range(2))
    assert first.result.tobytes() == again.result.tobytes()
    later = answer(worker, asked(order, memory=5, version=6, seed=(0, 0, 1)))
    assert later.result.tobytes() != first.result.tobytes()
    assert isinstance(later, SiteAnswer)


def test_a_memory_with_a_flipped_bit_is_lost_and_one_of_an_older_version_is_not(
    worker, order, kit, capfd
):
    def later():
        return answer(worker, asked(order, memory=5, version=6, seed=(0, 0, 1)))

    answer(worker, asked(order, version=5))
    expected = later().result.tobytes()
    (path,) = (kit / MEMORY / RUN).glob("*5.safetensors")
    whole = path.read_bytes()
    for place in (0, 9, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        assert later().reason == "memory lost"
        assert f"{path} is damaged" in capfd.readouterr().err
    path.write_bytes(whole[:-32])  # as older versions wrote it, without a digest
    assert later().result.tobytes() == expected


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_costs_a_reply_and_nothing_else(worker, order, kit, monkeypatch, function):
    """Also where there is no room for a line in the log."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    answer(worker, asked(order, version=5))
    later = asked(order, memory=5, version=6, needed=(5,), seed=(0, 0, 1))
    expected = answer(worker, later).result.tobytes()
    kept = kit / MEMORY / RUN
    (kept / "000000006.safetensors").unlink()
    with monkeypatch.context() as struck:
        struck.setattr(os, function, full)
        struck.setattr(sys.stderr, "write", full)
        reply = answer(worker, later)
    assert (reply.reason, reply.detail) == ("work failed", "")
    assert [path.name for path in kept.iterdir()] == ["000000005.safetensors"]
    assert answer(worker, later).result.tobytes() == expected


def test_memory_that_nobody_needs_any_more_goes(worker, order, kit):
    def versions():
        return sorted(int(path.stem) for path in (kit / MEMORY / RUN).iterdir())

    answer(worker, asked(order, version=11))
    answer(worker, asked(order, memory=11, version=12, needed=(11,)))
    assert versions() == [11, 12]
    answer(worker, asked(order, memory=12, version=13, needed=(11, 12)))
    assert versions() == [11, 12, 13]
    answer(worker, asked(order, memory=13, version=14))
    assert versions() == [13, 14]


def test_old_runs_make_way(worker, kit, terms):
    for number in range(RUNS_KEPT + 3):
        answer(worker, Opening(run=f"{number:032x}", terms=terms))
    kept = {path.name for path in (kit / MEMORY).iterdir()}
    assert len(kept) == RUNS_KEPT
    assert f"{RUNS_KEPT + 2:032x}" in kept


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"memory": 77}, "memory lost"),
        ({"run": "f" * 32}, "not opened"),
        ({"run": "../" + "f" * 29}, "bad order"),
        ({"work": "os:system"}, "work not allowed"),
        ({"work": prune_and_tune}, "work not allowed"),  # of a method that this run does not use
        ({"work": "fedspine.methods.fedlora:fresh"}, "work not allowed"),
        ({"version": "1"}, "bad order"),
        ({"seed": (0.5,)}, "bad order"),
    ],
)
def test_what_a_run_may_not_ask_is_refused_in_fixed_words(worker, order, changes, reason):
    reply = answer(worker, asked(order, **changes))
    assert (reply.reason, reply.detail) == (reason, "")


def test_an_order_of_another_type_is_refused(worker, order):
    other = fedlora.LoraResult(adapter=order.adapter, head=order.head, loss=0.0, examples=1)
    assert answer(worker, asked(other)).reason == "bad order"
    assert answer(worker, asked(replace(order, scale="2"))).reason == "bad order"
    assert answer(worker, asked(b"not safetensors")).reason == "bad order"


def test_the_refusal_of_an_order_of_other_shapes_says_what_is_wrong(worker, order):
    broken = replace(order, adapter={name: tensor[:, :3] for name, tensor in order.adapter.items()})
    reply = answer(worker, asked(broken))
    assert (reply.reason, reply.detail) == (
        "bad order",
        "adapter has a tensor of (4, 3) where (4, 32) was expected",
    )


def test_work_that_fails_is_reported_without_its_reason(worker, order, capfd, monkeypatch):
    def breaks(*values, **options):
        raise ZeroDivisionError("row 7 of rows.csv")

    monkeypatch.setattr(fedlora, "tune", breaks)
    expected = pack(NotDone(reason="work failed")).payload
    assert pack(answer(worker, asked(order))).payload == expected
    assert "Traceback" in capfd.readouterr().err  # which is the site's own log


def test_a_site_refuses_by_its_own_file(kit, terms):
    worker = open_site_worker(kit)
    for changes, words in (
        ({"model": "another"}, "does not allow this model"),
        ({"method": "nonesuch"}, "does not allow this method"),
        ({"model_sha256": "0" * 64}, "other content"),
        ({"label_names": ("good", "bad", "middling")}, "data does not fit"),
    ):
        reply = answer(worker, Opening(run=RUN, terms=replace(terms, **changes)))
        assert reply.reason == "refused"
        assert words in reply.detail
        assert str(kit) not in reply.detail


def test_works_of_a_method_are_its_own_and_those_it_builds_on():
    assert works_of("fedlora") == {
        name_of(fedlora.tune_adapter),
        name_of(head_start.class_means),
    }
    assert works_of("flexlora") == works_of("fedlora")
    assert works_of("fedspine") == {name_of(prune_and_tune)}
    assert works_of("fedspine-plus") == {name_of(prune_and_tune), name_of(head_start.class_means)}
    assert works_of("mergesfl-plus") == works_of("mergesfl")
    assert not works_of("fedspine") & works_of("mergesfl")
    with pytest.raises(BadInput):
        works_of("../fedlora")


# --- when it is killed ---


def test_a_worker_that_is_killed_at_work_is_a_missing_reply_and_its_memory_stays(
    process, order, terms
):
    assert isinstance(ask_worker(process, asked(order, version=21))[1], SiteAnswer)
    expected = ask_worker(process, asked(order, memory=21, version=22))[1].result.tobytes()
    long = replace(order, tuning=replace(order.tuning, steps=100_000))
    before = process.pid
    threading.Timer(1.0, os.kill, (before, signal.SIGKILL)).start()
    assert ask_worker(process, asked(long, memory=21, version=22)) == ("died", None)
    assert process.pid != before
    assert ask_worker(process, asked(order, memory=21, version=22))[1].reason == "not opened"
    assert isinstance(ask_worker(process, Opening(run=RUN, terms=terms))[1], Opened)
    assert ask_worker(process, asked(order, memory=21, version=22))[1].result.tobytes() == expected


def test_a_worker_that_dies_with_nothing_to_do_costs_nothing(process, terms):
    os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert isinstance(ask_worker(process, Opening(run=RUN, terms=terms))[1], Opened)


def test_a_worker_that_hangs_is_killed_in_time_and_replaced(process, order, terms):
    os.kill(process.pid, signal.SIGSTOP)
    hung, began = process.pid, time.monotonic()
    assert ask_worker(process, asked(order), seconds=1.0) == ("late", None)
    assert time.monotonic() - began < 5.0
    assert process.pid != hung
    with pytest.raises(ProcessLookupError):
        os.kill(hung, 0)
    assert isinstance(ask_worker(process, Opening(run=RUN, terms=terms))[1], Opened)


def test_whoever_comes_while_it_works_waits_for_its_turn_no_longer_than_allowed(process, order):
    busy, outcomes = process.pid, []
    os.kill(busy, signal.SIGSTOP)  # so that it works for as long as this test needs
    first = threading.Thread(target=lambda: outcomes.append(ask_worker(process, asked(order))))
    first.start()
    time.sleep(0.3)
    assert ask_worker(process, asked(order), seconds=0.5) == ("late", None)
    assert process.pid == busy  # not because of this message
    os.kill(busy, signal.SIGCONT)
    first.join()
    ((outcome, answered),) = outcomes
    assert (outcome, process.pid) == ("done", busy)
    assert isinstance(answered, SiteAnswer)


def test_a_worker_ends_with_its_supervisor(kit, terms):
    lines = (
        "import os, pathlib, fedspine.flare.worker_process as r",
        f"print(r.WorkerProcess(pathlib.Path({str(kit)!r})).pid, flush=True)",
        "os._exit(0)",
    )
    pid = int(python("-c", "\n".join(lines)).stdout)
    end = time.monotonic() + 60
    while _alive(pid) and time.monotonic() < end:
        time.sleep(0.2)
    assert not _alive(pid)


def test_a_site_file_that_cannot_be_read_is_reported_in_its_log(tmp_path):
    (tmp_path / "fedspine-site.toml").write_text("name = ")
    process = WorkerProcess(tmp_path)
    assert process.exchange(b"anything", SECONDS) == ("died", b"")
    process.close()
    assert "fedspine-site.toml cannot be read" in (tmp_path / LOG).read_text()


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
