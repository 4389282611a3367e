"""Adapters against PEFT itself: what we write it computes alike, what it writes we compute alike."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LABELS, labels_for, logits, minilm, model_on, tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedspine.errors import BadInput
from fedspine.export import hf
from fedspine.export.peft import read_adapter, write_adapter
from fedspine.lm.base import Model
from fedspine.lm.lora import a_name, b_name
from fedspine.lm.structure import is_full

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
# PEFT asks transformers for something by its old name
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
    """The model with a rank of its own on one site, and no adapter on another."""
    adapter = dict(model.adapter)
    wide, bare = base.anatomy.sites[0].path, base.anatomy.sites[1].path
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
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    back = read_adapter(tmp_path / "adapter", base)
    assert is_full(back.structure)
    assert back.scale == model.scale
    same(back.adapter, model.adapter)
    same(back.head, model.head)


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rank-stabilised"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_we_compute_what_peft_writes(tmp_path, name, kind, rslora):
    base, tokenizer = tiny(tmp_path, name, kind)
    values = [site.path for site in base.anatomy.sites if site.row_units == "heads"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM" if kind == "causal-lm" else "SEQ_CLS",
        r=4,
        lora_alpha=8,
        target_modules=values,
        use_rslora=rslora,
        init_lora_weights=False,  # random B too
        rank_pattern={values[0]: 2},
        alpha_pattern={values[1]: 5},
    )
    torch.manual_seed(0)
    module = peft.get_peft_model(stock(tmp_path / f"tiny-{name}", kind), config).eval()
    module.save_pretrained(tmp_path / "adapter")
    model = read_adapter(tmp_path / "adapter", base)
    assert set(model.adapter) == {name(path) for path in values for name in (a_name, b_name)}
    torch.testing.assert_close(
        logits(base.fit(model), tokenizer), logits(module, tokenizer), atol=1e-5, rtol=1e-5
    )


def test_real_minilm(tmp_path):
    base, tokenizer = minilm()
    from fedspine.lm.load import locate

    model = model_on(base, rank=8)
    expected = logits(base.fit(model), tokenizer).clone()
    write_adapter(tmp_path, model, base, locate("minilm"))
    module = AutoModelForSequenceClassification.from_pretrained(locate("minilm"), num_labels=8)
    torch.testing.assert_close(
        logits(with_peft(module, tmp_path), tokenizer), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_pruned_adapter_fits_the_export_without_it(tmp_path, name, kind):
    base, tokenizer = tiny(tmp_path, name, kind)
    model = model_on(base, [base.anatomy.heads, 1], [24, 30])
    expected = logits(base.fit(model), tokenizer).clone()
    options = {"labels": labels_for(kind), "kind": kind, "max_tokens": 64, "name": "toy"}
    hf.export(base, model, tokenizer, tmp_path / "cut", merge=False, **options)
    write_adapter(tmp_path / "adapter", model, base, str(tmp_path / "cut"))
    found = logits(with_peft(hf.load(tmp_path / "cut").module, tmp_path / "adapter"), tokenizer)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
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
    other, _ = tiny(tmp_path, "qwen3")  # the same names, other shapes
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
