"""Half of a model under training: its weights, and an optimiser whose state can be sent, kept and
resumed.
"""

import torch
from torch import Tensor, nn

from fedspine.core.checks import Asked, need
from fedspine.core.errors import BadInput
from fedspine.core.message import Tensors, message
from fedspine.lm.received import check_settings


@message
class Optimising:
    """How one half is trained in a round; the optimiser is fresh in every round."""

    kind: str  # "sgd" (no momentum) or "adamw"
    learning_rate: float
    weight_decay: float = 0.0
    clip: float = 0.0  # of the gradient's norm; 0: never

    def check(self, asked: Asked) -> None:
        need(self.kind in ("sgd", "adamw"), "kind is not one of sgd, adamw")
        check_settings(
            learning_rate=self.learning_rate, weight_decay=self.weight_decay, clip=self.clip
        )


def check_optimising(optimising: Optimising) -> None:
    """Raise BadInput for settings that cannot work."""
    if not optimising.learning_rate > 0:
        raise BadInput(
            f"method.learning_rate is {optimising.learning_rate}, but a positive number is needed"
        )
    for name in ("weight_decay", "clip"):
        if getattr(optimising, name) < 0:
            raise BadInput(
                f"method.{name} is {getattr(optimising, name)}, but it cannot be negative"
            )


class TrainableHalf:
    """Trainable copies of weights on `device`; those named in `still` have no gradient.

    `moments` is the optimiser's state after earlier steps, empty before the first.
    """

    def __init__(
        self,
        weights: Tensors,
        optimising: Optimising,
        still: frozenset[str] = frozenset(),
        moments: "Tensors | None" = None,
    ) -> None:
        self.weights: Tensors = {
            name: tensor.detach().clone().requires_grad_(name not in still)
            for name, tensor in weights.items()
        }
        self._leaves = {
            name: tensor for name, tensor in self.weights.items() if tensor.requires_grad
        }
        self._clip = optimising.clip
        self._optimiser = _optimiser(list(self._leaves.values()), optimising)
        for key, joined in (moments or {}).items():
            self._restore_moments(key, joined)

    @property
    def leaves(self) -> list[Tensor]:
        """The trained weights."""
        return list(self._leaves.values())

    def step(self) -> None:
        """One optimiser step with the accumulated gradients, which are then cleared."""
        if not self._leaves:
            return
        if self._clip:
            nn.utils.clip_grad_norm_(self._leaves.values(), self._clip)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)

    def now(self) -> Tensors:
        """The current weights, which the next step changes in place."""
        return {name: tensor.detach() for name, tensor in self.weights.items()}

    def moments(self) -> Tensors:
        """The optimiser's state: for each of its quantities those of all weights, one after
        another.
        """
        states = [self._optimiser.state[leaf] for leaf in self._leaves.values()]
        if not states or not all(states):  # before the first step, or where it keeps nothing
            return {}
        return {key: torch.cat([state[key].flatten() for state in states]) for key in states[0]}

    def _restore_moments(self, key: str, joined: Tensor) -> None:
        leaves = self._leaves.values()
        scalar = key == "step"  # which AdamW counts for each weight
        for leaf, own in zip(
            leaves, joined.split([1 if scalar else leaf.numel() for leaf in leaves]), strict=True
        ):
            self._optimiser.state[leaf][key] = own.clone().view(() if scalar else leaf.shape)

    def statistics(self) -> Tensors:
        """Copies of the weights that have no gradient."""
        return {
            name: tensor.clone()
            for name, tensor in self.weights.items()
            if not tensor.requires_grad
        }

    def forget(self, before: Tensors) -> None:
        """Restore the statistics from before a forward pass that does not count."""
        for name, tensor in before.items():
            self.weights[name].copy_(tensor)

    def without_statistics(self) -> Tensors:
        """The weights, with copies of those without a gradient, so that a repeated forward pass
        does not update these twice.
        """
        return {
            name: leaf if leaf.requires_grad else leaf.clone()
            for name, leaf in self.weights.items()
        }


def _optimiser(leaves: list[Tensor], optimising: Optimising) -> torch.optim.Optimizer:
    if not leaves:
        leaves = [torch.zeros(0, requires_grad=True)]  # torch wants one
    decay = optimising.weight_decay
    match optimising.kind:
        case "sgd":
            return torch.optim.SGD(leaves, lr=optimising.learning_rate, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(
                leaves, lr=optimising.learning_rate, weight_decay=decay, fused=True
            )
    raise BadInput(f"method.optimiser is {optimising.kind!r}; choose sgd or adamw")


def learning_rate_at(
    start: float, round: int, rounds: int, decay: float = 0.0, lowest: float = 0.0
) -> float:
    """The rate of a round, counted from 0: times `decay` each round, not below `lowest`; with 0 it
    falls linearly to zero.

    >>> learning_rate_at(0.1, 0, 10, 0.993), learning_rate_at(0.1, 5, 10)
    (0.1, 0.05)
    >>> learning_rate_at(0.1, 9999, 10, 0.993, 0.005)
    0.005
    """
    return max(start * decay**round, lowest) if decay else start * (1 - round / rounds)
