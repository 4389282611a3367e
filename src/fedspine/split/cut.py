"""A model cut in two, for every model that can be: transformers and convolutional nets."""

from fedspine.lm.base import Base
from fedspine.nets.net import Net
from fedspine.split.interface import Halves
from fedspine.split.net_halves import NetHalves
from fedspine.split.text_halves import TextHalves


def halves_of(base: Base | Net, cut: int, *, rank: int = 8, scale: float = 2.0) -> Halves:
    """The halves with the first `cut` blocks below; raises BadInput for a cut outside the model.

    `rank` and `scale` are those of the adapters, where the model trains adapters. Halves are made
    once for a model and kept with it, since each exchange asks for them.
    """
    match base:
        case Base():
            key = (cut, rank, scale)
            if key not in base.halves:
                base.halves[key] = TextHalves(base, cut, rank, scale)
        case Net():
            key = (cut,)
            if key not in base.halves:
                base.halves[key] = NetHalves(base, cut)
    return base.halves[key]
