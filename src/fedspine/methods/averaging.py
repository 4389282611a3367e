"""The mean of the common model over the last rounds, which is deployed while training goes on from the last one; no method.

A round's model leans to the labels of the devices that were asked in it; the mean does not. Source: averaging of weights over
rounds, as in Caldarola et al. 2022 (arXiv:2203.11834), here exponential and in the adapter's product space.
"""

from fedspine.lm.aggregate import factor
from fedspine.lm.anatomy import Anatomy
from fedspine.lm.merge import Aggregation
from fedspine.message import Tensors, message


@message
class Common:
    """What all devices share: the dense change of every weight (without the scale), its best factors, the task head."""

    dense: Tensors
    adapter: Tensors
    head: Tensors


def mean_over_rounds(
    how: Aggregation, anatomy: Anatomy, before: Common | None, now: Common, *, round: int, keep: float, seed: int
) -> Common:
    """The mean with `now` in it, the model after `round` (counted from 0); of a few rounds the plain mean.

    `keep` is what is left of the old mean at each round. Where `how` averages factors, so does this.
    """
    if before is None:
        return now
    keep = min(keep, round / (round + 1))

    def mixed(old: Tensors, new: Tensors) -> Tensors:
        return {name: keep * old[name] + (1 - keep) * tensor for name, tensor in new.items()}

    head = mixed(before.head, now.head)
    if how in ("zeropad", "hetlora"):
        return Common(dense=now.dense, adapter=mixed(before.adapter, now.adapter), head=head)
    dense = mixed(before.dense, now.dense)
    rank = next(iter(now.adapter.values())).shape[0]
    return Common(dense=dense, adapter=factor(anatomy, dense, rank, before.adapter, seed), head=head)
