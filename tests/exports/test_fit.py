"""`fedspine fit`: the best model that fits, nearest misses, predictions for a device kind, several
runs, and every refusal.
"""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
from rich.console import Console
from runs import carried_out, in_process, summary_of, tiny_job, write_csv

from fedspine.core.errors import BadInput
from fedspine.exports import fit, fit_runs, of_run
from fedspine.exports.card import weight_bytes
from fedspine.fleets.hardware import KINDS
from fedspine.report.fit_report import fit_table
from fedspine.ui.fit_cli import BYTES, SECONDS, quantity


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder):
    """Two runs on the same rows, at two sparsities."""
    root = tmp_path_factory.mktemp("fit")
    data = write_csv(root / "rows.csv")
    few = {"run__final_devices": 1, "run__evaluate_every": 0, "method__structure": "uniform"}
    for name, share in (("a", 0.4), ("b", 0.2)):
        job = tiny_job(tiny_folder("bert"), data, method__sparsity=share, **few)
        carried_out("run", *job, "--out", root / name)
    return root


@pytest.fixture
def ask(runs, monkeypatch, capsys):
    """The command line, with the size of the weights as memory: test_bench.py tests a process for
    each.
    """
    monkeypatch.setattr(fit, "peak_memory_bytes", lambda place, **_: weight_bytes(place))

    def command(*words, names=("a",), formats="hf"):
        folders = [runs / name for name in names]
        chosen = ("--formats", formats) if formats else ()
        return in_process(monkeypatch, capsys, "fit", *folders, *chosen, *words)

    return command


