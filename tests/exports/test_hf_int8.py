"""Merged folders with int8 weights in their blocks, which stock transformers reads by torchao."""

import json
import shutil

import pytest
import torch
from runs import carried_out, in_process, tiny_job, write_csv
from safetensors.torch import load_file, save_file
from tiny_models import LABELS, TEXTS, labels_for, load, logits, model_on, tiny

from fedspine.core.errors import BadInput
from fedspine.exports import hf_int8
from fedspine.exports.hf import export, load_model
from fedspine.exports.load import stock_class
from fedspine.lm.prunable_layout import layout_of
from fedspine.lm.tiny import write_tiny

MODELS = {  # architecture, kind, kept heads and channels
    "bert": ("bert", "classification", (4, 4), (64, 64)),
    "roberta": ("roberta", "classification", (4, 4), (24, 24)),
    "uniform llama": ("llama", "causal-lm", (1, 1), (24, 24)),
    "qwen3": ("qwen3", "causal-lm", (2, 2), (64, 64)),
}


def both(folder, architecture, kind, heads, channels):
    """The same model in fp32 and in int8."""
    base, tokenizer = tiny(folder, architecture, kind)
    model, about = model_on(base, list(heads), list(channels)), {"labels": labels_for(kind)}
    about |= {"kind": kind, "max_tokens": 64, "name": "toy"}
    for how in ("none", "int8"):
        export(base, model, tokenizer, folder / how, quantize=how, **about)
    return folder / "none", folder / "int8"


@pytest.mark.parametrize("name", MODELS)
def test_stock_transformers_loads_the_same_int8_model(tmp_path, name):
    single, small = both(tmp_path, *MODELS[name])
    ours, before = load_model(small), load_model(single)
    config = json.loads((small / "config.json").read_text())
    stock = stock_class(config["fedspine"]["pooling"]).from_pretrained(small)
    ids = torch.tensor([[5, 9, 7, 30]])
    with torch.inference_mode():
        inner = getattr(ours.module, "module", ours.module)  # of the mean over tokens
        assert torch.equal(inner(ids).logits, stock(ids).logits)
    apart, expected = (logits(m.module, ours.tokenizer, TEXTS) for m in (ours, before))
    # weights are off by at most half a step of 1/127 of their row's largest one, which is at most
    # four deviations; independent over the 14 products of two layers
    error = (apart - expected).pow(2).mean().sqrt() / expected.std()
    assert 0 < error < 4 / 254 * 14**0.5
    assert (ours.parameters, ours.block_parameters) == (before.parameters, before.block_parameters)


def test_each_weight_of_the_blocks_is_its_nearest_of_255_steps_and_all_else_stays(tmp_path):
    single, small = both(tmp_path, *MODELS["roberta"])
    module, before = load_model(small).module, load_model(single).module
    inside = {site.path for site in layout_of(module.config, module.base_model_prefix).sites}
    plain = dict(before.named_parameters())
    for name, parameter in module.named_parameters():
        whole, path = plain[name], name.rpartition(".")[0]
        if path in inside and name.endswith(".weight"):
            step = whole.abs().amax(1, keepdim=True) / 127
            off = (parameter.dequantize() - whole).abs()
            # the largest weight may be 127.5 steps of torchao's, and steps are rounded
            assert bool((off <= 0.51 * step).all()), name
        else:
            assert torch.equal(parameter, whole), name
    stored = load_file(small / "model.safetensors").values()
    matrices = (t for t in stored if t.dtype == torch.int8 and t.shape[-1] > 1)
    codes = sum(tensor.numel() for tensor in matrices)
    assert codes == load_model(small).block_parameters


@pytest.mark.parametrize(
    ("architecture", "pooling", "kind", "heads", "line"),
    [
        ("bert", "mean", "classification", (4, 2), "sizes of this model's layers; use --format"),
        ("bert", "bi-encoder", "pair", (4, 4), "no class for a bi-encoder; use --format onnx"),
    ],
)
def test_what_stock_transformers_cannot_load_is_refused(
    tmp_path, architecture, pooling, kind, heads, line
):
    place = str(write_tiny(tmp_path / "tiny", architecture))
    base, tokenizer = load(place, kind=kind, classes=3, pooling=pooling)
    about = {"labels": LABELS, "kind": kind, "max_tokens": 64, "name": "toy", "quantize": "int8"}
    with pytest.raises(BadInput, match=line):
        export(base, model_on(base, list(heads), [64, 64]), tokenizer, tmp_path / "x", **about)
    assert not (tmp_path / "x").exists()


def test_a_damaged_folder_is_one_line(tmp_path):
    _, small = both(tmp_path, *MODELS["bert"])
    stored = load_file(small / "model.safetensors")
    name = next(name for name in stored if "layer.1" in name)
    for label, change in (
        ("lacks", lambda file: save_file({n: t for n, t in stored.items() if n != name}, file)),
        ("cut", lambda file: file.write_bytes(file.read_bytes()[:-50])),
    ):
        place = shutil.copytree(small, tmp_path / label)
        change(place / "model.safetensors")
        with pytest.raises(BadInput, match="export the model again") as refused:
            load_model(place)
        assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a method that prunes nothing, and one that prunes layers unequally."""
    root = tmp_path_factory.mktemp("int8")
    model, data = str(write_tiny(root / "tiny", "bert")), write_csv(root / "rows.csv")
    for name, changed in {
        "whole": {"method__name": "fedlora", "method__rank": 4},
        "half": {"method__name": "magnitude", "method__sparsity": 0.4},
    }.items():
        settings = tiny_job(model, data, **({"method__ranks": None} | changed))
        pairs = list(zip(settings[::2], settings[1::2], strict=True))
        given = [part for pair in pairs if not pair[1].endswith("None") for part in pair]
        carried_out("run", *given, "--out", root / name)
    return root


def test_from_a_run_with_its_parity(run, tmp_path, monkeypatch, capsys):
    def command(*arguments):
        return in_process(monkeypatch, capsys, *arguments)

    options = ("--quantize", "int8")
    code, out, err = command(
        "export", run / "whole", "--to", tmp_path / "model", *options, "--json"
    )
    assert (code, err) == (0, [])
    found = json.loads(out)
    report = json.loads((tmp_path / "model" / "parity.json").read_text())
    assert found["parity"]["quantize"] == report["quantize"] == "int8"
    assert report["largest_difference"] > 0
    readme = (tmp_path / "model" / "README.md").read_text()
    assert "int8 in the blocks, else fp32" in readme and "with torchao and accelerate" in readme
    code, out, err = command("bench", tmp_path / "model", "--json")
    assert code == 0 and '"quantize": "int8"' in out, err
    code, _, err = command("predict", tmp_path / "model", "good the good", "--json")
    assert (code, err) == (0, [])
    for more, line in (
        (("--no-parity",), "quantised ones are always compared"),
        (("--format", "peft"), "--quantize is for --format hf"),
    ):
        code, _, err = command("export", run / "whole", "--to", tmp_path / "y", *options, *more)
        assert code == 2 and len(err) == 1 and line in err[0]
    code, _, err = command("export", run / "half", "--to", tmp_path / "y", *options)
    assert code == 2 and len(err) == 1 and 'method.structure = "uniform"' in err[0]
    monkeypatch.setattr(hf_int8, "find_spec", lambda package: None)
    code, _, err = command("export", run / "whole", "--to", tmp_path / "y", *options)
    assert code == 2 and err == [
        "fedspine: int8 weights of --format hf need torchao and accelerate; "
        "pip install 'fedspine[quantised]'"
    ]
    assert not (tmp_path / "y").exists()
