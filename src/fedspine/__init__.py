"""Federated fine-tuning and structured pruning of language models for devices that are not alike.

Everything that a script needs is here, and docs/python.md is the guide. A name is imported from its
home when it is first used, so that `import fedspine` is quick.

>>> from fedspine import FedLora, Recipe
>>> Recipe(method=FedLora(rank=8), rounds=5).run.rounds
5
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from fedspine.core.device import Device as Device
    from fedspine.core.device import on_device as on_device
    from fedspine.core.errors import BadInput as BadInput
    from fedspine.core.fleet import Fleet as Fleet
    from fedspine.core.message import message as message
    from fedspine.core.method import Method as Method
    from fedspine.core.method import method as method
    from fedspine.core.task import Task as Task
    from fedspine.exports.load import load_model as load_model
    from fedspine.exports.predict import predict as predict
    from fedspine.fleets.simulated import SimulatedFleet as SimulatedFleet
    from fedspine.methods.adasfl import AdaSfl as AdaSfl
    from fedspine.methods.fed_hello import FedHello as FedHello
    from fedspine.methods.fedadapter import FedAdapter as FedAdapter
    from fedspine.methods.fedavg import FedAvg as FedAvg
    from fedspine.methods.fedlora import FedLora as FedLora
    from fedspine.methods.fedquad import FedQuad as FedQuad
    from fedspine.methods.fedspine import FedSpine as FedSpine
    from fedspine.methods.fedspine_plus import FedSpinePlus as FedSpinePlus
    from fedspine.methods.ffa_lora import FfaLora as FfaLora
    from fedspine.methods.flexlora import FlexLora as FlexLora
    from fedspine.methods.flora import Flora as Flora
    from fedspine.methods.hetlora import HetLora as HetLora
    from fedspine.methods.legend import Legend as Legend
    from fedspine.methods.linear_probe import LinearProbe as LinearProbe
    from fedspine.methods.locfedmix import LocFedMix as LocFedMix
    from fedspine.methods.loraprune import LoraPrune as LoraPrune
    from fedspine.methods.magnitude import MagnitudePruning as MagnitudePruning
    from fedspine.methods.mergesfl import MergeSfl as MergeSfl
    from fedspine.methods.mergesfl_plus import MergeSflPlus as MergeSflPlus
    from fedspine.methods.prune_after import PruneAfter as PruneAfter
    from fedspine.methods.pyramidfl import PyramidFL as PyramidFL
    from fedspine.methods.splitfed_v1 import SplitFedV1 as SplitFedV1
    from fedspine.methods.splitfed_v2 import SplitFedV2 as SplitFedV2
    from fedspine.methods.splitlora import SplitLora as SplitLora
    from fedspine.runs.config import Recipe as Recipe
    from fedspine.ui.python import RunResult as RunResult
    from fedspine.ui.python import compare as compare
    from fedspine.ui.python import export as export
    from fedspine.ui.python import load as load
    from fedspine.ui.python import resume as resume
    from fedspine.ui.python import run as run

__version__ = "0.1.0"

_HOMES = {  # of each name
    "Device": "core.device",
    "on_device": "core.device",
    "BadInput": "core.errors",
    "Fleet": "core.fleet",
    "message": "core.message",
    "Method": "core.method",
    "method": "core.method",
    "Task": "core.task",
    "load_model": "exports.load",
    "predict": "exports.predict",
    "SimulatedFleet": "fleets.simulated",
    "AdaSfl": "methods.adasfl",
    "FedHello": "methods.fed_hello",
    "FedAdapter": "methods.fedadapter",
    "FedAvg": "methods.fedavg",
    "FedLora": "methods.fedlora",
    "FedQuad": "methods.fedquad",
    "FedSpine": "methods.fedspine",
    "FedSpinePlus": "methods.fedspine_plus",
    "FfaLora": "methods.ffa_lora",
    "FlexLora": "methods.flexlora",
    "Flora": "methods.flora",
    "HetLora": "methods.hetlora",
    "Legend": "methods.legend",
    "LinearProbe": "methods.linear_probe",
    "LocFedMix": "methods.locfedmix",
    "LoraPrune": "methods.loraprune",
    "MagnitudePruning": "methods.magnitude",
    "MergeSfl": "methods.mergesfl",
    "MergeSflPlus": "methods.mergesfl_plus",
    "PruneAfter": "methods.prune_after",
    "PyramidFL": "methods.pyramidfl",
    "SplitFedV1": "methods.splitfed_v1",
    "SplitFedV2": "methods.splitfed_v2",
    "SplitLora": "methods.splitlora",
    "Recipe": "runs.config",
    "RunResult": "ui.python",
    "compare": "ui.python",
    "export": "ui.python",
    "load": "ui.python",
    "resume": "ui.python",
    "run": "ui.python",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedspine' has no attribute {name!r}")
    found = getattr(import_module(f"fedspine.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
