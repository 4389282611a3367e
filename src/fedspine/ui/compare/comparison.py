"""A comparison report: from the given folders to the numbers, the figures and the files."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedspine.core.errors import BadInput
from fedspine.report.drawing import Panel
from fedspine.runs.observer import RunObserver
from fedspine.ui.compare import curves
from fedspine.ui.compare.groups import Group, grouped
from fedspine.ui.compare.latency import Latency, latency_of
from fedspine.ui.compare.numbers import (
    MEASURES,
    Comparison,
    MethodResult,
    Pair,
    compared,
    corrected,
)
from fedspine.ui.compare.render_text import verdict
from fedspine.ui.compare.runs import LeftOut, select

CORRECTION = "Holm, for all pairs of all comparisons here, separately for each measure"


@dataclass(frozen=True)
class ComparisonSection:
    """One comparison with its figures and the latencies by method, where they could be measured."""

    comparison: Comparison
    latencies: Mapping[str, Latency]
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class ComparisonReport:
    """All comparisons of one call. `numbers` fixes each method's colour, `notes` say what could not
    be measured.
    """

    sections: tuple[ComparisonSection, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    numbers: Mapping[str, int]
    runs: int

    def table(self) -> dict[str, Any]:
        """Every number, as plain data."""
        return {
            "comparisons": [_section_table(section) for section in self.sections],
            "correction": CORRECTION,
            "left_out": [asdict(left) for left in self.left_out],
            "notes": list(self.notes),
        }


def find(
    paths: Iterable[Path], *, target: str, latency: bool, progress: RunObserver
) -> ComparisonReport:
    """Compare the runs in these folders.

    Raises BadInput for an empty selection, runs that cannot be compared, and an invalid target.
    """
    selection = select(paths)
    groups = grouped(selection)
    comparisons = corrected([compared(group, target) for group in groups])
    numbers: dict[str, int] = {}
    for group in groups:
        for method in group.methods:
            numbers.setdefault(method.name, len(numbers))
    notes: list[str] = []
    sections = []
    for place, (group, comparison) in enumerate(zip(groups, comparisons, strict=True)):
        latencies = _latencies(group, progress, notes) if latency else {}
        prefix = f"{place + 1}-" if len(groups) > 1 else ""
        sections.append(
            ComparisonSection(
                comparison, latencies, tuple(curves.panels(comparison, numbers, prefix))
            )
        )
    return ComparisonReport(
        tuple(sections), selection.left_out, tuple(notes), numbers, len(selection.runs)
    )


def _latencies(group: Group, progress: RunObserver, notes: list[str]) -> dict[str, Latency]:
    found = {}
    for method in group.methods:
        progress.stage(f"measuring the latency of {method.name}")
        try:
            found[method.name] = latency_of(method)
        except BadInput as error:  # a model whose data is gone; its other numbers stand
            notes.append(f"No latency of {method.name}: {error}.")
    return found


def _section_table(section: ComparisonSection) -> dict[str, Any]:
    comparison = section.comparison
    return {
        "title": comparison.title,
        "measure": comparison.quality.name,
        "higher_is_better": comparison.quality.higher_is_better,
        "target": asdict(comparison.target) | {"checks": comparison.checks},
        "methods": [_result_table(result, section.latencies) for result in comparison.results],
        "differences": [_pair_table(comparison, pair) for pair in comparison.pairs],
    }


def _result_table(result: MethodResult, latencies: Mapping[str, Latency]) -> dict[str, Any]:
    method, found = result.method, latencies.get(result.method.name)
    return {
        "name": method.name,
        "method": next(iter(method.runs.values())).recipe.method.name,
        "runs": {str(seed): str(run.folder) for seed, run in method.runs.items()},
        "seeds": list(method.runs),
        "final": result.final.table(),
        "sparsity": result.sparsity.table(),
        "seeds_that_reach_the_target": result.reached,
        "simulated_seconds_to_target": result.seconds_to_target.table(),
        "bytes_to_target": result.bytes_to_target.table(),
        "simulated_seconds": result.simulated_seconds.table(),
        "bytes": result.bytes.table(),
        "waiting_share": result.waiting_share.table(),
        "peak_memory_bytes_simulated": result.peak_memory_bytes.table(),
        "latency": None if found is None else asdict(found),
    }


def _pair_table(comparison: Comparison, pair: Pair) -> dict[str, Any]:
    def interval(name: str) -> dict[str, Any] | None:
        found = getattr(pair, name)
        return None if found is None else asdict(found) | {"beyond_noise": found.beyond_noise}

    return {
        "first": pair.first,
        "second": pair.second,
        "seeds": list(pair.seeds),
        **{name: interval(name) for name in MEASURES},
        "verdict": verdict(comparison, pair).text,
    }
