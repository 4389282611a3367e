"""ExecuTorch folders: the logits of the PyTorch model, its one thread pool, a device without
fedspine, and every refusal.
"""

import dataclasses
import re

import numpy as np
import pytest
import torch
from runs import carried_out, in_process, python, tiny_job, write_csv
from tiny_models import LABELS, load, model_on

from fedspine.core.errors import BadInput
from fedspine.data.dataset import Rows
from fedspine.exports import bench as bench_module
from fedspine.exports.card import format_of
from fedspine.exports.hf import export, load_model, predict
from fedspine.lm.encode import encode
from fedspine.lm.tiny import VOCABULARY, write_tiny

MODELS = {  # architecture, readout, kind; all with different widths in each layer
    "bert": ("bert", "cls", "classification"),
    "bert pairs": ("bert", "mean", "pair"),
    "pairs apart": ("bert", "bi-encoder", "pair"),
    "roberta": ("roberta", "cls", "classification"),
    "distilbert": ("distilbert", "mean", "classification"),
}


def rows_of(kind, count):
    rng = np.random.default_rng(0)
    texts, others = (
        tuple(" ".join(rng.choice(VOCABULARY[4:40], rng.integers(1, 90))) for _ in range(count))
        for _ in range(2)
    )
    return Rows(texts, others if kind == "pair" else None, None, {})


@pytest.fixture(scope="module", params=MODELS)
def exported(tmp_path_factory, request):
    """The folders of one of MODELS, as hf and as executorch, and the parity."""
    executorch = installed()
    architecture, pooling, kind = MODELS[request.param]
    root = tmp_path_factory.mktemp("executorch")
    base, tokenizer = load(
        str(write_tiny(root / "tiny", architecture)), kind=kind, classes=3, pooling=pooling
    )
    model, about = model_on(base, [4, 2], [24, 30]), {"labels": LABELS, "kind": kind}
    stock = export(base, model, tokenizer, root / "hf", max_tokens=64, name="toy", **about)
    rows = encode(tokenizer, rows_of(kind, 48), kind, 64, bi_encoder=pooling == "bi-encoder")
    with pytest.MonkeyPatch.context() as patch:  # the test of a run measures it
        patch.setattr(bench_module, "peak_memory_bytes", lambda folder, tokens: 1)
        parity = executorch.export(stock, root / "et", examples=rows, rows_from="texts")
    return stock, root / "et", parity


def installed():
    pytest.importorskip("executorch")
    from fedspine.exports import executorch

    return executorch


def test_the_program_gives_the_logits(exported):
    stock, folder, parity = exported
    assert format_of(folder) == "executorch"
    assert parity.largest_difference <= 1e-4
    assert (parity.equal_predictions, parity.rows) == (1, 48)
    ours, theirs = load_model(stock), load_model(folder)
    assert theirs.runtime == "ExecuTorch"
    assert theirs == dataclasses.replace(ours, module=theirs.module, tokenizer=theirs.tokenizer)
    # one row, and more than a program reads at once
    for count in (1, 33):
        rows = rows_of(ours.kind, count)
        inputs = encode(ours.tokenizer, rows, ours.kind, 64, bi_encoder=ours.bi_encoder)
        inputs = inputs.batch(range(count))
        del inputs["labels"]
        with torch.inference_mode():
            expected = ours.module(**inputs).logits
        torch.testing.assert_close(theirs.module(**inputs).logits, expected, atol=1e-4, rtol=0)
    assert [one.label for one in predict(theirs, rows.texts, rows.pairs)] == [
        one.label for one in predict(ours, rows.texts, rows.pairs)
    ]
    sides = [rows.texts[:3], rows.pairs[:3] if rows.pairs else None]
    words = [word for row in zip(*filter(None, sides), strict=True) for word in row]
    assert answers_of_card(folder, *words) == [one.label for one in predict(theirs, *sides)]
    for file in folder.iterdir():  # nothing of the machine that wrote it
        assert str(folder.parent).encode() not in file.read_bytes(), file


def answers_of_card(folder, *texts):
    """The labels that the code in the folder's README.md prints."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    lines = python("-c", code, folder, *texts).stdout.splitlines()
    return [line.split("\t")[0] for line in lines]


@pytest.mark.parametrize("exported", ["distilbert"], indirect=True)
def test_programs_with_different_threads_take_turns(exported):
    _, folder, _ = exported
    first, second = load_model(folder, threads=1), load_model(folder, threads=1)
    third = load_model(folder, threads=2)
    ids = torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    found = [model.module(input_ids=ids).logits for model in (third, first, second, third, first)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("exported", ["distilbert"], indirect=True)
def test_refusals_of_a_program(exported, tmp_path):
    from fedspine.exports.executorch_program import Program

    _, folder, _ = exported
    whole = folder / "model.pte"
    damaged = tmp_path / "model.pte"
    damaged.write_bytes(whole.read_bytes()[:500])
    with pytest.raises(BadInput, match=r"cannot be read .* export the model again"):
        Program(damaged)
    with pytest.raises(BadInput, match="a row has 65 tokens, but this program reads at most 64"):
        load_model(folder).module(input_ids=torch.ones(1, 65, dtype=torch.int64))


def test_export_of_a_run_and_the_code_of_its_card(tiny_folder, tmp_path, monkeypatch, capsys):
    installed()
    data = write_csv(tmp_path / "rows.csv")
    job = tiny_job(tiny_folder("bert"), data, method__steps=20, method__learning_rate=1e-2)
    carried_out("run", *job, "--out", tmp_path / "run", "--json")
    to = tmp_path / "model"
    words = ("export", tmp_path / "run", "--to", to, "--format", "executorch")
    code, out, lines = in_process(monkeypatch, capsys, *words)
    assert (code, lines) == (0, [])
    assert "parity on 16 rows (test rows of the run): logits within" in out
    assert {file.name for file in to.iterdir()} == {
        *("README.md", "config.json", "model.pte", "parity.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    texts = ("good the very", "bad not small")
    assert answers_of_card(to, *texts) == [one.label for one in predict(load_model(to), texts)]


def test_without_executorch(monkeypatch):
    from fedspine.exports import executorch_program

    monkeypatch.setattr(executorch_program, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=re.escape("pip install 'fedspine[executorch]'")):
        executorch_program.check_installed()


def test_a_language_model_has_no_program(tiny_folder, tmp_path, monkeypatch, capsys):
    data = write_csv(tmp_path / "rows.csv")
    short = {"task__kind": "causal-lm", "run__rounds": 1, "fleet__per_round": 1}
    job = tiny_job(tiny_folder("llama"), data, **short)
    carried_out("run", *job, "--out", tmp_path / "run", "--json")
    words = ("export", tmp_path / "run", "--to", tmp_path / "model", "--format", "executorch")
    code, out, (line,) = in_process(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert "this run tuned a language model; use --format hf, --format onnx" in line
    assert not (tmp_path / "model").exists()
