"""Cut tokenizers and bases: what is kept means the same, and every text can still be encoded."""

import json

import numpy as np
import pytest
import torch
from cuttable import CUTTABLE, FOREIGN, LINES, byte_level, wordpiece
from tiny_models import TEXTS, logits, model_on, stories, tiny
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedspine.core.errors import BadInput
from fedspine.lm import vocabulary
from fedspine.lm.cut_tokenizer import Definition, cut_tokenizer
from fedspine.lm.load import load
from fedspine.lm.tiny import VOCABULARY, write_tiny


@pytest.fixture(scope="module", params=CUTTABLE)
def halved(request):
    """A tokenizer, one with about half of its tokens, and the ids that this one keeps."""
    whole = CUTTABLE[request.param]()
    definition = Definition.of(whole)
    kept = definition.required()
    for id in range(0, len(whole), 2):
        kept |= definition.with_parts(id)
    assert len(kept) < len(whole)
    return whole, cut_tokenizer(whole, sorted(kept)), sorted(kept)


def test_kept_tokens_have_their_strings_and_their_place_as_ids(halved):
    whole, cut, kept = halved
    assert len(cut) == len(kept)
    assert cut.convert_ids_to_tokens(range(len(cut))) == whole.convert_ids_to_tokens(kept)
    assert cut.special_tokens_map == whole.special_tokens_map
    assert cut.all_special_tokens == whole.all_special_tokens


def test_every_text_is_encoded_and_decoded_as_before(halved):
    whole, cut, _ = halved
    for text in [*LINES[:4], *FOREIGN]:
        before, after = whole(text)["input_ids"], cut(text)["input_ids"]
        assert cut.decode(after) == whole.decode(before)
        assert after.count(cut.unk_token_id) == before.count(whole.unk_token_id)


def test_texts_of_kept_tokens_have_the_tokens_that_they_had(halved):
    whole, cut, kept = halved
    words = {word for line in LINES for word in line.split()}
    texts = [*LINES, *words, *(f"{one} {two}" for one, two in zip(words, LINES, strict=False))]
    same = 0
    for text in texts:
        before = whole(text)["input_ids"]
        if set(before) <= set(kept):
            assert [kept[id] for id in cut(text)["input_ids"]] == before
            same += 1
    assert 0 < same < len(texts)


def test_a_cut_tokenizer_is_one_that_stock_transformers_reads(halved, tmp_path):
    _, cut, _ = halved
    cut.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(LINES[:4])["input_ids"] == cut(LINES[:4])["input_ids"]


def test_a_cut_that_drops_special_tokens_is_refused_in_one_line(halved):
    whole, _, kept = halved
    without = [id for id in kept if id != whole.eos_token_id]
    with pytest.raises(BadInput, match=r"would lose 1 special tokens .*'</s>'") as refused:
        cut_tokenizer(whole, without)
    assert "\n" not in str(refused.value)


def test_a_cut_that_drops_what_a_kept_token_is_made_of_is_refused():
    whole = byte_level()
    definition = Definition.of(whole)
    id = max(range(len(whole)), key=lambda id: len(definition.with_parts(id)))
    with pytest.raises(BadInput, match="of which kept tokens are made"):
        cut_tokenizer(whole, sorted(definition.required() | {id}))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("byte-level", "Qwen2Tokenizer"),
        ("byte-fallback", "LlamaTokenizer"),
        ("unigram", "XLMRobertaTokenizer"),
        ("wordpiece", "BertTokenizer"),
    ],
)
def test_tokenizers_of_stock_classes_which_build_themselves_anew(kind, name, tmp_path):
    CUTTABLE[kind]().save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": name}))
    whole = AutoTokenizer.from_pretrained(tmp_path)
    kept = sorted(Definition.of(whole).required())
    assert len(kept) < len(whole)
    cut = cut_tokenizer(whole, kept)
    assert type(cut).__name__ == type(whole).__name__ == name
    for text in [*LINES[:4], *FOREIGN]:
        assert cut.decode(cut(text)["input_ids"]) == whole.decode(whole(text)["input_ids"])


def test_tokens_of_characters_that_do_not_stand_alone_are_kept():
    whole = wordpiece()
    required = Definition.of(whole).required()
    assert set(whole.convert_tokens_to_ids(["łódź", "##ść"])) <= required


def test_a_tokenizer_of_whole_words_is_refused():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    with pytest.raises(BadInput, match="WordLevel, whose vocabulary cannot be cut"):
        Definition.of(PreTrainedTokenizerFast(tokenizer_object=words))


# --- the base ---


def counts_of(tokenizer, texts, tokens):
    flat = [id for ids in tokenizer(texts)["input_ids"] for id in ids]
    return np.bincount(flat, minlength=tokens)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "llama", "qwen3"])
