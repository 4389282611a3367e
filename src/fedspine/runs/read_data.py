"""From a recipe to its data and to the rows of each device, without a model: what `run` and `data`
have in common.
"""

from dataclasses import replace

import numpy as np

from fedspine.core.errors import BadInput
from fedspine.core.task import AUTO, NETS
from fedspine.data import arrays
from fedspine.data import partition as partitions
from fedspine.data.dataset import Dataset
from fedspine.data.tasks import load
from fedspine.nets.choice import net_for
from fedspine.runs.config import Recipe

_SAMPLE_SEED = 20260104  # the same rows for everyone, whatever the seed of a run


def dataset(recipe: Recipe) -> Dataset:
    """The data set that the recipe names; raises BadInput where it cannot be found or used.

    With `task.train_rows` its training set is a random sample of so many rows, the same for every
    seed.
    """
    data, most = _whole(recipe), recipe.task.train_rows
    rows = len(data.train)
    if not most or most >= rows:
        return data
    drawn = np.sort(np.random.default_rng(_SAMPLE_SEED).permutation(rows)[:most])
    return replace(data, train=data.train.take(drawn), not_drawn=rows - most)


def _whole(recipe: Recipe) -> Dataset:
    section = recipe.task
    group = _group(recipe)
    if section.kind == "array":
        return arrays.load(section.data, group=group)
    if arrays.is_arrays(section.data):
        raise BadInput(
            f"{section.data!r} holds arrays, which {section.model!r} cannot read; set task.model "
            f'to one of {", ".join(NETS)}, or to "auto"'
        )
    return load(
        section.data,
        kind=section.kind,
        text=section.text,
        pair=section.pair,
        label=section.label,
        group=group,
        encoding=section.encoding,
        answers=section.loss_on == "answers",
    )


def modelled(recipe: Recipe) -> tuple[Recipe, str | None]:
    """The recipe with the model that `task.model = "auto"` stands for, and a line about the choice.

    That is MiniLM for texts, and for arrays a net by the shape of their rows, which makes the kind
    "array". Raises BadInput where no model can be chosen.
    """
    task = recipe.task
    if task.model != AUTO:
        return recipe, None
    if task.kind == "array" or arrays.is_arrays(task.data):
        recipe.with_net(AUTO)  # refuses what is for texts before anything is read
        shape, type = arrays.row_of(task.data)
        net = net_for(shape, bytes=type == np.uint8)
        return recipe.with_net(net), f"model: {net}, for rows of shape {list(shape)}"
    if task.kind == "causal-lm":
        raise BadInput(
            'task.kind "causal-lm" has no default model; name a decoder as '
            "task.model: smollm2, a .gguf file, a folder, or a Hub id such as "
            "HuggingFaceTB/SmolLM2-135M"
        )
    return recipe.choosing({"task": {"model": "minilm"}}), "model: minilm, for texts"


def row_shares(recipe: Recipe, data: Dataset) -> list[np.ndarray]:
    """The training rows that each device holds: int64 indices, ascending."""
    how = partition_of(recipe, data)
    column = partitions.column_of(how, data.natural)
    return partitions.partition(
        how,
        devices=recipe.fleet.devices,
        rows=len(data.train),
        labels=data.train.labels,
        groups=None if column is None else data.train.columns[column],
        alpha=recipe.fleet.alpha,
        seed=recipe.run.seed,
    )


def partition_of(recipe: Recipe, data: Dataset) -> str:
    """The recipe's partition; where that is "auto", what it stands for."""
    if recipe.fleet.partition != "auto":
        return recipe.fleet.partition
    return "iid" if data.train.labels is None else "dirichlet"


def _group(recipe: Recipe) -> str | None:
    how = recipe.fleet.partition
    return how.removeprefix("column:") if how.startswith("column:") else None
