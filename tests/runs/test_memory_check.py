"""A fleet in which no device has room for the least work of a method is refused before a run."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import in_process, tiny_job, write_csv
from tiny_models import LABELS, tiny
from toy import toy_task

from fedspine.core.errors import BadInput
from fedspine.core.method import FitsMemory
from fedspine.flare.fleet import FlareFleet
from fedspine.flare.site_state import SiteState
from fedspine.fleets import hardware
from fedspine.lm.forecast import USABLE_MEMORY
from fedspine.lm.tiny import write_tiny
from fedspine.methods import all_methods
from fedspine.runs import backend
from fedspine.runs.config import Recipe
from fedspine.runs.memory_check import check_memory
from fedspine.runs.plan import plan

FITTING = [name for name, cls in all_methods().items() if issubclass(cls, FitsMemory)]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return toy_task(*tiny(tmp_path_factory.mktemp("memory"), "bert"), rounds=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny(tmp_path_factory.mktemp("memory") / "bert", "bert"))


def test_the_methods_that_leave_devices_out_say_what_they_need():
    expected = {"fed-hello", "fedadapter", "fedquad", "fedspine", "fedspine-plus", "legend"}
    assert set(FITTING) == expected


@pytest.mark.parametrize("name", FITTING)
def test_the_least_work_is_where_a_round_begins_to_ask(name, task, model, monkeypatch):
    """A round asks a device with just the memory that the check demands, and none with less."""
    method = all_methods()[name].toy()
    least = method.least_work(task)
    enough = math.ceil(least.memory_bytes / USABLE_MEMORY)
    recipe = Recipe(
        method=method,
        model=model,
        max_tokens=task.max_tokens,
        devices=2,
        per_round=2,
        mix={"tx2": 2},
    )
    for memory, fits in ((enough, True), (enough - 2, False)):
        kind = dataclasses.replace(hardware.KINDS["tx2"], memory_bytes=memory)
        monkeypatch.setitem(hardware.KINDS, "tx2", kind)
        (planned,) = plan(recipe, classes=len(LABELS)).kinds
        assert (planned.training is not None) == fits
        if fits:
            check_memory(method, task, [memory, 1])
        else:
            with pytest.raises(BadInput, match=rf"memory for {name}, .*lower method.batch, "):
                check_memory(method, task, [memory, 1])


def test_who_does_not_say_how_much_it_has_is_not_judged(task):
    method = all_methods()["legend"].toy()
    check_memory(method, task, [])
    check_memory(method, task, [1, 0])
    with pytest.raises(BadInput):
        check_memory(method, task, [1, 2])
    check_memory(all_methods()["fedlora"].toy(), task, [1])  # which leaves no device out


def test_real_sites_are_judged_by_what_they_report(task, monkeypatch):
    recipe = Recipe(method=all_methods()["legend"].toy())
    assembled = SimpleNamespace(task=task, recipe=recipe, remarks=(), tokenizer=None)
    monkeypatch.setattr(backend, "assemble", lambda *_, **__: assembled)
    monkeypatch.setattr(backend, "terms_of", lambda _: None)

    def join(fleet):
        fleet._session.sites |= {name: SiteState(name, 10, 1000) for name in ("a", "b")}
        return {}

    monkeypatch.setattr(FlareFleet, "join", join)
    sites = backend.RealSites(Path("kit"))
    sites._link = SimpleNamespace(sites=["a", "b"])
    with pytest.raises(BadInput, match="no device has enough memory for legend"):
        sites.assemble(recipe)


@pytest.mark.parametrize("name", FITTING)
def test_a_run_is_refused_before_its_folder_is_made(name, model, tmp_path, monkeypatch, capsys):
    job = tiny_job(model, write_csv(tmp_path / "rows.csv"), method__batch=100_000_000)
    other = ["--set", f"method.name={name}"]
    if name not in ("fedspine", "fedspine-plus"):
        at = job.index("method.ranks=[2, 4]")
        job = job[: at - 1] + job[at + 1 :]
        other += ["--set", f"method.{'width' if name == 'fedadapter' else 'rank'}=4"]
    if name == "legend":
        other += ["--set", "method.rank_difference=0.5"]
    status, out, err = in_process(
        monkeypatch, capsys, "run", *job, *other, "--out", tmp_path / "run"
    )
    assert (status, out) == (2, "")
    refused = [line for line in err if line.startswith("fedspine: no device has enough memory")]
    assert err[-1:] == refused and len(refused) == 1
    assert not (tmp_path / "run").exists()
