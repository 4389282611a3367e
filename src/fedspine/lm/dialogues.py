"""Dialogues as tokens, of which the answers alone are learnt.

A dialogue is written as the model's chat template writes it. What comes before an answer is what
the model will be given when it is asked: the template with its generation prompt. So a row is
trained on as it is used, whether or not the template writes the same before an answer that it
knows. The answer and the token that ends it count in the loss; the prompt does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedspine.core.errors import BadInput, reason_of
from fedspine.core.task import Examples
from fedspine.data.dataset import ANSWERS, Dialogue

# for a tokenizer without a template: each message a line, each answer up to the end token
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% elif not message['content'][-1:].isspace() %}{{ '\\n' }}{% endif %}{% endfor %}"
)
MARK = "@answer@"  # stands for an answer, to see what a template writes around it
Messages = Sequence[tuple[str, str]]  # roles and contents


def template_of(tokenizer: Any) -> Any:
    """The tokenizer's chat template, `PLAIN` where it has none."""
    return getattr(tokenizer, "chat_template", None) or PLAIN


def settle_template(tokenizer: Any) -> None:
    """Give a tokenizer without a chat template the plain one, so that what is exported says how it
    was trained.
    """
    tokenizer.chat_template = template_of(tokenizer)


def encode_dialogues(tokenizer: Any, dialogues: Sequence[Dialogue], max_tokens: int) -> Examples:
    """Tokenise dialogues, one row for each, or for each answer where a template writes answers
    otherwise once others follow them; a row is cut at `max_tokens`.

    A prompt that leaves no room for its answer is left out: its dialogue may be missing from
    `Examples.sources`. Raises BadInput for a template that fails on a dialogue, and where no prompt
    leaves room.
    """
    settle_template(tokenizer)
    turns = [list(_turns(tokenizer, dialogue)) for dialogue in dialogues]
    flat = [turn for of_one in turns for turn in of_one]
    prompts = _ids(tokenizer, [turn.prompt for turn in flat])
    wholes = _ids(tokenizer, [turn.prompt + turn.answer for turn in flat])
    _check_prompts(
        prompts, [one.where for one, of in zip(dialogues, turns, strict=True) for _ in of]
    )
    rows, counted, sources, place = [], [], [], 0
    for source, of_one in enumerate(turns):
        coded: list[tuple[list[int], list[bool]]] = []
        for turn in of_one:
            _append(coded, *_coded(tokenizer, turn, prompts[place], wholes[place]))
            place += 1
        for ids, learnt in coded:
            if any(learnt[:max_tokens]):
                rows.append(ids[:max_tokens])
                counted.append(learnt[:max_tokens])
                sources.append(source)
    if not rows:
        raise BadInput(
            f"no prompt leaves room for an answer within task.max_tokens = {max_tokens}; raise it"
        )
    lengths = [len(row) for row in rows]
    return Examples(
        ids=np.concatenate([np.array(row, np.int32) for row in rows]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=None,
        segments=None,
        padding=tokenizer.pad_token_id,
        sources=np.array(sources, np.int64),
        counted=np.concatenate([np.array(row, bool) for row in counted]),
    )


def text_of(tokenizer: Any, dialogue: Dialogue) -> str:
    """The whole dialogue as the chat template writes it."""
    settle_template(tokenizer)
    return _rendered(tokenizer, dialogue.messages, dialogue.where)


def prompt_ids(tokenizer: Any, messages: Messages, where: str = "the dialogue") -> list[int]:
    """The tokens that ask for the next answer, as they come before it in training."""
    settle_template(tokenizer)
    found = _ids(tokenizer, [_rendered(tokenizer, messages, where, asks=True)])
    _check_prompts(found, [where])
    return found[0]


def _check_prompts(prompts: Sequence[Sequence[int]], places: Sequence[str]) -> None:
    """Raise BadInput for a prompt without a token, to which no model can answer."""
    for ids, where in zip(prompts, places, strict=True):
        if not ids:
            raise BadInput(
                f"the chat template writes nothing before the answer of {where}, or no token that "
                "the tokenizer knows; correct the row or the template"
            )


def end_of_answers(tokenizer: Any) -> int | None:
    """The token that the chat template writes after an answer; None where answers have no end."""
    settle_template(tokenizer)
    (turn,) = _turns(tokenizer, Dialogue((("user", MARK), (ANSWERS, MARK)), "a dialogue"))
    return turn.end


@dataclass(frozen=True)
class _Turn:
    """An answer with all that comes before it, and the token that ends it."""

    prompt: str
    answer: str
    end: int | None


def _turns(tokenizer: Any, dialogue: Dialogue) -> list[_Turn]:
    """One for each answer of the dialogue."""
    messages = dialogue.messages
    return [
        _turn(tokenizer, messages[:place], messages[place][1], dialogue.where)
        for place, (role, _) in enumerate(messages)
        if role == ANSWERS
    ]


def _turn(tokenizer: Any, before: Messages, answer: str, where: str) -> _Turn:
    marked = _rendered(tokenizer, [*before, (ANSWERS, MARK)], where)
    head, found, tail = marked.rpartition(MARK)
    if not found:
        raise BadInput(
            f"the chat template leaves the answer of {where} out; give the model's tokenizer a "
            "template for dialogues"
        )
    whole = _rendered(tokenizer, [*before, (ANSWERS, answer)], where)
    known = whole.startswith(head) and whole.endswith(tail)
    return _Turn(
        prompt=_rendered(tokenizer, before, where, asks=True),
        # as the template writes it, which may strip it
        answer=whole[len(head) : len(whole) - len(tail)] if known else answer.strip(),
        end=_end_token(tokenizer, tail),
    )


def _rendered(tokenizer: Any, messages: Messages, where: str, *, asks: bool = False) -> str:
    said = [{"role": role, "content": content} for role, content in messages]
    try:
        return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=asks)
    except Exception as error:  # templates are programs, and raise what they like
        reason = reason_of(error)
        raise BadInput(
            f"the model's chat template fails on {where} ({type(error).__name__}: {reason}); "
            "correct the row or the template"
        ) from None


def _end_token(tokenizer: Any, tail: str) -> int | None:
    """The first token of what a template writes after an answer if it is a special one, else the
    tokenizer's end token.
    """
    ids = _ids(tokenizer, [tail])[0] if tail else []
    special = set(tokenizer.all_special_ids) | {
        id for id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return ids[0] if ids and ids[0] in special else tokenizer.eos_token_id


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # a template writes special tokens itself
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _coded(
    tokenizer: Any, turn: _Turn, prompt: list[int], whole: list[int]
) -> tuple[list[int], list[bool]]:
    """Tokens of a prompt with its answer and end, and which of them are learnt.

    The prompt has the tokens that it has alone, as when the model is asked, even where a token
    could span the border.
    """
    if whole[: len(prompt)] != prompt:
        whole = prompt + _ids(tokenizer, [turn.answer])[0]
    ids = whole if turn.end is None else [*whole, turn.end]
    learnt = [place >= max(1, len(prompt)) for place in range(len(ids))]  # never the first of all
    return ids, learnt


def _append(coded: list[tuple[list[int], list[bool]]], ids: list[int], learnt: list[bool]) -> None:
    """Add an answer to the rows of its dialogue: to the row of the one before where it goes on
    from there.
    """
    if coded and ids[: len(coded[-1][0])] == coded[-1][0]:
        before, counted = coded.pop()
        learnt = counted + learnt[len(before) :]
    coded.append((ids, learnt))