@pytest.fixture(scope="module")
def everything(runs):
    """All candidates of both runs, by run and sparsity."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "peak_memory_bytes", lambda place, **_: weight_bytes(place))
        question = fit.FitQuery(fit.DeviceLimits(None, None), formats=("hf",), tokens=8)
        return fit.fit([runs / "a", runs / "b"], question)


def test_every_model_of_every_run_is_known(runs, everything):
    found = everything.candidates
    for name, share in (("a", 0.4), ("b", 0.2)):
        mine = [one for one in found if one.run == str(runs / name) and one.quantize == "none"]
        assert sum(one.alike for one in mine) == 3 + 2  # devices, global and dense
        assert {round(one.sparsity, 1) for one in mine} == {0.0, share}
        # the best model of a size that a device has is at least as good as the one the run scored
        best = max(one.quality for one in mine if one.sparsity)
        assert best >= summary_of(runs / name)["accuracy"]
        dense = next(one for one in mine if not one.sparsity)
        assert dense.quality == pytest.approx(summary_of(runs / name)["accuracy_dense"])
    assert [one.quality for one in found] == sorted((one.quality for one in found), reverse=True)


def test_each_run_is_opened_once(runs, monkeypatch):
    opened, real = [], of_run.open_run
    monkeypatch.setattr(fit, "peak_memory_bytes", lambda place, **_: weight_bytes(place))
    monkeypatch.setattr(of_run, "open_run", lambda *a: opened.append(a[0]) or real(*a))
    fit.fit([runs / "b"], fit.FitQuery(fit.DeviceLimits(None, None), formats=("hf",), tokens=8))
    assert opened == [runs / "b"]


def test_the_best_that_fits_is_named(drawn, ask, runs, everything):
    sizes = sorted({one.memory_bytes for one in everything.candidates})
    assert len(sizes) == 6  # dense and two sparsities, in fp32 and in int8
    limit = (sizes[0] + sizes[1]) / 2
    code, out, lines = ask("--memory", f"{limit}B", "--json", "--tokens", "8")
    assert (code, lines) == (0, [])
    found = json.loads(out)
    best = found["best"]
    assert best["memory_bytes"] == sizes[0] <= limit and best["run"] == str(runs / "a")
    assert sum(one["excess"] <= 1 for one in found["candidates"]) == 1
    assert not best["predicted"] and best["latency_seconds"] > 0
    assert "<path" in (runs / "a" / "fit.svg").read_text() and found["plot"]


def test_where_nothing_fits_the_nearest_misses_follow(ask):
    code, out, lines = ask("--memory", "1kB", "--latency", "1s", "--json", "--tokens", "8")
    assert code == 2 and len(lines) == 1
    assert "nothing fits 0.001 MB and 1000 ms at batch 1; nearest is" in lines[0]
    found = json.loads(out)
    misses = [one["excess"] for one in found["nearest"]]
    assert found["best"] is None and misses == sorted(misses) and misses[0] > 1


def test_a_device_kind_is_predicted(ask):
    code, out, _ = ask("--device-kind", "tx2", "--tokens", "16", "--batch", "4", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["limits"]["memory_bytes"] == KINDS["tx2"].memory_bytes
    denses = [one for one in found["candidates"] if not one["sparsity"]]
    assert {one["quantize"] for one in denses} == {"none", "int8"}
    assert all(one["predicted"] for one in found["candidates"])
    # 2 layers of 4 x 32 x 32 and 2 x 32 x 64 weights, two operations for each of 64 tokens, and
    # 4 x 32 for each pair of tokens; fp32 at half of 30 % of 0.87 TFLOPS; half of 1/120 s a layer
    flops = 2 * (2 * 8192 * 64 + 4 * 32 * 4 * 16**2)
    for dense in denses:  # int8 weights are expanded, so products are those of fp32
        assert dense["latency_seconds"] == pytest.approx(2 * flops / (0.3 * 0.87e12) + 2 / 240)
    shown = io.StringIO()
    Console(file=shown, width=200).print(fit_table(found, found["candidates"]))
    assert "latency predicted for tx2" in " ".join(shown.getvalue().split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no limit was given; pass --memory"),
        (("--memory", "256"), "units B, kB, MB"),
        (("--memory", "-1MB"), "positive number"),
        (("--memory", "0MB"), "positive number"),
        (("--latency", "50MB"), "units us, ms, s"),
        (("--latency", "5ms", "--device-kind", "nano"), "unknown device kind 'nano'"),
        (("--latency", "5ms", "--formats", "hf,onix"), "did you mean 'onnx'"),
        (("--latency", "5ms", "--formats", "hf,gguf"), "is for language models on decoders"),
        (("--latency", "5ms", "--plot", "x.png"), "plots are SVG"),
        (("--latency", "5ms", "--plot", "nowhere/x.svg"), "nowhere/x.svg cannot be written"),
        (("--latency", "5ms", "--rows", "nowhere.csv"), "nowhere.csv"),
        (("--latency", "5ms", "--tokens", "9999"), "positions of this model"),
    ],
)
def test_what_is_refused_in_one_line(ask, runs, words, said):
    (runs / "a" / "fit.svg").unlink(missing_ok=True)
    code, out, lines = ask(*words, formats=None if "--formats" in words else "hf")
    assert (code, out, len(lines)) == (2, "", 1) and said in lines[0]
    assert not (runs / "a" / "fit.svg").exists()


def test_runs_of_other_data_and_folders_that_are_none(ask):
    def run(data):
        record = SimpleNamespace(kind="classification", classes=("a", "b"), data_sha256=data)
        return SimpleNamespace(record=record, folder=f"run-{data}")

    fit_runs._check_alike(run("x"), run("x"))
    with pytest.raises(BadInput, match="run-x and run-y are runs on different data"):
        fit_runs._check_alike(run("x"), run("y"))
    code, _, lines = ask("--memory", "1MB", names=("nothing",))
    assert code == 2 and len(lines) == 1


def test_without_its_data_a_run_needs_rows(ask, runs, monkeypatch):
    shutil.move(runs / "rows.csv", runs / "moved.csv")
    try:
        code, _, lines = ask("--memory", "1GB")
        assert code == 2 and "give rows with --rows" in lines[0]
        options = ("--rows", runs / "moved.csv", "--plot", runs / "own.svg", "--tokens", "8")
        code, out, _ = ask("--memory", "1GB", *options)
        assert code == 0 and "80 rows" in out
        assert f"fits best: fedspine export {runs / 'a'} --device" in out
        assert (runs / "own.svg").is_file()
    finally:
        shutil.move(runs / "moved.csv", runs / "rows.csv")


def test_quantities():
    assert quantity("--memory", "256 mib", BYTES) == 256 * 2**20
    assert quantity("--latency", ".5s", SECONDS) == 0.5
    for bad in ("", "MB", "1e3MB", "nanMB", "1.MB", "9" * 400 + "GB"):
        with pytest.raises(BadInput):
            quantity("--memory", bad, BYTES)
