"""`predict` and `bench` accept all that `export` writes: merged folders, adapters with their base,
GGUF folders and files, in llama.cpp or read back into PyTorch.
"""

import json
import shutil

import pytest
import torch
from runs import in_process
from tiny_models import fp32_apart, logits, model_on, stories, tiny

from fedspine.core.errors import BadInput
from fedspine.data.dataset import Rows
from fedspine.exports import bench, gguf, llama_cpp, of_run, parity_rows
from fedspine.exports.adapter import Origin, export_adapter
from fedspine.exports.hf import export
from fedspine.exports.load import load_model
from fedspine.exports.predict import predict
from fedspine.lm.encode import encode

pytest.importorskip("gguf")
TEXTS = ("Once upon a time there was a cat.", "The dog ran")
WIDTHS = {"llama": ([2] * 5, [128] * 5), "deci": ([4, 3, 2, 4, 3], [160, 128, 150, 172, 96])}
ABOUT = {"labels": (), "kind": "causal-lm", "max_tokens": 64, "name": "toy"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A merged folder of stories260k, pruned in two ways, and the same model as GGUF."""
    (base, tokenizer), root = stories(), tmp_path_factory.mktemp("formats")
    examples = encode(tokenizer, Rows(TEXTS, None, None, {}), "causal-lm", 64, scored=True)
    for name, (heads, channels) in WIDTHS.items():
        export(base, model_on(base, heads, channels), tokenizer, root / name, **ABOUT)
        file = root / f"{name}-gguf"
        gguf.export(root / name, file, examples=examples, rows_from="texts")
        shutil.copyfile(file / "model.gguf", root / f"{name}-alone.gguf")
    return root


@pytest.mark.parametrize("runtime", ["PyTorch", "llama.cpp"])
@pytest.mark.parametrize("name", WIDTHS)
def test_a_gguf_file_predicts_as_the_merged_folder(folders, monkeypatch, name, runtime):
    if runtime == "PyTorch":
        monkeypatch.setattr(llama_cpp, "installed", lambda: None)
    elif llama_cpp.installed() is None:
        pytest.skip(llama_cpp.EXTRA)
    ours = load_model(folders / name)
    for place in (f"{name}-gguf", f"{name}-alone.gguf"):
        theirs = load_model(folders / place, threads=1)
        assert theirs.runtime.startswith(runtime)
        assert (theirs.parameters, theirs.block_parameters) == (
            ours.parameters,
            ours.block_parameters,
        )
        there, here = (logits(m.module, ours.tokenizer, TEXTS) for m in (theirs, ours))
        # F16 weights: 2^-11 of each, over the 32 products that a token goes through; llama.cpp
        # keeps its cache in F16, too
        assert (there - here).pow(2).mean().sqrt() <= 2 * gguf._allowed("f16", 5) * here.std()
        (mine,), (other,) = (predict(m, TEXTS[:1], new_tokens=6) for m in (ours, theirs))
        assert mine.continuation == other.continuation
        # a loss moves by no more than the logits, and those of the tokens average out
        off = gguf._allowed("f16", 5) * float(here.std())
        assert mine.mean_loss == pytest.approx(other.mean_loss, abs=off)


def test_what_a_file_alone_does_not_say(folders):
    alone, beside = (load_model(folders / n) for n in ("deci-alone.gguf", "deci-gguf"))
    assert alone.sparsity != alone.sparsity and beside.sparsity > 0  # NaN
    assert (alone.max_tokens, beside.max_tokens) == (512, 64)


def test_bench_of_several_formats_is_one_table(folders, monkeypatch, capsys):
    monkeypatch.setattr(bench, "peak_memory_bytes", lambda *_, **__: 1)  # a process for each
    monkeypatch.setattr(parity_rows, "MADE_UP", 4)
    places = [folders / "deci", folders / "deci-gguf", folders / "llama"]
    options = ["--tokens", "4", "--threads", "1"]
    code, out, _ = in_process(monkeypatch, capsys, "bench", *places, *options, "--json")
    assert code == 0
    models = json.loads(out)["models"]
    assert [m["format"] for m in models] == ["hf", "gguf", "hf"]
    same, other = (m["same_rows"]["equal_predictions"] for m in models[1:])
    # F16 changes a token where the two best logits are nearer than what it moves them by, 0.3 % of
    # their spread: of 512 normal logits these are a quarter of it apart, so 2 tokens of 100. The
    # other model is cut in other places
    assert models[0]["same_rows"]["equal_predictions"] == 1 and same > 0.9 > 0.5 > other
    assert models[1]["same_rows"]["mean_loss"] == pytest.approx(
        models[0]["same_rows"]["mean_loss"], rel=gguf._allowed("f16", 5)
    )
    assert models[1]["file_bytes"] == (folders / "deci-gguf" / "model.gguf").stat().st_size


def test_an_adapter_with_its_base(tmp_path):
    pytest.importorskip("peft")
    base, tokenizer = tiny(tmp_path, "bert")
    model = model_on(base, None, [24, 24])
    labels = ("red", "green", "blue")
    about = {"labels": labels, "kind": "classification", "max_tokens": 64, "name": "toy"}
    export(base, model, tokenizer, tmp_path / "merged", **about)
    origin = Origin("a/model", cut=False)
    place = tmp_path / "adapter"
    export_adapter(base, model, tokenizer, place, origin=origin, with_base=True, **about)
    ours, theirs = load_model(tmp_path / "merged"), load_model(place)
    there, here = (logits(m.module, tokenizer) for m in (theirs, ours))
    torch.testing.assert_close(there, here, atol=fp32_apart(base, here), rtol=0)
    assert theirs.parameters == ours.parameters
    shutil.rmtree(place / "base")
    with pytest.raises(BadInput, match="adapter without its base model.*--with-base"):
        load_model(place)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (None, "is not a file"),
        (b"GGUF", "cannot be read as GGUF"),
    ],
)
def test_files_that_are_none(tmp_path, monkeypatch, capsys, made, said):
    place = tmp_path / "x.gguf"
    if made is not None:
        place.write_bytes(made)
    for command in (("predict", place, "text"), ("bench", place)):
        code, out, lines = in_process(monkeypatch, capsys, *command)
        assert (code, out, len(lines)) == (2, "", 1)
        assert said in lines[0]


def test_q4_k_m_is_made_by_llama_cpp(folders, tmp_path):
    if llama_cpp.installed() is None:
        pytest.skip(llama_cpp.EXTRA)
    _, tokenizer = stories()
    examples = encode(tokenizer, Rows(TEXTS, None, None, {}), "causal-lm", 64, scored=True)
    for name in WIDTHS:
        parity = gguf.export(
            folders / name,
            tmp_path / name,
            examples=examples,
            rows_from="texts",
            quantize="q4_k_m",
        )
        assert parity.perplexity <= 1.05 * parity.perplexity_before  # as docs/runs.md says
        # rows of 64 numbers have no block of 256, so llama.cpp uses types of smaller blocks
        assert sum(parity.types.values()) == 5 * 7 + 1
        # at most 8.5 bits of a weight in place of 16; the tokenizer and the norms stay
        assert parity.bytes < 0.75 * (folders / f"{name}-gguf" / "model.gguf").stat().st_size
        assert load_model(tmp_path / name).block_parameters > 0


def test_q4_k_m_without_llama_cpp_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "installed", lambda: None)
    with pytest.raises(BadInput, match=r"llama.cpp is not installed; pip install"):
        of_run.export_model(
            tmp_path, device="global", format="gguf", to=tmp_path / "x", quantize="q4_k_m"
        )
    assert not (tmp_path / "x").exists()


def test_models_of_different_tasks_are_not_compared(folders, tmp_path, monkeypatch, capsys):
    base, tokenizer = tiny(tmp_path, "bert")
    about = {"labels": ("a", "b", "c"), "kind": "classification", "max_tokens": 64, "name": "x"}
    export(base, model_on(base), tokenizer, tmp_path / "bert", **about)
    words = ("bench", folders / "deci", tmp_path / "bert", "--rows", "x.csv")
    code, _, lines = in_process(monkeypatch, capsys, *words)
    assert code == 2 and "expected models of one task" in lines[0]
