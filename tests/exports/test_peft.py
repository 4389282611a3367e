"""Adapters against PEFT itself: each gives the same logits with the other's files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    KINDS,
    LABELS,
    as_its_readme_says,
    fp32_apart,
    labels_for,
    logits,
    minilm,
    model_on,
    stories,
    tiny,
)
from tolerances import TINY
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedspine.core.errors import BadInput
from fedspine.exports import hf
from fedspine.exports.adapter import Origin, export_adapter
from fedspine.exports.peft import read_adapter, write_adapter
from fedspine.lm.base import Model
from fedspine.lm.load import MINILM_HUB
from fedspine.lm.load import load as load_base
from fedspine.lm.lora import a_name, b_name
from fedspine.lm.structure import is_full

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
# PEFT uses an old name of transformers
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
CASES = [
    ("bert", "classification"),
    ("roberta", "classification"),
    ("distilbert", "classification"),
    ("llama", "classification"),
    ("llama", "causal-lm"),
    ("qwen2", "causal-lm"),
    ("qwen3", "causal-lm"),
]


def stock(folder, kind):
    """The base model as a user of transformers and PEFT loads it."""
    if kind == "causal-lm":
        return AutoModelForCausalLM.from_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS))


def with_peft(module, folder):
    return peft.PeftModel.from_pretrained(module, str(folder)).eval()


def unequal_ranks(base, model):
    """The model with a different rank on one site, and no adapter on another."""
    adapter = dict(model.adapter)
    wide, bare = base.layout.sites[0].path, base.layout.sites[1].path
    adapter[a_name(wide)] = torch.cat([adapter[a_name(wide)]] * 2)
    adapter[b_name(wide)] = torch.cat([adapter[b_name(wide)]] * 2, 1)
    del adapter[a_name(bare)], adapter[b_name(bare)]
    return Model(structure=model.structure, adapter=adapter, head=model.head, scale=model.scale)


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("equal", [True, False], ids=["one rank", "unequal ranks"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_peft_computes_what_we_write(tmp_path, name, kind, equal):
    base, tokenizer = tiny(tmp_path, name, kind)
    model = model_on(base) if equal else unequal_ranks(base, model_on(base))
    expected = logits(base.fit(model), tokenizer).clone()
    write_adapter(tmp_path / "adapter", model, base, str(tmp_path / f"tiny-{name}"))
    found = logits(
        with_peft(stock(tmp_path / f"tiny-{name}", kind), tmp_path / "adapter"), tokenizer
    )
    torch.testing.assert_close(found, expected, atol=TINY, rtol=TINY)
    back = read_adapter(tmp_path / "adapter", base)
    assert is_full(back.structure)
    assert back.scale == model.scale
    same(back.adapter, model.adapter)
    same(back.head, model.head)


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rank-stabilised"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_we_compute_what_peft_writes(tmp_path, name, kind, rslora):
    base, tokenizer = tiny(tmp_path, name, kind)
    values = [site.path for site in base.layout.sites if site.row_units == "heads"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM" if kind == "causal-lm" else "SEQ_CLS",
        r=4,
        lora_alpha=8,
        target_modules=values,
        use_rslora=rslora,
        init_lora_weights=False,  # B is random, too
        rank_pattern={values[0]: 2},
        alpha_pattern={values[1]: 5},
    )
    torch.manual_seed(0)
    module = peft.get_peft_model(stock(tmp_path / f"tiny-{name}", kind), config).eval()
    module.save_pretrained(tmp_path / "adapter")
    model = read_adapter(tmp_path / "adapter", base)
    assert set(model.adapter) == {name(path) for path in values for name in (a_name, b_name)}
    torch.testing.assert_close(
        logits(base.fit(model), tokenizer), logits(module, tokenizer), atol=TINY, rtol=TINY
    )


def test_real_minilm(tmp_path):
    base, tokenizer = minilm()
    from fedspine.lm.load import locate

    model = model_on(base, rank=8)
    expected = logits(base.fit(model), tokenizer).clone()
    write_adapter(tmp_path, model, base, locate("minilm"))
    module = AutoModelForSequenceClassification.from_pretrained(locate("minilm"), num_labels=8)
    found = logits(with_peft(module, tmp_path), tokenizer)
    off = fp32_apart(base, expected) * float(expected.abs().max())  # of logits near 0.04, not 1
    torch.testing.assert_close(found, expected, atol=off, rtol=0)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_pruned_adapter_fits_the_export_without_it(tmp_path, name, kind):
    base, tokenizer = tiny(tmp_path, name, kind)
    model = model_on(base, [base.layout.heads, 1], [24, 30])
    expected = logits(base.fit(model), tokenizer).clone()
    options = {"labels": labels_for(kind), "kind": kind, "max_tokens": 64, "name": "toy"}
    hf.export(base, model, tokenizer, tmp_path / "cut", merge=False, **options)
    write_adapter(tmp_path / "adapter", model, base, str(tmp_path / "cut"))
    found = logits(
        with_peft(hf.load_model(tmp_path / "cut").module, tmp_path / "adapter"), tokenizer
    )
    torch.testing.assert_close(found, expected, atol=TINY, rtol=TINY)
    back = read_adapter(tmp_path / "adapter", base)
    assert torch.equal(back.structure.heads, model.structure.heads)
    assert torch.equal(back.structure.channels, model.structure.channels)
    same(back.adapter, model.adapter)


def test_a_head_that_the_adapter_lacks_is_the_checkpoints(tmp_path):
    base, _ = tiny(tmp_path, "bert")
    model = model_on(base)
    write_adapter(tmp_path / "a", model, base, "toy")
    tensors = {
        name: tensor.clone()
        for name, tensor in load_file(tmp_path / "a" / "adapter_model.safetensors").items()
    }
    del tensors["base_model.model.bert.pooler.dense.weight"]
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    same(read_adapter(tmp_path / "a", base).head, model.head)


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    base, _ = tiny(tmp_path, "bert")
    for name in "ab":
        write_adapter(tmp_path / name, unequal_ranks(base, model_on(base)), base, "toy")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    targets = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)


def test_a_model_without_adapter_is_refused(tmp_path):
    base, _ = tiny(tmp_path, "bert")
    model = model_on(base)
    with pytest.raises(BadInput, match="no adapter to write"):
        write_adapter(
            tmp_path,
            Model(structure=model.structure, adapter={}, head=model.head, scale=1.0),
            base,
            "toy",
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases"),
    ],
)
def test_other_kinds_of_adapter_are_refused(tmp_path, change, message):
    base, _ = tiny(tmp_path, "bert")
    write_adapter(tmp_path / "a", model_on(base), base, "toy")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(BadInput, match=message):
        read_adapter(tmp_path / "a", base)


def test_adapters_of_another_model_are_refused(tmp_path):
    base, _ = tiny(tmp_path, "llama")
    other, _ = tiny(tmp_path, "qwen3")  # equal names, other shapes
    write_adapter(tmp_path / "a", model_on(other), other, "toy")
    with pytest.raises(BadInput, match="as a layer of 64 x 32, but the base has 32 x 32"):
        read_adapter(tmp_path / "a", base)
    write_adapter(tmp_path / "b", model_on(base, channels=[24, 30]), base, "toy")
    bert, _ = tiny(tmp_path, "bert")
    with pytest.raises(BadInput, match="another base model"):
        read_adapter(tmp_path / "b", bert)


def test_damaged_folders_are_refused(tmp_path):
    base, _ = tiny(tmp_path, "bert")
    with pytest.raises(BadInput, match=r"adapter_config\.json cannot be read"):
        read_adapter(tmp_path, base)
    write_adapter(tmp_path / "a", model_on(base), base, "toy")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    save_file(tensors | {"base_model.model.bert.embeddings.lora_A.weight": torch.zeros(1)}, weights)
    with pytest.raises(BadInput, match=r"adapts bert\.embeddings"):
        read_adapter(tmp_path / "a", base)
    weights.write_bytes(b"nothing")
    with pytest.raises(BadInput, match=r"adapter_model\.safetensors cannot be read"):
        read_adapter(tmp_path / "a", base)


def test_a_fresh_head_must_come_with_the_adapter(tmp_path):
    base, _ = tiny(tmp_path, "llama")  # whose checkpoint has no classifier
    write_adapter(tmp_path / "a", model_on(base), base, "toy")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {
        name: tensor.clone() for name, tensor in load_file(weights).items() if "score" not in name
    }
    save_file(tensors, weights)
    with pytest.raises(BadInput, match=r"score\.weight; save the adapter with its task head"):
        read_adapter(tmp_path / "a", base)


# --- whole folders, with stock tools only ---


def with_auto_peft(folder, kind):
    """The same without its help: PEFT's own class for the task, and no options."""
    auto = (
        peft.AutoPeftModelForCausalLM
        if kind == "causal-lm"
        else peft.AutoPeftModelForSequenceClassification
    )
    return auto.from_pretrained(str(folder)).eval(), AutoTokenizer.from_pretrained(folder)


