"""Data sets: every format written and read back, the real sets if they are beside the
repository, and every refusal.
"""

import csv
import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.utils import logging
from places import DATA

from fedspine.core.errors import BadInput
from fedspine.data import files, hub, pydocs
from fedspine.data.tasks import load, remarks

ROWS = [
    {
        "text": f"row {n}, “quoted”\nsecond line",
        "label": "odd" if n % 2 else "even",
        "by": f"00{n % 3}",
    }
    for n in range(20)
]


def write(path, rows):
    """Writes rows (one dict each) in the format that the suffix of `path` names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case ".csv" | ".tsv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(
                    file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t"
                )
                writer.writeheader()
                writer.writerows(rows)
        case ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        case _:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(labels, **columns):
    return [
        {"text": f"text {n}", "label": label}
        | {name: values[n] for name, values in columns.items()}
        for n, label in enumerate(labels)
    ]


def refused(data, kind="classification", **options):
    with pytest.raises(BadInput) as error:
        load(str(data), kind=kind, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- formats and folders ---


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".json", ".jsonl", ".ndjson"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    write(tmp_path / f"train{suffix}", ROWS)
    write(tmp_path / f"test{suffix}", ROWS[:4])
    data = load(str(tmp_path), kind="classification", group="by")
    assert data.train.texts == tuple(row["text"] for row in ROWS)
    assert data.label_names == ("even", "odd")
    assert data.train.labels.dtype == np.int64
    assert data.train.labels.tolist() == [n % 2 for n in range(20)]
    # "001" stays text in CSV too
    assert data.train.columns["by"] == tuple(row["by"] for row in ROWS)
    assert data.test.texts == data.train.texts[:4]
    assert data.natural is None and data.train.pairs is None


def test_a_file_of_json_lines_may_be_called_json(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = load(str(path), kind="classification")
    assert sorted(data.train.texts + data.test.texts) == sorted(row["text"] for row in ROWS)


def test_a_single_file_gives_a_fifth_for_testing_always_the_same(tmp_path):
    path = write(tmp_path / "reviews.csv", labelled([n % 2 for n in range(50)]))
    once, again = load(str(path), kind="classification"), load(str(path), kind="classification")
    assert (len(once.train.texts), len(once.test.texts)) == (40, 10)
    assert once.test.texts == again.test.texts
    assert once.test.texts != tuple(f"text {n}" for n in range(10))
    assert set(once.train.texts).isdisjoint(once.test.texts)
    of = dict(
        zip(
            once.train.texts + once.test.texts, [*once.train.labels, *once.test.labels], strict=True
        )
    )
    assert all(of[f"text {n}"] == n % 2 for n in range(50))


def test_a_class_of_one_row_stays_in_the_train_set(tmp_path):
    path = write(
        tmp_path / "rows.jsonl", labelled([f"rare {n}" for n in range(30)] + ["a", "b"] * 30)
    )
    data = load(str(path), kind="classification")
    assert {data.label_names[label] for label in data.test.labels} == {"a", "b"}
    assert len(set(data.train.labels.tolist())) == len(data.label_names) == 32


def test_shards_are_read_in_order_also_below_data(tmp_path):
    write(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[12:])
    write(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:12])
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", ROWS[:2])
    data = load(str(tmp_path), kind="classification")
    assert data.train.texts == tuple(row["text"] for row in ROWS)
    assert data.test.texts == data.train.texts[:2]


def test_a_missing_shard_is_not_overlooked(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", ROWS)
    assert "all 2 shards of the train split" in refused(tmp_path)


def test_shards_of_different_columns_are_refused(tmp_path):
    write(tmp_path / "train-0.jsonl", [{"text": "a", "label": 1}])
    write(tmp_path / "train-1.jsonl", [{"text": "a", "label": [1]}])
    assert "found a list; name a label column" in refused(tmp_path)


def test_shards_whose_numbers_stand_for_other_classes_are_refused(tmp_path):
    for shard, names in enumerate((["no", "yes"], ["yes", "no"])):
        table = pa.Table.from_pylist(labelled([0, 1])).replace_schema_metadata(
            {"label_names": json.dumps(names)}
        )
        pq.write_table(table, tmp_path / f"train-{shard}.parquet")
    assert "expected the same class names of column 'label' in every shard" in refused(tmp_path)


def test_the_test_file_goes_before_validation_and_an_exact_name_before_others(tmp_path):
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "train_old.csv", ROWS[:3])
    write(tmp_path / "dev.csv", ROWS[:5])
    write(tmp_path / "test.csv", ROWS[:2])
    data = load(str(tmp_path), kind="classification")
    assert (len(data.train.texts), len(data.test.texts)) == (20, 2)


def test_a_test_set_that_hides_its_labels_gives_way_to_validation(tmp_path):
    write(tmp_path / "train.csv", labelled([0, 1] * 5))
    write(tmp_path / "validation.csv", labelled([0, 1]))
    write(tmp_path / "test.csv", labelled([-1, -1, -1]))
    assert len(load(str(tmp_path), kind="classification").test.texts) == 2


def test_a_single_file_of_any_name_in_a_folder_is_the_data(tmp_path):
    write(tmp_path / "reviews.csv", ROWS)
    assert len(load(str(tmp_path), kind="classification").train.texts) == 16


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_text_may_be_longer_than_a_megabyte(tmp_path, suffix):
    rows = [{"text": "one book\n" * 300_000, "by": "a"}, {"text": "a note", "by": "b"}] * 2
    write(tmp_path / f"train{suffix}", rows)
    write(tmp_path / f"test{suffix}", rows[1:2])
    assert load(str(tmp_path), kind="causal-lm").train.texts == tuple(row["text"] for row in rows)


def test_a_partition_by_label_leaves_the_order_of_the_labels(tmp_path):
    data = load(
        str(write(tmp_path / "rows.csv", labelled([9, 10] * 10))),
        kind="classification",
        group="label",
    )
    assert data.label_names == ("9", "10")
    assert set(data.train.columns["label"]) == {"9", "10"}


def test_types_are_not_guessed_from_the_first_megabyte_alone(tmp_path):
    rows = labelled([n % 2 for n in range(6000)]) + labelled(["maybe"] * 2)
    for row in rows:
        row["text"] = "1" * 300  # 1.8 MB of what a CSV reader takes for numbers
    for suffix in (".csv", ".tsv"):
        data = load(str(write(tmp_path / f"rows{suffix}", rows)), kind="classification")
        assert data.label_names == ("0", "1", "maybe")
        assert data.train.texts[0] == "1" * 300


# --- labels ---


def test_int_labels_without_names_sort_as_numbers(tmp_path):
    path = write(tmp_path / "rows.csv", labelled([10, 9, 100, 9] * 5))
    assert load(str(path), kind="classification").label_names == ("9", "10", "100")


@pytest.mark.parametrize(
    ("suffix", "names"),
    [(".csv", ("False", "True")), (".jsonl", ("false", "true")), (".parquet", ("false", "true"))],
)
def test_bool_labels(tmp_path, suffix, names):
    """As CSV has them, here written by Python; JSON has its own spelling."""
    path = write(tmp_path / f"rows{suffix}", labelled([True, False] * 10))
    assert load(str(path), kind="classification").label_names == names


@pytest.mark.parametrize(
    ("labels", "names"), [([1.0, 2.0], ("1", "2")), ([1.0, 2.5], ("1.0", "2.5"))]
)
def test_floats_are_whole_numbers_where_all_of_them_are(tmp_path, labels, names):
    path = write(tmp_path / "rows.parquet", labelled(labels * 9))
    assert load(str(path), kind="classification").label_names == names


def test_strings_stored_as_a_dictionary_are_strings(tmp_path):
    table = pa.table(
        {"text": pa.array(["a", "b"] * 9).dictionary_encode(), "label": ["x", "y"] * 9}
    )
    pq.write_table(
        table.set_column(1, "label", table["label"].dictionary_encode()), tmp_path / "rows.parquet"
    )
    assert load(str(tmp_path), kind="classification").label_names == ("x", "y")


@pytest.mark.parametrize(
    ("names", "expected"), [(["no", "yes", "maybe"], ("no", "yes", "maybe")), (["no"], ("0", "1"))]
)
def test_stated_label_names_hold_where_the_labels_lie_in_their_range(tmp_path, names, expected):
    table = pa.Table.from_pylist(labelled([0, 1] * 10)).replace_schema_metadata(
        {"label_names": json.dumps(names)}
    )
    pq.write_table(table, tmp_path / "train.parquet")
    data = load(str(tmp_path), kind="classification")
    assert data.label_names == expected
    assert set(data.train.labels.tolist()) == {0, 1}


def test_metadata_that_is_no_list_of_names_is_passed_over(tmp_path):
    table = pa.Table.from_pylist(labelled([0, 1] * 10))
    pq.write_table(
        table.replace_schema_metadata({"label_names": "{", "huggingface": "[]"}),
        tmp_path / "train.parquet",
    )
    assert load(str(tmp_path), kind="classification").label_names == ("0", "1")


# --- refusals ---


def test_a_missing_file_names_the_one_beside_it(tmp_path):
    write(tmp_path / "reviews.csv", ROWS)
    assert "did you mean 'reviews.csv'?" in refused(tmp_path / "revews.csv")


@pytest.mark.parametrize(
    "name", ["./nothing", "nothing.parquet", "~/nothing/of/this/name", "/nothing/of/this/name"]
)
def test_what_looks_like_a_path_is_not_looked_for_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(hub, "source", lambda *_: pytest.fail("asked the Hub"))
    assert "found nothing there" in refused(name)


def test_an_empty_name_is_refused():
    assert "expected the name of a data set" in refused(" ")


def test_an_unknown_format_names_the_nearest(tmp_path):
    path = tmp_path / "rows.cvs"
    path.write_text("text,label\n")
    assert "did you mean '.csv'?" in refused(path)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json", ".jsonl"])
@pytest.mark.parametrize("content", [b'{"text": \xff\xfe "a"\n"b', b"", b"[1, 2"])
def test_a_broken_file_is_refused_by_name(tmp_path, suffix, content):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    said = refused(path)
    if (suffix, content) == (".csv", b"[1, 2"):  # which is only a header
        assert "found the columns [1, 2; name the text column" in said
    else:
        assert f"cannot read {str(path)!r} as {suffix[1:]}: " in said


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_text_that_is_not_utf8_is_refused(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(
        b"text,label\n\xff\xfea,1\n" if suffix == ".csv" else b'{"text": "\xff\xfe", "label": 1}\n'
    )
    assert "cannot read" in refused(path)


def test_a_folder_without_data(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    assert "found none; put train.* and test.* there" in refused(tmp_path)


def test_a_folder_without_a_train_file(tmp_path):
    write(tmp_path / "test.csv", ROWS)
    assert "expected a file train.*" in refused(tmp_path)


def test_two_formats_of_one_split(tmp_path):
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "train.parquet", ROWS)
    assert "keep one of them" in refused(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text": "txet"}, (
            "the text column 'txet' in the train set, found "
            "the columns text, label, by; did you mean"
        )),
        ({"label": "lable"}, "the label column 'lable'"),
        ({"kind": "pair"}, "the pair column 'text2'"),
        ({"kind": "pair", "pair": "hypothesis"}, "the pair column 'hypothesis'"),
        ({"group": "author"}, (
            "the group column 'author' in the train set, found the columns text, label, by"
        )),
        ({"pair": "by"}, "set kind 'pair'"),
        ({"kind": "regression"}, "unknown kind of task 'regression'"),
    ],
)  # fmt: skip
def test_a_missing_column_lists_those_present(tmp_path, options, said):
    assert said in refused(write(tmp_path / "rows.parquet", ROWS), **options)


def test_a_missing_column_of_the_test_set(tmp_path):
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "test.csv", [{"text": "a"}])
    assert "the label column 'label' in the test set" in refused(tmp_path)


def test_a_column_that_is_there_twice(tmp_path):
    (tmp_path / "rows.csv").write_text("text,text,label\na,b,1\n")
    assert "found several" in refused(tmp_path)


def test_a_text_column_of_numbers(tmp_path):
    assert "found int64; name a text column" in refused(
        write(tmp_path / "rows.parquet", labelled([1, 2])), text="label"
    )


def test_a_label_column_of_lists(tmp_path):
    assert "found list<" in refused(write(tmp_path / "rows.parquet", labelled([[1], [2]])))


@pytest.mark.parametrize("empty", ["", " \n\t", None])
@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("column", ["text", "text2"])
def test_rows_with_an_empty_text_are_left_out_and_counted(tmp_path, empty, suffix, column):
    rows = labelled([0, 1] * 5, text2=["other"] * 10)
    rows[3][column] = rows[7][column] = empty
    write(tmp_path / f"train{suffix}", labelled([0, 1], text2=["a", "b"]))
    write(tmp_path / f"test{suffix}", rows)
    data = load(str(tmp_path), kind="pair")
    reason = {"text": "no text", "text2": "no second text"}[column]
    assert data.left_out == {reason: 2}
    assert data.test.texts == tuple(row["text"] for n, row in enumerate(rows) if n not in (3, 7))
    assert remarks(data)[0] == f"2 of 12 rows are left out: 2 with {reason}"


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("labels", [[1, 2], ["a", "b"], [True, False]])
def test_rows_without_a_label_are_left_out_and_counted(tmp_path, suffix, labels):
    write(tmp_path / f"train{suffix}", labelled([*labels * 2, None, *labels, None]))
    write(tmp_path / f"test{suffix}", labelled([None, *labels]))
    data = load(str(tmp_path), kind="classification")
    assert data.left_out == {"no label": 3}
    assert data.train.texts == tuple(f"text {n}" for n in (0, 1, 2, 3, 5, 6))
    assert data.test.texts == ("text 1", "text 2")
    assert data.train.labels.tolist() == [*data.test.labels.tolist()] * 3


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_train_set_without_any_label_is_refused(tmp_path, suffix):
    said = refused(write(tmp_path / f"rows{suffix}", labelled([None] * 3)))
    assert "found only 3 with no label" in said


def test_a_null_group_is_refused(tmp_path):
    path = write(tmp_path / "rows.parquet", labelled([1, 2], by=["a", None]))
    assert "expected a group in column 'by'" in refused(path, group="by")


def test_a_label_seen_only_in_the_test_set_is_named(tmp_path):
    write(tmp_path / "train.csv", labelled(["a", "b"]))
    write(tmp_path / "test.csv", labelled(["a", "c", "c"]))
    assert "found 'c' in column 'label' of 2 rows" in refused(tmp_path)


def test_one_class_is_refused(tmp_path):
    assert "at least 2 classes" in refused(write(tmp_path / "rows.csv", labelled(["same"] * 20)))


def test_no_rows(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n")
    assert "expected rows in the train set, found none" in refused(tmp_path)


def test_too_few_rows_to_hold_some_out(tmp_path):
    assert "expected enough rows to set a fifth aside" in refused(
        write(tmp_path / "rows.csv", labelled(["a", "b"]))
    )


# --- the Hub ---


def test_a_name_that_is_nowhere_says_so_three_times(monkeypatch):
    datasets = pytest.importorskip(
        "datasets", reason="the package datasets (extra hub) is not installed"
    )

    def unreachable(*_):
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    logging.set_verbosity_warning()
    said = refused("pydoc-topic")
    assert logging.get_verbosity() == logging.ERROR  # otherwise every retry is a line on stderr
    assert "is not built in (known: pydoc-topics, pydoc-qa), not a path here" in said
    assert "the Hugging Face Hub does not provide 'pydoc-topic': no network here" in said
    assert "did you mean 'pydoc-topics'?" in said


def test_without_the_package_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'fedspine[hub]'" in refused("someone/something")


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    """The package, with its cache in the test's folder."""
    package = pytest.importorskip(
        "datasets", reason="the package datasets (extra hub) is not installed"
    )
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return package


