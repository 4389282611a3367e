"""What a run means is in its folder: nothing that changes outside changes a run, and what cannot be
is said.
"""

import functools
import json
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from array_toy import waves
from runs import in_process, summary_of, tiny_job, without_wall, write_csv
from safetensors.torch import load_file, save_file
from tiny_models import as_its_readme_says, fp32_apart
from transformers import AutoConfig, AutoTokenizer
from warm import forked

from fedspine.core.errors import BadInput
from fedspine.data.dataset import Dataset, Rows
from fedspine.exports.of_run import open_run
from fedspine.lm.load import load
from fedspine.lm.tiny import DECODERS, ENCODERS
from fedspine.lm.tokens import written
from fedspine.runs import config, task_record
from fedspine.runs.assemble import assemble
from fedspine.runs.run_dir import make, recipe_of


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs a command in this process: its exit code, stdout, and the lines of
    stderr.
    """
    return functools.partial(in_process, monkeypatch, capsys)


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """A folder with a base `bert`, `rows.csv` and a finished `run` of them, and a copy of all; the
    run's summary.
    """
    root = tmp_path_factory.mktemp("made") / "place"
    shutil.copytree(tiny_folder("bert"), root / "bert")
    job = tiny_job(root / "bert", write_csv(root / "rows.csv"))
    done = forked("run", *job, "--out", root / "run", "--json")
    assert done.returncode == 0, done.stderr
    summary = summary_of(root / "run")
    (root / "run" / "summary.json").unlink()  # so that it waits to be resumed
    shutil.copytree(root, root.with_name("copy"))
    return root, summary


@pytest.fixture
def place(made):
    """The folder, as it was made; what a test does to it is undone."""
    root, _ = made
    yield root
    shutil.rmtree(root)
    shutil.copytree(root.with_name("copy"), root)


@pytest.fixture
def whole(made):
    """The summary of the run that nothing happened to."""
    return made[1]


def files(folder):
    """All files below a folder with their bytes, but for the lock."""
    found = {path.relative_to(folder): path for path in Path(folder).rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if path.name != "lock"}


def rename(path, **names):
    """Give classes other names in a CSV file."""
    text = path.read_text()
    for old, new in names.items():
        text = re.sub(rf",{old}$", f",{new}", text, flags=re.MULTILINE)
    path.write_text(text)


def other_weights(folder):
    """Change one number of a model."""
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    tensors["bert.embeddings.word_embeddings.weight"][5, 5] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without_place(config):
    return config.to_dict() | {"_name_or_path": None}


def exported(command, place, *more):
    to = Path(tempfile.mkdtemp(dir=place)) / "model"
    export = ("export", place / "run", "--to", to, "--no-parity", "--json", *more)
    code, _, lines = command(*export)
    assert (code, lines) == (0, [])
    return to


# --- what is kept ---


def test_a_run_keeps_what_it_means(place) -> None:
    record = task_record.recorded(place / "run")
    assert record.classes == ("kind", "unkind")
    assert record.columns == {"text": "text", "label": "label"}
    assert (record.kind, record.max_tokens, record.layers) == ("classification", 48, None)
    assert {name: split.rows for name, split in record.splits.items()} == {"train": 64, "test": 16}
    assert set(record.splits["test"].sha256) == {"texts", "labels"}
    base, tokenizer = load(str(place / "bert"), kind="classification", classes=2, precision="bf16")
    assert record.model_sha256 == base.weights_sha256
    kept = AutoConfig.from_pretrained(place / "run" / "base")
    assert without_place(kept) == without_place(base.config)
    assert written(AutoTokenizer.from_pretrained(place / "run" / "base")) == written(tokenizer)


def test_the_summary_names_data_and_base(place, whole) -> None:
    record = task_record.recorded(place / "run")
    assert whole["data_sha256"] == record.data_sha256
    assert whole["model_sha256"] == record.model_sha256


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_a_kept_tokenizer_and_configuration_are_those_of_the_base(tiny_folder, tmp_path, name):
    options = {"kind": "classification", "classes": 3}
    base, tokenizer = load(str(tiny_folder(name)), **options)
    tokenizer("good", truncation=True, max_length=3)  # which leaves its mark on a tokenizer
    task_record.write(tmp_path, some_record(), base, tokenizer)
    again, kept = load(str(tiny_folder(name)), kept=tmp_path / "base", precision="bf16", **options)
    assert written(kept) == written(tokenizer)
    assert json.loads((tmp_path / "base" / "tokenizer.json").read_text())["truncation"] is None
    assert without_place(again.config) == without_place(base.config)
    assert again.weights_sha256 == base.weights_sha256  # whatever the precision
    cut, _ = load(str(tiny_folder(name)), layers=1, **options)
    assert cut.weights_sha256 != base.weights_sha256


def test_a_base_has_the_same_digest_for_any_number_of_classes(tiny_folder) -> None:
    """The head that the task needs is no part of it, where the checkpoint has none of that size."""
    two, five = (
        load(str(tiny_folder("llama")), kind="classification", classes=n)[0] for n in (2, 5)
    )
    assert two.weights_sha256 == five.weights_sha256


# --- export ---


def test_export_needs_no_rows(place, command) -> None:
    before = files(exported(command, place))
    rename(place / "rows.csv", unkind="AAA")
    assert files(exported(command, place)) == before
    code, out, _ = command("export", place / "run", "--to", place / "compared")
    assert code == 0 and "64 rows (random words, since the run's data is not available" in out
    (place / "rows.csv").unlink()
    assert files(exported(command, place)) == before
    labels = json.loads(before[Path("config.json")])["id2label"]
    assert labels == {"0": "kind", "1": "unkind"}


def test_export_takes_configuration_and_tokenizer_from_the_run(place, command) -> None:
    before = files(exported(command, place))
    config = json.loads((place / "bert" / "config.json").read_text())
    (place / "bert" / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    for path in (place / "bert").glob("tokenizer*"):
        path.write_text("{}")
    assert files(exported(command, place)) == before


@pytest.mark.parametrize("format", ["hf", "peft"])
def test_another_base_is_refused(place, command, format) -> None:
    was = task_record.recorded(place / "run").model_sha256
    other_weights(place / "bert")
    now = load(str(place / "bert"), kind="classification", classes=2)[0].weights_sha256
    code, _, (line,) = command(
        "export", place / "run", "--to", place / "x", "--format", format, "--device", "dense"
    )
    assert code == 2
    assert line.startswith(f"fedspine: {place / 'bert'} is not the base that the run in {place}")
    assert was[:12] in line
    assert now[:12] in line
    assert not (place / "x").exists()


def test_a_base_that_moved(place, command) -> None:
    before = files(exported(command, place))
    (place / "bert").rename(place / "moved")
    code, _, (line,) = command("export", place / "run", "--to", place / "x")
    assert code == 2
    assert f"the base of {place / 'run'} cannot be loaded: {place / 'bert'} is not a folder" in line
    assert "--base" in line
    assert files(exported(command, place, "--base", place / "moved")) == before


def test_a_recipe_that_was_edited_after_the_run_is_not_exported(place, command) -> None:
    recipe = place / "run" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("sparsity = 0.5", "sparsity = 0.25"))
    code, _, (line,) = command("export", place / "run", "--to", place / "x")
    assert code == 2
    assert "recipe.toml was changed after the run: method.sparsity was 0.5" in line


def test_an_export_of_an_older_run_is_refused(place, command) -> None:
    (place / "run" / "task.json").unlink()
    code, _, (line,) = command("export", place / "run", "--to", place / "x")
    assert code == 2
    assert "older version" in line
    assert str(place / "run" / "recipe.toml") in line


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of PEFT's
def test_adapters_of_a_pruned_run(place, command, monkeypatch) -> None:
    """What fits no stock base is refused with all choices; the dense adapter loads with stock
    tools.
    """
    pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    export = ("export", place / "run", "--to", place / "x", "--format", "peft")
    code, _, (line,) = command(*export)
    assert code == 2
    assert f"its adapter does not fit {place / 'bert'}; use --device dense" in line
    assert "--format hf" in line
    code, _, (line,) = command(*export, "--with-base")  # a BERT with fewer heads
    assert code == 2
    assert "a stock configuration cannot describe" in line
    code, _, (line,) = command("export", place / "run", "--to", place / "x", "--with-base")
    assert code == 2
    assert "--with-base is for --format peft" in line
    assert not (place / "x").exists()

    (place / "rows.csv").unlink()
    monkeypatch.chdir(place)
    for more in ((), ("--with-base",)):
        folder = exported(command, place, "--format", "peft", "--device", "dense", *more)
        module, tokenizer = as_its_readme_says(folder)
        with torch.inference_mode():
            inputs = tokenizer("good the very in at 27", return_tensors="pt")
            found = module(**inputs).logits
            opened = open_run(place / "run")
            expected = opened.base.fit(opened.model("dense"))(**inputs).logits
        apart = fp32_apart(opened.base, expected)
        torch.testing.assert_close(found, expected, atol=apart, rtol=0)
        assert module.config.id2label == {0: "kind", 1: "unkind"}
        assert "kind, unkind" in (folder / "README.md").read_text()


# --- resume ---


def swap_labels(place):
    rename(place / "rows.csv", kind="x", unkind="kind")
    rename(place / "rows.csv", x="unkind")


def edit_a_row(place):
    lines = (place / "rows.csv").read_text().splitlines()
    (place / "rows.csv").write_text("\n".join([*lines[:-1], "other words,unkind"]) + "\n")


def another_base(place):
    other_weights(place / "bert")


CHANGES = {  # what happens to the files of a run, and what the line must say
    "classes renamed": (
        lambda place: rename(place / "rows.csv", unkind="AAA"),
        "rows.csv has changed since the run in {run} began: the classes were kind, unkind, now "
        "they are AAA, kind",
    ),
    "labels swapped": (
        swap_labels,
        "rows.csv has changed since the run in {run} began: other labels in the train rows; other "
        "labels in the test rows",
    ),
    "a row edited": (edit_a_row, "other texts in the t"),
    "rows gone": (
        lambda place: write_csv(place / "rows.csv", 70),
        "there were 64 train rows, now there are 56; there were 16 test rows, now there are 14",
    ),
    "data gone": (
        lambda place: (place / "rows.csv").unlink(),
        "the run in {run} cannot be resumed without its data: expected a data file or folder at",
    ),
    "data unreadable": (
        lambda place: (place / "rows.csv").write_text("a,b\n1,2\n"),
        "the run in {run} cannot be resumed without its data: expected the text column 'text' in "
        "the train set, found the columns a, b; put {place}/rows.csv back as it was",
    ),
    "another base": (another_base, "bert is not the base that the run in {run} was made with"),
    "base gone": (
        lambda place: (place / "bert").rename(place / "elsewhere"),
        "the run in {run} cannot be resumed without its base: {place}/bert is not a folder",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_does_not_go_on_with_something_else(place, whole, command, name) -> None:
    change, says = CHANGES[name]
    before, kept = files(place / "run"), files(place)
    change(place)
    code, out, (line,) = command("run", "--resume", place / "run", "--json")
    assert (code, out) == (2, "")
    assert says.format(run=place / "run", place=place) in line
    assert files(place / "run") == before
    for path, content in kept.items():  # put back as it was
        (place / path).parent.mkdir(exist_ok=True)
        (place / path).write_bytes(content)
    code, _, lines = command("run", "--resume", place / "run", "--json")
    assert (code, lines) == (0, [])
    assert without_wall(summary_of(place / "run")) == without_wall(whole)


def test_a_run_goes_on_with_its_own_tokenizer(place, whole, command) -> None:
    for path in (place / "bert").glob("tokenizer*"):
        path.write_text("{}")
    code, _, lines = command("run", "--resume", place / "run", "--json")
    assert (code, lines) == (0, [])
    assert without_wall(summary_of(place / "run")) == without_wall(whole)


def test_an_older_run_is_not_gone_on_with(place, command) -> None:
    (place / "run" / "task.json").unlink()
    before = files(place / "run")
    code, _, (line,) = command("run", "--resume", place / "run")
    assert code == 2
    assert "older version" in line
    assert files(place / "run") == before


@pytest.mark.parametrize(
    "words",
    [["run", "--resume", "{run}"], ["export", "{run}", "--to", "x"]],
    ids=["resume", "export"],
)
def test_a_run_of_an_older_format_is_refused(place, command, words) -> None:
    recipe = place / "run" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("format = 4\n", ""))
    before = files(place / "run")
    code, _, (line,) = command(*(word.format(run=place / "run") for word in words))
    assert code == 2
    assert "is of format 1 and this fedspine reads format 4" in line
    assert files(place / "run") == before


def test_a_folder_made_before_its_run_is_built(place, command) -> None:
    """As the cells of a sweep are; it is kept from then on."""
    recipe = recipe_of(place / "run")
    make(place / "cell", recipe)
    (place / "cell" / "base").mkdir()  # left over from a kill between the two
    assert task_record.read(place / "cell") is None
    code, _, lines = command("run", "--resume", place / "cell", "--json")
    assert (code, lines) == (0, [])
    assert task_record.recorded(place / "cell") == task_record.recorded(place / "run")
    assert files(place / "cell" / "base") == files(place / "run" / "base")


@pytest.mark.parametrize("name", ["records.jsonl", "task.json", "state/current.json"])
@pytest.mark.parametrize("words", [["run", "--resume"], ["show"]], ids=["resume", "show"])
def test_a_pipe_in_place_of_a_file_is_one_line(place, command, words, name) -> None:
    """And not a wait for who would write to it."""
    path = place / "run" / name
    path.unlink()
    os.mkfifo(path)
    code, _, (line,) = command(*words, place / "run")
    assert code == 2
    assert f"{path} is neither a file nor a folder; remove it" in line


def test_a_damaged_record_is_said(place, command) -> None:
    task = place / "run" / "task.json"
    good = task.read_text()
    for bad, says in (
        ("{", "is damaged"),
        (good.replace('"rows": 64', '"rows": "many"'), "is damaged"),
        (good.replace('"format": 1', '"format": 9'), "has format 9, but this version reads 1"),
    ):
        task.write_text(bad)
        for words in (("run", "--resume"), ("export", "--to", place / "x")):
            code, _, (line,) = command(*words, place / "run")
            assert code == 2
            assert says in line
    task.write_text(good)
    for path in sorted((place / "run" / "base").iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        for words in (("run", "--resume"), ("export", "--to", place / "x")):
            code, _, (line,) = command(*words, place / "run")
            assert code == 2
            assert f"{path} is damaged (it has other bytes than were written)" in line
        path.write_bytes(whole)
    shutil.rmtree(place / "run" / "base")
    code, _, (line,) = command("export", place / "run", "--to", place / "x")
    assert code == 2
    assert "config.json is missing" in line


def test_a_net_does_not_go_on_with_other_arrays(tmp_path, command) -> None:
    def rows(**more):
        x, y = waves(60, 0)
        np.savez(tmp_path / "rows.npz", **{"x": x, "y": y} | more)

    rows()
    settings = {"task.model": "cnn-h", "task.data": tmp_path / "rows.npz", "method.name": "fedavg"}
    settings |= {"fleet.devices": 3, "fleet.per_round": 2, "run.rounds": 1, "run.workers": 1}
    job = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    code, _, lines = command("run", *job, "--out", tmp_path / "run", "--json")
    assert (code, lines) == (0, [])
    record = task_record.recorded(tmp_path / "run")
    assert (record.model_sha256, record.encoding, record.columns) == (None, None, {})
    assert record.splits["train"].shape == (2, 16)
    (tmp_path / "run" / "summary.json").unlink()
    x, y = waves(60, 0)
    for changed, says in (
        ({"x": x + np.float32(1e-3)}, "other values in the train rows"),
        ({"y": y[::-1].copy()}, "other labels in the train rows"),
        ({"x": x[:, :1]}, "train rows were of shape [2, 16], now [1, 16]"),
        ({"label_names": np.array(["a", "b", "c"])}, "now they are a, b, c"),
    ):
        rows(**changed)
        code, _, (line,) = command("run", "--resume", tmp_path / "run")
        assert code == 2
        assert says in line
    rows()
    code, _, lines = command("run", "--resume", tmp_path / "run", "--json")
    assert (code, lines) == (0, [])


# --- the record itself ---


def some_record(train=("a", "bc"), test=("d",), labels=(0, 1), names=("x", "y"), **more):
    """The record of two rows for training and one for testing."""
    rows = Rows(tuple(train), more.get("pairs"), np.array(labels), more.get("columns", {}))
    tests = Rows(tuple(test), None, np.array([0]), {})
    data = Dataset("data", rows, tests, tuple(names), None)
    return task_record.record_of(config.load(None), data, here=more.get("here", True))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, None),
        ({"train": ("ab", "c")}, "other texts in the train rows"),  # the same letters
        ({"train": ("bc", "a")}, "other texts in the train rows"),
        ({"test": ("e",)}, "other texts in the test rows"),
        ({"labels": (1, 0)}, "other labels in the train rows"),
        ({"train": ("ab", "c"), "labels": (1, 0)}, "other texts and labels in the train rows"),
        ({"pairs": ("p", "q")}, "other pairs in the train rows"),
        ({"columns": {"by": ("p", "q")}}, "other column 'by' in the train rows"),
        ({"train": ("a",), "labels": (0,)}, "there were 2 train rows, now there are 1"),
        ({"names": ("x", "z")}, "the classes were x, y, now they are x, z"),
        # another order of the classes, in which the same labels have other numbers
        ({"names": ("y", "x"), "labels": (1, 0)}, "the classes were x, y, now they are y, x"),
    ],
)
def test_changes_are_named(changed, says) -> None:
    then, now = some_record(), some_record(**changed)
    if says is None:
        assert then == now
        task_record.check_data(then, now, Path("run"))
        return
    with pytest.raises(BadInput) as refused:
        task_record.check_data(then, now, Path("run"))
    assert f"pydoc-topics has changed since the run in run began: {says}; put it back" in str(
        refused.value
    )
    assert then.data_sha256 != now.data_sha256


def test_other_tokens_of_a_text_are_said(monkeypatch) -> None:
    then = some_record()
    monkeypatch.setattr("fedspine.lm.tokens.FORMAT", "none")
    with pytest.raises(BadInput, match="tokenises texts differently"):
        task_record.check_data(then, some_record(), Path("run"))


def test_of_a_real_fleet_only_the_servers_test_rows_count(place) -> None:
    recipe = recipe_of(place / "run")
    assembled = assemble(recipe, here=False)
    assert set(assembled.record.splits) == {"test"}
    make(place / "served", recipe, assembled)
    lines = (place / "rows.csv").read_text().splitlines()
    (place / "split").mkdir()
    recipe = replace(recipe, task=recipe.task.model_copy(update={"data": str(place / "split")}))

    def give(train, test):
        for name, rows in (("train", train), ("test", test)):
            (place / "split" / f"{name}.csv").write_text("\n".join([lines[0], *rows]) + "\n")

    give(lines[1:40], lines[40:60])
    make(place / "sites", recipe, assemble(recipe, here=False))
    give(lines[1:30], lines[40:60])  # a server's training rows are nobody's
    assemble(recipe, here=False, begun=place / "sites")
    give(lines[1:30], lines[40:59])
    with pytest.raises(BadInput, match="there were 20 test rows, now there are 19"):
        assemble(recipe, here=False, begun=place / "sites")


def test_a_recipe_in_a_run_names_what_it_named(tmp_path, monkeypatch) -> None:
    """A folder that later bears the name of a Hub id is not meant by it."""
    monkeypatch.chdir(tmp_path)
    recipe = config.load(None, ["task.model=org/name", "task.data=org/rows"])
    make(tmp_path / "run", recipe)
    for name in ("name", "rows"):
        (tmp_path / "org" / name).mkdir(parents=True)
    found = recipe_of(tmp_path / "run").task
    assert (found.model, found.data) == ("org/name", "org/rows")
