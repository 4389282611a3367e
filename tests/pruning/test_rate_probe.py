"""A learning rate that the run chooses: who tries what, what decides, what a run does with it."""

import dataclasses
import json
import tomllib

import numpy as np
import pytest
import torch
from malformed import mutants
from runs import carried_out, records_of, summary_of, tiny_job, write_csv
from toy import Lab, Spy

from fedspine.core.checks import Asked, Terms, why_unusable
from fedspine.core.device import name_of
from fedspine.core.schema import work_kinds
from fedspine.core.tensors import average, half, single
from fedspine.flare.site_worker import works_of
from fedspine.lm.tune import tune
from fedspine.lm.tuning import RATES, UNPROBED
from fedspine.methods import all_methods
from fedspine.methods.fedlora import FedLora
from fedspine.pruning import rate_probe
from fedspine.pruning.rate_probe import (
    HELD,
    MOST_LOSS,
    AveragesOrder,
    LossesAtRates,
    RatesOrder,
    TunedAtRates,
    losses_at_rates,
    probe,
    tune_at_rates,
)

OPEN = dataclasses.replace(FedLora.toy(), learning_rate="auto", steps=3)


@pytest.fixture
def lab(task, tmp_path):
    made = Lab(task, tmp_path / "lab")
    made.fleet.begin_round(0)
    yield made
    made.close()


def probed(lab, fleet=None, method=OPEN):
    return probe(method, lab.task, fleet or lab.fleet, np.random.default_rng(3))


@dataclasses.dataclass
class Told:
    """A reply, as far as what decides."""

    value: LossesAtRates


def told(*losses, rows=10):
    return Told(LossesAtRates(losses=losses, rows=rows))


