"""A base with a reduced vocabulary: which tokens are kept, and the embeddings cut to them.

Rows of the token embedding, and of an output layer, are sliced to the kept ids and renumbered with
the tokenizer's (`lm.cut_tokenizer`). The frozen weights of the blocks stay as they are.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from jaxtyping import Int

from fedspine.core.errors import BadInput, reason_of
from fedspine.core.fleet import EarlyExchange
from fedspine.lm.base import Base
from fedspine.lm.cut_tokenizer import Definition, cut_tokenizer, special_ids, token_ids

FILE = "vocabulary.json"  # beside a run's configuration and tokenizer
FORMAT = 1


@dataclass(frozen=True)
class VocabularyCut:
    """What is left of a model's vocabulary, as a model card says it."""

    kept: int  # tokens
    whole: int  # rows of the embedding before
    same: float  # share of the test texts' tokens that the cut tokenizer leaves as they were
    bytes_saved: int  # of fp32 weights

    @property
    def line(self) -> str:
        return (
            f"{self.kept:,} of {self.whole:,} tokens kept, {self.bytes_saved:,} bytes saved in "
            f"fp32; {self.same:.2%} of the test texts' tokens are the same as before"
        )


@dataclass(frozen=True)
class Vocabulary:
    """The kept tokens of a run, by which its base and tokenizer are cut."""

    kept: tuple[int, ...]  # ids of the whole tokenizer, ascending; a token's new id is its place
    about: VocabularyCut
    exchanges: tuple[EarlyExchange, ...] = ()  # of devices that counted; none for a public text
    format: int = FORMAT


def required(tokenizer: Any, base: Base) -> set[int]:
    """The ids that a vocabulary has to keep: see `Definition.required`; besides, those that the
    model's configuration names.
    """
    named = special_ids(tokenizer, base.config, *_generation_configs(base))
    found = Definition.of(tokenizer).required() | named
    if "roberta" in base.config.model_type:
        # it counts positions from its padding id on, which so must not move
        found |= set(range(base.config.pad_token_id + 1))
    return found


def choose(
    counts: Int[np.ndarray, " tokens"],
    tokenizer: Any,
    base: Base,
    *,
    coverage: float,
    most: int | None,
) -> tuple[int, ...]:
    """The ids to keep, ascending: what is required, and the commonest of those counted, with all
    that they are made of, up to this share of all counts and to so many tokens (None: any number).

    Tokens of equal counts are taken in the order of their ids. Raises BadInput where `most` leaves
    no room for what is required.
    """
    kept, definition = required(tokenizer, base), Definition.of(tokenizer)
    if most is not None and most < len(kept):
        raise BadInput(
            f"task.vocabulary.size is {most}, which would drop special tokens: {len(kept)} special "
            f"tokens and single characters have to stay; give at least {len(kept)}"
        )
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    falling = counts[order].astype(np.float64)
    # a share of 1 is all of them, which rounding must not change
    wanted = np.inf if coverage == 1 else coverage * falling.sum()
    before = np.concatenate([[0.0], np.cumsum(falling)[:-1]])
    for id in order[before < wanted].tolist():
        grown = kept | definition.with_parts(id)
        if most is not None and len(grown) > most:
            break
        kept = grown
    return tuple(sorted(kept))


def cut(base: Base, tokenizer: Any, kept: Sequence[int]) -> Any:
    """Cut the base to the kept tokens, in place; returns the tokenizer cut to them.

    Raises BadInput where something is missing that has to stay.
    """
    if missing := sorted(required(tokenizer, base) - set(kept)):
        raise BadInput(
            f"the vocabulary would drop {len(missing)} special tokens and single characters, the "
            f"first with id {missing[0]}, which have to stay; keep them"
        )
    found = cut_tokenizer(tokenizer, kept)
    keep_rows(base, kept)
    return found


def keep_rows(base: Base, kept: Sequence[int]) -> None:
    """Slice the base's embeddings to these ids, ascending, and renumber what its configuration
    names.
    """
    base.keep_tokens(torch.tensor(kept))
    places = {id: place for place, id in enumerate(kept)}
    for settings in (base.config, *_generation_configs(base)):
        _renumber_tokens(settings, places)


def whole_config(config: Any, vocabulary: Vocabulary) -> None:
    """Let the configuration of a cut base, as a run keeps it, fit the whole base's weights."""
    config.vocab_size = vocabulary.about.whole
    _renumber_tokens(config, dict(enumerate(vocabulary.kept)))


def read(folder: Path | None) -> Vocabulary | None:
    """The vocabulary in a folder with a run's configuration and tokenizer; None where there is
    none, so that the whole one is meant.
    """
    if folder is None or not (folder / FILE).is_file():
        return None
    path = folder / FILE
    try:
        payload = path.read_bytes()
        return pydantic.TypeAdapter(Vocabulary).validate_json(payload, strict=True)
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise BadInput(
            f"{path} is damaged ({reason}); restore it from a copy, or start a new run"
        ) from None


def cut_in(folder: Path) -> VocabularyCut | None:
    """What such a folder says is left of the model's vocabulary; None: all."""
    found = read(folder)
    return None if found is None else found.about


def write(folder: Path, vocabulary: Vocabulary) -> None:
    (folder / FILE).write_text(json.dumps(asdict(vocabulary)), encoding="utf-8")


def _generation_configs(base: Base) -> list[Any]:
    """How texts are generated, which names tokens too; of language models only."""
    return [base.skeleton.generation_config] if base.pooling is None else []


def _renumber_tokens(settings: Any, places: dict[int, int]) -> None:
    for key, ids in list(token_ids(settings)):
        new = [places[id] for id in ids if id in places]
        many = isinstance(getattr(settings, key), list)
        setattr(settings, key, new if many else next(iter(new), None))
