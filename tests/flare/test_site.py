"""A site's file and its rows: classes are numbered as at all other sites, and every refusal is one
line that reveals nothing.
"""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from site_files import NAMES, ROWS, terms, written

from fedspine.core.errors import BadInput
from fedspine.core.message import pack, unpack
from fedspine.data.tasks import load
from fedspine.flare.run_terms import REFUSALS, Refused, model_name
from fedspine.flare.site import check_name, load_site, open_site, site_examples
from fedspine.lm.content import content_sha256
from fedspine.lm.load import load as load_model
from fedspine.lm.tokens import tokens


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return load_model(str(tiny_folder("bert")), kind="classification", classes=3)[1]


@pytest.fixture(scope="module")
def stated(tiny_folder):
    """The terms for the tiny model, with its true content."""
    base, tokenizer = load_model(str(tiny_folder("bert")), kind="classification", classes=3)
    return terms(model_sha256=content_sha256(base, tokenizer))


def refusal(site, terms):
    with pytest.raises(Refused) as error:
        open_site(site, terms)
    assert "\n" not in str(error.value) and error.value.detail == REFUSALS[error.value.reason]
    return error.value


def bad(folder):
    with pytest.raises(BadInput) as error:
        load_site(folder)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{folder / 'fedspine-site.toml'}: ")


# --- the file ---


def test_a_site_file_is_read_with_its_paths_absolute(tmp_path):
    models = '[models]\nminilm = "minilm"\n"org/name" = "models/here"\nhub = "org/hub"\n'
    limits = "[limits]\nmemory_bytes = 2_000_000_000\nthreads = 2\n"
    allow = (
        '[allow]\nmethods = ["fedlora"]\nkinds = ["classification"]\n'
        'fewest_rows = 3\n[caches]\nfolder = "kept"\n'
    )
    folder = written(tmp_path / "a", data='labels = {0 = "no"}', more=models + limits + allow)
    (folder / "models" / "here").mkdir(parents=True)
    site = load_site(folder)
    assert site == load_site(folder / "fedspine-site.toml")
    assert (site.name, site.data.path, site.data.labels) == (
        "a",
        str(folder / "rows.parquet"),
        {"0": "no"},
    )
    assert site.models == {
        "minilm": "minilm",
        "org/name": str(folder / "models" / "here"),
        "hub": "org/hub",
    }
    assert (site.memory_bytes, site.allow.methods, site.allow.fewest_rows) == (
        2_000_000_000,
        ("fedlora",),
        3,
    )
    assert (
        site.environment["FEDSPINE_CACHE"] == str(folder / "kept")
        and site.environment["OMP_NUM_THREADS"] == "2"
    )


def test_a_short_site_file_allows_the_built_in_model_and_the_machines_memory(tmp_path):
    site = load_site(written(tmp_path))
    assert site.models == {"minilm": "minilm"} and site.allow.methods is None
    assert site.memory_bytes > 2**28 and site.limits.threads == 1


@pytest.mark.parametrize(
    ("head", "data", "more", "line"),
    [
        ("", "", "", "site.name is missing; it must be given"),
        ("name = 3", "", "", "site.name is 3: Input should be a valid string"),
        ('name = "a b"', "", "", "'a b' cannot be the name of a site"),
        ('name = "server"', "", "", "'server' cannot be the name of a site"),
        ('name = "a"', 'txt = "x"', "", "unknown key of [data] 'txt'; did you mean 'text'?"),
        (
            'name = "a"',
            "",
            "[limit]\nthreads = 2",
            "unknown part of a site file 'limit'; did you mean 'limits'?",
        ),
        (
            'name = "a"\nlimits = 3',
            "",
            "",
            "[limits] is 3, but a table of keys",
        ),
        (
            'name = "a"',
            "",
            "[limits]\nthreads = 0",
            "limits.threads is 0: Input should be greater than or equal to 1",
        ),
        (
            'name = "a"',
            "",
            '[allow]\nkinds = ["pairs"]',
            "unknown allow.kinds.0 'pairs'; did you mean 'pair'?",
        ),
        (
            'name = "a"',
            "",
            '[allow]\nmethods = "fedlora"',
            "allow.methods is 'fedlora': Input should be a valid tuple",
        ),
        ('name = "a"', "", "[models]\nx = 3", "site.models.x is 3: Input should be a valid string"),
    ],
)
def test_what_a_site_file_cannot_say(tmp_path, head, data, more, line):
    assert bad(written(tmp_path, head=head, data=data, more=more)).startswith(line)


