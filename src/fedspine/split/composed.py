"""The parts that split methods are composed of, as settings and state.

The parts decide which devices take part, how large batches are, when devices start and stop, what
client models learn and which model is deployed. A method's own file says how the server model
learns from features and which parts are its defaults; `split/composed_round.py` has the round.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import inf
from typing import Any, TypeVar

import numpy as np

from fedspine.control.split_parts import (
    Batches,
    Equal,
    Everyone,
    Selection,
    WithinRound,
    check_control,
    limits_of,
    measures_speed,
    needs_labels,
)
from fedspine.control.worker_state import WorkerState
from fedspine.core.device import DeviceId
from fedspine.core.errors import BadInput
from fedspine.core.logit_adjustment import LogitAdjustment, Unadjusted
from fedspine.core.message import message
from fedspine.core.parts import quiet
from fedspine.core.task import Task
from fedspine.split.averaging import Averaging, LastRound, first_mean
from fedspine.split.baseline import SplitState, SplitTraining, check_split, cutting_of
from fedspine.split.joining import AtOnce, Joining, check_joining
from fedspine.split.wire import row_bytes

S = TypeVar("S", bound=SplitState)


@dataclass(frozen=True, kw_only=True)
class ComposedTraining(SplitTraining):
    """The settings of composed split methods; all parts are off by default."""

    selection: Selection = quiet(Everyone())  # which of the offered devices take part
    batches: Batches = quiet(Equal())  # rows per device and iteration
    joining: Joining = quiet(AtOnce())  # when devices join and leave a round
    logit_adjustment: LogitAdjustment = quiet(Unadjusted())  # in the loss of client models
    averaging: Averaging = quiet(LastRound())  # which model is deployed
    client_lr_multiplier: float = quiet(1.0)  # learning rate of client models over the server's


@message
class ComposedState(SplitState):
    """The state with what the parts know of devices and earlier rounds."""

    classes: int
    labels: dict[str, np.ndarray]  # V_i of every device asked so far
    workers: dict[str, WorkerState]  # of every device that has completed a round
    fixed_seconds: float  # of an exchange regardless of its rows, estimated in the last round
    mean: Any  # of the models of all rounds; None if the last round's model is deployed


@dataclass(frozen=True)
class Known:
    """What the parts know; a state has only the fields that its method's settings need."""

    classes: int = 0
    labels: Mapping[DeviceId, np.ndarray] = field(default_factory=dict)
    workers: Mapping[DeviceId, WorkerState] = field(default_factory=dict)
    fixed_seconds: float = 0.0
    mean: Any = None

    @classmethod
    def of(cls, state: SplitState) -> "Known":
        kept = _field_names(cls) & _field_names(type(state))
        return cls(**{name: getattr(state, name) for name in kept})

    def put_into(self, state: S) -> S:
        """The state with its own fields set from this."""
        kept = _field_names(Known) & _field_names(type(state))
        return replace(state, **{name: getattr(self, name) for name in kept})


def is_composed(method: ComposedTraining) -> bool:
    """Whether any part needs knowledge of devices or earlier rounds."""
    return (
        asks_labels(method)
        or measures_speed(method.selection, method.batches)
        or method.averaging != LastRound()
    )


def asks_labels(method: ComposedTraining) -> bool:
    """Whether devices are asked for their label distributions."""
    adjusted = method.logit_adjustment != Unadjusted()
    return adjusted or needs_labels(method.selection, method.batches)


def learns_within(method: ComposedTraining) -> bool:
    """Whether batches are replanned from the round's own exchanges."""
    return isinstance(method.batches, WithinRound)


def composed_state(method: ComposedTraining, first: SplitState, task: Task) -> SplitState:
    """The first state, with the fields of `ComposedState` if the parts need them."""
    if not is_composed(method):
        return first
    classes = len(task.label_names)
    return ComposedState(
        **vars(first),
        classes=classes,
        labels={},
        workers={},
        fixed_seconds=0.0,
        mean=first_mean(method.averaging, first.model),
    )


def deployed(method: ComposedTraining, state: SplitState) -> Any:
    """The model of the last round, or the mean of the rounds' models."""
    return state.model if method.averaging == LastRound() else Known.of(state).mean


def check_composed(method: ComposedTraining, task: Task) -> None:
    """Raise BadInput for settings that cannot work on this task."""
    check_split(method, task)
    check_control(method.selection, method.batches)
    check_joining(method.joining)
    method.logit_adjustment.check()
    if not 0 < method.client_lr_multiplier < inf:
        raise BadInput(
            f"method.client_lr_multiplier is {method.client_lr_multiplier}, but a finite number "
            "above 0 was expected"
        )
    split_model = cutting_of(method, task.base).of(task.base)
    bytes_of_row = row_bytes(split_model.feature_shape(task.max_tokens), method.precision)
    limits_of(
        method.selection, method.batches, devices=1, batch=method.batch, row_bytes=bytes_of_row
    )


def _field_names(cls: type) -> set[str]:
    return {each.name for each in fields(cls)}