def assert_stock(base, model, kind, loaded):
    """What stock tools load computes what the run deployed and knows its classes, and does not
    without the adapter.
    """
    module, tokenizer = loaded
    expected = logits(base.fit(model), tokenizer).clone()
    apart = fp32_apart(base, expected)
    torch.testing.assert_close(logits(module, tokenizer), expected, atol=apart, rtol=0)
    with module.disable_adapter():
        assert (logits(module, tokenizer) - expected).abs().max() > 10 * apart
    if kind != "causal-lm":
        assert module.config.id2label == dict(enumerate(LABELS))
        assert module.config.label2id == {label: index for index, label in enumerate(LABELS)}


def written(tmp_path, base, model, tokenizer, kind, *, with_base, name="base", cut=False):
    return export_adapter(
        base,
        model,
        tokenizer,
        tmp_path / "adapter",
        origin=Origin(name, cut),
        with_base=with_base,
        labels=labels_for(kind),
        kind=kind,
        max_tokens=64,
        name="toy",
    )


def assert_no_path(folder, place):
    """No file in a folder has a path of this machine."""
    for file in folder.rglob("*"):
        assert file.is_dir() or str(place).encode() not in file.read_bytes(), file


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_an_unpruned_adapter_loads_onto_its_base(tmp_path, monkeypatch, name, kind):
    base, tokenizer = tiny(tmp_path, name, kind)
    model = unequal_ranks(base, model_on(base))
    place = str(tmp_path / f"tiny-{name}")
    folder = written(tmp_path, base, model, tokenizer, kind, with_base=False, name=place)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == f"./tiny-{name}"
    assert_no_path(folder, tmp_path)
    monkeypatch.chdir(tmp_path)  # where the base is
    assert_stock(base, model, kind, as_its_readme_says(folder))
    assert not (folder / "base").exists()


