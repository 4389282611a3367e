"""The Python face: what it imports, recipes in Python, runs that are those of the command line."""

import ast
import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from array_toy import waves
from rich.console import Console
from runs import carried_out, python, records_of, summary_of, tiny_job, write_csv

import fedspine
from fedspine import BadInput, FedAvg, FedLora, Recipe, compare, export, load, resume, run
from fedspine.methods import all_methods, comes_with_fedspine
from fedspine.runs import config
from fedspine.runs.sections import SECTIONS, FleetSection, TaskSection

EXAMPLES = (  # names whose docstrings have an example, which the doctests run
    *("run", "Recipe", "FedLora", "FedSpine", "MergeSfl", "Method", "method", "message"),
    *("on_device", "Fleet", "SimulatedFleet", "compare", "export", "load", "resume", "RunResult"),
)


# --- names ---


def test_importing_fedspine_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "numpy", "pydantic", "rich", "matplotlib", "pyarrow"}
    code = f"import sys, fedspine; dir(fedspine); print(sorted({heavy!r} & set(sys.modules)))"
    done = python("-c", code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_type_checkers_see_the_names_that_are_there() -> None:
    tree = ast.parse(Path(fedspine.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: f"fedspine.{home}" for alias, home in _aliases(block)}
    assert seen == {name: f"fedspine.{home}" for name, home in fedspine._HOMES.items()}
    assert set(fedspine.__all__) == set(seen)


def _aliases(block):
    for node in block.body:
        for alias in node.names:
            assert alias.asname == alias.name  # which says that the name is offered, not only used
            yield alias, node.module.removeprefix("fedspine.")


def test_all_names_are_there_and_documented() -> None:
    for name in fedspine.__all__:
        assert getattr(fedspine, name).__doc__, name
        assert name in dir(fedspine)
    for name in EXAMPLES:
        assert ">>>" in getattr(fedspine, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'fedlora'"):
        _ = fedspine.fedlora


def test_every_method_class_is_there() -> None:
    for name, cls in all_methods().items():
        if comes_with_fedspine(name):
            assert getattr(fedspine, cls.__name__) is cls


def test_the_package_is_typed() -> None:
    assert (Path(fedspine.__file__).parent / "py.typed").is_file()


# --- recipes ---


def test_no_two_sections_have_a_name_in_common() -> None:
    names = [key for cls in SECTIONS.values() for key in cls.model_fields]
    assert len(names) == len({*names, *SECTIONS, "method"} - {*SECTIONS, "method"})


def test_names_mean_what_they_mean_in_a_file(tmp_path) -> None:
    here = Recipe(
        method=FedLora(rank=4, scale=1),
        data=tmp_path / "rows.csv",
        pair="second",
        devices=9,
        mix={"tx2": 9},
        round_trip_seconds=0.01,
        rounds=5,
        seed=3,
    )
    there = config.recipe(
        {
            "method": {"name": "fedlora", "rank": 4, "scale": 1.0},
            "task": {"data": str(tmp_path / "rows.csv"), "pair": "second"},
            "fleet": {"devices": 9, "mix": {"tx2": 9}, "round_trip_seconds": 0.01},
            "run": {"rounds": 5, "seed": 3},
        }
    )
    assert here == there
    assert here.fingerprint == there.fingerprint
    assert here.task.kind == "pair"


def test_sections_may_be_given_whole_and_names_lie_over_them() -> None:
    fleet = FleetSection(devices=12, per_round=3)
    recipe = Recipe(method="fedavg", task={"model": "cnn-h"}, fleet=fleet, per_round=4)
    assert (recipe.fleet.devices, recipe.fleet.per_round) == (12, 4)
    assert recipe.task.kind == "array"
    assert recipe.method == FedAvg()
    assert Recipe(fleet=fleet).fleet is fleet
    assert Recipe().method.name == "fedspine"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"round": 5}, "unknown key of a recipe 'round'; did you mean 'rounds'?"),
        ({"rank": 4}, "'rank' is a setting of the method; write method=FedLora(rank=...)"),
        ({"rounds": "5"}, "run.rounds is '5'"),
        ({"rounds": 0}, "run.rounds is 0"),
        ({"data": ""}, "task.data is empty"),
        ({"task": {"modl": "minilm"}}, "unknown key of [task] 'modl'; did you mean 'model'?"),
        ({"fleet": TaskSection()}, "fleet must be a FleetSection or a table"),
        ({"method": FedLora}, "method is the class FedLora; write FedLora()"),
        ({"method": FedLora(rank="4")}, "method.rank is '4'"),
        ({"method": "fedlor"}, "unknown method 'fedlor'; did you mean 'fedlora'?"),
        ({"method": 3}, "method is 3, which is not an instance of a registered method"),
        ({"model": "cnn-h", "text": "words"}, "task.text is for texts"),
    ],
)
def test_bad_recipes_end_with_one_line(given, words) -> None:
    with pytest.raises(BadInput) as error:
        Recipe(**{"method": FedLora()} | given)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# --- runs ---


