"""The runs that `fedspine fit` chooses from, each opened once: what models it has, how good and how
large they are, and how one is exported and scored in a format.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from math import inf, isnan
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode

from fedspine.core.errors import BadInput
from fedspine.core.task import Examples, TaskKind
from fedspine.data.array_rows import GivenRows
from fedspine.exports import of_run
from fedspine.exports.agreement import answers, net_answers
from fedspine.exports.of_run import RunModel
from fedspine.exports.parity_rows import RANDOM_WORDS, parity_rows
from fedspine.exports.saved_run import DENSE, GLOBAL, device_ids_of
from fedspine.lm.cost import Extent, forward_flops
from fedspine.lm.score import score
from fedspine.lm.structure import sparsity
from fedspine.nets.load import arranged_shape, empty
from fedspine.nets.net import Net
from fedspine.nets.score import score_nets
from fedspine.runs.run_dir import recipe_of
from fedspine.runs.task_record import TaskRecord

ROWS = 1000  # that models are scored on, at most


@dataclass(frozen=True)
class ModelCost:
    """What a forward pass of one model computes."""

    flops: float
    layers: int


class FitRun(Protocol):
    """One run to choose from; a name is a device's id, `global` or `dense`."""

    folder: Path
    record: TaskRecord
    rows: int  # that its models are scored on
    rows_from: str
    tokens: int | None  # of a row at most; None for nets

    def names(self) -> tuple[str, ...]: ...

    def model(self, name: str) -> Any: ...

    def falling(self, model: Any) -> float:
        """A number that is lower for a better model, from the rows."""

    def size(self, model: Any) -> Hashable:
        """Equal for models that cost the same."""

    def check_format(self, format: str) -> None:
        """Raise BadInput for a format that its models cannot have."""

    def export(self, name: str, format: str, quantize: str | None, to: Path) -> None:
        """Write a model to the new folder `to`; raises BadInput outside its tolerance."""

    def quality(self, loaded: Any) -> float:
        """Accuracy, 0 to 1, or loss in nats per token, of an export on the rows."""

    def sparsity(self, name: str) -> float: ...

    def cost(self, name: str, batch: int, tokens: int | None) -> ModelCost: ...


def open_runs(
    folders: list[Path], *, base: str | None, rows: str | None
) -> list["TextRun | NetRun"]:
    """The runs in these folders, with the rows to score on: those of the data in `rows`, else their
    test rows.

    Raises BadInput for folders that are not runs, a base that is missing, runs of different data,
    and without rows to score on.
    """
    runs: list[TextRun | NetRun] = []
    for folder in folders:
        array = recipe_of(folder).task.kind == "array"
        runs.append(_net_run(folder, base, rows) if array else _text_run(folder, base, rows))
        _check_alike(runs[0], runs[-1])
    return runs


def falling(value: float, kind: TaskKind) -> float:
    """A loss, or an accuracy, as a number that is lower for a better model; NaN counts as the
    worst.
    """
    if isnan(value):
        return inf
    return value if kind == "causal-lm" else -value


def _check_alike(first: FitRun, other: FitRun) -> None:
    mine, its = first.record, other.record
    if (mine.kind, mine.classes, mine.data_sha256) != (its.kind, its.classes, its.data_sha256):
        raise BadInput(
            f"{first.folder} and {other.folder} are runs on different data, so their models have "
            "no common rows; give runs on one data set"
        )


# --- transformers ---