@pytest.mark.parametrize("size", ["whole", "channels", "heads"])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_an_adapter_loads_with_the_base_beside_it(tmp_path, monkeypatch, name, kind, size):
    base, tokenizer = tiny(tmp_path, name, kind)
    heads = [1, 1] if size == "heads" else None
    model = model_on(base, heads, None if size == "whole" else [24, 24])
    if size == "heads" and not base.layout.decoder:  # whose configurations cannot express it
        with pytest.raises(BadInput, match=r"stock configuration.*--device dense.*--format hf"):
            written(tmp_path, base, model, tokenizer, kind, with_base=True)
        assert {path.name for path in tmp_path.iterdir()} == {f"tiny-{name}"}
        return
    folder = written(tmp_path, base, model, tokenizer, kind, with_base=True)
    folder = folder.rename(tmp_path / "moved")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "./base"
    assert_no_path(folder, tmp_path)
    assert_stock(base, model, kind, as_its_readme_says(folder))
    monkeypatch.chdir(folder)
    assert_stock(base, model, kind, with_auto_peft(folder, kind))
    auto = AutoModelForCausalLM if kind == "causal-lm" else AutoModelForSequenceClassification
    expected = logits(base.fit(model), tokenizer).clone()
    torch.testing.assert_close(  # transformers also finds the base from the adapter
        logits(auto.from_pretrained(folder), tokenizer),
        expected,
        atol=fp32_apart(base, expected),
        rtol=0,
    )
    assert (folder / "base" / "README.md").is_file()
    assert is_full(read_adapter(folder, base).structure) is (size == "whole")