@pytest.fixture(scope="module")
def place(tiny_folder, tmp_path_factory):
    """A folder of a tiny model and of rows."""
    folder = tmp_path_factory.mktemp("python [red]<b>")
    (folder / "bert").symlink_to(tiny_folder("bert"))
    write_csv(folder / "rows.csv")
    return folder


@pytest.fixture(scope="module")
def recipe(place):
    return Recipe(
        method=FedLora(rank=4, steps=2),
        data=place / "rows.csv",
        model=place / "bert",
        devices=3,
        per_round=2,
        rounds=2,
        workers=1,
        precision="fp32",
        evaluate_every=1,
        references=False,
    )


@pytest.fixture(scope="module")
def result(place, recipe):
    return run(recipe, place / "run")


def test_a_run_is_that_of_the_command_line(place, result) -> None:
    job = {"method__name": "fedlora", "method__rank": 4, "run__evaluate_every": 1}
    arguments = tiny_job(place / "bert", place / "rows.csv", **job)
    at = next(i for i, word in enumerate(arguments) if word.startswith("method.ranks"))
    defaults = {"task.max_tokens": 64, "method.batch": 32, "method.head_start": "random"}
    defaults |= {"method.learning_rate": 3e-3, "method.head_lr_multiplier": 3.0}
    arguments = arguments[: at - 1] + arguments[at + 1 :]
    arguments += [part for item in defaults.items() for part in ("--set", "{}={}".format(*item))]
    carried_out("run", *arguments, "--out", place / "cli", "--json")
    assert summary_of(place / "cli")["state_sha256"] == result.summary["state_sha256"]


