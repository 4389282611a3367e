"""The readout that a recipe leaves to the run."""

from fedspine.core.task import Pooling
from fedspine.lm.load import pooling_for
from fedspine.lm.tuning import HeadTraining
from fedspine.runs.config import Recipe


def auto_pooling(recipe: Recipe) -> Pooling:
    """What "auto" stands for as the recipe's `task.pooling`; raises BadInput for a model that
    cannot be found or read.
    """
    # a model that is split cannot be a bi-encoder
    bi_encoder = recipe.task.kind == "pair" and isinstance(recipe.method, HeadTraining)
    return pooling_for(recipe.task.model, bi_encoder=bi_encoder)
