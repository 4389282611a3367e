"""The optimiser and the learning rate that "auto" stands for, by the kind of model that is trained."""

import dataclasses
from typing import Any, Literal, TypeAlias

from fedspine.core.errors import BadInput

AUTO = "auto"
Rate: TypeAlias = float | Literal["auto"]
Optimiser: TypeAlias = Literal["auto", "sgd", "adamw"]

# docs/recipes.md, experiments/README.md: what was tried, on which data
OPTIMISERS = {"net": "adamw", "transformer": "adamw"}
RATES = {
    ("net", "sgd"): 0.1,
    ("net", "adamw"): 1e-3,
    ("transformer", "sgd"): 0.1,
    (
        "transformer",
        "adamw",
    ): 2e-3,  # of adapters; whoever trains the head alone has a rate of its own
}


def open_fields(method: Any) -> list[str]:
    """Which of a method's fields leave the optimiser or its rate to the run."""
    return [key for key in ("optimiser", "learning_rate") if getattr(method, key, None) == AUTO]


def chosen(method: Any, family: str) -> tuple[dict[str, Any], str] | None:
    """Values for a method's open fields on a model of this family, and a line about them.

    `family` is "net" or "transformer". None where nothing is open.
    """
    fields = open_fields(method)
    if not fields:
        return None
    optimiser = getattr(method, "optimiser", "adamw")
    optimiser = OPTIMISERS[family] if optimiser == AUTO else optimiser
    values = {"optimiser": optimiser, "learning_rate": RATES[family, optimiser]}
    rate = values["learning_rate"] if "learning_rate" in fields else method.learning_rate
    what = {"sgd": "SGD", "adamw": "AdamW"}[optimiser]
    return {key: values[key] for key in fields}, f"training: {what}, learning rate {rate:g}"


def check_settled(method: Any) -> None:
    """Raise BadInput where a choice is still open, which a run decides as it begins."""
    if fields := open_fields(method):
        raise BadInput(
            f'method.{fields[0]} is "auto", which stands for a value only in a recipe; '
            "give a value where a method is used without one"
        )


def settled(method: Any, family: str) -> Any:
    """The method with its open fields decided for a model of this family."""
    found = chosen(method, family)
    return method if found is None else dataclasses.replace(method, **found[0])
