"""Conversations as texts, for language modelling: `messages`, or `prompt` and `completion`, become
one text a row.

A message is "role: content", and messages stand one a line. A completion follows its prompt
directly, or after a line break where neither of them has white space there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fedspine.data.parts import FilePart

ALONE = "messages"
TOGETHER = ("prompt", "completion")


def columns(names: Sequence[str]) -> tuple[str, ...]:
    """Those columns of a file that hold conversations, or none.

    >>> columns(["completion", "prompt"])
    ('prompt', 'completion')
    """
    bare = [name.strip() for name in names]
    if bare.count(ALONE) == 1:
        return (ALONE,)
    return TOGETHER if all(bare.count(name) == 1 for name in TOGETHER) else ()


def texts(part: FilePart) -> list[str | None]:
    """One text for each row of the columns that `columns` names; None where there is none."""
    if ALONE in part.columns:
        return [_bare(value) for value in part.columns[ALONE]]
    prompts, completions = (part.columns[name] for name in TOGETHER)
    return [
        _followed(_bare(prompt), _bare(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


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
    return isinstance(message, Mapping)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):  # parts of a message; pictures among them are passed over
        content = "".join(
            str(piece.get("text") or "") for piece in content if isinstance(piece, Mapping)
        )
    return content if isinstance(content, str) else ""


def _followed(prompt: str | None, completion: str | None) -> str | None:
    if not prompt or not completion:
        return prompt or completion
    apart = "" if prompt[-1].isspace() or completion[0].isspace() else "\n"
    return prompt + apart + completion