def test_logits_of_kept_tokens_are_the_same(architecture, tmp_path):
    kind = "causal-lm" if architecture in ("llama", "qwen3") else "classification"
    base, tokenizer = tiny(tmp_path, architecture, kind)
    model, before_cut = model_on(base, heads=[1, 2]), base.weights_sha256
    before = logits(base.fit(model), tokenizer)
    counts = counts_of(tokenizer, TEXTS, len(VOCABULARY))
    kept = vocabulary.choose(counts, tokenizer, base, coverage=1.0, most=None)
    bytes_before, left_before = base.token_bytes, base.embeddings
    cut = vocabulary.cut(base, tokenizer, kept)
    after = logits(base.fit(model), cut)
    if kind == "causal-lm":
        before = before[:, list(kept)]
    assert torch.equal(after, before)
    assert base.weights_sha256 == before_cut
    # words that TEXTS lack, where "one" is "on" and "##e": rows of 32 numbers, of an untied output
    # layer too
    gone = len({"and", "to", "in", "is", "with", "at"})
    assert len(kept) == len(VOCABULARY) - gone
    layers = 2 if kind == "causal-lm" else 1
    assert bytes_before - base.token_bytes == 4 * 32 * gone * layers
    assert left_before - base.embeddings == 32 * gone * layers


def test_what_a_run_keeps_loads_the_same_cut_base(tmp_path):
    source = str(write_tiny(tmp_path / "whole", "llama"))
    base, tokenizer = load(source, kind="causal-lm")
    # tokens named by the configuration, which are renumbered with the others
    kept = tuple(id for id in range(len(VOCABULARY)) if VOCABULARY[id] not in ("the", "good"))
    kept = tuple(sorted(vocabulary.required(tokenizer, base) | set(kept)))
    cut = vocabulary.cut(base, tokenizer, kept)
    about = vocabulary.VocabularyCut(len(kept), len(VOCABULARY), 0.9, 1)
    run = tmp_path / "run"
    run.mkdir()
    base.config.save_pretrained(run)
    cut.save_pretrained(run)
    vocabulary.write(run, vocabulary.Vocabulary(kept, about))
    again, words = load(source, kind="causal-lm", kept=run)
    assert again.weights_sha256 == base.weights_sha256
    assert again.config.to_dict() == base.config.to_dict()
    model = model_on(base)
    assert torch.equal(logits(again.fit(model), words), logits(base.fit(model), cut))
    (run / vocabulary.FILE).write_text('{"kept": [1, ')
    with pytest.raises(BadInput, match=r"vocabulary\.json is damaged"):
        load(source, kind="causal-lm", kept=run)


def test_a_real_decoder_is_cut_with_its_tied_output_layer(tmp_path):
    shared, tokenizer = stories()
    base, tokenizer = load(shared.config._name_or_path, kind="causal-lm")
    text = ["Once upon a time, there was a little girl."]
    model = model_on(base)
    before = logits(base.fit(model), tokenizer, text)
    counts = counts_of(tokenizer, text, 512)
    kept = vocabulary.choose(counts, tokenizer, base, coverage=1.0, most=None)
    assert len(kept) < 330
    cut = vocabulary.cut(base, tokenizer, kept)
    module = base.fit(model)
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight
    assert torch.equal(logits(module, cut, text), before[:, list(kept)])
    assert base.skeleton.generation_config.eos_token_id == base.config.eos_token_id
    assert kept[base.config.eos_token_id] == tokenizer.eos_token_id == tokenizer.bos_token_id


def test_a_base_keeps_the_tokens_that_its_configuration_names(tmp_path):
    base, tokenizer = tiny(tmp_path, "llama", "causal-lm")
    base.config.bos_token_id = VOCABULARY.index("the")
    kept = sorted(vocabulary.required(tokenizer, base))
    assert base.config.bos_token_id in kept
    kept.remove(base.config.bos_token_id)
    with pytest.raises(BadInput, match="would drop 1 special tokens"):
        vocabulary.cut(base, tokenizer, kept)


def test_sizes_and_coverage_take_the_commonest_tokens_first(tmp_path):
    base, tokenizer = tiny(tmp_path, "bert")
    ids = {word: VOCABULARY.index(word) for word in ("the", "and", "of")}
    counts = np.zeros(len(VOCABULARY), np.int64)
    for word, count in (("of", 5), ("the", 90), ("and", 5)):
        counts[ids[word]] = count
    required = vocabulary.required(tokenizer, base)

    def words(**how):
        kept = vocabulary.choose(counts, tokenizer, base, **({"coverage": 1.0, "most": None} | how))
        return set(kept) - required

    assert words() == set(ids.values())
    assert words(coverage=0.9) == {ids["the"]}
    assert words(coverage=0.91) == {ids["the"], min(ids["and"], ids["of"])}
    assert words(most=len(required) + 1) == {ids["the"]}
    with pytest.raises(BadInput, match=f"would drop special tokens: {len(required)} special"):
        words(most=len(required) - 1)
