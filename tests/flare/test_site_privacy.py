"""A site and the privacy of its rows: the demands of its file, its ledger, and that it keeps it."""

import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from flare_federation import MAX_TOKENS, NAMES, labelled
from site_files import ROWS as SITE_ROWS
from site_files import terms as stated
from site_files import written
from toy import toy_rows

import fedspine.methods.fedlora as fedlora
from fedspine.core.accountant import Spending
from fedspine.core.device import name_of
from fedspine.core.errors import BadInput
from fedspine.core.message import pack, unpack
from fedspine.core.privacy import SPENT, Privacy
from fedspine.core.tensors import half
from fedspine.flare.provision import write_site_file
from fedspine.flare.run_terms import REFUSALS, Refused, RunTerms
from fedspine.flare.site import load_site
from fedspine.flare.site_disk import used
from fedspine.flare.site_privacy import (
    FOLDER,
    KEY,
    LEDGER,
    ORDERS_KEPT,
    SiteLedger,
    SitePrivacySection,
)
from fedspine.flare.site_worker import open_site_worker
from fedspine.flare.wire import NotDone, Opened, Opening, SiteAnswer, SiteOrder, as_array, decoded
from fedspine.lm.content import content_sha256
from fedspine.lm.load import load
from fedspine.lm.lora import fresh
from fedspine.lm.tuning import Tuning
from fedspine.pruning.head_start import MeansOrder, class_means

RUN, OTHER_RUN = "0123456789abcdef" * 2, "f" * 32
PROMISE = Privacy(level="rows", epsilon=4.0, delta=1e-3, clip=1.0, answers=2)


@pytest.fixture(scope="module")
def base(tiny_folder):
    return load(str(tiny_folder("bert")), kind="classification", classes=len(NAMES), pooling="mean")


@pytest.fixture(scope="module")
def terms(base):
    return RunTerms(
        method="fedlora",
        kind="classification",
        model="tiny",
        model_sha256=content_sha256(*base),
        layers=None,
        precision="fp32",
        pooling="mean",
        max_tokens=MAX_TOKENS,
        label_names=NAMES,
        privacy=PROMISE,
    )


@pytest.fixture(scope="module")
def order(base):
    rng = np.random.default_rng(0)
    return fedlora.LoraOrder(
        adapter=half(fresh(base[0].layout.sites, 2, rng)),
        head=half(base[0].initial_head(rng)),
        scale=2.0,
        tuning=Tuning(steps=8, batch=6, learning_rate=1e-2),
    )


@pytest.fixture
def site(tiny_folder, tmp_path):
    """A function that makes the worker of a site with this `[privacy]` section."""

    def make(more="", terms=None, run=RUN):
        folder = tmp_path / "site"
        if not folder.exists():
            folder.mkdir()
            pq.write_table(labelled(toy_rows(60, 0)), folder / "rows.parquet")
            write_site_file(
                folder,
                name="east",
                data={"path": "rows.parquet"},
                models={"tiny": str(tiny_folder("bert"))},
            )
            path = folder / "fedspine-site.toml"
            path.write_text(f"{path.read_text()}\n[privacy]\n{more}")
        made = open_site_worker(folder)
        assert isinstance(answer(made, Opening(run=run, terms=terms)), Opened)
        return made

    return make


def answer(worker, message):
    return decoded(worker.answer(pack(message).payload), Opened, SiteAnswer, NotDone)


def asked(order, *, run=RUN, work=fedlora.tune_adapter, seed=(0, 0, 0), memory=None, version=1):
    return SiteOrder(
        run=run,
        work=name_of(work),
        order=as_array(pack(order).payload),
        seed=seed,
        round=0,
        memory=memory,
        version=version,
        needed=(),
    )


def noise_between(first, second):
    """The distance of two results over all their tensors."""
    one, two = (unpack(reply.result.tobytes()) for reply in (first, second))
    return max(float((one.adapter[n] - t).abs().max()) for n, t in two.adapter.items())


def test_an_order_that_is_served_again_gives_the_same_and_spends_nothing(site, terms, order):
    worker = site(terms=terms)
    first = answer(worker, asked(order))
    assert 0 < first.epsilon < 4.0
    for again in (worker, site(terms=terms)):  # also a restarted worker
        same = answer(again, asked(order))
        assert (same.result == first.result).all() and same.epsilon == first.epsilon
    assert answer(worker, asked(order, seed=(0, 0, 1))).epsilon > first.epsilon


