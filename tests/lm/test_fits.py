"""Model folders whose parts do not fit: one line with the cause, before anything is trained."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import model_on, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, RobertaConfig

from fedspine.core.errors import BadInput
from fedspine.lm.fits import longest_input, positions
from fedspine.lm.load import load
from fedspine.lm.tiny import MAX_TOKENS, VOCABULARY, write_tiny

ROWS = len(VOCABULARY)


def settings(**changed):
    """Change the model's config.json."""

    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return spoil


def without(*parts):
    """Take the weights out whose names hold one of `parts`."""

    def spoil(folder):
        path = folder / "model.safetensors"
        kept = {n: t for n, t in load_file(path).items() if not any(part in n for part in parts)}
        save_file(kept, path, {"format": "pt"})

    return spoil


def tokenizer_with(change):
    def spoil(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        change(tokenizer)
        tokenizer.save_pretrained(folder)

    return spoil


def no_filler(folder):
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text())
    dropped = ("pad_token", "eos_token", "unk_token")
    path.write_text(json.dumps({key: value for key, value in said.items() if key not in dropped}))


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def only_special(folder):
    no_tokenizer(folder)
    (folder / "vocab.json").write_text("{}")  # a file that says nothing to this architecture


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def no_number(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    next(tensor for name, tensor in weights.items() if "layer" in name)[0] = torch.nan
    save_file(weights, path, {"format": "pt"})


SPOILT = {
    "weights that are no numbers": (no_number, ["not finite in 1 parameters", "is damaged"]),
    "a padding token was added": (
        tokenizer_with(lambda t: t.add_special_tokens({"pad_token": "<pad>"})),
        [f"{ROWS} rows", f"1 of the {ROWS + 1} entries", f"'<pad>' with id {ROWS}", "resize_token"],
    ),
    "two words were added": (
        tokenizer_with(lambda t: t.add_tokens(["quz", "qux"])),
        [f"2 of the {ROWS + 2} entries", f"'quz' with id {ROWS}, 'qux' with id {ROWS + 1}"],
    ),
    "many entries too many": (
        settings(vocab_size=50),
        ["has 50 rows, too few for 51 of", "'##m' with id 52, ...)"],
    ),
    "fewer rows than stated": (
        settings(vocab_size=150),
        [f"({ROWS}, 32) and not (150, 32)", "take config.json and weights of one model"],
    ),
    "nothing to fill rows with": (no_filler, ["no padding, end or unknown token", "set its pad"]),
    "no tokenizer": (no_tokenizer, ["has no tokenizer", "tokenizer.json", "copy the files"]),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ["no file named model.safetensors", "check its files"],
    ),
    "weights cut short": (cut_short, ["file not fully covered", "copy the model again"]),
    "weights that are none": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 5000),
        ["header too large", "check its files"],
    ),
    "no embedding": (without("embed"), ["no weights for", "embed", "complete checkpoint"]),
    "no norms": (without("norm", "Norm"), ["no weights for", "orm", "complete checkpoint"]),
    "one layer more than there is": (
        settings(num_hidden_layers=3),
        ["no weights for", ".2.", "complete checkpoint"],
    ),
    "another width": (settings(hidden_size=64), ["in the sizes of its config.json", "64"]),
    "a width that heads cannot share": (
        settings(num_attention_heads=5),
        ["not a multiple of the number of attention heads", "check its files"],
    ),
    "a config.json that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        ["config.json' is not a valid JSON file", "check its files"],
    ),
    "a config.json that says nothing": (
        lambda folder: (folder / "config.json").write_text("{}"),
        ["`model_type` key", "check its files"],
    ),
    "a tokenizer that is no JSON": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        ["Expecting property name", "check its files"],
    ),
}


@pytest.mark.parametrize("model_type", ["llama", "bert"])
@pytest.mark.parametrize("what", SPOILT)
def test_what_does_not_fit_is_reported_in_one_line(tmp_path, what, model_type):
    spoil, said = SPOILT[what]
    folder = write_tiny(tmp_path / "model", model_type)
    spoil(folder)
    kind = "causal-lm" if model_type == "llama" else "classification"
    with pytest.raises(BadInput) as caught:
        load(str(folder), kind=kind, classes=3)
    line = str(caught.value)
    assert "\n" not in line and str(folder) in line
    assert not [word for word in said if word not in line], line


def test_a_made_up_tokenizer_is_none(tmp_path):
    folder = write_tiny(tmp_path / "model", "bert")
    only_special(folder)
    with pytest.raises(BadInput, match="no entries but 5 special ones"):
        load(str(folder), kind="classification", classes=3)


def test_a_language_model_needs_its_head(tmp_path):
    folder = write_tiny(tmp_path / "model", "llama")
    whole = load(str(folder), kind="causal-lm")[0].skeleton.lm_head.weight.clone()
    without("lm_head")(folder)
    with pytest.raises(BadInput, match=r"1 parameters, lm_head.weight among them"):
        load(str(folder), kind="causal-lm")
    # a classifier has a head of its own, and tied weights are those of the embedding
    assert load(str(folder), kind="classification", classes=3)
    settings(tie_word_embeddings=True)(folder)
    base, _ = load(str(folder), kind="causal-lm")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(base.whole_skeleton().lm_head.weight, embedding)
    assert not torch.equal(embedding, whole)


@pytest.mark.parametrize("padded_to", [ROWS, 128])
def test_an_embedding_that_is_larger_than_the_tokenizer_is_fine(tmp_path, padded_to):
    folder = write_tiny(tmp_path / "model", "llama")
    module = AutoModelForCausalLM.from_pretrained(folder)
    module.resize_token_embeddings(padded_to)
    module.save_pretrained(folder)
    base, tokenizer = load(str(folder), kind="causal-lm")
    assert base.config.vocab_size == padded_to >= len(tokenizer) == ROWS


def test_the_last_row_of_the_embedding_is_of_use(tmp_path):
    folder = write_tiny(tmp_path / "model", "llama")
    tokenizer_with(lambda t: t.add_special_tokens({"pad_token": "<pad>"}))(folder)
    module = AutoModelForCausalLM.from_pretrained(folder)
    module.resize_token_embeddings(ROWS + 1)  # what the message tells to do
    module.save_pretrained(folder)
    base, tokenizer = load(str(folder), kind="causal-lm")
    assert tokenizer.pad_token_id == base.config.vocab_size - 1 == ROWS


def test_the_longest_input_leaves_out_positions_that_no_token_has(tmp_path):
    base, tokenizer = tiny(tmp_path, "roberta")
    assert base.config.max_position_embeddings == MAX_TOKENS + 2
    assert tokenizer.pad_token_id == 0  # so position 0 is that of padding
    assert positions(base.config) == MAX_TOKENS + 1
    assert positions(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert longest_input(base.config, tokenizer) == MAX_TOKENS
    # as many as the model can read, and no more
    module = base.fit(model_on(base))
    module(input_ids=torch.full((1, MAX_TOKENS + 1), 7))
    with pytest.raises((IndexError, RuntimeError)):
        module(input_ids=torch.full((1, MAX_TOKENS + 2), 7))
