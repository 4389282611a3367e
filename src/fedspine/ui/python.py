"""The functions of the command line for scripts and notebooks: they return objects and print
nothing.

>>> from fedspine import FedLora, Recipe, compare, run
>>> job = {"data": "rows.csv", "model": "tiny", "devices": 3, "per_round": 2, "rounds": 2}
>>> runs = [run(Recipe(method=FedLora(rank=r, steps=2), **job)) for r in (2, 4)]
>>> len(compare(runs, latency=False).table()["comparisons"])
1
"""

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.text import Text

from fedspine.core.errors import BadInput
from fedspine.exports import hub
from fedspine.exports.of_run import export_model
from fedspine.exports.run_models import Models
from fedspine.exports.saved_run import GLOBAL
from fedspine.report.page import REPORT
from fedspine.report.rows import read_rows
from fedspine.report.series import Checks, Traffic, Waiting, checks, traffic, waiting
from fedspine.report.tables import headlines, summary_line, summary_table
from fedspine.runs import config, loop
from fedspine.runs.backend import RealSites
from fedspine.runs.config import Recipe
from fedspine.runs.run_dir import RECORDS, recipe_of, status_of, summary_of
from fedspine.ui.compare import write
from fedspine.ui.compare.comparison import ComparisonReport, find
from fedspine.ui.compare.terminal import WIDE, rendered
from fedspine.ui.progress import progress_for


@dataclass(frozen=True, repr=False)
class RunResult:
    """A finished run, read from its folder; a terminal and a notebook show its headline numbers.

    >>> from fedspine import load
    >>> result = load("runs/fedlora-1")
    >>> result.summary["method"], result.curves.rounds.tolist()
    ('fedlora', [1.0])
    >>> sorted(result.models)
    ['agx-02', 'dense', 'global', 'nx-01', 'tx2-00']
    >>> type(result.models["nx-01"].module).__name__
    'BertForSequenceClassification'
    """

    folder: Path
    recipe: Recipe  # with its open choices decided
    summary: Mapping[str, Any]

    @cached_property
    def curves(self) -> Checks:
        """Accuracy, loss, simulated seconds and bytes at each check during the run, as arrays.

        `rounds` says after how many rounds each check was; `evaluate_every` of the recipe decides.
        """
        return checks(self._rows)

    @cached_property
    def traffic(self) -> Traffic:
        """Bytes down and up of all devices since the start, round by round, as arrays."""
        return traffic(self._rows)

    @cached_property
    def waiting(self) -> Waiting:
        """The length of each round and the mean idle time per device, as arrays."""
        return waiting(self._rows)

    @property
    def models(self) -> Models:
        """The model of each device, and those called `global` and `dense`."""
        return Models(self.folder)

    @property
    def report(self) -> Path:
        """The path of the run's report page."""
        return self.folder / REPORT

    def export(self, to: str | Path, **options: Any) -> dict[str, Any]:
        """Write one model to the new folder `to`; the options are those of `fedspine.export`."""
        return export(self, to, **options)

    @cached_property
    def _rows(self) -> Any:
        return read_rows(self.folder / RECORDS)

    def __repr__(self) -> str:
        first = headlines(self.summary)[0]
        text = f"{summary_line(self.summary)}: {first.label.lower()} {first.value}"
        return f"<RunResult {str(self.folder)!r}: {text}>"

    def __rich__(self) -> RenderableType:
        return Group(summary_table(self.summary), Text(f"report: {self.report}"))

    def _repr_html_(self) -> str:
        return _html(self)


@dataclass(frozen=True, repr=False)
class ComparisonResult:
    """A comparison of runs; a terminal and a notebook show what `fedspine compare` prints."""

    report: ComparisonReport

    def table(self) -> dict[str, Any]:
        """Every number, as plain data; docs/compare.md explains them."""
        return self.report.table()

    def write(self, folder: str | Path) -> Path:
        """Write the page, the tables and the plots into a folder; returns the page's path."""
        return write.write(self.report, Path(folder))

    def __repr__(self) -> str:
        titles = "; ".join(section.comparison.title for section in self.report.sections)
        return f"<ComparisonResult of {self.report.runs} runs: {titles}>"

    def __rich__(self) -> RenderableType:
        return rendered(self.report)

    def _repr_html_(self) -> str:
        return _html(self)


def run(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    quiet: bool = True,
    *,
    sites: RealSites | None = None,
) -> RunResult:
    """Run a recipe, or a recipe file, on simulated devices or at the `sites` of a real fleet.

    Results go to the new folder `out`, by default `runs/METHOD-N` of the working directory, as on
    the command line; a run that was interrupted goes on with `resume`. Unless `quiet`, stderr shows
    how far the run is and what it comes to. Raises BadInput for what cannot be run, before the
    folder is made; Stopped where the run cannot go on.

    >>> from fedspine import FedLora, Recipe, run
    >>> result = run(Recipe(method=FedLora(rank=4, steps=2), data="rows.csv", model="tiny",
    ...                     devices=3, per_round=2, rounds=2))
    >>> result.summary["rounds"], len(result.traffic.up)
    (2, 2)
    """
    if not isinstance(recipe, Recipe):
        recipe = config.load(Path(recipe))
    recipe = config.anchored(recipe)
    folder = Path(out) if out is not None else free_folder(recipe.method.name)
    with _as_before():
        progress = progress_for(quiet)
        progress.finished(summary_table(loop.new_run(recipe, folder, progress, sites)))
    return load(folder)