def test_a_server_cannot_fill_the_ledger(tmp_path):
    """However many orders of next to no cost: the latest are remembered, and all are counted."""
    promise = replace(PROMISE, epsilon=1e9, answers=10**6)
    path, orders = tmp_path / FOLDER / LEDGER, ORDERS_KEPT + 40
    tiny, sizes = Spending(noise_multiplier=1e3, rate=1e-3, steps=1), []
    for i in range(orders):
        ledger = SiteLedger(path, SitePrivacySection(), promise, RUN, f"{i:064x}")
        ledger.spend(tiny)
        sizes.append(path.stat().st_size)
    assert max(sizes) - sizes[ORDERS_KEPT] < 64  # no more than digits of the count
    assert sum(entry.steps for entry in ledger.spent.entries) == orders
    ledger.spend(tiny)  # the same order again
    assert sum(entry.steps for entry in ledger.spent.entries) == orders
    assert used(tmp_path, tmp_path / "cache")[FOLDER] == sizes[-1]


def test_draws_differ_with_all_that_an_answer_depends_on(site, terms, order):
    terms = replace(terms, privacy=replace(PROMISE, answers=8))
    worker = site(terms=terms)
    plain = answer(worker, asked(order))
    louder = replace(terms, privacy=replace(terms.privacy, clip=1.0 + 1e-6))
    slower = replace(order, tuning=replace(order.tuning, learning_rate=1e-2 * (1 + 1e-6)))
    found = [plain, answer(worker, asked(slower))]
    found.append(answer(site(terms=louder), asked(order)))
    found.append(answer(site(terms=terms, run=OTHER_RUN), asked(order, run=OTHER_RUN)))
    # AdamW moves each entry by about the rate a step, so equal draws differ by rounding
    for i, one in enumerate(found):
        for other in found[:i]:
            assert noise_between(one, other) > 1e-2


def test_the_resources_of_a_private_answer_tell_nothing(site, terms, order):
    private = answer(site(terms=terms), asked(order))
    plain = answer(site(terms=replace(terms, privacy=None)), asked(order))
    kept = ("flops", "launches", "samples", "peak_memory_bytes", "compute_seconds")
    assert [getattr(private, name) for name in kept] == [0] * 5
    assert all(getattr(plain, name) > 0 for name in kept) and plain.epsilon is None
    assert unpack(private.result.tobytes()).loss is None


def test_the_site_stops_where_the_runs_budget_is_spent(site, terms, order):
    """No version of memory that the server names restores spent budget."""
    worker = site(terms=terms)
    for seed in ((0, 0, 0), (0, 0, 1)):
        assert isinstance(answer(worker, asked(order, seed=seed)), SiteAnswer)
    for again in (worker, site(terms=terms)):
        refused = answer(again, asked(order, seed=(0, 0, 2), memory=None))
        assert refused.reason == SPENT
    # an answer sent again spends nothing
    assert isinstance(answer(worker, asked(order)), SiteAnswer)


def test_the_sites_own_budget_is_over_all_runs(site, terms, order):
    demand = "epsilon = 4.5\ndelta = 1e-3\n"
    worker = site(demand, terms=terms)
    for seed in ((0, 0, 0), (0, 0, 1)):
        assert isinstance(answer(worker, asked(order, seed=seed)), SiteAnswer)
    worker = site(terms=terms, run=OTHER_RUN)
    assert answer(worker, asked(order, run=OTHER_RUN)).reason == SPENT


def test_only_work_that_keeps_the_promise_is_done(site, terms, order):
    worker = site(terms=terms)
    means = asked(MeansOrder(rows=60), work=class_means)
    assert answer(worker, means).reason == "work not allowed"
    assert isinstance(answer(site(terms=replace(terms, privacy=None)), means), SiteAnswer)


def test_an_empty_promise_loosens_no_other_term(site, terms, order):
    """The attack: a huge epsilon, under which answers were about 20 rows, and of a clip at which
    AdamW's step is proportional to the gradient.
    """
    empty = replace(terms, privacy=replace(PROMISE, epsilon=1e6))
    worker, tuning = site(terms=empty), order.tuning
    few = replace(order, tuning=replace(tuning, batch=4))  # 32 draws, 25 rows of 60 on average
    said = "expected at least 32 distinct rows behind an answer on average, got 25 (allow.fewest"
    assert said in answer(worker, asked(few)).detail
    assert isinstance(answer(worker, asked(order)), SiteAnswer)
    tiny = Opening(run=RUN, terms=replace(terms, privacy=replace(PROMISE, clip=1e-9)))
    said = "expected at least 0.5 for the clip of a row's gradient, got 1e-09 (allow.lowest_clip"
    assert said in answer(worker, tiny).detail


