"""Tiny random transformers with a real tokenizer, written as ordinary model folders: for tests and
toy settings.

They load offline through `fedspine.lm.load.load`, as any other local folder does.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)
from transformers.utils import logging

from fedspine.core.errors import unknown

WIDTH, CHANNELS, HEADS, KEY_HEADS = 32, 64, 4, 2
MAX_TOKENS = 128
SPREAD = 0.2  # of the weights: ten times the usual, so that logits differ visibly between inputs
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_WORDS = (
    "the",
    "and",
    "of",
    "to",
    "in",
    "is",
    "for",
    "on",
    "with",
    "at",
    "good",
    "bad",
    "not",
    "very",
    "small",
)
_MARKS = tuple(".,!?'-:;()")
VOCABULARY = (
    *_SPECIAL,
    *_CHARACTERS,
    *(f"##{character}" for character in _CHARACTERS),
    *_WORDS,
    *_MARKS,
)
_PAD, _CLS, _SEP = 0, 2, 3  # token ids; decoders take the last two to begin and to end a text

_ENCODER = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": CHANNELS}
_DECODER = _ENCODER | {"num_key_value_heads": KEY_HEADS}


def _encoder(kind: type[PreTrainedConfig], layers: int, classes: int) -> PreTrainedConfig:
    # RoBERTa counts positions from the padding id on, so it needs a few more of them
    return kind(
        num_hidden_layers=layers,
        num_labels=classes,
        max_position_embeddings=MAX_TOKENS + 2,
        **_ENCODER,
    )


def _decoder(kind: type[PreTrainedConfig], layers: int, **more: int | None) -> PreTrainedConfig:
    return kind(num_hidden_layers=layers, max_position_embeddings=MAX_TOKENS, **_DECODER, **more)


def _distilbert(layers: int, classes: int) -> PreTrainedConfig:
    return DistilBertConfig(
        num_labels=classes,
        n_layers=layers,
        dim=WIDTH,
        n_heads=HEADS,
        hidden_dim=CHANNELS,
        max_position_embeddings=MAX_TOKENS,
    )


_CONFIGS: dict[str, Callable[[int, int], PreTrainedConfig]] = {  # from layers and classes
    "bert": lambda layers, classes: _encoder(BertConfig, layers, classes),
    "roberta": lambda layers, classes: _encoder(RobertaConfig, layers, classes),
    "distilbert": _distilbert,
    "llama": lambda layers, _: _decoder(LlamaConfig, layers),
    "mistral": lambda layers, _: _decoder(MistralConfig, layers, sliding_window=None),
    "qwen2": lambda layers, _: _decoder(Qwen2Config, layers),
    # heads wider than their share of the residual stream, as real Qwen3 models have them
    "qwen3": lambda layers, _: _decoder(Qwen3Config, layers, head_dim=2 * WIDTH // HEADS),
}
ENCODERS = ("bert", "roberta", "distilbert")
DECODERS = ("llama", "mistral", "qwen2", "qwen3")


def write_tiny(
    folder: str | Path, model_type: str, *, classes: int = 3, layers: int = 2, seed: int = 0
) -> Path:
    """Write a random model of this architecture with its tokenizer to `folder`; the same seed gives
    the same bytes.

    Width 32, 64 channels, 4 heads (decoders: 4 query heads on 2 key/value heads), 101 tokens, fp32.
    Encoders carry a classifier of `classes` labels, decoders a language-modelling head. Raises
    BadInput for another `model_type`.

    >>> import tempfile
    >>> from fedspine.lm.load import load
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_tiny(folder, "bert")
    ...     base, tokenizer = load(str(path), kind="classification", classes=3)
    >>> base.layout.heads, base.layout.channels, tokenizer.tokenize("good, not bad!")
    (4, 64, ['good', ',', 'not', 'bad', '!'])
    """
    if model_type not in _CONFIGS:
        raise unknown("tiny model", model_type, _CONFIGS)
    config = _CONFIGS[model_type](layers, classes)
    config.update({"vocab_size": len(VOCABULARY), "initializer_range": SPREAD, "dtype": "float32"})
    config.update({"pad_token_id": _PAD, "bos_token_id": _CLS, "eos_token_id": _SEP})
    auto = AutoModelForSequenceClassification if model_type in ENCODERS else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = auto.from_config(config)
        with torch.no_grad():
            for parameter in module.parameters():
                if (
                    parameter.dim() == 1
                ):  # biases start at zero and norms at one, which would hide a wrong slice
                    parameter.add_(SPREAD * torch.randn_like(parameter))
    logging.disable_progress_bar()
    module.save_pretrained(folder)
    _tokenizer(encoder=model_type in ENCODERS, segments=model_type == "bert").save_pretrained(
        folder
    )
    return Path(folder)


def _tokenizer(*, encoder: bool, segments: bool) -> PreTrainedTokenizerFast:
    """Letters, digits and a few words, so that each English text has its own token sequence."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]" if encoder else "[CLS] $A",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1" if encoder else "[CLS] $A [SEP] $B",
        special_tokens=[("[CLS]", _CLS), ("[SEP]", _SEP)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]" if encoder else None,
        sep_token="[SEP]" if encoder else None,
        bos_token=None if encoder else "[CLS]",
        eos_token=None if encoder else "[SEP]",
        model_max_length=MAX_TOKENS,
        model_input_names=[
            "input_ids",
            *(["token_type_ids"] if segments else []),
            "attention_mask",
        ],
    )
