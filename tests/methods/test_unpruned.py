"""What a pruned run is read against: an unpruned run of the same budget, named or found in its
sweep.
"""

import functools
import json

import pytest
from made_runs import made_cell, made_run
from runs import in_process

from fedspine.report.page import REPORT, write_page
from fedspine.ui.compare.unpruned import rewrite_pages, unpruned_runs


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs fedspine in this process: its exit code, stdout, and the lines of
    stderr.
    """
    return functools.partial(in_process, monkeypatch, capsys)


@pytest.fixture
def pruned(tmp_path):
    """A finished run of FedSpine at 70 %."""
    return made_run(tmp_path / "pruned", method="fedspine", curve=(0.5, 0.7), **DIGESTS)


DIGESTS = {"data_sha256": "ab" * 32, "model_sha256": "cd" * 32, "classes": 8}


def unpruned(folder, **changed):
    """A finished run of FedLoRA at 72.5 %."""
    made = {"curve": (0.5, 0.725), "sparsity": 0.0} | DIGESTS | changed
    return made_run(folder, **made)


def test_a_run_is_read_against_the_one_that_is_named(drawn, command, pruned, tmp_path):
    other = unpruned(tmp_path / "other", settings=("method.rank=4", "method.learning_rate=1e-3"))
    code, out, lines = command("show", pruned, "--reference", other, "--json")
    assert (code, lines) == (0, [])
    (found,) = json.loads(out)["unpruned_runs"]
    assert found == {
        "name": "fedlora",
        "folder": str(other),
        "accuracy": 0.725,
        "loss": 1.0,
        "difference": pytest.approx(-0.025),
    }
    code, out, lines = command("show", pruned, "--reference", other)
    assert (code, lines) == (0, [])
    assert "72.5 %" in out and "-2.5 points" in out
    code, out, lines = command("report", pruned, "--reference", other)
    assert (code, lines, out) == (0, [], f"report: {pruned / REPORT}\n")
    page = (pruned / REPORT).read_text()
    assert "-2.5 points" in page and "fedlora 72.5 %" in page
    assert command("report", pruned, "--json")[1] == f'{{"page": "{pruned / REPORT}"}}\n'
    assert "72.5 %" not in (pruned / REPORT).read_text()


NO_FIT = {  # what the other run has, and what the line must say
    "data": (
        {"settings": ("task.data='rows.csv'", "task.model='minilm'")},
        ["their data differ", "task.data", "pydoc-topics"],
    ),
    "content": ({"data_sha256": "ef" * 32}, ["their data differ", "sha256 of the data"]),
    "test rows": ({"test_rows": 400}, ["their data differ", "test rows is 500", "400"]),
    "rounds": ({"curve": (0.5, 0.6, 0.7)}, ["their budgets differ", "run.rounds is 3", "4 in"]),
    "steps": ({"settings": ("method.steps=7",)}, ["their budgets differ", "method.steps", "7"]),
    "batch": ({"settings": ("method.batch=5",)}, ["their budgets differ", "method.batch", "5"]),
    "devices a round": (
        {"settings": ("fleet.per_round=3",)},
        ["their budgets differ", "fleet.per_round is 4", "3"],
    ),
    "time": ({"settings": ("run.seconds=60",)}, ["their budgets differ", "run.seconds"]),
    "devices": ({"settings": ("fleet.devices=16",)}, ["their devices differ", "fleet.devices"]),
    "seed": ({"seed": 1}, ["their seeds differ", "run.seed is 0", "1"]),
    "model": ({"model_sha256": "ef" * 32}, ["their models differ", "sha256 of the base's weights"]),
    "layers": ({"settings": ("task.layers=3",)}, ["their models differ", "task.layers"]),
    "pruned itself": ({"sparsity": 0.5}, ["prunes too (sparsity 50.0 %)"]),
}


@pytest.mark.parametrize("name", NO_FIT)
def test_a_run_that_does_not_fit_is_refused(command, pruned, tmp_path, name):
    changed, says = NO_FIT[name]
    other = unpruned(tmp_path / "other", **changed)
    for verb in ("show", "report"):
        code, out, (line,) = command(verb, pruned, "--reference", other)
        assert (code, out) == (2, "")
        for word in (*says, str(other)):
            assert word in line
    assert not (pruned / REPORT).exists()


def test_what_has_no_final_score_or_prunes_nothing_is_refused(command, pruned, tmp_path):
    other = unpruned(tmp_path / "other")
    code, _, (line,) = command("show", other, "--reference", pruned)
    assert code == 2 and "prunes nothing" in line
    code, _, (line,) = command("show", pruned, "--all", "--reference", other)
    assert code == 2 and "--all cannot be combined with --reference; leave one of them out" in line
    (other / "summary.json").unlink()
    code, _, (line,) = command("show", pruned, "--reference", other)
    assert code == 2 and f"{other} is not finished" in line
    code, _, (line,) = command("show", pruned, "--reference", tmp_path / "nowhere")
    assert code == 2 and "does not exist" in line


def test_an_older_run_that_kept_no_digests_is_not_refused_for_it(pruned, tmp_path):
    other = made_run(tmp_path / "other", curve=(0.5, 0.725), sparsity=0.0)
    assert unpruned_runs(pruned, other)[0].accuracy == 0.725


def made_sweep(folder):
    """Cells of a pruning method and two that do not prune, in two settings and for two seeds."""
    for alpha in (0.1, 1.0):
        for seed in (0, 1):
            for label, method, best, more in (
                ("ours", "fedspine", 0.7, {}),
                ("lora", "fedlora", 0.72, {"sparsity": 0.0}),
                ("ranks", "hetlora", 0.74, {"sparsity": 0.0}),
            ):
                settings = (f"fleet.alpha={alpha}",)
                made_cell(
                    *(folder, f"{label}-{alpha}-{seed}", label, {"fleet.alpha": alpha}),
                    method=method,
                    seed=seed,
                    curve=(0.5, best + alpha / 100 + seed / 1000),
                    settings=settings,
                    **more,
                )
    return folder / "cells"


def test_a_cell_is_read_against_those_of_its_settings_and_seed(command, tmp_path):
    cells = made_sweep(tmp_path)
    found = unpruned_runs(cells / "ours-1.0-1")
    assert [(run.name, run.accuracy) for run in found] == [
        ("lora", pytest.approx(0.731)),
        ("ranks", pytest.approx(0.751)),
    ]
    assert unpruned_runs(cells / "lora-1.0-1") == ()
    _, out, _ = command("show", cells / "ours-0.1-0", "--json")
    assert [each["name"] for each in json.loads(out)["unpruned_runs"]] == ["lora", "ranks"]


def test_a_cell_of_another_budget_or_unfinished_is_passed_over(tmp_path):
    cells = made_sweep(tmp_path)
    made_cell(
        *(tmp_path, "longer", "longer", {"fleet.alpha": 1.0}),
        curve=(0.5, 0.6, 0.8),
        settings=("fleet.alpha=1.0",),
        sparsity=0.0,
    )
    (cells / "lora-1.0-0" / "summary.json").unlink()
    (cells / "ranks-1.0-0" / "recipe.toml").unlink()
    assert unpruned_runs(cells / "ours-1.0-0") == ()


def test_pages_are_written_anew_when_a_cell_adds_to_them(tmp_path):
    cells = made_sweep(tmp_path)
    late = cells / "lora-1.0-0"
    summary = (late / "summary.json").read_bytes()
    (late / "summary.json").unlink()
    ours, apart = cells / "ours-1.0-0", cells / "ours-0.1-0"
    write_page(apart)
    rewrite_pages(ours)
    assert "75.0 %" in (ours / REPORT).read_text()  # of `ranks`, which is done
    assert "73.0 %" not in (ours / REPORT).read_text()
    rewrite_pages(late)  # not done yet
    (late / "summary.json").write_bytes(summary)
    before = (apart / REPORT).read_bytes()
    rewrite_pages(late)
    assert "73.0 %" in (ours / REPORT).read_text()
    assert (apart / REPORT).read_bytes() == before  # of other settings
    assert not (late / REPORT).exists()