def test_a_run_prints_nothing_unless_asked_and_leaves_torch_as_it_was(
    recipe, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = run(recipe)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert capfd.readouterr() == ("", "")
    assert first.folder == Path("runs/fedlora-1")
    second = run(recipe, quiet=False)
    assert second.folder == Path("runs/fedlora-2")
    out, err = capfd.readouterr()
    assert out == ""
    assert "round 2/2" in err and "Device models" in err
    assert first.summary["state_sha256"] == second.summary["state_sha256"]


def test_curves_are_what_was_recorded(result) -> None:
    rows = records_of(result.folder)
    moved = [0.0, 0.0]
    for row in rows:
        if row["row"] == "exchange":
            moved[row["round"]] += row["bytes_down"] + row["bytes_up"]
    # the last round is followed by the final score, which is no check
    (check,) = (row for row in rows if row["row"] == "score" and not row["final"])
    curves = result.curves
    assert curves.rounds.tolist() == [1.0]
    assert curves.accuracy.tolist() == [check["accuracy"]]
    assert curves.loss.tolist() == [check["loss"]]
    assert curves.seconds.tolist() == [check["now"]]
    assert curves.bytes.tolist() == [moved[0]]
    assert (result.traffic.down + result.traffic.up).tolist() == np.cumsum(moved).tolist()
    ends = [row["now"] for row in rows if row["row"] == "round"]
    assert np.cumsum(result.waiting.lengths).tolist() == pytest.approx(ends)


def test_models_are_those_that_export_writes(result, tmp_path) -> None:
    assert list(result.models) == ["global", "dense", *config_ids(result)]
    written = result.export(tmp_path / "model", device="tx2-00", parity=False)
    assert written["device"] == "tx2-00"
    there, here = fedspine.load_model(tmp_path / "model"), result.models["tx2-00"]
    expected = dict(there.module.named_parameters())
    assert {
        n: torch.equal(p, expected[n]) for n, p in here.module.named_parameters()
    } == dict.fromkeys(expected, True)
    assert here.labels == there.labels == ("kind", "unkind")
    again = export(result.folder, tmp_path / "again", device="tx2-00", parity=False)
    assert again == written | {"folder": str(tmp_path / "again")}
    with pytest.raises(BadInput, match="unknown device 'tx2-0'; did you mean 'tx2-00'"):
        result.models["tx2-0"]


def config_ids(result):
    rows = records_of(result.folder)
    ids = {row["device"] for row in rows if row["row"] == "exchange"}
    assert len(ids) == 3  # two rounds of two of three devices
    return sorted(ids, key=lambda id: id[-2:])


def test_a_result_shows_itself(result) -> None:
    console = Console(width=200, record=True, file=StringIO())
    console.print(result)
    text = console.export_text()
    assert "fedlora, 2 rounds, 3 devices, seed 0" in text
    assert result.summary["state_sha256"][:12] in text
    assert "[red]<b>" in text  # of the folder's name, which is no markup
    html = result._repr_html_()
    assert "[red]&lt;b&gt;" in html and "<b>" not in html
    assert repr(result).startswith(f"<RunResult {str(result.folder)!r}: fedlora, 2 rounds")


def test_a_finished_run_is_loaded_and_another_is_not(result, tmp_path) -> None:
    again = load(str(result.folder))
    assert again == result
    assert resume(result.folder) == result
    with pytest.raises(BadInput, match="is not the folder of a run"):
        load(tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "recipe.toml").write_text(result.recipe.toml())
    with pytest.raises(BadInput, match=r"not finished, 0 of 2 rounds are done; resume it with"):
        load(tmp_path)


def test_a_comparison_is_that_of_the_command_line(result, tmp_path, capfd) -> None:
    found = compare([result], latency=False)
    carried_out("compare", result.folder, "--no-latency", "--out", tmp_path / "cli", "--json")
    assert json.loads((tmp_path / "cli" / "compare.json").read_text()) == json.loads(
        json.dumps(found.table())
    )
    assert found.write(tmp_path / "here") == tmp_path / "here" / "compare.html"
    assert "fedlora" in found._repr_html_()
    assert capfd.readouterr() == ("", "")
    with pytest.raises(BadInput, match="no run was named"):
        compare([])


def test_a_run_on_arrays_gives_its_nets(tmp_path) -> None:
    x, labels = waves(60, 0)
    np.savez(tmp_path / "waves.npz", x=x, y=labels)
    result = run(
        Recipe(
            method=FedAvg(steps=1, batch=4),
            data=tmp_path / "waves.npz",
            model="cnn-h",
            devices=2,
            per_round=2,
            rounds=1,
            workers=1,
            references=False,
        ),
        tmp_path / "run",
    )
    module = result.models["global"]
    assert module(torch.from_numpy(x[:5])).shape == (5, 3)
    assert not module.training
    with pytest.raises(BadInput, match="which --format hf does not support; use --format onnx"):
        result.export(tmp_path / "model")


def test_what_cannot_run_is_refused_before_a_folder_is_made(recipe, tmp_path) -> None:
    with pytest.raises(BadInput, match="rank 4096"):
        run(replace(recipe, method=replace(recipe.method, rank=4096)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
