"""Conversations in columns, for language modelling: `messages`, or a prompt and an answer.

A dialogue keeps its messages separate, so that only its answers are learnt. As one text, a message
is "role: content", one per line; an answer follows its prompt directly, or after a line break if
there is no white space between them.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from fedspine.core.errors import BadInput
from fedspine.data.dataset import ANSWERS, Dialogue
from fedspine.data.parts import FilePart, shown

MESSAGES = "messages"
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "answer"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("question", "answer"),
)
CONTEXTS = {  # of a prompt, where there is one
    "instruction": ("context", "input"),
    "question": ("context",),
}
PROMPTS = "user"  # the role of a prompt
NO_PROMPT, NO_ANSWER = "no prompt", "no answer"  # why a row is left out


def columns(names: Sequence[str]) -> tuple[str, ...]:
    """The columns of a file that hold conversations; empty if there are none.

    >>> columns(["completion", "prompt"])
    ('prompt', 'completion')
    >>> columns(["instruction", "context", "response", "category"])
    ('instruction', 'response', 'context')
    >>> columns(["instruction", "input", "output"])
    ('instruction', 'output', 'input')
    """
    bare = [name.strip() for name in names]
    once = {name for name in bare if bare.count(name) == 1}
    if MESSAGES in once:
        return (MESSAGES,)
    pair = next((pair for pair in PAIRS if once.issuperset(pair)), None)
    if pair is None:
        return ()
    contexts = (name for name in CONTEXTS.get(pair[0], ()) if name in once)
    return (*pair, *islice(contexts, 1))


def texts(part: FilePart) -> list[str | None]:
    """One text for each row of the columns that `columns` names; None for a row without one."""
    if MESSAGES in part.columns:
        return [_bare(value) for value in part.columns[MESSAGES]]
    return [
        _followed(_bare(prompt) if context is None else _asked(prompt, context), _bare(answer))
        for prompt, answer, context in _in_pairs(part)
    ]


def dialogues(part: FilePart, text: str, split: str) -> list[Dialogue | str] | None:
    """The dialogue of each row, up to its last answer, or why it is left out.

    They are in the column `text`, or in those that `columns` names; None if that column holds plain
    texts. Raises BadInput for an empty row.
    """
    if text in part.columns:
        values = part.columns[text]
        if not any(isinstance(value, list) for value in values) or not are_messages(values):
            return None
        said = [_messages(value, PROMPTS) for value in values]
    elif MESSAGES in part.columns:
        said = [_messages(value, PROMPTS) for value in part.columns[MESSAGES]]
    else:
        said = [
            (
                *_messages(prompt if context is None else _asked(prompt, context), PROMPTS),
                *_messages(answer, ANSWERS),
            )
            for prompt, answer, context in _in_pairs(part)
        ]
    return [
        _dialogue(messages, f"row {row} of the {split} set")
        for row, messages in enumerate(said, start=1)
    ]


def roles(part: FilePart, text: str) -> list[str]:
    """All roles of the messages, once each; none for plain texts."""
    return list(dict.fromkeys(str(one["role"]) for one in _all(part, text) if one.get("role")))


def unread(part: FilePart, text: str) -> int:
    """The number of messages without a text, such as calls of tools, which no dialogue keeps."""
    return sum(not _content(one).strip() for one in _all(part, text))


def _all(part: FilePart, text: str) -> Iterator[Mapping[str, Any]]:
    """All messages of the columns that hold lists of them."""
    for name in (text,) if text in part.columns else columns(list(part.columns)):
        for value in part.columns[name]:
            if isinstance(value, list):
                yield from value


def refuse_others(part: FilePart, split: str) -> None:
    """Raise BadInput for a value of the columns that `columns` names that is no conversation."""
    for name in columns(list(part.columns)):
        for row, value in enumerate(part.columns[name], start=1):
            plain = isinstance(value, str | int | float | None)
            if not plain and not (isinstance(value, list) and all(map(_is_one, value))):
                raise BadInput(
                    f"expected a text or a list of messages in column {name!r}, row {row} of the "
                    f'{split} set, found {shown(value)}; write a message as {{"role": "user", '
                    '"content": "..."}'
                )


def _in_pairs(part: FilePart) -> list[tuple[Any, Any, Any]]:
    """Prompt, answer and context of each row; the context may be None."""
    prompt, answer, *context = columns(list(part.columns))
    contexts = part.columns[context[0]] if context else [None] * part.rows
    return list(zip(part.columns[prompt], part.columns[answer], contexts, strict=True))


def _asked(instruction: Any, context: Any) -> str | None:
    """An instruction with its context."""
    return "\n\n".join(filter(None, (_bare(instruction), _bare(context)))) or None


def _messages(value: Any, role: str) -> tuple[tuple[str, str], ...]:
    """Roles and contents of a cell: its messages, or its text as one of this role."""
    if isinstance(value, list):
        said = [(str(message.get("role") or role), _content(message)) for message in value]
        return tuple((of, content) for of, content in said if content.strip())
    text = _bare(value)
    return () if text is None else ((role, text),)


def _dialogue(messages: tuple[tuple[str, str], ...], where: str) -> Dialogue | str:
    if not messages:
        raise BadInput(
            f"expected a prompt and an answer in {where}, found both empty; fill them in, or "
            "remove the row"
        )
    answers = [place for place, (role, _) in enumerate(messages) if role == ANSWERS]
    if not answers:
        return NO_ANSWER
    if answers[0] == 0:
        return NO_PROMPT
    return Dialogue(messages[: answers[-1] + 1], where)


def are_messages(values: Sequence[Any]) -> bool:
    """Whether every value is a list of messages, or missing."""
    return all(
        value is None or (isinstance(value, list) and _are_messages(value)) for value in values
    )


def of_messages(values: Sequence[Any]) -> list[str | None]:
    """The text of each list of messages."""
    return [_bare(value) for value in values]


def _are_messages(value: list[Any]) -> bool:
    return all(isinstance(message, Mapping) and "content" in message for message in value)


def _bare(value: Any) -> str | None:
    """A text as it is, messages as one text; None for an empty value."""
    if isinstance(value, list):
        said = [(message.get("role"), _content(message)) for message in value if _is_one(message)]
        value = "\n".join(f"{role}: {text}" if role else text for role, text in said if text)
    elif isinstance(value, int | float) and value == value:
        value = str(value)
    return value if isinstance(value, str) and value.strip() else None


def _is_one(message: Any) -> bool:
    return isinstance(message, Mapping) and not {"role", "content"}.isdisjoint(message)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):  # parts of a message, of which images are skipped
        content = "".join(
            str(piece.get("text") or "") for piece in content if isinstance(piece, Mapping)
        )
    return content if isinstance(content, str) else _bare(content) or ""


def _followed(prompt: str | None, completion: str | None) -> str | None:
    if not prompt or not completion:
        return prompt or completion
    apart = "" if prompt[-1].isspace() or completion[0].isspace() else "\n"
    return prompt + apart + completion
