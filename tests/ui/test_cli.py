"""The command line: what it prints, and that bad input is one clear line, exit code 2, and nothing
left behind.
"""

import errno
import functools
import json
import os
import shutil

import pytest
import typer
from made_runs import made_run
from runs import (
    carried_out,
    fedspine,
    in_process,
    python,
    records_of,
    summary_of,
    tiny_job,
    write_csv,
)
from tolerances import LOGITS
from warm import forked

from fedspine.exports import hf
from fedspine.ui import cli

PROMISED = {
    *(
        "method",
        "seed",
        "rounds",
        "devices",
        "accuracy",
        "accuracy_global",
        "accuracy_dense",
        "sparsity",
    ),
    *(
        "simulated_seconds",
        "waiting_seconds",
        "bytes_up",
        "bytes_down",
        "peak_memory_bytes_simulated",
    ),
    *("wall_seconds", "server_wall_seconds", "samples_per_second", "state_sha256"),
}


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs a command in this process: its exit code, stdout, and the lines of
    stderr.
    """
    return functools.partial(in_process, monkeypatch, capsys)


@pytest.fixture(scope="module")
def place(tiny_folder, tmp_path_factory):
    """A folder of good and bad inputs, with a finished run of the tiny job and a model of it."""
    root = tmp_path_factory.mktemp("inputs")
    tiny_folder("llama")
    (root / "bert").symlink_to(tiny_folder("bert"))
    (root / "llama").symlink_to(tiny_folder("llama"))
    (root / "gpt2").mkdir()
    (root / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    for name, sizes in (("flat", {"num_hidden_layers": 0}), ("odd", {"num_key_value_heads": 3})):
        (root / name).mkdir()
        config = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 32}
        (root / name / "config.json").write_text(json.dumps(config | sizes))
    (root / "files").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (root / "files" / name).write_bytes(b"GGUF")
    (root / "link").symlink_to(root / "nothing")
    write_csv(root / "rows.csv")
    write_csv(root / "one.csv", labels=("kind",))
    write_csv(root / "few.csv", rows=10)
    (root / "torn.csv").write_text("text,label\n" + "fine,a\nbad,b\n" * 8 + '"good, a')
    (root / "by.csv").write_text("text,label,by\n" + "fine,a,x\nbad,b,y\n" * 8)
    (root / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    (root / "strange").mkdir()
    (root / "strange" / "train.csv").write_text("text,label\n" + "fine,a\nbad,b\n" * 8)
    (root / "strange" / "test.csv").write_text("text,label\nodd,c\n")
    (root / "broken.toml").write_text("[task\n")
    (root / "other.toml").write_text("[run]\nrounds = 3\n")
    job = tiny_job(root / "bert", root / "rows.csv")
    carried_out("run", *job, "--out", root / "run", "--json")
    carried_out("export", root / "run", "--to", root / "model", "--no-parity", "--json")
    return root


BAD_RUNS = {  # what to change in the good job, and what the line must say
    "section": ({"taks__model": "x"}, ["section 'taks'", "did you mean 'task'"]),
    "key": ({"run__round": 3}, ["key of [run] 'round'", "did you mean 'rounds'"]),
    "method": ({"method__name": "fedspin"}, ["method 'fedspin'", "did you mean 'fedspine'"]),
    "field": (
        {"method__sparsty": 0.5},
        ["key of [method] for fedspine-plus 'sparsty'", "did you mean 'sparsity'"],
    ),
    "field of another": (
        {"method__name": "fedlora"},
        ["key of [method] for fedlora 'ranks'", "did you mean 'rank'"],
    ),
    "device kind": ({"fleet__mix": "{tx22=1, nx=2}"}, ["device kind 'tx22'", "did you mean 'tx2'"]),
    "mix": ({"fleet__mix": "{tx2=1, nx=1}"}, ["sum to 3 devices"]),
    "mix of one": ({"fleet__mix": 3}, ["fleet.mix is 3", "a table in braces"]),
    "partition": (
        {"fleet__partition": "dirichlett"},
        ["partition 'dirichlett'", "did you mean 'dirichlet'"],
    ),
    "alpha": ({"fleet__alpha": 0}, ["fleet.alpha is 0", "greater than 0"]),
    "not finite": ({"fleet__spread": "inf"}, ["fleet.spread is inf", "finite"]),
    "field not finite": (
        {"method__learning_rate": "nan"},
        ["method.learning_rate is nan", "finite"],
    ),
    "kind of task": (
        {"task__kind": "clasification"},
        ["unknown task.kind 'clasification'", "'classification'"],
    ),
    "precision": (
        {"run__precision": "bf61"},
        ["unknown run.precision 'bf61'; did you mean 'bf16'", "'bf16'"],
    ),
    "rounds": ({"run__rounds": "abc"}, ["run.rounds is 'abc'", "integer"]),
    "no rounds": ({"run__rounds": 0}, ["run.rounds is 0", "greater than or equal to 1"]),
    "nothing": ({"run__rounds": ""}, ["run.rounds is empty; give it a value"]),
    "no data": ({"task__data": ""}, ["task.data is empty; give it a value"]),
    "no method": ({"method__name": ""}, ["unknown method ''", "known: adasfl"]),
    "one rank": ({"method__ranks": 8}, ["method.ranks is 8", "a list in brackets such as [4, 8]"]),
    "wide rank": ({"method__ranks": "[4, 33]"}, ["rank 33", "choose 1 to 32"]),
    "unsorted ranks": ({"method__ranks": "[4, 2]"}, ["method.ranks is [4, 2]", "rising"]),
    "high sparsity": ({"method__sparsity": 0.96}, ["0.96", "0 to 0.95"]),
    "low sparsity": ({"method__sparsity": -0.1}, ["-0.1", "0 to 0.95"]),
    "steps": ({"method__steps": 0}, ["method.steps is 0", "at least 1"]),
    "yes for a number": ({"method__steps": "true"}, ["method.steps is True", "integer"]),
    "part of a step": ({"method__steps": 2.0}, ["method.steps is 2.0", "integer"]),
    "no file": ({"task__data": "{place}/rwos.csv"}, ["rwos.csv", "did you mean 'rows.csv'"]),
    "torn file": ({"task__data": "{place}/torn.parquet"}, ["cannot read", "torn.parquet"]),
    "text column": ({"task__text": "texts"}, ["text column 'texts'", "text, label"]),
    "label column": (
        {"task__label": "lable"},
        ["label column 'lable'", "text, label", "did you mean 'label'"],
    ),
    "strange label": ({"task__data": "{place}/strange"}, ["'c'", "test set"]),
    "one class": ({"task__data": "{place}/one.csv"}, ["at least 2 classes", "'kind'"]),
    "few rows": (
        {"task__data": "{place}/few.csv", "fleet__devices": 9},
        ["expected 1 to 8 devices", "got 9"],
    ),
    "no rows": (
        {"task__data": "{place}/by.csv", "fleet__partition": "column:by"},
        ["a device would be left without rows", "at most 2 devices"],
    ),
    "torn table": (
        {"task__data": "{place}/torn.csv"},
        ["a quote opens a value in line 18 and is never closed"],
    ),
    "no unit map": (
        {"task__model": "{place}/gpt2"},
        ["'gpt2' has no unit map", "bert, roberta", "llama"],
    ),
    "encoder": ({"task__kind": "causal-lm"}, ["encoder", "take a decoder"]),
    "no model": ({"task__model": "{place}/bret"}, ["bret", "folder"]),
    "no model folder": ({"task__model": "{place}/strange"}, ["no config.json"]),
    "long texts": ({"task__max_tokens": 1000}, ["task.max_tokens is 1000", "at most"]),
    "layers": ({"task__layers": 9}, ["task.layers is 9"]),
    "no layers": ({"task__model": "{place}/flat"}, ["num_hidden_layers = 0", "at least 1"]),
    "uneven groups": (
        {"task__model": "{place}/odd"},
        ["num_attention_heads = 4", "num_key_value_heads = 3 does not divide"],
    ),
    "bits": ({"run__frozen_bits": 3}, ["unknown run.frozen_bits '3'", "known: 4, 8"]),
    "folder of files": ({"task__model": "{place}/files"}, ["a.gguf, b.gguf"]),
    "large seed": ({"run__seed": 2**63}, ["run.seed is 9223372036854775808", "less than"]),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_run(place, command, name) -> None:
    changed, says = BAD_RUNS[name]
    changed = {key: str(value).replace("{place}", str(place)) for key, value in changed.items()}
    before = set(os.listdir(place))
    arguments = tiny_job(place / "bert", place / "rows.csv", **changed)
    code, out, lines = command("run", *arguments, "--out", place / "new", "--json")
    assert (code, out) == (2, "")
    (line,) = lines
    assert line.startswith("fedspine: ")
    for words in says:
        assert words in line
    assert set(os.listdir(place)) == before


BAD_COMMANDS = {  # arguments, and what the line must say
    "recipe that is not there": ("run {place}/mine.toml", ["mine.toml does not exist"]),
    "broken recipe": ("run {place}/broken.toml", ["broken.toml cannot be read"]),
    "recipe that is a folder": ("run {place}", ["cannot be read"]),
    "setting without a section": ("run --set rounds=3", ["section.key=value"]),
    "setting without a value": ("run --set run.rounds", ["section.key=value"]),
    "negative seed": ("run --seed -1", ["run.seed is -1"]),
    "output folder that exists": ("run --out {place}/run", ["run exists", "--resume"]),
    "resume what is not there": (
        "run --resume {place}/no",
        ["not the folder of a run", "does not exist"],
    ),
    "resume no run": ("run --resume {place}/strange", ["not the folder of a run", "recipe.toml"]),
    "resume into a folder": (
        "run --resume {place}/run --out {place}/x",
        ["cannot be combined with --out"],
    ),
    "resume another seed": (
        "run --resume {place}/run --seed 5",
        ["recipe differs", "run.seed is 0 there, 5 here"],
    ),
    "resume other rounds": (
        "run --resume {place}/run --set run.rounds=9",
        ["run.rounds is 2 there, 9 here"],
    ),
    "resume another recipe": (
        "run {place}/other.toml --resume {place}/run",
        ["recipe differs", "task.data"],
    ),
    "show no run": ("show {place}/strange", ["not the folder of a run"]),
    "export no run": ("export {place}/strange --to {place}/x", ["not the folder of a run"]),
    "format": (
        "export {place}/run --format hff --to {place}/x",
        ["export format 'hff'", "did you mean 'hf'"],
    ),
    "device": (
        "export {place}/run --device nx-3 --to {place}/x",
        ["unknown device 'nx-3'", "did you mean 'nx-0"],
    ),
    "quantisation": (
        "export {place}/run --format onnx --quantize int88 --to {place}/x",
        ["quantisation 'int88'", "did you mean 'int8'"],
    ),
    "quantisation that needs llama.cpp": (
        "export {place}/run --format gguf --quantize q5_k_m --to {place}/x",
        ["quantisation 'q5_k_m'", "known: f16, q4_k_m, q8_0", "llama-quantize"],
    ),
    "quantisation of another format": (
        "export {place}/run --format peft --quantize int8 --to {place}/x",
        ["--quantize is for --format hf, onnx, gguf, not peft"],
    ),
    "graph with its base": (
        "export {place}/run --format onnx --with-base --to {place}/x",
        ["--with-base is for --format peft", "of --format onnx"],
    ),
    "graph to what exists": (
        "export {place}/run --format onnx --to {place}/model",
        ["exists already"],
    ),
    "rows that are gone": (
        "export {place}/run --format onnx --rows {place}/gone.csv --to {place}/x",
        ["gone.csv"],
    ),
    "export to a link to nothing": ("export {place}/run --to {place}/link", ["exists already"]),
    "export to what exists": ("export {place}/run --to {place}/model", ["exists already"]),
    "predict without a model": ("predict {place}/run good", ["{place}/run"]),
    "predict in no folder": ("predict {place}/x good", ["{place}/x"]),
    "pairs for single texts": ("predict {place}/model good --pair bad", ["got pairs"]),
    "bench without a model": ("bench {place}/run", ["{place}/run"]),
    "bench against no model": ("bench {place}/model --against {place}/run", ["{place}/run"]),
    "tokens of a label": (
        "predict {place}/model good --tokens 5",
        ["--tokens is for language models", "leave it out"],
    ),
    "temperature of a label": (
        "predict {place}/model good --temperature 1",
        ["--temperature is for language models", "leave it out"],
    ),
    "text that is not UTF-8": ("predict {place}/model \udcff", ["text 1 is not UTF-8"]),
    "large seed": ("predict {place}/model good --seed 9223372036854775808", ["'--seed'"]),
    "predict nothing": ("predict {place}/model", ["no text was given"]),
    "predict with a folder of files": ("predict {place}/files good", ["a.gguf, b.gguf"]),
    "more threads than cores": ("bench {place}/model --threads 100000", ["--threads is 100000"]),
    "bench of long rows": ("bench {place}/model --tokens 100000", ["tokens"]),
}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_bad_command(place, command, name) -> None:
    words, says = BAD_COMMANDS[name]
    before = set(os.listdir(place))
    code, out, lines = command(*words.format(place=place).split(), "--json")
    assert (code, out) == (2, "")
    (line,) = lines
    assert line.startswith("fedspine: ")
    for each in says:
        assert each.format(place=place) in line
    assert set(os.listdir(place)) == before


DASH = "put -- before a text that begins with a dash, as in: fedspine predict DIR -- TEXT"
WRONG_USAGE = {  # arguments, and what the line must say
    "option": (["run", "--nonsense"], ["unknown option '--nonsense'", "fedspine run --help"]),
    "misspelt option": (["run", "--sed", "1"], ["'--sed'", "did you mean '--seed'?"]),
    "no number": (["run", "--seed", "x"], ["'--seed'", "integer", "fedspine run --help"]),
    "command": (["nonsense"], ["no such command 'nonsense'", "fedspine --help"]),
    "command of a fleet": (["fleet", "nonsense"], ["'nonsense'", "fedspine fleet --help"]),
    "argument": (["show"], ["missing argument 'DIR'", "fedspine show --help"]),
    "needed option": (["export", "DIR"], ["missing option '--to'"]),
    "low": (["bench", "DIR", "--tokens", "0"], ["'--tokens'"]),
    "text with two dashes": (["predict", "DIR", "-- a text"], [DASH]),
    "text with a dash": (["predict", "DIR", "-5 is cold"], [DASH]),
    "no text": (["predict", "DIR", "good", ""], ["argument after 'good' is empty"]),
    "blank text": (["predict", "DIR", "--", " "], ["argument after '--' is empty"]),
    "no second text": (["predict", "DIR", "good", "--pair="], ["--pair= has no value"]),
    "no folder": (["run", "--out", ""], ["argument after '--out' is empty"]),
    "no folder to go on": (["run", "--resume="], ["--resume= has no value"]),
    "no run": (["show", ""], ["argument after 'show' is empty"]),
    "no setting": (["run", "--set", ""], ["argument after '--set' is empty"]),
    "no kit": (["fleet", "status", "--kit", ""], ["argument after '--kit' is empty"]),
    "nothing": ([""], ["argument after 'fedspine' is empty"]),
}


@pytest.mark.parametrize("name", WRONG_USAGE)
def test_wrong_usage(command, name) -> None:
    words, says = WRONG_USAGE[name]
    code, out, lines = command(*words)
    assert (code, out) == (2, "")
    (line,) = lines
    assert line.startswith("fedspine: ")
    for each in says:
        assert each in line


def test_a_text_that_begins_with_a_dash(place, command) -> None:
    """After -- every text is one, also where it looks like an option or has nothing behind its ="""
    texts = ["-- a text", "-5", "--json", "--pair=", "good"]
    code, out, lines = command("predict", place / "model", "--json", "--", *texts)
    assert (code, lines) == (0, [])
    assert len(json.loads(out)["predictions"]) == len(texts)


@pytest.mark.parametrize("words", [[], ["fleet"]])
def test_without_arguments_help_comes(command, words) -> None:
    code, out, lines = command(*words)
    usage = lines[0].replace("[COMMAND]", "COMMAND")  # as older versions of typer write it
    assert (out, usage) == (
        "",
        f"Usage: {' '.join(['fedspine', *words])} [OPTIONS] COMMAND [ARGS]...",
    )
    assert code == 2


def test_errors_of_a_process(place) -> None:
    """What main() makes of errors is what a shell sees."""
    done = fedspine("show", place / "bert")
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("fedspine: ")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ((errno.ENOSPC, "No space left", "/x/y"), "/x/y: No space left; free some space"),
        ((errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied; mend that"),
        (("the tokenizer cannot be saved",), "the tokenizer cannot be saved; mend that"),
    ],
)
def test_an_error_of_the_system_says_where_and_what_to_do(monkeypatch, capsys, error, said) -> None:
    def fails(**_):
        raise OSError(*error)

    monkeypatch.setattr(cli, "app", fails)
    code, out, lines = in_process(monkeypatch, capsys, "show", "run")
    assert (code, out, lines) == (2, "", [f"fedspine: {said}, then give the same command again"])


def test_summary(place) -> None:
    summary = summary_of(place / "run")
    assert set(summary) >= PROMISED
    assert (summary["method"], summary["rounds"], summary["devices"], summary["seed"]) == (
        "fedspine-plus",
        2,
        3,
        0,
    )
    exchanges = [row for row in records_of(place / "run") if row["row"] == "exchange"]
    assert len(exchanges) == 2 * 2
    for name in ("bytes_up", "bytes_down"):
        assert summary[name] == sum(row[name] for row in exchanges) > 0
    assert summary["peak_memory_bytes_simulated"] == max(
        row["peak_memory_bytes"] for row in exchanges
    )


def test_resume_of_a_finished_run_prints_its_summary(place, command) -> None:
    before = {path: path.stat().st_mtime_ns for path in (place / "run").rglob("*")}
    code, out, _ = command("run", "--resume", place / "run", "--json")
    assert code == 0
    assert json.loads(out) == summary_of(place / "run")
    assert {path: path.stat().st_mtime_ns for path in (place / "run").rglob("*")} == before
    code, out, lines = command(
        "run", "--resume", place / "run", "--seed", "0", "--set", "run.workers=7"
    )
    assert code == 0
    assert summary_of(place / "run")["state_sha256"][:12] in "".join(lines)
    assert "report.html" in out


def test_show_of_an_unfinished_run(place, tmp_path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    # in a process of its own, which has not run anything
    done = forked("show", tmp_path / "run", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["rounds_done"] == found["rounds"] == 2
    assert found["bytes_up"] == summary_of(place / "run")["bytes_up"]


@pytest.mark.parametrize(
    "words", ["methods", "devices", "show {place}/run", "predict {place}/model good not"]
)
def test_json_and_tables(place, command, words) -> None:
    code, out, lines = command(*words.format(place=place).split(), "--json")
    assert (code, lines) == (0, [])
    assert isinstance(json.loads(out), dict)
    assert out.count("\n") == 1
    code, out, lines = command(*words.format(place=place).split())
    assert (code, lines) == (0, [])
    assert len(out.splitlines()) > 2


def test_export_says_what_it_wrote(place, command) -> None:
    code, out, lines = command(
        "export", place / "run", "--device", "nx-01", "--to", place / "nx", "--json"
    )
    assert (code, lines) == (0, [])
    found = json.loads(out)
    # every device is at the target
    assert found["sparsity"] == pytest.approx(summary_of(place / "run")["sparsity"])
    assert found["bytes"] == sum(path.stat().st_size for path in (place / "nx").iterdir())
    parity, card = found["parity"], (place / "nx" / "README.md").read_text()
    assert parity.pop("line") in card
    assert parity == json.loads((place / "nx" / "parity.json").read_text())
    assert parity["rows_from"] == "test rows of the run"
    assert parity["equal_predictions"] == 1 and parity["accuracy"] == parity["accuracy_before"]
    assert 0 < parity["largest_difference"] < LOGITS  # merged against unmerged products
    assert parity["peak_memory_bytes"] > parity["bytes"] and len(parity["latency_seconds"]) == 2
    assert "| method | fedspine-plus, 2 rounds over 3 devices |" in card
    assert "| data | rows.csv |" in card and str(place) not in card
    assert "| base | bert |" in card and "not stated where bert was loaded from" in card
    assert "base_model" not in card and "license" not in card


def test_an_export_that_is_not_the_model_is_refused(place, command, monkeypatch) -> None:
    written = hf.merged_tensors

    def damaged(*given, **options):
        tensors = written(*given, **options)
        name = next(name for name in tensors if name.endswith("query.weight"))
        return tensors | {name: tensors[name] + 0.1}

    monkeypatch.setattr(hf, "merged_tensors", damaged)
    code, _, (line,) = command("export", place / "run", "--to", place / "wrong")
    assert code == 2 and "in a logit, more than the 0.0001 allowed, on" in line
    assert not (place / "wrong").exists() and not list(place.glob("*.partial"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--format", "onnx", "--no-parity"), "--no-parity is for --format hf and peft"),
        (("--rows", "rows.csv", "--no-parity"), "rows of the comparison that --no-parity skips"),
    ],
)
def test_a_comparison_that_cannot_be_left_out(place, command, words, expected) -> None:
    code, _, (line,) = command("export", place / "run", "--to", place / "x", *words)
    assert code == 2 and expected in line and not (place / "x").exists()


@pytest.mark.slow
def test_bench(place, command, monkeypatch) -> None:
    # which costs a process for each model, and is tested in test_bench.py
    monkeypatch.setattr("fedspine.exports.bench.peak_memory_bytes", lambda *_, **__: 1)
    code, out, lines = command(
        "bench", place / "model", "--against", place / "model", "--tokens", "8", "--json"
    )
    assert (code, lines) == (0, [])
    found = json.loads(out)
    assert set(found["model"]["latency_seconds"]) == {"1", "32"}
    assert found["ratio"]["file_bytes"] == 1


def test_mix_on_the_command_line(place, command) -> None:
    job = tiny_job(
        place / "bert",
        place / "rows.csv",
        fleet__mix="{agx=2, tx2=1}",
        fleet__per_round=9,
        run__rounds=1,
    )
    code, _, _ = command("run", *job, "--out", place / "mixed", "--json")
    assert code == 0
    asked = [row["device"] for row in records_of(place / "mixed") if row["row"] == "exchange"]
    assert asked == [
        "agx-00",
        "agx-01",
        "tx2-02",
    ]  # all of them, since nine are more than there are


def commands(command, path=()):
    """All commands, and the groups that they are in, each by the words that call it."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_loses_nothing(command, words) -> None:
    """What docstrings and options say is there to the letter: brackets are no markup. Only line
    breaks differ.
    """
    code, out, lines = command(*words, "--help")
    assert (code, lines) == (0, [])
    asked = COMMANDS[words]
    shown = "".join(out.split())
    for text in filter(None, [asked.help, *(param.help for param in asked.params)]):
        assert "".join(text.split()) in shown


