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


@dataclass(frozen=True)
class LabelSkew:
    """Logits are adjusted by the label skew of each device; not for language models, which have no
    classes.
    """

    name: ClassVar = "label-skew"
    share: float = 0.95  # share of a device's label skew that is removed from its gradient


LogitAdjustment: TypeAlias = Unadjusted | LabelSkew


def check_logit_adjustment(adjustment: LogitAdjustment) -> None:
    """Raise BadInput for a share of the skew that cannot be removed."""
    if isinstance(adjustment, LabelSkew) and not 0 <= adjustment.share < 1:
        raise BadInput(
            f"method.logit_adjustment.share is {adjustment.share}, but 0 to below 1 was expected"
        )
