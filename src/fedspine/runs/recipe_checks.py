"""What the sections of a recipe and its method demand of one another."""

from typing import Any

from fedspine.core.aggregation import Mean
from fedspine.core.errors import BadInput, listed
from fedspine.lm.tuning import HeadTraining
from fedspine.methods import all_methods
from fedspine.runs.sections import FLEET, FleetSection, PrivacySection, RunSection, TaskSection

LEAST_EPSILON = (
    1e-3  # of counts of tokens; with less, the noise of 4 tokens is 5,000 counts and more
)


def check_privacy(privacy: PrivacySection, method: Any) -> None:
    """Raise BadInput for a promise that is not complete, or that the method cannot keep."""
    if not privacy.promised:
        if privacy.model_fields_set:
            raise BadInput(
                "privacy.epsilon is missing; give the epsilon of each device in the whole run, or "
                "leave [privacy] out"
            )
        return
    if privacy.delta is None:
        raise BadInput(
            f"privacy.epsilon is {privacy.epsilon} and privacy.delta is missing; give a delta well "
            "below 1 over the rows of a device, such as 1e-5"
        )
    if privacy.level not in method.privacy:
        able = [name for name, cls in all_methods().items() if privacy.level in cls.privacy]
        raise BadInput(
            f"method {method.name!r} does not support [privacy] with level {privacy.level!r}; "
            f"choose one of {listed(able)}, or leave [privacy] out"
        )


def check_packing(task: TaskSection, privacy: PrivacySection) -> None:
    """Raise BadInput where rows of several texts have no place."""
    if task.pack and task.kind != "causal-lm":
        raise BadInput(
            f"task.pack puts several texts in one row, which task.kind {task.kind!r} cannot read; "
            'leave it out, or set task.kind to "causal-lm"'
        )
    if task.pack and privacy.promised:
        raise BadInput(
            "task.pack puts several rows in one, and [privacy] counts single rows; leave one of "
            "them out"
        )


def check_vocabulary(task: TaskSection, privacy: PrivacySection) -> None:
    """Raise BadInput where the devices' counts have no promise, or break that of the run."""
    section = task.vocabulary
    if section is None:
        return
    if section.texts != FLEET and section.epsilon is not None:
        raise BadInput(
            f"task.vocabulary.epsilon is for counts of devices, and task.vocabulary.texts names a "
            f'public text; leave epsilon out, or set texts to "{FLEET}"'
        )
    if section.texts == FLEET and section.epsilon is None:
        raise BadInput(
            "task.vocabulary.epsilon is missing; give the epsilon of each text, such as 8, or "
            '"inf" for counts without noise'
        )
    if section.epsilon is not None and section.epsilon < LEAST_EPSILON:
        raise BadInput(
            f"task.vocabulary.epsilon is {section.epsilon:g}, at which the counts would be pure "
            f"noise; give at least {LEAST_EPSILON:g}"
        )
    if section.texts == FLEET and privacy.promised:
        raise BadInput(
            "task.vocabulary lets devices count their tokens, whose epsilon [privacy] does not "
            "count; name a public text as task.vocabulary.texts, or leave one of them out"
        )


def check_frozen_bits(run: RunSection, task: TaskSection, method: Any) -> None:
    """Raise BadInput for quantised weights where there is no frozen transformer."""
    if run.frozen_bits is None:
        return
    if task.kind == "array":
        raise BadInput(
            f"run.frozen_bits is {run.frozen_bits}, but all weights of a net are trained; leave it "
            "out"
        )
    if isinstance(method, HeadTraining) and not method.changes_base:
        return
    able = [
        name
        for name, cls in all_methods().items()
        if issubclass(cls, HeadTraining) and not cls.changes_base
    ]
    raise BadInput(
        f"run.frozen_bits is {run.frozen_bits}, but {method.name} does not keep the whole model "
        f"frozen below adapters; leave it out, or choose one of {listed(able)}"
    )


def check_quorum(method: Any, fleet: FleetSection) -> None:
    """Raise BadInput for a quorum below 1 where late replies cannot be merged or timed."""
    if fleet.quorum == 1:
        return
    if method.merges_late is None:
        able = [name for name, cls in all_methods().items() if cls.merges_late is not None]
        raise BadInput(
            f"fleet.quorum is {fleet.quorum:g}, but {method.name} needs all replies of a round; "
            f"set it to 1, or choose one of {listed(able)}"
        )
    if fleet.delay_seconds:
        raise BadInput(
            f"fleet.quorum is {fleet.quorum:g}, but fleet.delay_seconds delays only replies that "
            "a round waits for; set fleet.quorum to 1 or fleet.delay_seconds to 0"
        )


def check_aggregation(method: Any, fleet: FleetSection) -> None:
    """Raise BadInput for an aggregation that the method lacks, or that needs more replies."""
    how = fleet.aggregation or Mean()
    if how != Mean() and not method.robust:
        able = [name for name, cls in all_methods().items() if cls.robust]
        raise BadInput(
            f"fleet.aggregation is {how.name}, but {method.name} supports only the mean; leave it "
            f"out, or choose one of {listed(able)}"
        )
    how.check(fleet.replies)
    try:
        how.check(fleet.replies // method.groups)
    except BadInput as few:
        raise BadInput(
            f"{method.name} divides the {fleet.replies} replies of a round into up to "
            f"{method.groups} groups, and for each of them {few}"
        ) from few
