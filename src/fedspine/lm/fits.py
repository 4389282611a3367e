"""Checks before a model is used: its tokenizer, its checkpoint and the length of its inputs.

Libraries find out in the middle of a run, or never: `transformers` fills layers that a checkpoint
lacks with random numbers. Each check raises BadInput with the numbers and what to do.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedspine.core.errors import BadInput
from fedspine.core.tensors import finite

# of the norm: about 175 of the 512 rows of stories260k are within 4e-4 of that of its end token,
# the next one is a byte
# that was seen a few times, at 0.012; rows that were trained are about 1 apart
SAME = 0.01
CHUNK = 8192  # rows compared at a time, so that a large output layer is not copied
NAMED = 3  # entries of a tokenizer or layers of a checkpoint that a message lists
# any of them makes a folder one with a tokenizer; slow and fast ones of all known architectures
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab*", "tekken.json", "*.tiktoken")

# of a configuration, whatever the architecture calls them
SIZES = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "hidden_dim", "vocab_size", "max_position_embeddings"),
)


def check_sizes(name: str, config: Any) -> None:
    """Raise BadInput for a configuration of no possible model, of which `transformers` builds an
    empty one, or fails somewhere inside.
    """
    sizes = {size: found for size in SIZES if (found := getattr(config, size, None)) is not None}
    for size, found in sizes.items():
        if found < 1:
            raise BadInput(
                f"config.json of {name} has {size} = {found}, but at least 1 was expected; take "
                "the model's own config.json"
            )
    heads, groups = config.num_attention_heads, sizes.get("num_key_value_heads", 1)
    if heads % groups:
        raise BadInput(
            f"config.json of {name} has num_attention_heads = {heads}, which "
            f"num_key_value_heads = {groups} does not divide; take the model's own config.json"
        )


def check_folder(name: str, source: str) -> None:
    """Raise BadInput for a model folder without a tokenizer; a Hub id passes.

    For some architectures `transformers` makes up a tokenizer of five special tokens.
    """
    folder = Path(source)
    if folder.is_dir() and not any(list(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise BadInput(
            f"{name} has no tokenizer: one of {', '.join(TOKENIZER_FILES)} was expected there; "
            "copy the files of the model's tokenizer into the folder"
        )


def check_tokenizer(name: str, tokenizer: Any, config: Any) -> None:
    """Raise BadInput where a text or its padding can become an id that the embedding has no row
    for.

    An embedding with more rows than the tokenizer has entries is fine: many are rounded up.
    """
    vocabulary = tokenizer.get_vocab()
    if not set(vocabulary.values()) - set(tokenizer.all_special_ids):
        raise BadInput(
            f"the tokenizer of {name} has no entries but "
            f"{len(vocabulary)} special ones; take a complete tokenizer"
        )
    rows = config.vocab_size
    outside = sorted((id, entry) for entry, id in vocabulary.items() if id >= rows)
    if outside:
        which = ", ".join(f"{entry!r} with id {id}" for id, entry in outside[:NAMED])
        raise BadInput(
            f"the embedding of {name} has {rows} rows, too few for {len(outside)} of the "
            f"{len(vocabulary)} entries of its tokenizer "
            f"({which}{', ...' if len(outside) > NAMED else ''}); take the tokenizer that the "
            "model was trained with, or save the model after "
            "resize_token_embeddings(len(tokenizer))"
        )
    if tokenizer.pad_token_id is None:
        raise BadInput(
            f"the tokenizer of {name} has no padding, end or unknown token to fill short rows "
            "with; set its pad_token to one of its entries and save it"
        )


def check_complete(
    name: str, missing: Iterable[str], mismatched: Iterable[Any], trained: Collection[str]
) -> None:
    """Raise BadInput for a checkpoint that lacks weights other than those of the layers `trained`
    from scratch.

    `missing` and `mismatched` are what `from_pretrained` reports: parameter names, and such with
    two shapes.
    """
    wrong = [entry for entry in mismatched if _layer(entry[0]) not in trained]
    if wrong:
        parameter, *shapes = wrong[0]
        sizes = " and not ".join(str(tuple(shape)) for shape in shapes)
        raise BadInput(
            f"{name} has no weights for {len(wrong)} parameters in the sizes of its config.json, "
            f"{parameter} ({sizes}) among them; take config.json and weights of one model"
        )
    lost = sorted(key for key in missing if _layer(key) not in trained)
    if lost:
        raise BadInput(
            f"{name} has no weights for {len(lost)} parameters, {', '.join(lost[:NAMED])} among "
            "them; take a complete checkpoint for this kind of task"
        )


def check_finite(name: str, module: nn.Module) -> None:
    """Raise BadInput for weights that hold a NaN or an infinity, with which no loss is finite at
    any learning rate.
    """
    weights = module.named_parameters()
    broken = [path for path, weight in weights if not finite({path: weight.detach()})]
    if broken:
        raise BadInput(
            f"{name} has weights that are not finite in {len(broken)} parameters, {broken[0]} "
            "among them; the checkpoint is damaged, copy the model again"
        )


def settle_end(tokenizer: Any, module: nn.Module) -> None:
    """Let texts end in the token that begins them where the output layer cannot tell the end token
    from others.

    It is frozen, so a token that pre-training never predicted has a row as good as equal to those
    of all other such tokens, and no adapter can prefer it. Models of llama2.c are such: `</s>` is
    unused, `<s>` stands between texts.
    """
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    if end is None or begin in (None, end):
        return
    rows = module.get_output_embeddings().weight.detach()
    if _has_equal_row(rows, end) and not _has_equal_row(rows, begin):
        tokenizer.eos_token = tokenizer.bos_token
        module.config.eos_token_id = begin
        module.generation_config.eos_token_id = begin


def _has_equal_row(rows: Float[Tensor, "entries width"], one: int) -> bool:
    """Whether another entry's row is equal up to `SAME` of its norm."""
    near = SAME * rows[one].float().norm()
    parts = [(part.float() - rows[one].float()).norm(dim=1) <= near for part in rows.split(CHUNK)]
    return int(torch.cat(parts).sum()) > 1


def longest_input(config: Any, tokenizer: Any) -> int:
    """Tokens of the longest row that the model can read."""
    return min(positions(config), tokenizer.model_max_length)


def check_lengths(
    name: str, config: Any, longest: int, max_tokens: int, answer_tokens: int
) -> None:
    """Raise BadInput for rows longer than the `longest` that the model `name` reads, and for
    answers (0: none) that do not fit its positions after a prompt.
    """
    if max_tokens > longest:
        raise BadInput(
            f"task.max_tokens is {max_tokens}, but {name} reads at most {longest}; lower it"
        )
    room = positions(config) - max_tokens
    if answer_tokens > room:
        raise BadInput(
            f"run.answer_tokens is {answer_tokens}, but {name} has {positions(config)} positions, "
            f"{room} after a prompt of task.max_tokens = {max_tokens}; lower one of them"
        )


def positions(config: Any) -> int:
    """Tokens for which the model has positions."""
    count = config.max_position_embeddings
    # RoBERTa counts positions from the one after its padding id on
    return count - (config.pad_token_id + 1) if "roberta" in config.model_type else count


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]
