"""What a run promises each device: from `[privacy]` of its recipe to the terms of its devices."""

import math
from collections.abc import Sequence
from typing import Any

from fedspine.core.errors import BadInput
from fedspine.core.privacy import Privacy
from fedspine.report.rows import RunRows
from fedspine.report.trust import epsilon_spent
from fedspine.runs.config import Recipe


def privacy_of(recipe: Recipe) -> Privacy | None:
    """The run's promise, None where it makes none.

    Devices take turns (`assemble.cohort`), so none is asked more often than the budget is laid out
    for, and once that is used up it declines.
    """
    section, fleet = recipe.privacy, recipe.fleet
    if section.epsilon is None or section.delta is None:
        return None
    asked = recipe.run.rounds * min(fleet.per_round, fleet.devices)
    return Privacy(
        level=section.level,
        epsilon=section.epsilon if math.isfinite(section.epsilon) else None,
        delta=section.delta,
        clip=section.clip,
        answers=math.ceil(asked / fleet.devices),
    )


def check_delta(recipe: Recipe, rows: Sequence[int]) -> None:
    """Raise BadInput for a delta with which whole rows, or whole devices, might be published;
    `rows` are those of each device, where they are known.
    """
    section = recipe.privacy
    if not section.promised or section.delta is None:
        return
    of_rows = section.level == "rows"
    most = max(rows, default=0) if of_rows else recipe.fleet.devices
    if most and section.delta >= 1 / most:
        who = "a device holds" if of_rows else "the fleet has"
        what = "rows" if of_rows else "devices"
        raise BadInput(
            f"privacy.delta is {section.delta:g}, but {who} {most} {what}, and a delta of 1 over "
            f"that allows one of them to be published whole; set it well below {1 / most:.2g}"
        )


def spent_of(recipe: Recipe, rows: RunRows) -> dict[str, Any]:
    """What a run promised and what each device has spent of it, for the summary; empty without a
    promise.
    """
    section = recipe.privacy
    if not section.promised:
        return {}
    promised = section.model_dump()
    return {"privacy": promised | {"epsilon_spent": epsilon_spent(rows)}}