def resume(
    folder: str | Path,
    recipe: Recipe | None = None,
    quiet: bool = True,
    *,
    sites: RealSites | None = None,
    from_round: int | None = None,
) -> RunResult:
    """Resume the run in a folder from its last saved round; a finished run is returned as it is.

    The recipe is optional; if given, it must be the folder's. `from_round` goes back to the round
    before the last, or to 0, where something in the folder was damaged. Raises as `run` does.

    >>> from fedspine import resume
    >>> resume("runs/fedlora-1").summary["rounds"]
    2
    """
    with _as_before():
        progress = progress_for(quiet)
        summary = loop.resume(Path(folder), progress, recipe, sites, from_round)
        progress.finished(summary_table(summary))
    return load(folder)


def load(folder: str | Path) -> RunResult:
    """The finished run in a folder; raises BadInput for another folder and for an unfinished run.

    >>> from fedspine import load
    >>> load("runs/fedlora-1").recipe.method.rank
    4
    """
    folder = Path(folder)
    recipe, summary = recipe_of(folder), summary_of(folder)
    if summary is None:
        found = status_of(folder)
        raise BadInput(
            f"the run in {folder} is not finished, {found['rounds_done']} of {found['rounds']} "
            f"rounds are done; resume it with fedspine.resume({str(folder)!r})"
        )
    return RunResult(folder, recipe, summary)


def compare(
    runs: Iterable[RunResult | str | Path],
    target: str = "auto",
    latency: bool = True,
    quiet: bool = True,
) -> ComparisonResult:
    """Compare runs, given as results or as the folders of runs and sweeps; docs/compare.md.

    `target` is the accuracy or loss that runs are timed to; with `latency`, the deployed models are
    measured on this machine. Raises BadInput for runs that cannot be compared.

    >>> from fedspine import compare
    >>> found = compare(["runs/fedlora-1"], latency=False).table()["comparisons"][0]
    >>> found["measure"], [method["name"] for method in found["methods"]]
    ('accuracy', ['fedlora'])
    """
    progress = progress_for(quiet)
    try:
        paths = [_folder(each) for each in runs]
        return ComparisonResult(find(paths, target=target, latency=latency, progress=progress))
    finally:
        progress.close()


def export(
    run: RunResult | str | Path,
    to: str | Path,
    *,
    device: str = GLOBAL,
    format: str = "hf",
    with_base: bool = False,
    base: str | None = None,
    quantize: str | None = None,
    rows: str | Path | None = None,
    parity: bool = True,
    push_to_hub: str | None = None,
    private: bool = False,
) -> dict[str, Any]:
    """Write one deployed model of a run to the new folder `to`; returns what it is.

    `device` is a device's id, `global` or `dense`; `format` is `hf`, a merged model, `onnx`, the
    same for ONNX Runtime, `executorch`, a classifier of texts for ExecuTorch, `gguf`, a language
    model for llama.cpp, or `peft`, an adapter, and `with_base` adds the model that it fits; `base`
    says where the run's base is now. `quantize` is `none` (the default) or `int8` for `hf`, also
    `fp16` or `int8-static` (calibrated on the run's training rows) for ONNX, and `f16` (the
    default), `q8_0` or `q4_k_m` for GGUF. What was written is compared with the run's model on
    `rows` (None: the run's test rows), which `parity=False` leaves out for `peft` and for `hf` in
    fp32. `push_to_hub` is a repository of the Hugging Face Hub that gets the folder, too, made
    `private` where it is new.
    Raises BadInput for an unknown device, format or quantisation, for a folder that exists, for an
    export outside its tolerance, and where the Hub refuses.

    >>> from fedspine import export, load_model, predict
    >>> export("runs/fedlora-1", "models/nx", device="nx-01")["sparsity"]
    0.0
    >>> predict(load_model("models/nx"), ["good the very"])[0].label in ("kind", "unkind")
    True
    """
    client = None if push_to_hub is None else hub.client_for(push_to_hub)
    found = export_model(
        _folder(run),
        device=device,
        format=format,
        to=Path(to),
        with_base=with_base,
        base=base,
        quantize=quantize,
        rows=None if rows is None else str(rows),
        parity=parity,
    )
    if push_to_hub is not None and client is not None:
        found["pushed_to"] = hub.push(Path(to), push_to_hub, client, private=private)
    return found


def free_folder(name: str) -> Path:
    """The first of the folders runs/NAME-1, runs/NAME-2, ... that does not exist."""
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder


def _folder(run: RunResult | str | Path) -> Path:
    return run.folder if isinstance(run, RunResult) else Path(run)


@contextmanager
def _as_before() -> Iterator[None]:
    """A run takes one of torch's threads; afterwards the caller has as many as before."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _html(shown: RenderableType) -> str:
    """What the terminal shows, for a notebook; names in it are escaped."""
    console = Console(file=io.StringIO(), record=True, width=WIDE, force_jupyter=False)
    console.print(shown)
    pre = "<pre style='white-space:pre;overflow-x:auto;line-height:normal'>{code}</pre>"
    return console.export_html(inline_styles=True, code_format=pre)