def test_help_knows_all_commands() -> None:
    named = {" ".join(words) for words in COMMANDS}
    assert named >= {"run", "sweep", "methods", "devices", "show", "compare", "export", "predict"}
    assert named >= {"bench", "fleet create", "fleet start", "fleet status", "fleet stop"}
    assert "[task], [fleet], [method] and [run]" in COMMANDS[("run",)].help  # what markup would eat


def test_what_shows_records_does_not_wait_for_torch_and_no_list_for_transformers(tmp_path) -> None:
    """One process after another: what one command imports, the next ones have, too."""
    run = made_run(tmp_path / "run", sparsity=0.5)
    heavy = ["transformers", "torch", "matplotlib", "numpy"]
    allowed = [
        (["--help"], 0),
        (["devices"], 1),
        (["show", str(run), "--json"], 1),
        (["report", str(run)], 2),
        (["methods", "fedlora"], 3),
    ]
    code = (
        "import sys, fedspine.ui.cli as cli\n"
        f"for words, count in {allowed!r}:\n"
        "    sys.argv = ['fedspine', *words]\n"
        "    try:\n        cli.main()\n"
        "    except SystemExit as ended:\n        assert not ended.code, words\n"
        f"    found = [name for name in {heavy!r} if name in sys.modules]\n"
        f"    assert set(found) <= set({heavy!r}[len({heavy!r}) - count:]), (words, found)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
