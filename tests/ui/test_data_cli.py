"""`fedspine data`: what it says about a data set is what a run reads; what a run refuses, it
refuses, in one line.
"""

import functools
import io
import json

import numpy as np
import pytest
from PIL import Image
from places import DATA
from rich.console import Console
from runs import in_process

from fedspine.core.errors import BadInput
from fedspine.data.overview import overview
from fedspine.data.tasks import remarks
from fedspine.runs import config, read_data
from fedspine.ui import data_cli


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs a command in this process: its exit code, stdout, and the lines of
    stderr.
    """
    return functools.partial(in_process, monkeypatch, capsys)


@pytest.fixture
def table(tmp_path):
    """A CSV file of 50 rows, of which one has no label and one no text; two rows of the rest are
    doubles.
    """
    lines = [f"row number {n},{'ab'[n % 2]}\n" for n in range(48)]
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(lines) + "no label,\n,a\n")
    return path


def shown(found):
    out = io.StringIO()
    data_cli.show(found, Console(file=out, width=100))
    return out.getvalue()


def test_json_says_what_is_read(command, table, tiny_folder):
    model = tiny_folder("bert")
    code, out, errors = command(
        "data", table, "--json", "--set", f"task.model={model}", "--set", "task.max_tokens=4"
    )
    assert (code, errors) == (0, [])
    found = json.loads(out)
    assert found["rows"] == {"train": 39, "test": 9}
    assert found["left_out"] == {"no label": 1, "no text": 1}
    assert found["classes"] == {"a": 24, "b": 24}
    assert found["doubles"] == 0
    assert found["notes"][0] == "2 of 50 rows are left out: 1 with no label, 1 with no text"
    assert "39 training rows are too few for 80 devices" in found["notes"][1]
    assert found["tokens"]["max_tokens"] == 4 and found["tokens"]["cut"] == 1.0


def test_lengths_are_those_of_the_tokenizer(tmp_path, tiny_folder):
    """With [CLS] and [SEP], n words that the tiny vocabulary holds make n + 2 tokens."""
    path = tmp_path / "rows.csv"
    words = [1] * 50 + [3] * 40 + [5] * 9 + [9]
    path.write_text(
        "text,label\n" + "".join(f"{'good ' * n},{n % 2}{i % 2}\n" for i, n in enumerate(words))
    )
    settings = [f"task.model={tiny_folder('bert')}", "task.max_tokens=6"]
    tokens = data_cli.look(str(path), settings)["tokens"]
    lengths = np.array(words) + 2
    assert tokens == {
        "model": str(tiny_folder("bert")),
        "texts": 100,
        "median": int(np.median(lengths)),
        "p90": int(np.percentile(lengths, 90)),
        "p99": int(np.percentile(lengths, 99)),
        "max": 11,
        "max_tokens": 6,
        "cut": 0.1,
    }


def test_texts_of_pairs_that_are_read_apart_are_measured_apart(tmp_path, tiny_folder):
    """Five words and two special tokens beside one and two, of which six are left of the longer."""
    path = tmp_path / "rows.csv"
    row = f"{'good ' * 5},bad"
    path.write_text("text,text2,label\n" + "".join(f"{row},{n % 2}\n" for n in range(50)))
    settings = [f"task.model={tiny_folder('bert')}", "task.max_tokens=6", "task.kind=pair"]
    apart = data_cli.look(str(path), [*settings, "task.pooling=bi-encoder"])
    tokens = apart["tokens"]
    assert (tokens["texts"], tokens["max"], tokens["cut"]) == (100, 7, 0.5)
    assert "50.0% of them are cut at task.max_tokens = 6" in shown(apart)
    assert "drawn at random" not in shown(apart)
    joint = data_cli.look(str(path), [*settings, "task.pooling=mean"])["tokens"]
    assert (joint["texts"], joint["max"], joint["cut"]) == (50, 9, 1.0)


def test_of_many_texts_some_are_drawn_and_the_longest_is_among_them(
    tmp_path, tiny_folder, monkeypatch
):
    monkeypatch.setattr(data_cli, "MEASURED", 50)
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "good,a\nbad,b\n" * 200 + "good good good good,a\n")
    found = data_cli.look(str(path), [f"task.model={tiny_folder('bert')}"])
    assert (found["tokens"]["texts"], found["tokens"]["max"]) == (50, 6)
    assert "of 50 texts drawn at random" in shown(found)


def test_long_texts_are_measured_up_to_so_many_characters(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(data_cli, "CHARACTERS", 100)
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + f"{'good ' * 10},a\n{'bad ' * 10},b\n" * 20)
    tokens = data_cli.look(str(path), [f"task.model={tiny_folder('bert')}"])["tokens"]
    assert tokens["texts"] == 2 and tokens["max"] == 12


def test_doubles_are_counted_between_train_and_test(tmp_path, tiny_folder):
    (tmp_path / "train.csv").write_text("text,label\nThe good,a\nbad,b\n" + "other,a\n" * 3)
    (tmp_path / "test.csv").write_text("text,label\nthe  good,a\nbad,a\nnew,b\n")
    found = data_cli.look(str(tmp_path), [f"task.model={tiny_folder('bert')}"])
    assert found["doubles"] == 2
    assert "2 test rows are training rows, too" in shown(found)


def test_devices_hold_what_a_run_gives_them(table, tiny_folder):
    settings = [f"task.model={tiny_folder('bert')}", "fleet.devices=5", "fleet.alpha=0.5"]
    found = data_cli.look(str(table), settings)
    recipe = config.load(None, [*settings, f"task.data={table}"])
    data = read_data.dataset(recipe)
    shares = read_data.row_shares(recipe, data)
    assert found["partition"] == "dirichlet"
    assert [device["rows"] for device in found["devices"]] == [len(share) for share in shares]
    for device, share in zip(found["devices"], shares, strict=True):
        labels = data.train.labels[share].tolist()
        assert device["classes"] == {
            name: labels.count(n) for n, name in enumerate("ab") if n in labels
        }
    picture = shown(found)
    assert all(device["device"] in picture for device in found["devices"])


def test_a_picture_of_many_devices_shows_some_of_them(tmp_path, tiny_folder):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "good,a\nbad,b\n" * 100)
    found = data_cli.look(str(path), [f"task.model={tiny_folder('bert')}", "fleet.devices=60"])
    assert len(found["devices"]) == 60
    assert "60 devices, dirichlet; 24 of them" in shown(found)


def test_arrays_need_no_net_to_be_looked_at(command, tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((20, 9, 8), np.float32), y=np.arange(20) % 2)
    code, out, _ = command("data", tmp_path / "x.npz", "--json", "--set", "fleet.devices=2")
    found = json.loads(out)
    assert code == 0 and found["kind"] == "array" and "tokens" not in found
    assert found["arrays"] == {
        "model": "alexnet-small",
        "shape": [9, 8],
        "type": "float32",
    }
    assert found["classes"] == {"0": 10, "1": 10} and found["doubles"] == 4
    assert sum(device["rows"] for device in found["devices"]) == 16
    assert "a row is [9, 8] of float32" in shown(found)


def test_a_sample_of_the_training_rows_is_the_same_for_every_seed(table):
    tables = {"data": str(table), "model": "minilm"}
    whole, *drawn = (
        read_data.dataset(
            config.recipe({"task": tables | {"train_rows": rows}, "run": {"seed": seed}})
        )
        for rows, seed in [(0, 0), (12, 0), (12, 1)]
    )
    assert drawn[0].train.texts == drawn[1].train.texts
    assert len(drawn[0].train) == 12 and set(drawn[0].train.texts) < set(whole.train.texts)
    assert drawn[0].test.texts == whole.test.texts
    assert remarks(drawn[0]) == (
        "2 of 50 rows are left out: 1 with no label, 1 with no text",
        "12 of 39 training rows are used: a random sample",
    )


def test_texts_to_continue_are_shown_without_a_decoder_and_measured_with_one(tmp_path, tiny_folder):
    path = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "good"}]}
    path.write_text((json.dumps(row) + "\n") * 10)
    settings = ["task.kind=causal-lm", "task.loss_on=texts"]
    found = data_cli.look(str(path), settings)
    assert found["rows"] == {"train": 8, "test": 2} and found["classes"] == {}
    assert found["tokens"] is None and "name a decoder as task.model" in shown(found)
    found = data_cli.look(str(path), [*settings, f"task.model={tiny_folder('llama')}"])
    assert found["tokens"]["texts"] == 10 and "read in windows of" in shown(found)
    with pytest.raises(BadInput, match="is an encoder"):
        data_cli.look(str(path), [*settings, f"task.model={tiny_folder('bert')}"])
    with pytest.raises(BadInput, match=r'10 with no answer.*or set task.loss_on = "texts"'):
        data_cli.look(str(path), settings[:1])


def test_dialogues_are_measured_in_their_template(tmp_path, tiny_folder):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "good", "completion": "bad"}
    path.write_text((json.dumps(row) + "\n") * 10)
    settings = ["task.kind=causal-lm", f"task.model={tiny_folder('llama')}"]
    found = data_cli.look(str(path), settings)
    # the beginning once by the tokenizer and once by the template, two words, the end
    assert found["tokens"]["max"] == 5 and "are cut at" in shown(found)


def test_pictures_beside_a_table_are_no_data(tmp_path, tiny_folder):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("text,label\n" + "good,a\nbad,b\n" * 5)
    (tmp_path / "assets").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "assets" / "logo.png")
    found = data_cli.look(str(tmp_path), [f"task.model={tiny_folder('bert')}"])
    assert found["classes"] == {"a": 5, "b": 5}


REFUSED = {
    "nothing there": (["absent.csv"], "found nothing there"),
    "an empty name": ([""], "argument after 'data' is empty"),
    "no such column": (["rows.csv", "--set", "task.label=stars"], "the label column 'stars'"),
    "too many devices": (["rows.csv", "--set", "fleet.devices=99"], "1 to 39 devices"),
    "a setting that is none": (["rows.csv", "--set", "fleet.device=9"], "did you mean 'devices'?"),
    "arrays for a text model": (
        ["x.npz", "--set", "task.model=minilm"],
        "holds arrays, which 'minilm' cannot read",
    ),
    "texts for a net": (["rows.csv", "--set", "task.model=cnn-h"], "expected an .npz file"),
    "too many tokens": (["rows.csv", "--set", "task.max_tokens=9999"], "reads at most"),
    "no such model": (["rows.csv", "--set", "task.model=./absent"], "is not a folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_run_refuses_is_refused_in_one_line(command, table, monkeypatch, name):
    monkeypatch.chdir(table.parent)
    np.savez("x.npz", x=np.zeros((20, 9, 8), np.float32), y=np.arange(20) % 2)
    arguments, said = REFUSED[name]
    code, out, errors = command("data", *arguments)
    assert (code, out, len(errors)) == (2, "", 1)
    assert errors[0].startswith("fedspine: ") and said in errors[0]


def test_what_save_to_disk_writes_is_read(tmp_path, tiny_folder):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(30)]
    part = datasets.Dataset.from_list(rows, features=features)
    part.save_to_disk(tmp_path / "one", num_shards=3)
    part.shuffle(seed=0).filter(lambda row: row["label"] == 1).save_to_disk(tmp_path / "indexed")
    datasets.DatasetDict(train=part, test=part.select(range(4))).save_to_disk(tmp_path / "two")
    model = f"task.model={tiny_folder('bert')}"
    one = data_cli.look(str(tmp_path / "one"), [model])
    assert (one["rows"], one["classes"]) == ({"train": 24, "test": 6}, {"no": 15, "yes": 15})
    two = data_cli.look(str(tmp_path / "two"), [model])
    assert (two["rows"], two["doubles"]) == ({"train": 30, "test": 4}, 4)
    with pytest.raises(BadInput, match="found only 'yes'"):
        data_cli.look(str(tmp_path / "indexed"), [model])


def test_a_recipe_and_a_sweep_may_begin_with_a_mark(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xef\xbb\xbf" + b"[run]\nrounds = 3\n")
    assert config.load(path).run.rounds == 3
    from fedspine.ui.sweep import plan

    sweep = tmp_path / "sweep.toml"
    sweep.write_bytes(b"\xef\xbb\xbf" + b'seeds = [0]\n[methods.a]\nname = "fedlora"\n')
    assert plan._read(sweep)["seeds"] == [0]


def test_an_encoding_of_a_recipe_reaches_the_reader(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(("text,label\n" + "café,a\nthé,b\n" * 5).encode("latin-1"))
    settings = [f"task.data={path}", "task.encoding=latin-1"]
    data = read_data.dataset(config.load(None, settings))
    assert set(data.train.texts) == {"café", "thé"}
    with pytest.raises(BadInput, match=r"task\.encoding is for texts"):
        config.load(None, ["task.encoding=latin-1", "task.model=cnn-h"])


@pytest.mark.parametrize(("name", "rows", "doubles"), [("trec6", 5952, 11), ("ag_news", 31600, 0)])
def test_real_data_has_the_doubles_that_its_notes_name(name, rows, doubles):
    if not (DATA / name).is_dir():
        pytest.skip(f"the data set {name} does not lie in ../shared/data beside the repository")
    found = overview(read_data.dataset(config.load(None, [f"task.data={DATA / name}"])))
    assert sum(found["rows"].values()) == sum(found["classes"].values()) == rows
    assert found["doubles"] == doubles