def test_each_device_scores_the_averages_on_rows_that_none_has_seen(lab) -> None:
    spy = Spy(lab.fleet)
    found = probed(lab, spy)
    tuned = {id: value for id, value in spy.results if isinstance(value, TunedAtRates)}
    scored = {id: order for id, order in spy.orders if isinstance(order, AveragesOrder)}
    assert list(tuned) == list(scored) == lab.ids
    averages = scored[lab.ids[0]]
    for index in range(len(RATES)):
        parts = [(v.examples, single(v.adapters[index])) for v in tuned.values()]
        for name, factor in half(average(parts)).items():
            assert torch.equal(averages.adapters[index][name], factor)
    said = [value for _, value in spy.results if isinstance(value, LossesAtRates)]
    assert [value.rows for value in said] == [len(share) // HELD for share in lab.shares]
    losses, rows = [value.losses for value in said], [value.rows for value in said]
    assert found.losses == pytest.approx(np.average(losses, axis=0, weights=rows))
    assert found.rate in RATES and f"learning rate: {found.rate:g};" in found.line


def test_a_row_is_trained_on_or_held_back() -> None:
    for rows in (5, 6, 124):
        trained, held = rate_probe._parts(rows)
        assert sorted([*trained, *held]) == list(range(rows)) and len(held) == rows // HELD
    trained, held = rate_probe._parts(3)  # too few to hold one back
    assert len(trained) == len(held) == 3


def test_what_is_held_back_is_not_trained_on(lab, monkeypatch) -> None:
    seen = []

    def listening(device, model, tuning, **also):
        seen.append((device.id, device.data.lengths.tolist()))
        return tune(device, model, tuning, **also)

    monkeypatch.setattr(rate_probe, "tune", listening)
    probed(lab)
    lengths = lab.task.train.lengths
    for id, own in seen:
        share = lab.shares[lab.ids.index(id)]
        trained, _ = rate_probe._parts(len(share))
        assert own == lengths[share[trained]].tolist() and len(own) < len(share)


def test_all_rates_get_the_same_batches_of_the_same_start(lab) -> None:
    spy = Spy(lab.fleet, order=lambda id, order: alike(order))
    probed(lab, spy)
    for value in (value for _, value in spy.results if isinstance(value, TunedAtRates)):
        for adapter in value.adapters[1:]:
            assert all(torch.equal(adapter[name], f) for name, f in value.adapters[0].items())


def alike(order):
    if not isinstance(order, RatesOrder):
        return order
    return dataclasses.replace(order, tunings=(order.tunings[0],) * len(order.tunings))


def test_a_higher_rate_has_to_be_clearly_better() -> None:
    lowest = rate_probe._lowest
    assert lowest((1e-3, 2e-3), [told(0.7, 0.697)]).rate == 1e-3
    assert lowest((1e-3, 2e-3), [told(0.7, 0.69)]).rate == 2e-3


def test_no_device_decides_alone_by_what_it_says() -> None:
    liar, honest = told(MOST_LOSS, 0.1), [told(0.5, 0.9) for _ in range(3)]
    assert rate_probe._lowest((1e-3, 2e-3), [liar, *honest]).rate == 1e-3


def test_a_rate_that_diverges_is_out(lab, monkeypatch) -> None:
    monkeypatch.setattr(rate_probe, "RATES", (1e-3, 1e30))
    found = probed(lab)
    assert found.rates == (1e-3,) and found.rate == 1e-3


def test_one_device_decides_where_no_other_is_asked(lab) -> None:
    assert probed(lab, lab.fleet.only(lab.ids[:1])).rate in RATES


@pytest.mark.parametrize("work", [tune_at_rates, losses_at_rates])
def test_a_malformed_reply_is_refused_or_does_no_harm(lab, work) -> None:
    kind = TunedAtRates if work is tune_at_rates else LossesAtRates
    good: dict[str, object] = {}
    orders = {}

    def listened(reply):
        if isinstance(reply.value, kind):
            good[reply.device], orders[reply.device] = reply, reply.order
        return reply

    probed(lab, Spy(lab.fleet, reply=listened))
    bad, terms = lab.ids[0], Terms.of(lab.task)
    rows = len(lab.shares[0])
    asked = Asked(terms, rows=rows, order=orders[bad])
    cases = list(mutants(good[bad].value))
    passing = [v for v in cases if why_unusable(v, work_kinds(work)[1], asked) is None]
    assert len(passing) < len(cases)
    for value in passing[:2]:

        def swapped(reply, value=value):
            mine = reply.device == bad and isinstance(reply.value, kind)
            return dataclasses.replace(reply, value=value) if mine else reply

        found = probed(lab, Spy(lab.fleet, reply=swapped))
        assert found is None or found.rate in RATES


def test_sites_serve_the_probe_to_methods_that_may_ask_for_it() -> None:
    wanted = {name_of(tune_at_rates), name_of(losses_at_rates)}
    for name, method in all_methods().items():
        asks = any(
            field.name == "learning_rate" and field.default == "auto"
            for field in dataclasses.fields(method)
        )
        assert (wanted <= works_of(name)) == asks, name


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """A finished run that chose its rate."""
    folder = tmp_path_factory.mktemp("auto")
    data = write_csv(folder / "rows.csv")
    job = tiny_job(tiny_folder("bert"), data, method__learning_rate="auto")
    carried_out("run", *job, "--out", folder / "run")
    return folder / "run"


def test_a_run_keeps_the_rate_that_it_chose(run) -> None:
    rows = map(json.loads, (run / "records.jsonl").read_text().splitlines())
    (chosen,) = [row for row in rows if row["row"] == "learning_rate"]
    assert chosen["rate"] in chosen["rates"] == list(RATES) and len(chosen["losses"]) == 3
    assert summary_of(run)["learning_rate"] == chosen["rate"]
    assert tomllib.loads((run / "recipe.toml").read_text())["method"]["learning_rate"] == "auto"


def test_a_resumed_run_goes_on_at_its_rate(run) -> None:
    before = summary_of(run)
    carried_out("run", "--resume", run, "--from-round", 1)
    after = summary_of(run)
    assert after["state_sha256"] == before["state_sha256"]
    assert after["learning_rate"] == before["learning_rate"]


def test_no_rate_is_tried_where_losses_may_not_leave(tiny_folder, tmp_path) -> None:
    job = tiny_job(
        tiny_folder("bert"),
        write_csv(tmp_path / "rows.csv"),
        method__name="fedlora",
        method__learning_rate="auto",
        method__head_start="random",
        privacy__epsilon=8.0,
        privacy__delta=1e-3,
        run__rounds=1,
    )
    at = next(i for i, word in enumerate(job) if word.startswith("method.ranks"))
    carried_out("run", *job[: at - 1], *job[at + 1 :], "--out", tmp_path / "run")
    assert summary_of(tmp_path / "run")["learning_rate"] == UNPROBED
    works = [row.get("work") for row in records_of(tmp_path / "run")]
    assert name_of(tune_at_rates) not in works and "tune_at_rates" not in works
