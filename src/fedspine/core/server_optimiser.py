"""Server optimisers, which use the merged change of a round as a pseudo-gradient.

The merged change is the mean of what devices changed, or another merge by `fleet.aggregation`. Each
optimiser is a part (`core.parts`) of the recipe, `fleet.server_optimiser`; a fleet carries it to
the methods as `fleet.server`, and `core.merging` applies it. Each has `check()`, which raises
BadInput for invalid settings, `begin(like)`, the first moments, and `step(change, moments)`.

Source: Reddi et al. 2020, "Adaptive Federated Optimization" (arXiv:2003.00295); FedAvgM is Hsu et
al. 2019 (arXiv:1909.06335).
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from fedspine.core import parts
from fedspine.core.errors import BadInput
from fedspine.core.message import Tensors

Moments: TypeAlias = "dict[str, Tensors]"  # by the moment's name, then by parameter name


@dataclass(frozen=True)
class NoOptimiser:
    """No server step: the merged weights are the new ones, as in FedAvg."""

    name: ClassVar = "none"

    def check(self) -> None:
        pass


@dataclass(frozen=True)
class FedAvgM:
    """Momentum: m <- momentum m + change, and the weights move by learning_rate m.

    At the default rate, 1 - momentum, constant changes move the weights as far as without momentum.
    """

    name: ClassVar = "fedavgm"
    learning_rate: float = 0.1
    momentum: float = 0.9

    def check(self) -> None:
        _check(self, positive=("learning_rate",), below_one=("momentum",))

    def begin(self, like: Tensor) -> Tensors:
        return {"first": torch.zeros_like(like)}

    def step(self, change: Tensor, moments: Tensors) -> tuple[Tensor, Tensors]:
        """The change to apply instead of the merged one, and the new moments.

        >>> how, change = FedAvgM(learning_rate=1.0), torch.tensor([1.0])
        >>> step, moments = how.step(change, how.begin(change))
        >>> how.step(change, moments)[0]
        tensor([1.9000])
        """
        first = self.momentum * moments["first"] + change
        return self.learning_rate * first, {"first": first}


@dataclass(frozen=True)
class FedAdam:
    """Adam without bias correction: m <- beta1 m + (1 - beta1) change, v <- beta2 v + (1 - beta2)
    change^2, and the weights move by learning_rate m / (sqrt(v) + tau). v begins at tau^2.
    """

    name: ClassVar = "fedadam"
    learning_rate: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3  # the smaller, the more adaptive

    def check(self) -> None:
        _check(self, positive=("learning_rate", "tau"), below_one=("beta1", "beta2"))

    def begin(self, like: Tensor) -> Tensors:
        return {"first": torch.zeros_like(like), "second": torch.full_like(like, self.tau**2)}

    def step(self, change: Tensor, moments: Tensors) -> tuple[Tensor, Tensors]:
        first = self.beta1 * moments["first"] + (1 - self.beta1) * change
        second = self._second(moments["second"], change.square())
        step = self.learning_rate * first / (second.sqrt() + self.tau)
        return step, {"first": first, "second": second}

    def _second(self, second: Tensor, square: Tensor) -> Tensor:
        return self.beta2 * second + (1 - self.beta2) * square


@dataclass(frozen=True)
class FedYogi(FedAdam):
    """FedAdam whose v moves by at most (1 - beta2) change^2: v <- v - (1 - beta2) change^2
    sign(v - change^2).
    """

    name: ClassVar = "fedyogi"

    def _second(self, second: Tensor, square: Tensor) -> Tensor:
        return second - (1 - self.beta2) * square * torch.sign(second - square)


@dataclass(frozen=True)
class Accumulated:
    """The server's part of FedDyn (Acar et al. 2021, arXiv:2111.04263), which `method.drift` turns
    on: s <- s + share change, and the weights move by change + s.

    `share` is the share of all devices that a round asks. In the paper's notation s is -h / alpha.
    """

    name: ClassVar = "feddyn"
    share: float = 1.0

    def check(self) -> None:
        pass

    def begin(self, like: Tensor) -> Tensors:
        return {"first": torch.zeros_like(like)}

    def step(self, change: Tensor, moments: Tensors) -> tuple[Tensor, Tensors]:
        first = self.share * change + moments["first"]
        return change + first, {"first": first}


ServerOptimiser: TypeAlias = NoOptimiser | FedAvgM | FedAdam | FedYogi
CHOICES: dict[str, type[Any]] = {
    part.name: part for part in (NoOptimiser, FedAvgM, FedAdam, FedYogi)
}


def server_optimiser_of(given: Any) -> Any:
    """The part that a name or a table of a recipe describes; any other value is returned as it is.

    Raises BadInput for unknown names and settings.
    """
    match given:
        case str():
            return parts.part("fleet.server_optimiser", CHOICES, NoOptimiser(), {"name": given})
        case dict():
            return parts.part("fleet.server_optimiser", CHOICES, NoOptimiser(), given)
        case _:
            return given


@dataclass
class Server:
    """A run's server optimiser, and what the server remembers between rounds beside the method's
    state. A fleet carries it and saves its memory in the fleet's snapshot.
    """

    optimiser: ServerOptimiser | Accumulated = NoOptimiser()
    # moments by what was merged, such as "head": by moment, then by parameter name
    moments: dict[str, Moments] = field(default_factory=dict)
    # by device, then by parameter name: of each row of a tensor, such as a classifier's, the share
    # of the device's weight that counts for it, fp32 [rows]; see `pruning.head_start.know_classes`
    row_shares: dict[str, Tensors] = field(default_factory=dict)

    def step(
        self, what: str, before: Tensors, merged: Tensors, averaged: Collection[str] = ()
    ) -> Tensors:
        """The weights after the optimiser's step from `before` towards `merged`, fp32; all have
        equal names and shapes. Updates the moments of `what`.

        An entry that no device changed stays, and so do its moments. Tensors named in `averaged`,
        such as batch statistics, are those of `merged`.
        """
        if isinstance(self.optimiser, NoOptimiser):
            return merged
        known, after = self.moments.get(what, {}), {}
        moments: Moments = {}
        for name, value in merged.items():
            if name in averaged:
                after[name] = value
                continue
            old = before[name].float()
            change = value.float() - old
            mine = {kind: tensors[name] for kind, tensors in known.items()}
            mine = mine or self.optimiser.begin(change)
            step, new = self.optimiser.step(change, mine)
            moved = change != 0
            after[name] = torch.where(moved, old + step, old)
            for kind, tensor in new.items():
                moments.setdefault(kind, {})[name] = torch.where(moved, tensor, mine[kind])
        self.moments = {**self.moments, what: moments}
        return after

    @property
    def memory(self) -> dict[str, Any]:
        """What a fleet's snapshot saves; empty if nothing is remembered."""
        held = {"moments": self.moments, "row_shares": self.row_shares}
        return {name: value for name, value in held.items() if value}

    def restore(self, memory: dict[str, Any]) -> None:
        """Restore the memory of a snapshot."""
        self.moments = dict(memory.get("moments", {}))
        self.row_shares = dict(memory.get("row_shares", {}))


def _check(how: Any, positive: Collection[str], below_one: Collection[str]) -> None:
    for name in positive:
        value = getattr(how, name)
        if not (value > 0 and isfinite(value)):
            raise BadInput(
                f"fleet.server_optimiser.{name} is {value:g}, but a positive number was expected"
            )
    for name in below_one:
        value = getattr(how, name)
        if not 0 <= value < 1:
            raise BadInput(
                f"fleet.server_optimiser.{name} is {value:g}, but 0 to below 1 was expected"
            )
