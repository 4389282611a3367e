"""The answers at the end of a run: of the untuned base, the tuned one, and the pruned model."""

from dataclasses import asdict
from typing import Any

from fedspine.execution.answers import answers_of, questions_of
from fedspine.execution.workers import Workers
from fedspine.lm.base import Model
from fedspine.lm.decoding import Decoding
from fedspine.lm.structure import full, is_full
from fedspine.runs.assemble import Assembled, test_order
from fedspine.storage.records import Records


def answers_at_end(
    assembled: Assembled, workers: Workers, state: Any, records: Records
) -> dict[str, Any]:
    """What goes into the summary: scores of each model's answers to the first `run.answers` of the
    shuffled test rows; the answers themselves go into the records.

    Nothing where no row has an answer, or none was wanted.
    """
    recipe, task = assembled.recipe, assembled.task
    if not recipe.run.answers or assembled.dialogues is None:
        return {}
    rows = test_order(assembled)[: recipe.run.answers]
    questions = questions_of(task.test, assembled.dialogues, rows, assembled.tokenizer)
    decoding = Decoding(recipe.run.answer_tokens, recipe.run.temperature, recipe.run.seed)
    found = answers_of(
        _models(assembled, state), questions, task, assembled.tokenizer, workers, decoding
    )
    for place, question in enumerate(questions):
        records.write(
            "answer",
            prompt=question.prompt,
            reference=question.reference,
            answers={name: answers.texts[place] for name, answers in found.items()},
        )
    scores = {name: asdict(answers) for name, answers in found.items()}
    for each in scores.values():
        del each["texts"]
    return {"answers": len(questions), "answer_scores": scores}


def _models(assembled: Assembled, state: Any) -> dict[str, Model]:
    """By their names in a report; the pruned one where the global model is pruned."""
    method, layout = assembled.recipe.method, assembled.task.base.layout
    models = {
        "untuned": Model(structure=full(layout), adapter={}, head={}, scale=1.0),
        "unpruned": method.unpruned(state),
    }
    common = method.deploy(state)
    return models if is_full(common.structure) else models | {"pruned": common}
