"""`task.vocabulary`: a run on fewer tokens, what its folder and exports say, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import carried_out, in_process, records_of, summary_of, tiny_job, without_wall, write_csv
from tiny_models import STORIES, fp32_apart
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedspine.core.errors import BadInput
from fedspine.exports.hf import load_model
from fedspine.exports.of_run import export_model, open_run
from fedspine.lm import vocabulary
from fedspine.lm.tiny import VOCABULARY, write_tiny
from fedspine.runs.backend import RealSites
from fedspine.runs.config import recipe

OPEN = '{texts = "fleet", epsilon = "inf", coverage = 1}'
NEVER = ("and", "to", "for", "on", "of")  # words of the model that no row of the data has


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A model, rows, and a run on them whose devices counted without noise."""
    folder = tmp_path_factory.mktemp("vocabulary")
    model, data = write_tiny(folder / "model", "bert"), write_csv(folder / "rows.csv")
    job = tiny_job(model, data, task__vocabulary=OPEN)
    carried_out("run", *job, "--out", folder / "run")
    return folder, job


def test_only_tokens_of_the_fleet_and_what_spells_any_text_are_kept(ground):
    folder, _ = ground
    kept = vocabulary.read(folder / "run" / "base").kept
    assert {VOCABULARY[id] for id in range(len(VOCABULARY)) if id not in kept} == set(NEVER)
    found = summary_of(folder / "run")["vocabulary"]
    about = {"kept": 96, "whole": 101, "same": 1.0, "bytes_saved": 5 * 32 * 4}
    assert found == about | {"texts": "fleet", "epsilon": None}


def test_all_devices_are_charged_for_counting_before_anything_else(ground):
    folder, _ = ground
    exchanges = [row for row in records_of(folder / "run") if row["row"] == "exchange"]
    counting = [row for row in exchanges if row["work"] == "count_tokens"]
    assert exchanges[:3] == counting
    assert len({row["device"] for row in counting}) == 3
    slowest = max(row["seconds"] for row in counting)
    assert all(row["started"] == 0 and row["bytes_up"] > 4 * len(VOCABULARY) for row in counting)
    assert exchanges[3]["started"] == slowest > 0
    summary = summary_of(folder / "run")
    assert summary["bytes_up"] == sum(row["bytes_up"] for row in exchanges)
    assert summary["bytes_down"] == sum(row["bytes_down"] for row in exchanges)
    assert summary["exchanges"] == len(exchanges)


@pytest.mark.parametrize("round", [0, 1])
def test_a_resumed_run_is_the_uninterrupted_one(ground, round):
    folder, _ = ground
    again = folder / f"again-{round}"
    shutil.copytree(folder / "run", again)
    carried_out("run", "--resume", again, "--from-round", round)
    assert without_wall(summary_of(again)) == without_wall(summary_of(folder / "run"))
    assert records_of(again) == records_of(folder / "run")


def test_show_says_what_is_kept(ground, monkeypatch, capsys):
    folder, _ = ground
    code, out, _ = in_process(monkeypatch, capsys, "show", folder / "run")
    assert code == 0
    said = " ".join(out.split())
    assert "Vocabulary 96 of 101 tokens; 640 B saved in fp32; 100.0 % of the test texts'" in said


@pytest.fixture(scope="module")
def exported(ground):
    folder, _ = ground
    export_model(folder / "run", device="dense", format="hf", to=folder / "hf")
    return folder / "hf"


