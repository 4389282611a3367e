"""A model cut in two, for every model that can be: transformers and convolutional nets."""

from fedspine.lm.base import Base
from fedspine.nets.net import Net
from fedspine.split.interface import SplitModel
from fedspine.split.split_net import SplitNet
from fedspine.split.split_transformer import SplitTransformer

KEPT = 32  # split models of a base


def split_model_of(base: Base | Net, cut: int, *, rank: int = 8, scale: float = 2.0) -> SplitModel:
    """The model with its first `cut` blocks on the devices; raises BadInput for a cut outside the
    model.

    `rank` and `scale` are those of the adapters, where the model trains adapters. A split model is
    made once for a base and kept with it, since each exchange asks for it.
    """
    match base:
        case Base():
            key = (cut, rank, scale)
            if key not in base.split_models:
                base.split_models[key] = SplitTransformer(base, cut, rank, scale)
                if len(base.split_models) > KEPT:  # the sender of orders chooses the keys
                    del base.split_models[next(iter(base.split_models))]
        case Net():
            key = (cut,)
            if key not in base.split_models:
                base.split_models[key] = SplitNet(base, cut)
    return base.split_models[key]
