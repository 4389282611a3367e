"""From a run on arrays to an exported net."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedspine.exports import onnx_net  # needs fedspine[onnx]
from fedspine.exports.onnx_net import NetData
from fedspine.exports.saved_run import check_unedited, chosen, saved_state
from fedspine.exports.whole_folder import bytes_in
from fedspine.nets.net import NetModel
from fedspine.runs import task_record
from fedspine.runs.config import Recipe
from fedspine.runs.run_dir import recipe_of
from fedspine.runs.task_record import TaskRecord


@dataclass(frozen=True)
class RunNet:
    """A run's recipe, record and last saved state, with the rows that its nets are compared on."""

    recipe: Recipe
    record: TaskRecord
    state: Any
    data: NetData

    def model(self, device: str) -> NetModel:
        """A device's net, the global one (`global`) or the unpruned one (`dense`)."""
        found: NetModel = chosen(self.recipe.method, self.state, device)
        return found


def open_net_run(folder: Path, rows: str | None) -> RunNet:
    """Load a run from its directory, with rows as `onnx_net.data_of` chooses them, and raising what
    that raises.
    """
    recipe, record = recipe_of(folder), task_record.recorded(folder)
    saved = saved_state(folder)
    check_unedited(folder, recipe, saved.state["recipe"])
    data = onnx_net.data_of(recipe, record, rows)
    return RunNet(recipe, record, saved.state["method"], data)


def export_net(run: RunNet, device: str, to: Path, *, quantize: str) -> dict[str, Any]:
    """Write one net of a run to the new folder `to`; returns and raises what `of_run.export_model`
    does.
    """
    parity = onnx_net.export(
        run.model(device),
        run.data,
        to,
        name=f"{run.recipe.method.name} {device}",
        record=run.record,
        quantize=quantize,
    )
    return {
        "device": device,
        "format": "onnx",
        "folder": str(to),
        "bytes": bytes_in(to),
        "quantize": quantize,
        "parity": asdict(parity) | {"line": parity.line},
    }