@dataclass(frozen=True)
class TextRun:
    """A run on texts."""

    folder: Path
    run: RunModel
    examples: Examples
    rows_from: str
    given: str | None  # the data that rows were named by

    @property
    def record(self) -> TaskRecord:
        return self.run.record

    @property
    def rows(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> int:
        return self.record.max_tokens

    def names(self) -> tuple[str, ...]:
        return (DENSE, GLOBAL, *device_ids_of(self.folder))

    def model(self, name: str) -> Any:
        return self.run.model(name)

    def falling(self, model: Any) -> float:
        found = score(self.run.base, model, self.examples)
        kind = self.record.kind
        return falling(found.mean_loss if kind == "causal-lm" else found.accuracy, kind)

    def size(self, model: Any) -> Hashable:
        kept = model.structure
        return tuple(kept.heads.sum(1).tolist()), tuple(kept.channels.sum(1).tolist())

    def check_format(self, format: str) -> None:
        of_run.check_kind(format, self.run)

    def export(self, name: str, format: str, quantize: str | None, to: Path) -> None:
        compared = format in of_run.OTHER_RUNTIMES or quantize not in (None, "none")
        rows = self.given if compared else None
        options = of_run.ExportOptions(quantize=quantize, rows=rows, parity=compared)
        of_run.check_options(format, options)
        of_run.export_opened(self.run, options, device=name, format=format, to=to)

    def quality(self, loaded: Any) -> float:
        _, accuracy, loss = answers(loaded, self.examples)
        return float(loss if accuracy is None else accuracy)  # type: ignore[arg-type]

    def sparsity(self, name: str) -> float:
        return sparsity(self.run.base.layout, self.model(name).structure)

    def cost(self, name: str, batch: int, tokens: int | None) -> ModelCost:
        layout, length = self.run.base.layout, tokens or self.tokens
        extent = Extent(tokens=batch * length, squared_tokens=batch * length**2)
        flops = (1 - self.sparsity(name)) * forward_flops(layout, extent)
        return ModelCost(flops, layout.layers)


def _text_run(folder: Path, base: str | None, rows: str | None) -> TextRun:
    run = of_run.open_run(folder, base)
    # encoded by the run's own tokenizer, whose vocabulary may be cut
    examples, rows_from = parity_rows(run.recipe, run.record, run.tokenizer, rows, ROWS)
    if rows_from == RANDOM_WORDS:
        raise BadInput(
            f"the data of {folder} is not available, so its models cannot be scored; give rows "
            "with --rows"
        )
    if run.record.kind != "causal-lm" and examples.labels is None:
        raise BadInput(
            "the rows have no labels, so models cannot be scored; give others with --rows"
        )
    return TextRun(folder, run, examples, rows_from, rows)


# --- nets on arrays ---


@dataclass(frozen=True)
class NetRun:
    """A run on arrays."""

    folder: Path
    run: Any  # a `net_of_run.RunNet`
    tokens: None = None

    @property
    def record(self) -> TaskRecord:
        return self.run.record

    @property
    def rows(self) -> int:
        return len(self.run.data.raw)

    @property
    def rows_from(self) -> str:
        return self.run.data.rows_from

    def names(self) -> tuple[str, ...]:
        return (DENSE, GLOBAL, *device_ids_of(self.folder))

    def model(self, name: str) -> Any:
        return self.run.model(name)

    def falling(self, model: Any) -> float:
        shape = arranged_shape(model.net, self._shape)
        net = Net(model.net, shape, len(self.record.classes))
        (found,) = score_nets(net, [model], self.run.data.read)
        return falling(found.accuracy, "array")

    def size(self, model: Any) -> Hashable:
        return model.net

    def check_format(self, format: str) -> None:
        of_run.check_net_format(self.run.recipe, format)

    def export(self, name: str, format: str, quantize: str | None, to: Path) -> None:
        from fedspine.exports.net_of_run import export_net

        export_net(self.run, name, to, quantize=quantize or "none")

    def quality(self, loaded: Any) -> float:
        raw = self.run.data.raw
        _, accuracy, _ = net_answers(loaded, GivenRows(raw.x, raw.labels))
        return float(accuracy)  # type: ignore[arg-type]

    def sparsity(self, name: str) -> float:
        return 0.0

    def cost(self, name: str, batch: int, tokens: int | None) -> ModelCost:
        net, classes = self.model(name).net, len(self.record.classes)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            module = empty(net, self._shape, classes).eval()
            module(torch.empty(batch, *arranged_shape(net, self._shape)))
        return ModelCost(counter.get_total_flops(), len(module))

    @property
    def _shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.run.data.raw.x.shape[1:]
        return shape


def _net_run(folder: Path, base: str | None, rows: str | None) -> NetRun:
    if base is not None:
        raise BadInput(f"{folder} trained a net on arrays, which has no base; leave --base out")
    from fedspine.exports.net_of_run import open_net_run  # needs fedspine[onnx]

    return NetRun(folder, open_net_run(folder, rows))
