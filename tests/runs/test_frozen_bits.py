"""`run.frozen_bits`: a run on quantised frozen weights, its charges, exports and refusals."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from runs import carried_out, in_process, records_of, summary_of, tiny_job, without_wall, write_csv

from fedspine.core.errors import BadInput
from fedspine.exports.hf import load_model
from fedspine.exports.of_run import export_model, open_run
from fedspine.lm.structure import full
from fedspine.lm.tiny import write_tiny
from fedspine.runs.assemble import assemble
from fedspine.runs.backend import RealSites
from fedspine.runs.config import recipe
from fedspine.runs.plan import plan
from fedspine.runs.run_dir import recipe_of

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not here: pip install torchao"
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A model, rows, and a run on them with weights of 4 bits and one without."""
    folder = tmp_path_factory.mktemp("frozen")
    model, data = write_tiny(folder / "model", "bert"), write_csv(folder / "rows.csv")
    for name, more in (("few", {"run__frozen_bits": 4}), ("plain", {})):
        carried_out("run", *tiny_job(model, data, **more), "--out", folder / name)
    return folder


def exchanges(folder):
    return [row for row in records_of(folder) if row["row"] == "exchange"]


@needs_torchao
def test_only_memory_and_time_are_charged_otherwise(ground):
    few, plain = (exchanges(ground / name) for name in ("few", "plain"))
    assert len(few) == len(plain)
    for one, other in zip(few, plain, strict=True):
        assert one["bytes_down"] == other["bytes_down"]
        assert one["peak_memory_bytes"] < other["peak_memory_bytes"]
        assert one["flops"] > other["flops"]
    assert "frozen_bits = 4" in (ground / "few" / "recipe.toml").read_text()
    assert "frozen_bits" not in (ground / "plain" / "recipe.toml").read_text()
    losses = [summary_of(ground / name)["loss"] for name in ("few", "plain")]
    assert losses[0] != losses[1]


@needs_torchao
def test_a_plan_counts_it(ground):
    few, plain = (plan(recipe_of(ground / name), classes=2) for name in ("few", "plain"))
    assert few.kinds[0].dense_memory_bytes < plain.kinds[0].dense_memory_bytes
    assert few.round.bytes_down == plain.round.bytes_down
    assert any("held in 4 bits" in line for line in few.remarks)


@needs_torchao
def test_a_resumed_run_is_the_uninterrupted_one(ground):
    again = ground / "again"
    shutil.copytree(ground / "few", again)
    carried_out("run", "--resume", again, "--from-round", 1)
    assert without_wall(summary_of(again)) == without_wall(summary_of(ground / "few"))
    assert records_of(again) == records_of(ground / "few")


@needs_torchao
def test_an_export_has_the_expanded_weights(ground, tmp_path):
    """Parity with the run's own model is checked by the export itself."""
    export_model(ground / "few", device="dense", format="hf", to=tmp_path / "hf")
    assert "had 4 bits and are expanded here" in (tmp_path / "hf" / "README.md").read_text()
    base = open_run(ground / "few").base
    assert base.layout.held_bits == 4
    loaded = load_model(tmp_path / "hf").module.state_dict()
    for site in base.layout.sites:
        # nothing but the adapter, of rank 4 at most, was added to them
        apart = loaded[f"{site.path}.weight"] - base.slice(site.path, full(base.layout))[0]
        assert int(torch.linalg.matrix_rank(apart, rtol=1e-3)) <= 4


@needs_torchao
def test_an_adapter_needs_its_base_in_these_bits(ground, tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(BadInput, match=r"in 4 bits .*; add --with-base"):
        export_model(ground / "few", device="dense", format="peft", to=tmp_path / "peft")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"run__frozen_bits": 5}, r"run.frozen_bits"),
        ({"run__frozen_bits": 4, "method__name": "splitlora"}, "splitlora does not keep the whole"),
        ({"run__frozen_bits": 4, "method__name": "flora"}, "flora does not keep the whole"),
    ],
)
def test_bad_settings_end_in_one_line(settings, line, tmp_path, monkeypatch, capsys):
    job = tiny_job("model", "rows.csv", **settings)
    ranks = job.index("method.ranks=[2, 4]")
    job = [*job[: ranks - 1], *job[ranks + 1 :], "--out", tmp_path / "run"]
    code, _, said = in_process(monkeypatch, capsys, "run", *job)
    assert code == 2
    assert line in said[-1]
    assert not (tmp_path / "run").exists()


def test_it_goes_with_neither_nets_nor_sites_nor_without_its_library(monkeypatch):
    with pytest.raises(BadInput, match=r"all weights of a net are trained"):
        recipe(
            {"task": {"model": "cnn-s"}, "run": {"frozen_bits": 8}, "method": {"name": "fedavg"}}
        )
    few = recipe({"run": {"frozen_bits": 8}})
    with pytest.raises(BadInput, match=r"run\.frozen_bits is for simulated devices"):
        RealSites(Path("kit")).adapted(few)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name)
    )
    with pytest.raises(BadInput, match=r"8 needs torchao; pip install 'fedspine\[quantised\]'"):
        assemble(few)
