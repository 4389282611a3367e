"""The terms of a run, which a server sends before the first round, and a site's refusal.

The terms name no path on a site. A refusal reveals at most a term of the site's file: file names,
values and paths stay in its log.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Literal, TypeAlias

import pydantic

from fedspine.core.errors import BadInput
from fedspine.core.message import message
from fedspine.core.privacy import Privacy
from fedspine.core.reads import Reads
from fedspine.core.strict import validated
from fedspine.core.task import BUILT_IN_MODELS, Pooling, TaskKind, row_tokens

MOST_CLASSES = 10_000
RefusalReason: TypeAlias = Literal[
    "terms", "model", "task", "method", "data", "rows", "content",
    "split", "labels", "limits", "order", "weights", "rate", "disk", "privacy",
]  # fmt: skip
REFUSALS: dict[RefusalReason, str] = {
    "terms": "the terms of the run cannot be read; the server may run another version",
    "model": "it does not allow this model, or cannot load it; its own log says why",
    "task": "it does not allow this kind of task",
    "method": "it does not allow this method",
    "data": "its data does not fit the task; its own log says why",
    "rows": "it has fewer rows than it answers about",
    "content": (
        "its copy of the model has other content; all must hold "
        "the same model and the same versions of libraries"
    ),
    "split": "it lets features of rows leave only in the split methods that its file names",
    "labels": (
        "labels of a language model are texts and stay; "
        "method.labels_stay of mergesfl-plus keeps them"
    ),
    "limits": "it allows less than was asked",
    "order": "the order asks for what the terms of the run do not say",
    "weights": "weights in the order are not of the run's model, or of a larger rank than allowed",
    "rate": "it got more orders within a minute than it accepts",
    "disk": "its disk quota is used up; its owner can raise limits.disk_bytes",
    "privacy": "it demands more privacy than the run promises, or lacks the accountant for it",
}


class Refused(BadInput):
    """A site refuses a run or an order. The message is for the site's log; the server gets only
    `detail`, one line that reveals at most a term of the site's file.
    """

    def __init__(self, line: str, reason: RefusalReason, detail: str | None = None) -> None:
        super().__init__(line)
        self.reason = reason
        self.detail = REFUSALS[reason] if detail is None else detail


@contextmanager
def refusing(reason: RefusalReason) -> Iterator[None]:
    """Turn BadInput into a refusal for this reason."""
    try:
        yield
    except Refused:
        raise
    except BadInput as error:
        raise Refused(str(error), reason) from None


@message
@pydantic.with_config(pydantic.ConfigDict(strict=True, revalidate_instances="always"))
class RunTerms:
    """Everything that a site needs in order to join a run."""

    method: str
    kind: TaskKind
    model: str  # as sites know it: see `model_name`
    model_sha256: str  # `content_sha256` of the server's
    layers: int | None  # only the first blocks of the model; None: all
    precision: Literal["bf16", "fp32"]
    pooling: Pooling | Literal["auto"]  # the classifier's readout
    max_tokens: int
    label_names: tuple[str, ...]  # in the order of their numbers; empty for language modelling
    foretold: Reads | None = None  # the method's `predicted_reads`, if it has any; not binding
    privacy: Privacy | None = None  # what is promised to each site
    # what is learnt of rows with prompts and answers
    loss_on: Literal["answers", "texts"] = "answers"

    @property
    def row_tokens(self) -> int:
        """The most tokens of a row; for pairs, pooling "auto" counts as a bi-encoder."""
        auto_pair = self.pooling == "auto" and self.kind == "pair"
        return row_tokens("bi-encoder" if auto_pair else self.pooling, self.max_tokens)

    def check(self) -> None:
        """Raise BadInput for invalid values."""
        validated("terms", RunTerms, self)
        if (self.kind == "causal-lm") != (not self.label_names) or len(set(self.label_names)) < len(
            self.label_names
        ):
            raise BadInput(
                f"terms.label_names are {self.label_names!r}: distinct "
                "names were expected for classes, none for causal-lm"
            )
        if len(self.label_names) > MOST_CLASSES:
            raise BadInput(
                f"terms.label_names are {len(self.label_names)}: "
                f"at most {MOST_CLASSES} were expected"
            )
        if self.privacy is not None:
            _check_privacy(self.privacy)
        if self.max_tokens < 4:
            raise BadInput(f"terms.max_tokens is {self.max_tokens}: at least 4 were expected")


def _check_privacy(privacy: Privacy) -> None:
    """Raise BadInput for invalid numbers."""
    epsilon, delta, clip = privacy.epsilon, privacy.delta, privacy.clip
    sound = (epsilon is None or 0 < epsilon < inf) and 0 < delta < 1 and 0 < clip < inf
    if not sound or not 1 <= privacy.answers < 2**31:
        raise BadInput(
            f"terms.privacy has epsilon {epsilon}, delta {delta}, clip {clip} and "
            f"{privacy.answers} answers: positive numbers and a delta below 1 were expected"
        )


def model_name(name: str) -> str:
    """The name by which sites list a recipe's model: a Hub id or built-in name as it is, or a
    folder's last part.

    >>> model_name("BAAI/bge-small-en"), model_name("/srv/models/bge-small")
    ('BAAI/bge-small-en', 'bge-small')
    """
    return (
        name
        if name in BUILT_IN_MODELS or not Path(name).expanduser().is_absolute()
        else Path(name).name
    )