def test_a_private_answer_does_not_show_that_training_failed(site, terms, order):
    """Training that ended early was about fewer rows, so the answer was refused."""
    worker = site(terms=replace(terms, privacy=replace(PROMISE, level="devices", clip=0.1)))
    worker._site = replace(
        worker._site, allow=worker._site.allow.model_copy(update={"rates": (0.0, 1e30)})
    )
    failing = replace(order.tuning, learning_rate=1e30, weight_decay=0.0)
    came = answer(worker, asked(replace(order, tuning=failing)))
    assert isinstance(came, SiteAnswer) and came.epsilon > 0
    result = unpack(came.result.tobytes())
    assert result.loss is None and all(t.isfinite().all() for t in result.adapter.values())


def test_key_and_ledger_lie_at_the_site_and_are_missed(site, terms, order, tmp_path):
    worker = site(terms=terms)
    first = answer(worker, asked(order))
    home = tmp_path / "site" / FOLDER
    assert (home / KEY).stat().st_mode & 0o077 == 0
    (home / KEY).write_bytes(torch.arange(32, dtype=torch.uint8).numpy().tobytes())
    other = answer(site(terms=terms), asked(order))
    assert noise_between(first, other) > 1e-2  # another key, other draws
    (home / KEY).write_bytes(b"")
    assert answer(worker, asked(order)).reason == "work failed"
    (home / KEY).unlink()
    (home / LEDGER).write_bytes(b"damaged")
    assert answer(worker, asked(order, seed=(0, 0, 5))).reason == "work failed"


# --- the site's file ---


def with_privacy(folder, text):
    return written(folder, rows=SITE_ROWS, more=f'[models]\ntiny = "minilm"\n[privacy]\n{text}')


@pytest.mark.parametrize(
    ("text", "privacy", "said"),
    [
        ("epsilon = 2.0\ndelta = 1e-3", None, "the run promises no privacy"),
        ("epsilon = 2.0\ndelta = 1e-3", replace(PROMISE, epsilon=None), "promises no privacy"),
        ("epsilon = 2.0\ndelta = 1e-3", PROMISE, "epsilon is 4, and its privacy.epsilon allows 2"),
        ("epsilon = 8.0\ndelta = 1e-5", PROMISE, "the run's delta is 0.001"),
        ('level = "devices"', PROMISE, "demands that of devices"),
    ],
)  # fmt: skip
def test_a_run_that_promises_less_is_refused_before_any_row_is_read(tmp_path, text, privacy, said):
    site = load_site(with_privacy(tmp_path / "a", text))
    with pytest.raises(Refused) as error:
        site.check(stated(privacy=privacy))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert error.value.detail == REFUSALS["privacy"]


@pytest.mark.parametrize("text", ["epsilon = 8.0\ndelta = 1e-3", 'level = "rows"', ""])
def test_a_run_that_promises_enough_is_joined(tmp_path, text):
    site = load_site(with_privacy(tmp_path / "a", text))
    site.check(stated(privacy=PROMISE))
    site.check(stated(privacy=replace(PROMISE, level="devices")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epsilon = 2.0", "privacy.epsilon is given and privacy.delta is missing; give both"),
        ("delta = 1e-3", "privacy.delta is given and privacy.epsilon is missing; give both"),
        ("epsilon = 0", "privacy.epsilon is 0: Input should be greater than 0"),
        ('level = "row"', "unknown privacy.level 'row'; did you mean 'rows'?"),
    ],
)
def test_demands_that_cannot_be_are_bad_input(tmp_path, text, said):
    with pytest.raises(BadInput) as error:
        load_site(with_privacy(tmp_path / "a", text))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [{"delta": 0.0}, {"clip": math.inf}, {"answers": 0}])
def test_terms_that_cannot_be_are_refused(tmp_path, wrong):
    site = load_site(with_privacy(tmp_path / "a", ""))
    with pytest.raises(Refused) as error:
        site.check(stated(privacy=replace(PROMISE, **wrong)))
    assert error.value.reason == "terms"


def test_a_delta_of_one_over_the_rows_is_refused(site, terms):
    worker = site(terms=terms)  # of 60 rows
    generous = replace(terms, privacy=replace(PROMISE, delta=1 / 60))
    refused = answer(worker, Opening(run=RUN, terms=generous))
    assert (refused.reason, refused.detail) == ("refused", REFUSALS["privacy"])
