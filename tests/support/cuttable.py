"""Small tokenizers of each kind whose vocabulary can be cut, trained on a few lines."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "the good model of twelve words was trained on good days",
    "a bad model, trained badly, was not good enough for words",
    "twelve bad days and twelve good ones: enough for the model",
    "words of the model, and days of words",
] * 3
FOREIGN = ["zażółć gęślą jaźń", "你好 🙂", "tabs\tand  spaces\n", "x" * 150, ""]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def byte_level(*, ignore_merges=False):
    """Byte-level BPE, as GPT-2, Llama 3, SmolLM2 and Qwen have it, with an added token behind."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trained)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return _wrapped(tokenizer, additional_special_tokens=["<|end of turn|>"])


def byte_fallback():
    """SentencePiece's BPE, as Llama 2 has it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    vocabulary = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary += [token for token, _ in sorted(trained.get_vocab().items(), key=lambda e: e[1])]
    merges = [tuple(pair) for pair in _model(trained)["merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            {token: id for id, token in enumerate(vocabulary)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")]
    )
    return _wrapped(tokenizer)


def wordpiece():
    """WordPiece with some characters that are in whole words alone, as real ones have."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trained = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(LINES, trained)
    model = _model(tokenizer)["vocab"]
    model |= {token: len(model) + i for i, token in enumerate(("łódź", "##ść"))}
    tokenizer.model = models.WordPiece(model, unk_token="<unk>")
    tokenizer.post_processor = processors.BertProcessing(
        ("</s>", model["</s>"]), ("<s>", model["<s>"])
    )
    return _wrapped(tokenizer, cls_token="<s>", sep_token="</s>")


def unigram():
    """Unigram, as T5 and XLM-RoBERTa have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trained = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trained)
    return _wrapped(tokenizer)


CUTTABLE = {
    "byte-level": byte_level,
    "ignoring-merges": lambda: byte_level(ignore_merges=True),
    "byte-fallback": byte_fallback,
    "wordpiece": wordpiece,
    "unigram": unigram,
}


def _model(tokenizer):
    return json.loads(tokenizer.to_str())["model"]


def _wrapped(tokenizer, **more):
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **more)