def test_an_absent_or_broken_file_is_named(tmp_path):
    assert "does not exist" in bad(tmp_path)
    (tmp_path / "fedspine-site.toml").write_text("name = ")
    assert "cannot be read" in bad(tmp_path)
    (tmp_path / "fedspine-site.toml").write_text('name = "a"')
    assert bad(tmp_path) == "data.path is missing; it must be given"


@pytest.mark.parametrize("name", ["", "a.b", "../a", "-a", "a" * 64, "a\n", "ä", "Admin", "all"])
def test_names_that_no_site_can_have(name):
    with pytest.raises(BadInput, match="cannot be the name of a site"):
        check_name(name)


# --- the rows ---

VALUES = {
    "text": ["no", "maybe", "yes"],
    "numbers": [0, 1, 2],
    "numbers from 1": [3, 1, 2],
    "many numbers": [10, 9, 200],
    "true and false": [True, False],
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("named", [False, True], ids=["plain", "with names"])
@settings(max_examples=20)
@given(
    order=st.permutations(range(30)),
    cuts=st.lists(st.integers(1, 29), min_size=2, max_size=2, unique=True),
)
def test_sites_number_classes_as_a_simulation_does(
    tmp_path_factory, tokenizer, values, named, order, cuts
):
    folder = tmp_path_factory.mktemp("federation")
    # sorted by label before it is cut, so that sites lack classes
    rows = [{"text": f"row {n}", "label": values[n * len(values) // 30]} for n in range(30)]
    names = None if not named else json.dumps(["zero", "one", "two"]).encode()
    tables = {"train": rows, "test": rows}
    (folder / "all").mkdir()
    for split, table in tables.items():
        pq.write_table(table_of(table, names), folder / "all" / f"{split}.parquet")
    whole = load(str(folder / "all"), kind="classification")
    train = tokens(tokenizer, whole.train, "classification", 16)
    stated = terms(label_names=whole.label_names)
    for number, share in enumerate(np.split(np.array(order), sorted(cuts))):
        place = written(folder / str(number), more="[allow]\nfewest_rows = 1")
        pq.write_table(table_of([rows[i] for i in share], names), place / "rows.parquet")
        ours, theirs = site_examples(load_site(place), stated, tokenizer), train.take(share)
        for field in ("ids", "offsets", "labels"):
            assert getattr(ours, field).tolist() == getattr(theirs, field).tolist()
        assert ours.padding == theirs.padding


def table_of(rows, names):
    table = pa.Table.from_pylist(rows)
    return table if names is None else table.replace_schema_metadata({"label_names": names})


def test_a_site_without_class_names_says_which_number_means_which(tmp_path, tokenizer):
    rows = [
        row | {"label": NAMES.index(row["label"]) + 1} for row in ROWS
    ]  # counted from 1, as in some data sets
    folder = written(tmp_path, rows)
    with pytest.raises(
        BadInput, match="expected only the classes 'maybe', 'no', 'yes' in column 'label', found 2"
    ):
        site_examples(load_site(folder), terms(), tokenizer)
    folder = written(tmp_path, rows, data='labels = {1 = "maybe", 2 = "no", 3 = "yes"}')
    labels = site_examples(load_site(folder), terms(), tokenizer).labels
    assert labels.tolist() == [NAMES.index(row["label"]) for row in ROWS]


def test_a_csv_of_true_and_false_fits_a_task_that_has_more_classes(tmp_path, tokenizer):
    folder = written(tmp_path, data="").parent / tmp_path.name
    (folder / "rows.csv").write_text("text,label\n" + "good row,true\nbad row,false\n" * 16)
    (folder / "fedspine-site.toml").write_text('name = "a"\n[data]\npath = "rows.csv"\n')
    examples = site_examples(
        load_site(folder), terms(label_names=("false", "true", "unknown")), tokenizer
    )
    assert examples.labels.tolist() == [1, 0] * 16


def test_pairs_and_language_modelling(tmp_path, tokenizer):
    rows = [row | {"text2": f"and {n}"} for n, row in enumerate(ROWS)]
    site = load_site(written(tmp_path, rows))
    pairs = site_examples(site, terms(kind="pair", max_tokens=64), tokenizer)
    assert pairs.segments is not None and len(pairs) == len(rows)
    stated = terms(kind="pair", pooling="bi-encoder", max_tokens=64)
    apart = site_examples(site, stated, tokenizer)
    # the second text has a first token of its own
    assert (apart.lengths == pairs.lengths + 1).all()
    texts = site_examples(site, terms(kind="causal-lm", label_names=()), tokenizer)
    assert texts.labels is None and texts.sources.max() == len(rows) - 1


# --- taking part ---


def test_a_site_opens_what_the_terms_ask_for(tmp_path, tiny_folder, stated):
    site = load_site(written(tmp_path, more=f'[models]\ntiny = "{tiny_folder("bert")}"'))
    held = open_site(site, unpack(pack(stated)))
    assert len(held.examples) == len(ROWS)
    assert held.examples.labels.tolist() == [NAMES.index(row["label"]) for row in ROWS]


@pytest.mark.parametrize(
    ("more", "changes", "reason", "line"),
    [
        ("", {"model": "other"}, "model", "the model 'other' is not among what [models]"),
        ("", {"model": "../other"}, "model", "the model '../other' is not among what [models]"),
        ('[allow]\nkinds = ["pair"]', {}, "task", "the kind of task 'classification' is not among"),
        (
            '[allow]\nmethods = ["fedspine"]',
            {},
            "method",
            "the method 'fedlora' is not among what allow.methods",
        ),
        ("[allow]\nfewest_rows = 61", {}, "rows", "has 60 rows and answers about 61 at least"),
        ("", {"model_sha256": "1" * 64}, "content", "has content"),
        ("", {"precision": "bf16"}, "content", "has content"),
        ("", {"label_names": ("no", "yes", "other")}, "data", "found 'maybe'"),
        ("", {"kind": "pair"}, "data", "expected the pair column 'text2'"),
        ("", {"layers": 99}, "model", "task.layers is 99"),
        ("", {"kind": "images"}, "terms", "unknown terms.kind 'images'"),
        ("", {"max_tokens": "16"}, "terms", "terms.max_tokens is '16'"),
        ("", {"max_tokens": 0}, "terms", "terms.max_tokens is 0"),
        ("", {"label_names": ("no", "no")}, "terms", "distinct names were expected"),
        ("", {"label_names": ()}, "terms", "distinct names were expected for classes"),
        ("", {"label_names": ["no", "yes"]}, "terms", "terms.label_names is"),
    ],
)
def test_a_site_refuses_what_its_file_does_not_allow(
    tmp_path, tiny_folder, stated, more, changes, reason, line
):
    site = load_site(written(tmp_path, more=f'[models]\ntiny = "{tiny_folder("bert")}"\n{more}'))
    found = refusal(site, dataclasses.replace(stated, **changes))
    assert found.reason == reason and line in str(found)


def test_a_refusal_tells_the_server_nothing_of_the_site(tmp_path, tiny_folder, stated):
    folder = written(tmp_path / "patients", more=f'[models]\ntiny = "{tiny_folder("bert")}"')
    (folder / "rows.parquet").write_bytes(b"secret")
    found = refusal(load_site(folder), stated)
    assert (
        "patients" in str(found) and "patients" not in found.detail and "secret" not in found.detail
    )


def test_the_content_of_a_model_does_not_depend_on_where_it_lies_but_on_all_it_holds(
    tmp_path, tiny_folder
):
    copy = shutil.copytree(tiny_folder("bert"), tmp_path / "copy")

    def content(folder, **options):
        base, tokenizer = load_model(str(folder), kind="classification", classes=3, **options)
        return content_sha256(base, tokenizer)

    here = content(tiny_folder("bert"))
    assert content(copy) == here
    assert content(copy, layers=1) != here and content(copy, precision="bf16") != here
    weights = load_file(copy / "model.safetensors")
    for name in weights:
        if "classifier" not in name:
            changed = {key: value.clone() for key, value in weights.items()}
            changed[name].view(-1)[-1] += 1
            save_file(changed, copy / "model.safetensors", {"format": "pt"})
            assert content(copy) != here, name


def test_a_folder_is_known_to_sites_by_its_last_part_only():
    assert model_name("/home/someone/models/tiny") == "tiny"
    assert model_name("minilm") == "minilm" and model_name("org/name") == "org/name"


def test_a_site_reads_its_own_encoding_and_its_log_says_what_is_left_out(
    tmp_path, tokenizer, capsys
):
    folder = written(tmp_path, data='encoding = "latin-1"')
    rows = [f"caf\u00e9 {number},{NAMES[number % 3]}" for number in range(33)]
    text = "\n".join(["text,label", *rows, "nobody knows,", ""])
    (folder / "rows.csv").write_bytes(text.encode("latin-1"))
    site_file = folder / "fedspine-site.toml"
    site_file.write_text(site_file.read_text().replace("rows.parquet", "rows.csv"))
    examples = site_examples(load_site(folder), terms(), tokenizer)
    assert len(examples) == 33
    assert "1 of 34 rows are left out: 1 with no label" in capsys.readouterr().err
    site_file.write_text(site_file.read_text().replace('encoding = "latin-1"', ""))
    with pytest.raises(BadInput, match="encoding"):
        site_examples(load_site(folder), terms(), tokenizer)
