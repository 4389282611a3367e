"""Whether a device's logits are adjusted by its label skew while it trains: a part of a method.

Menon et al. 2021 (arXiv:2007.07314); for devices of a fleet: FedLC, Zhang et al. 2022
(arXiv:2209.00189). `control.labels.class_log_ratios` is the amount.
"""

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from fedspine.core.errors import BadInput


@dataclass(frozen=True)
class Unadjusted:
    """Devices learn from the plain gradient."""

    name: ClassVar = "none"

    def check(self) -> None:
        pass


@dataclass(frozen=True)
class LabelSkew:
    """Logits are adjusted by the label skew of each device; not for language models, which have no
    classes.
    """

    name: ClassVar = "label-skew"
    share: float = 0.95  # share of a device's label skew that is removed from its gradient

    def check(self) -> None:
        if not 0 <= self.share < 1:
            raise BadInput(
                f"method.logit_adjustment.share is {self.share}, but 0 to below 1 was expected"
            )


@dataclass(frozen=True)
class OwnLabelSkew:
    """The same by a device that knows its own labels, so that all of the skew can be removed: of
    classes that it lacks it then learns nothing. What is left of a gradient counts in full, since
    AdamW's steps do not shrink with it.
    """

    name: ClassVar = "label-skew"
    share: float = 1.0

    def check(self) -> None:
        if not 0 <= self.share <= 1:
            raise BadInput(
                f"method.logit_adjustment.share is {self.share}, but 0 to 1 was expected"
            )


LogitAdjustment: TypeAlias = Unadjusted | LabelSkew
OwnLogitAdjustment: TypeAlias = Unadjusted | OwnLabelSkew
