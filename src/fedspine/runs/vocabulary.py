"""Vocabulary reduction before the first round: tokens are counted on the fleet or in a public text,
and the base and its tokenizer are cut to those that are kept.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fedspine.core.draws import SeededDraws
from fedspine.core.errors import BadInput, one_line
from fedspine.core.fleet import EarlyExchange
from fedspine.core.message import pack
from fedspine.core.task import Task
from fedspine.data.dataset import Dataset, Rows
from fedspine.fleets.hardware import device_ids, fleet_mix
from fedspine.lm import vocabulary
from fedspine.lm.cut_tokenizer import special_ids
from fedspine.lm.dialogues import text_of
from fedspine.lm.token_counts import (
    CountTokens,
    floor_of,
    open_counts,
    private_counts,
    summed,
)
from fedspine.lm.vocabulary import Vocabulary, VocabularyCut
from fedspine.runs.config import Recipe
from fedspine.runs.sections import FLEET, VocabularySection

COUNTING = 106  # the purpose of the stream of the counts' noise, apart from a device's others
TEXTS = 2000  # test texts on which the two tokenizers are compared
CHUNK = 1000  # lines that are tokenised at a time
COUNT = 4  # bytes of a count
WORK = "count_tokens"  # as records name it


def reduced(
    recipe: Recipe, data: Dataset, task: Task, tokenizer: Any, shares: Sequence[np.ndarray]
) -> tuple[Any, Vocabulary]:
    """Cut the task's base in place, as `task.vocabulary` says; returns the cut tokenizer, and what
    was kept. `shares` are each device's rows of `task.train`.

    Raises BadInput for a text that cannot be read, and where tokens would go that have to stay.
    """
    section, base = recipe.task.vocabulary, task.base
    assert section is not None
    exchanges: tuple[EarlyExchange, ...] = ()
    if section.texts == FLEET:
        counts, exchanges = _of_fleet(recipe, section, task, tokenizer, shares)
    else:
        counts = _of_text(Path(section.texts), tokenizer, base.config.vocab_size)
    kept = vocabulary.choose(counts, tokenizer, base, coverage=section.coverage, most=section.size)
    whole, bytes_before = base.config.vocab_size, base.token_bytes
    after = vocabulary.cut(base, tokenizer, kept)
    about = VocabularyCut(
        kept=len(kept),
        whole=whole,
        same=_same(tokenizer, after, kept, _texts(data.test, tokenizer)),
        bytes_saved=bytes_before - base.token_bytes,
    )
    return after, Vocabulary(kept, about, exchanges)


def vocabulary_line(recipe: Recipe, found: Vocabulary) -> str:
    """A line on what was kept, and by what it was counted."""
    section = recipe.task.vocabulary
    assert section is not None
    if section.texts != FLEET:
        return f"vocabulary: {found.about.line}; counted in {section.texts}"
    if (epsilon := section.epsilon_of_texts) is None:
        return f"vocabulary: {found.about.line}; counted by devices without noise"
    order = CountTokens(tokens=found.about.whole, clip=section.clip, epsilon=epsilon)
    return (
        f"vocabulary: {found.about.line}; counted by devices with epsilon {epsilon:g} for each "
        f"text, so that a token needs {floor_of(len(found.exchanges), order)} counts to be kept"
    )


# --- counting ---


def _of_fleet(
    recipe: Recipe,
    section: VocabularySection,
    task: Task,
    tokenizer: Any,
    shares: Sequence[np.ndarray],
) -> tuple[np.ndarray, tuple[EarlyExchange, ...]]:
    """What all devices counted, and what the exchange costs each of them."""
    order = CountTokens(
        tokens=task.base.config.vocab_size, clip=section.clip, epsilon=section.epsilon_of_texts
    )
    special = special_ids(tokenizer)
    bytes_down, replies, exchanges = pack(order).bytes, [], []
    ids = device_ids(fleet_mix(recipe.fleet.mix, recipe.fleet.devices))
    for index, (device, rows) in enumerate(zip(ids, shares, strict=True)):
        held = task.train.take(rows)
        draws = SeededDraws((recipe.run.seed, index, COUNTING))
        replies.append(private_counts(held, special, order, draws))
        exchanges.append(
            EarlyExchange(
                device=device,
                work=WORK,
                bytes_down=bytes_down,
                bytes_up=pack(replies[-1]).bytes,
                flops=float(len(held.ids) + order.tokens),  # an addition for each token, and noise
                peak_memory_bytes=COUNT * (len(held.ids) + order.tokens),
            )
        )
    return summed(replies, order), tuple(exchanges)


def _of_text(path: Path, tokenizer: Any, tokens: int) -> np.ndarray:
    """The tokens of a public text, each line of which is tokenised for itself."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = one_line(error)
        raise BadInput(
            f"task.vocabulary.texts is {str(path)!r}, which cannot be read as a UTF-8 text "
            f'({reason}); name a text file, or "{FLEET}"'
        ) from None
    counts = np.zeros(tokens, np.int64)
    for start in range(0, len(lines), CHUNK):
        part = lines[start : start + CHUNK]
        counts += open_counts(_ids(tokenizer, part)["input_ids"], tokens)
    if not counts.any():
        raise BadInput(
            f"task.vocabulary.texts is {str(path)!r}, which contains no text; name a text file "
            "that resembles the data"
        )
    return counts


# --- what the cut tokenizer leaves as it was ---


def _texts(rows: Rows, tokenizer: Any) -> list[str]:
    if rows.dialogues is not None:
        return [text_of(tokenizer, dialogue) for dialogue in rows.dialogues[:TEXTS]]
    return list(chain(rows.texts[:TEXTS], (rows.pairs or ())[:TEXTS]))


def _same(before: Any, after: Any, kept: Sequence[int], texts: list[str]) -> float:
    """The share of the tokens of `before` that `after` cuts at the same place of a text."""
    same = total = 0
    for start in range(0, len(texts), CHUNK):
        part = texts[start : start + CHUNK]
        old, new = (_ids(each, part, return_offsets_mapping=True) for each in (before, after))
        for row in range(len(part)):
            had = Counter(zip(old["offset_mapping"][row], old["input_ids"][row], strict=True))
            ids = (kept[id] for id in new["input_ids"][row])
            has = Counter(zip(new["offset_mapping"][row], ids, strict=True))
            same, total = same + (had & has).total(), total + had.total()
    return same / total if total else 1.0


def _ids(tokenizer: Any, texts: list[str], **options: Any) -> Any:
    return tokenizer(texts, add_special_tokens=False, verbose=False, **options)