def test_an_export_is_a_stock_model_with_the_cut_tokenizer(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["vocab_size"] == config["fedspine"]["vocabulary"]["kept"] == 96
    assert "96 of 101 tokens kept, 640 bytes saved" in (exported / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert len(tokenizer) == 96
    module = AutoModelForSequenceClassification.from_pretrained(exported).eval()
    assert module.get_input_embeddings().weight.shape == (96, 32)
    loaded = load_model(exported)
    texts = ["the good, not bad", "for you and me"]  # with words that were cut, too
    with torch.inference_mode():
        rows = [t(texts, padding=True, return_tensors="pt") for t in (loaded.tokenizer, tokenizer)]
        ours, stock = (m(**r).logits for m, r in zip((loaded.module, module), rows, strict=True))
    assert torch.equal(ours, stock)
    assert tokenizer.tokenize("for me") == ["f", "##o", "##r", "m", "##e"]


def test_predict_uses_the_cut_tokenizer(exported, monkeypatch, capsys):
    code, out, _ = in_process(monkeypatch, capsys, "predict", exported, "for you and me", "--json")
    assert code == 0
    assert 0 < json.loads(out)["predictions"][0]["probability"] <= 1


def test_a_damaged_card_is_refused(exported, tmp_path):
    place = tmp_path / "hf"
    shutil.copytree(exported, place)
    config = json.loads((place / "config.json").read_text())
    config["fedspine"]["vocabulary"] = {"kept": "many"}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="`fedspine` entry of .* is damaged"):
        load_model(place)


def test_an_adapter_needs_its_base_with_these_tokens(ground):
    pytest.importorskip("peft")
    folder, _ = ground
    with pytest.raises(BadInput, match=r"kept a part of the vocabulary .*; add --with-base"):
        export_model(folder / "run", device="dense", format="peft", to=folder / "peft")
    export_model(folder / "run", device="dense", format="peft", to=folder / "peft", with_base=True)
    merged, apart = load_model(folder / "peft"), load_model(folder / "hf")
    rows = apart.tokenizer(["the good, not bad"], return_tensors="pt")
    assert merged.tokenizer(["the good, not bad"])["input_ids"] == rows["input_ids"].tolist()
    with torch.inference_mode():
        ours, other = merged.module(**rows).logits, apart.module(**rows).logits
    most = fp32_apart(open_run(folder / "run").base, other)
    torch.testing.assert_close(ours, other, rtol=0, atol=most)


def test_a_decoder_with_a_cut_vocabulary_is_a_gguf_file(tmp_path):
    """Parity with PyTorch is checked by the export itself."""
    pytest.importorskip("gguf")
    if not STORIES.is_dir():
        pytest.skip("stories260k is not beside the repository, in shared/models")
    texts = tmp_path / "texts.csv"
    rows = [f"Once upon a time there was a {animal}." for animal in ("cat", "dog", "bird", "fish")]
    texts.write_text("\n".join(["text", *rows * 4]))
    public = tmp_path / "public.txt"
    public.write_text("\n".join(rows))
    settings = {"task__kind": "causal-lm", "task__vocabulary": public, "run__rounds": 1}
    carried_out("run", *tiny_job(STORIES, texts, **settings), "--out", tmp_path / "run")
    found = vocabulary.read(tmp_path / "run" / "base")
    assert found.about.kept < 330
    assert not found.exchanges
    export_model(tmp_path / "run", device="global", format="gguf", to=tmp_path / "gguf")
    loaded = load_model(tmp_path / "gguf")
    assert len(loaded.tokenizer) == found.about.kept


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            '{texts = "fleet", epsilon = 8, size = 20}',
            "size is 20, which would drop special",
        ),
        ("fleet", "epsilon is missing; give the epsilon of each text"),
        ('{texts = "fleet", epsilon = 0}', "Input should be greater than 0"),
        ('{texts = "fleet", epsilon = 8, coverage = 1.5}', "less than or equal to 1"),
        ('{texts = "fleet", epsilon = 8, sise = 90}', "did you mean 'size'?"),
        ("nowhere.txt", "cannot be read as a UTF-8 text"),
        ('{texts = "nowhere.txt", epsilon = 8}', "epsilon is for counts of devices"),
        (7, "the path of a text or a table was expected"),
    ],
)
def test_bad_settings_end_in_one_line(ground, settings, line, tmp_path, monkeypatch, capsys):
    folder, _ = ground
    job = tiny_job(folder / "model", folder / "rows.csv", task__vocabulary=settings)
    code, _, said = in_process(monkeypatch, capsys, "run", *job, "--out", tmp_path / "run")
    assert code == 2
    assert line in said[-1]
    assert not (tmp_path / "run").exists()


def test_it_goes_with_neither_privacy_nor_sites_nor_arrays():
    words = {"texts": "fleet", "epsilon": 8.0}
    private = {"epsilon": 8.0, "delta": 1e-5}
    with pytest.raises(BadInput, match=r"whose epsilon \[privacy\] does not count"):
        recipe({"task": {"vocabulary": words}, "method": {"name": "fedlora"}, "privacy": private})
    with pytest.raises(BadInput, match=r"task\.vocabulary is for texts"):
        recipe({"task": {"model": "cnn-s", "vocabulary": words}, "method": {"name": "fedavg"}})
    fewer = recipe({"task": {"vocabulary": words}})
    with pytest.raises(BadInput, match=r"task\.vocabulary is for simulated devices"):
        RealSites(Path("kit")).adapted(fewer)
