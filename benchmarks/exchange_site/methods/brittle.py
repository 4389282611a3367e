"""Brittle: FedLoRA whose devices spoil a reply when a file tells them to, and whose rounds take a
while.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedspine.core.device import Device, DeviceId, on_device
from fedspine.core.fleet import Fleet
from fedspine.core.method import method
from fedspine.methods.fedlora import FedLora, LoraOrder, LoraResult, LoraState, tune_adapter

# environment: a folder with a file for each site that is to spoil its replies
SPOIL = "FEDSPINE_SPOIL"


@on_device
def tune_or_spoil(device: Device, order: LoraOrder) -> LoraResult:
    result = tune_adapter(device, order)
    said = Path(os.environ[SPOIL]) / device.id
    match said.read_text() if said.exists() else "":
        case "nan":
            return replace(
                result,
                adapter={name: tensor * float("nan") for name, tensor in result.adapter.items()},
            )
        case "shapes":
            return replace(
                result, adapter={name: tensor[:1] for name, tensor in result.adapter.items()}
            )
    return result


@dataclass(frozen=True)
class Spoiling:
    """A fleet whose devices are asked for the work above."""

    fleet: Fleet

    def ask(self, work: Any, orders: Mapping[DeviceId, LoraOrder], **limits: Any) -> Any:
        return self.fleet.ask(tune_or_spoil, orders, **limits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fleet, name)


@method("brittle")
@dataclass(frozen=True)
class Brittle(FedLora):
    """Rounds of FedLoRA, each followed by a pause, in which faults find the time to happen."""

    pause: float = 0.0  # seconds

    def round(self, state: LoraState, fleet: Fleet) -> LoraState:
        after = super().round(state, Spoiling(fleet))
        time.sleep(self.pause)
        return after