def test_the_hub_reader_reads_a_folder_of_csv(datasets, tmp_path):
    write(tmp_path / "rows" / "train.csv", ROWS)
    write(tmp_path / "rows" / "test.csv", ROWS[:4])
    found = {
        split: read(lambda names: {"text": names.index("text")})
        for split, read in hub.source(str(tmp_path / "rows")).items()
    }
    assert {split: part.rows for split, part in found.items()} == {"train": 20, "test": 4}
    assert found["train"].columns == {"text": [row["text"] for row in ROWS]}


def test_class_labels_of_the_hub_become_label_names(datasets, monkeypatch):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    part = datasets.Dataset.from_list(labelled([1, 0, 1, 0]), features=features)
    asked = []

    def found(*name):
        asked.append(name)
        return datasets.DatasetDict(train=part, test=part.select([2]), unsupervised=part)

    monkeypatch.setattr(datasets, "load_dataset", found)
    data = load("someone/something:sst2", kind="classification")
    assert asked == [("someone/something", "sst2")]
    assert data.label_names == ("no", "yes")
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([1, 0, 1, 0], [1])


def test_parquet_files_written_by_datasets_keep_their_class_names(datasets, tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    path = tmp_path / "rows" / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_list(labelled([1, 0] * 9), features=features).to_parquet(str(path))
    assert load(str(tmp_path / "rows"), kind="classification").label_names == ("no", "yes")


def test_a_hub_set_without_a_train_split(datasets, monkeypatch):
    part = datasets.Dataset.from_list(labelled([1, 0]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(all=part))
    assert "expected a split 'train'" in refused("someone/something")


# --- the built-in set and the real ones ---


@pytest.fixture(scope="module")
def paragraphs():
    return pydocs.read()


@pytest.mark.slow
def test_pydoc_topics_has_the_documented_size(paragraphs):
    origins = {}
    for text, topic, file in paragraphs:
        assert 40 <= len(text) <= 400 and text == " ".join(text.split())
        assert origins.setdefault(file, topic) == topic
        assert pydocs.LEFT_OUT.isdisjoint(Path(file).parts)
    assert len({text for text, _, _ in paragraphs}) == len(paragraphs)
    assert {topic for _, topic, _ in paragraphs} == set(pydocs.TOPICS)
    if sys.version_info[:2] == (3, 11):
        assert 9_000 <= len(paragraphs) <= 12_000
        assert 400 <= len(origins) <= 500


@pytest.mark.slow
def test_pydoc_topics_is_the_same_every_time_and_quick(paragraphs):
    begin = time.process_time()
    assert pydocs.read() == paragraphs
    assert time.process_time() - begin < 15  # about 1.5 s on a slow core


@pytest.mark.slow
def test_pydoc_qa_asks_about_functions_and_answers_from_their_docs():
    data = load("pydoc-qa", kind="causal-lm", answers=True)
    assert data.natural == "file" and not data.left_out
    rows = [*data.train.dialogues, *data.test.dialogues]
    pairs = {prompt: answer for (_, prompt), (_, answer) in (row.messages for row in rows)}
    assert len(pairs) == len(rows) == len(data.train) + len(data.test)
    found = pairs["What does `textwrap.dedent(text)` do?"]
    assert found == "Remove any common leading whitespace from every line in `text`."
    assert all(20 <= len(answer) <= 400 for answer in pairs.values())
    names = [prompt.partition("(")[0].rpartition(".")[2] for prompt in pairs]
    assert not [name for name in names if name.startswith("_")]
    files = {file for file in data.train.columns["file"] if file.startswith("json")}
    assert "json/encoder.py" in files
    if sys.version_info[:2] == (3, 11):
        assert 3_900 <= len(rows) <= 4_700


def test_no_module_has_two_topics():
    modules = [module for of_topic in pydocs.TOPICS.values() for module in of_topic]
    assert len(modules) == len(set(modules))


def test_an_interpreter_without_sources_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(pydocs.sysconfig, "get_path", lambda _: str(tmp_path))
    assert "expected the Python sources of the standard library" in refused("pydoc-topics")
    with pytest.raises(BadInput, match="standard library .* for pydoc-qa, found none"):
        load("pydoc-qa", kind="causal-lm")


def test_broken_sources_are_passed_over(monkeypatch, tmp_path):
    (tmp_path / "cmd.py").write_bytes(b"def broken(:\n")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "tool.py").write_text(
        f'"""{"word " * 20}\n\n  short\n\n{"other " * 10}"""\n'
    )
    (tmp_path / "unmapped.py").write_text(f'"""{"word " * 20}"""\n')
    monkeypatch.setattr(pydocs.sysconfig, "get_path", lambda _: str(tmp_path))
    expected = [("word " * 20, "text", "json/tool.py"), ("other " * 10, "text", "json/tool.py")]
    assert pydocs.read() == [(text.strip(), topic, file) for text, topic, file in expected]


def test_pydoc_topics_as_a_task(paragraphs, monkeypatch):
    monkeypatch.setattr(pydocs, "read", lambda: paragraphs)  # the same ones every time
    data = load("pydoc-topics", kind="classification")
    assert data.label_names == (
        "interface", "network", "language", "concurrency", "testing", "text", "files", "numbers"
    )  # fmt: skip
    assert data.natural == "file"
    assert len(data.test.texts) == len(paragraphs) // 5
    assert len(data.train.texts) + len(data.test.texts) == len(paragraphs)
    topic_of = {text: topic for text, topic, _ in paragraphs}
    file_of = {text: file for text, _, file in paragraphs}
    assert all(
        data.label_names[n] == topic_of[t]
        for t, n in zip(data.train.texts, data.train.labels, strict=True)
    )
    assert data.train.columns["file"] == tuple(file_of[text] for text in data.train.texts)


def real(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"the data set {name} does not lie in ../shared/data beside the repository")
    return str(DATA / name)


@pytest.mark.parametrize(
    ("name", "kind", "rows", "names"),
    [
        ("ag_news", "classification", (24000, 7600), ("World", "Sports", "Business", "Sci/Tech")),
        ("trec6", "classification", (5452, 500), ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")),
        ("mrpc", "pair", (3668, 1725), ("not_equivalent", "equivalent")),
        ("tinystories", "causal-lm", (900, 100), ()),
    ],
)
def test_real_data(name, kind, rows, names):
    data = load(real(name), kind=kind)
    assert (len(data.train.texts), len(data.test.texts)) == rows
    assert data.label_names == names
    for split in (data.train, data.test):
        assert (split.pairs is None) == (kind != "pair")
        assert (split.labels is None) == (kind == "causal-lm")
        if split.labels is not None:
            assert len(split.labels) == len(split.texts)
            assert set(split.labels.tolist()) == set(range(len(names)))


def test_real_data_by_a_column_of_its_own():
    data = load(real("trec6"), kind="classification", group="fine_label", label="fine_label")
    assert len(data.label_names) == len(set(data.train.columns["fine_label"])) > 40


def test_split_names():
    assert files.split_of("Train") == "train"
    assert files.split_of("test.2020") == "test"
    assert files.split_of("valid_1") == "validation"
    assert files.split_of("contest") is None
