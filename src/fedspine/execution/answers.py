"""Models' answers to the prompts of test rows, compared with the reference answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedspine.core.message import pack
from fedspine.core.task import Examples, Task
from fedspine.data.dataset import ANSWERS, Dialogue
from fedspine.execution.workers import AnswerJob, Workers
from fedspine.lm.answer_scores import exact_match, rouge_l
from fedspine.lm.base import Model
from fedspine.lm.decoding import Decoding, ends_of
from fedspine.lm.dialogues import end_of_answers, prompt_ids


@dataclass(frozen=True)
class Question:
    """The first prompt of a dialogue, its tokens, and the answer that the data gives."""

    prompt: str
    ids: tuple[int, ...]
    reference: str


@dataclass(frozen=True)
class Answers:
    """One model's answers to all questions, the share of exact matches, and the mean ROUGE-L."""

    texts: tuple[str, ...]
    exact_match: float
    rouge_l: float


def questions_of(
    test: Examples, dialogues: Sequence[Dialogue], rows: np.ndarray, tokenizer: Any
) -> list[Question]:
    """The first question of each of these rows of the encoded test set, tokenised as the model
    gets it.
    """
    found = []
    for row in rows:
        begin, end = test.offsets[row], test.offsets[row + 1]
        prompt = int(np.argmax(test.counted[begin:end]))  # tokens before the first that is learnt
        messages = dialogues[test.sources[row]].messages
        ids = test.ids[begin : begin + prompt].tolist()
        answers = [place for place, (role, _) in enumerate(messages) if role == ANSWERS]
        # a dialogue may fill several rows, each of which begins with a later answer
        asked = (place for place in answers if prompt_ids(tokenizer, messages[:place]) == ids)
        place = next(asked, answers[0])
        found.append(Question(messages[place - 1][1], tuple(ids), messages[place][1]))
    return found


def answers_of(
    models: Mapping[str, Model],
    questions: Sequence[Question],
    task: Task,
    tokenizer: Any,
    workers: Workers,
    decoding: Decoding,
) -> dict[str, Answers]:
    """Each model's answers; equal models answer once."""
    settings = task.base.skeleton.generation_config
    ends = ends_of(tokenizer, settings, end_of_answers(tokenizer))
    packed = {name: pack(model) for name, model in models.items()}
    different = {each.sha256: each.payload for each in packed.values()}
    jobs = [
        AnswerJob(
            model=payload,
            prompts=tuple(question.ids for question in questions),
            decoding=decoding,
            ends=tuple(ends),
            padding=tokenizer.pad_token_id,
        )
        for payload in different.values()
    ]
    by_digest = {
        sha256: _marked(tokenizer.batch_decode(ids, skip_special_tokens=True), questions)
        for sha256, ids in zip(different, workers.run(jobs), strict=True)
    }
    return {name: by_digest[each.sha256] for name, each in packed.items()}


def _marked(texts: Sequence[str], questions: Sequence[Question]) -> Answers:
    pairs = list(zip(texts, (question.reference for question in questions), strict=True))
    return Answers(
        texts=tuple(text.strip() for text in texts),
        exact_match=float(np.mean([exact_match(*pair) for pair in pairs])),
        rouge_l=float(np.mean([rouge_l(*pair) for pair in pairs])),
    )