def tied(tmp_path):
    """A tiny Llama whose output layer is its embedding."""
    from fedspine.lm.tiny import write_tiny

    source = write_tiny(tmp_path / "tied", "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = {name: t.clone() for name, t in load_file(source / "model.safetensors").items()}
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return load_base(str(source), kind="causal-lm")


@pytest.mark.parametrize("channels", [None, [24, 24]])
def test_tied_embeddings_stay_tied(tmp_path, monkeypatch, channels):
    base, tokenizer = tied(tmp_path)
    model = model_on(base, channels=channels)
    folder = written(tmp_path, base, model, tokenizer, "causal-lm", with_base=True)
    stored = load_file(folder / "base" / "model.safetensors")
    assert "lm_head.weight" not in stored
    monkeypatch.chdir(folder)
    module, tokenizer = with_auto_peft(folder, "causal-lm")
    assert_stock(base, model, "causal-lm", (module, tokenizer))
    inner = module.get_base_model()
    assert inner.lm_head.weight is inner.model.embed_tokens.weight
    adapter = sum(tensor.numel() for tensor in model.adapter.values())
    parameters = sum(p.numel() for p in module.parameters())
    assert parameters == sum(t.numel() for t in stored.values()) + adapter
    # 101 tokens, 2 layers: q and o of 32 x 32, k and v of 16 x 32, three of 32 x channels, and five
    # norms of 32
    assert parameters - adapter == (
        101 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * (24 if channels else 64)) + 5 * 32
    )


def test_the_real_stories_model_with_its_base(tmp_path):
    """Also tied, with eight query heads on four key/value heads."""
    base, tokenizer = stories()
    model = model_on(base, [2] * 5, [100] * 5)
    folder = written(tmp_path, base, model, tokenizer, "causal-lm", with_base=True)
    assert_stock(base, model, "causal-lm", as_its_readme_says(folder))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_unequal_layers_have_no_stock_base(tmp_path, name):
    base, tokenizer = tiny(tmp_path, name)
    model = model_on(base, channels=[24, 30])
    for with_base, says in (
        (True, "a stock configuration cannot describe"),
        (False, "is pruned"),
    ):
        with pytest.raises(BadInput, match=says) as refused:
            written(tmp_path, base, model, tokenizer, "classification", with_base=with_base)
        assert "--device dense" in str(refused.value)
        assert "--format hf" in str(refused.value)
        assert "--with-base" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {f"tiny-{name}"}


def test_a_run_of_the_first_blocks_needs_its_base(tmp_path):
    tiny(tmp_path, "bert")
    base, tokenizer = load_base(
        str(tmp_path / "tiny-bert"), kind="classification", classes=3, layers=1
    )
    model = model_on(base)
    with pytest.raises(BadInput, match=r"only the first blocks of base.*--with-base"):
        written(tmp_path, base, model, tokenizer, "classification", with_base=False, cut=True)
    folder = written(tmp_path, base, model, tokenizer, "classification", with_base=True, cut=True)
    assert_stock(base, model, "classification", as_its_readme_says(folder))


def test_minilm_is_named_as_stock_tools_know_it(tmp_path):
    base, tokenizer = minilm()
    model = model_on(base, rank=2)
    options = {"with_base": False, "kind": "classification", "max_tokens": 64, "name": "toy"}
    folder = export_adapter(
        base,
        model,
        tokenizer,
        tmp_path / "a",
        origin=Origin("minilm", False),
        labels=tuple("abcdefgh"),
        **options,
    )
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == MINILM_HUB


@pytest.mark.parametrize("name", ["smollm2", "/models/x.Q4_1.gguf"])
def test_no_adapter_is_fitted_to_a_quantised_file(tmp_path, name):
    base, tokenizer = tiny(tmp_path, "llama", "causal-lm")
    options = {"labels": (), "kind": "causal-lm", "max_tokens": 64, "name": "toy"}
    with pytest.raises(BadInput, match=r"quantised file.*--with-base"):
        export_adapter(
            base,
            model_on(base),
            tokenizer,
            tmp_path / "a",
            origin=Origin(name, False),
            with_base=False,
            **options,
        )
    assert not (tmp_path / "a").exists()


def test_an_adapter_folder_appears_whole_or_not_at_all(tmp_path):
    base, tokenizer = tiny(tmp_path, "bert")

    class Broken:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(BadInput, match="No space left"):
        written(tmp_path, base, model_on(base), Broken(), "classification", with_base=False)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-bert"}
    written(tmp_path, base, model_on(base), tokenizer, "classification", with_base=False)
    with pytest.raises(BadInput, match="exists already"):
        written(tmp_path, base, model_on(base), tokenizer, "classification", with_base=False)
