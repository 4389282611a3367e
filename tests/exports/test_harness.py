"""`fedspine lm-eval`: a pruned decoder under the harness scores as the module itself does."""

import importlib.util
import json

import datasets
import pytest
import torch
from runs import in_process
from tiny_models import model_on, tiny

from fedspine.core.errors import BadInput
from fedspine.exports import hf
from fedspine.exports.card import read_card
from fedspine.exports.harness import evaluate
from fedspine.exports.hf import load_model

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not here: pip install lm-eval"
)
TEXTS = ("the good model", "a very small one is bad")
TASK = """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a decoder of unequal widths, and one with a task."""
    place = tmp_path_factory.mktemp("harness")
    base, tokenizer = tiny(place, "llama", "causal-lm")
    model = model_on(base, heads=[1, 2], channels=[40, 23])
    facts = {"labels": (), "kind": "causal-lm", "max_tokens": 32, "name": "tiny"}
    hf.export(base, model, tokenizer, place / "decoder", **facts)
    (place / "tasks").mkdir()
    data = place / "tasks" / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (place / "tasks" / "texts.yaml").write_text(TASK.replace("DATA", str(data)))
    return place


@needs_harness
@pytest.mark.filterwarnings("ignore")  # of what the harness imports and of how it calls it
def test_a_pruned_decoder_scores_as_its_module_does(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    words = ("--tasks", "texts", "--include", place / "tasks", "--json")
    code, out, said = in_process(monkeypatch, capsys, "lm-eval", place / "decoder", *words)
    assert code == 0, said
    found = json.loads(out.splitlines()[-1])["results"]["texts"]["word_perplexity,none"]
    loaded = load_model(place / "decoder")
    assert not read_card(place / "decoder").stock
    total = 0.0
    for text in TEXTS:
        ids = loaded.tokenizer(text, return_tensors="pt").input_ids
        # the harness predicts every token, the one that begins a text from another such token
        ids = torch.cat([torch.tensor([[loaded.tokenizer.bos_token_id]]), ids], 1)
        with torch.inference_mode():
            logits = loaded.module(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total += float(logits.gather(1, ids[0, 1:, None]).sum())
    count = sum(len(text.split()) for text in TEXTS)
    # fp32 sums of a few tokens' log-probabilities
    assert found == pytest.approx(float(torch.tensor(-total / count).exp()), rel=1e-5)


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_one_line(place):
    with pytest.raises(BadInput, match=r"unknown task 'text'.*'texts'"):
        evaluate(place / "decoder", ["text"], include=place / "tasks")


@needs_harness
def test_a_classifier_is_refused(place):
    base, tokenizer = tiny(place, "bert")
    facts = {"labels": ("a", "b", "c"), "kind": "classification", "max_tokens": 32, "name": "b"}
    hf.export(base, model_on(base), tokenizer, place / "classifier", **facts)
    with pytest.raises(BadInput, match="is a classifier, and lm_eval scores language models"):
        evaluate(place / "classifier", ["texts"], include=place / "tasks")


def test_without_the_harness_one_line_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    with pytest.raises(BadInput, match=r"pip install 'fedspine\[lm-eval\]'"):
        evaluate(tmp_path, ["texts"])
