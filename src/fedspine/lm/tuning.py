"""The settings of local training: of a recipe, and what of them an order of one round carries."""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

from fedspine.core.checks import Asked, need, within
from fedspine.core.errors import BadInput
from fedspine.core.logit_adjustment import OwnLabelSkew, OwnLogitAdjustment, Unadjusted
from fedspine.core.message import message
from fedspine.core.parts import quiet
from fedspine.core.reads import KEPT_ADAMW, Descent, Reads, lasting
from fedspine.lm.drift import Drift, FedDyn, FedProx, Free
from fedspine.lm.received import check_settings
from fedspine.lm.schedules import Linear, Schedule


@message
class Tuning:
    """How a device trains in one round."""

    steps: int
    batch: int
    learning_rate: float  # of the adapter
    head_learning_rate: float | None = None  # of the task head, None: as the adapter
    weight_decay: float = 0.1
    clip: float = 1.0  # of the gradient's norm
    turns: float = 1.0  # how often the device trains in the whole run, on average

    @property
    def reads(self) -> Reads:
        rates = (self.learning_rate, self.head_learning_rate or self.learning_rate)
        show = lasting(self.steps, max(rates) * self.weight_decay)
        how = Descent(
            kind="adamw", learning_rates=rates, weight_decay=self.weight_decay, clip=self.clip
        )
        return Reads(steps=self.steps, batch=self.batch, lasting=show, descent=how)

    def check(self, asked: Asked) -> None:
        """A step at least, of a row at least; rates and limits are not negative."""
        need(self.steps >= 1, f"steps is {self.steps}, but at least 1 is needed")
        need(self.batch >= 1, f"batch is {self.batch}, but at least 1 is needed")
        check_settings(
            learning_rate=self.learning_rate,
            head_learning_rate=self.head_learning_rate,
            weight_decay=self.weight_decay,
            clip=self.clip,
            turns=self.turns,
        )


@message
class HeldTuning(Tuning):
    """The same with what only some runs ask for, so that the orders of others are as short as
    before.
    """

    proximal: float  # weight of the pull towards what was received: FedProx's mu, FedDyn's alpha
    dynamic: bool  # whether the device keeps FedDyn's g and adds its term
    keep_optimiser: bool  # whether AdamW goes on where the device's last training ended
    personal_head: bool  # whether the device goes on with its own head

    @property
    def reads(self) -> Reads:
        """With the pull as what is minimised beside the loss, and the optimiser's start."""
        own = super().reads
        how = own.descent and replace(own.descent, penalty=self.proximal)
        if how is not None and self.keep_optimiser:
            how = replace(how, kind=KEPT_ADAMW)
        return replace(own, descent=how)

    def check(self, asked: Asked) -> None:
        super().check(asked)
        check_settings(proximal=self.proximal)


@message
class AdjustedTuning(HeldTuning):
    """The same with logits that are adjusted by the device's label skew while it trains."""

    skew_share: float  # of the skew, that is removed

    def check(self, asked: Asked) -> None:
        super().check(asked)
        within("skew_share", self.skew_share, 0.0, 1.0)
        need(asked.terms.classes > 0, "skew_share is for classes, and the task has none")


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """The hyper-parameters of training the task head alone on a device."""

    steps: int = 20  # optimiser steps of a device in a round
    batch: int = 32  # rows of one step
    learning_rate: float = 3e-3  # over the rounds as `schedule` says
    weight_decay: float = 0.1
    head_lr_multiplier: ClassVar[float] = 1.0
    schedule: Schedule = quiet(Linear())  # of the learning rate over the rounds
    drift: Drift = quiet(Free())  # what holds training near what was received
    logit_adjustment: OwnLogitAdjustment = quiet(Unadjusted())  # in the loss of a device
    keep_optimiser: bool = quiet(False)  # whether a device's AdamW goes on from round to round
    personal_head: ClassVar[bool] = False

    def predicted_reads(self, base: Any) -> Reads:
        """What a device's orders will read."""
        ranks = getattr(self, "ranks", ()) or (getattr(self, "rank", None),)
        whole = replace(self, schedule=Linear())  # at the whole rate, without a warm-up
        return replace(
            tuning_at(whole, 0, 1).reads, scale=getattr(self, "scale", None), rank=max(ranks)
        )


@dataclass(frozen=True, kw_only=True)
class LocalTraining(HeadTraining):
    """Those of training an adapter and the task head, which adapter methods share."""

    head_lr_multiplier: float = 3.0  # the task head's learning rate over the adapter's
    personal_head: bool = quiet(False)  # whether each device trains and runs a head of its own


# with which a tiny model learns a toy task in a few rounds
TOY = MappingProxyType({"steps": 8, "batch": 16, "learning_rate": 2e-2, "head_lr_multiplier": 1.0})


def check_tuning(fields: HeadTraining) -> None:
    """Raise BadInput for training settings that cannot work."""
    for name in ("steps", "batch"):
        if getattr(fields, name) < 1:
            raise BadInput(f"method.{name} is {getattr(fields, name)}, but at least 1 is needed")
    for name in ("learning_rate", "head_lr_multiplier", "scale"):
        if not getattr(fields, name, 1.0) > 0:
            raise BadInput(
                f"method.{name} is {getattr(fields, name)}, but a positive number is needed"
            )
    if fields.weight_decay < 0:
        raise BadInput(f"method.weight_decay is {fields.weight_decay}, but it cannot be negative")
    if fields.schedule.warmup_rounds < 0:
        raise BadInput(
            f"method.schedule.warmup_rounds is {fields.schedule.warmup_rounds}, but it cannot be "
            "negative"
        )
    fields.schedule.check()
    fields.drift.check()
    fields.logit_adjustment.check()


def tuning_at(fields: HeadTraining, round: int, rounds: int, turns: float = 1.0) -> Tuning:
    """The settings of one round, counted from 0: rates are as `fields.schedule` says."""
    learning_rate = fields.learning_rate * fields.schedule.share(round, rounds)
    tuning = Tuning(
        steps=fields.steps,
        batch=fields.batch,
        learning_rate=learning_rate,
        head_learning_rate=learning_rate * fields.head_lr_multiplier,
        weight_decay=fields.weight_decay,
        turns=turns,
    )
    match fields.drift:
        case Free():
            proximal = 0.0
        case FedProx(mu=proximal) | FedDyn(alpha=proximal):
            pass
    match fields.logit_adjustment:
        case Unadjusted():
            skew_share = 0.0
        case OwnLabelSkew(share=skew_share):
            pass
    if not (proximal or fields.keep_optimiser or fields.personal_head or skew_share):
        return tuning
    held = HeldTuning(
        **vars(tuning),
        proximal=proximal,
        dynamic=isinstance(fields.drift, FedDyn),
        keep_optimiser=fields.keep_optimiser,
        personal_head=fields.personal_head,
    )
    return AdjustedTuning(**vars(held), skew_share=skew_share) if skew_share else held
