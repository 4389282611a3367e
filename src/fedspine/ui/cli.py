"""The command line: parsing and printing only. Bad input ends with one line on stderr and exit code
2.
"""

import dataclasses
import difflib
import json as jsonlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

try:
    from typer._click import exceptions as usage  # typer brings a copy of click
except ImportError:  # which older versions need
    from click import exceptions as usage
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fedspine
from fedspine.core.errors import BadInput, Stopped
from fedspine.core.process import ends_when_told
from fedspine.ui import data_cli, fleet_cli
from fedspine.ui.fleet_cli import Json

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Tune a pre-trained language model across many unequal devices, prune it while it tunes, "
        "and give each device a small model of its own. Start with: fedspine run"
    ),
)

app.add_typer(fleet_cli.app, name="fleet")
app.command("data")(data_cli.data)

RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `fedspine run` made.")]
Reference = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="An unpruned run of the same data, seed and budget."),
]
ModelFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder that `fedspine export` made.")
]


def main() -> None:
    """Run the command line; every expected failure becomes one line and exit code 2."""
    try:
        _none_empty(sys.argv[1:])
        sys.exit(app(prog_name="fedspine", standalone_mode=False))
    except BadInput as error:
        _fail(str(error))
    except usage.UsageError as error:
        _fail_usage(error)
    except typer.Abort:
        _fail("interrupted", exit_code=130)
    except Stopped as stopped:
        _fail(str(stopped), stopped.exit_code)
    except OSError as error:  # such as a full disk or an unreadable folder
        _fail(str(error))


def _fail(line: str, exit_code: int = 2) -> NoReturn:
    print(f"fedspine: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(exit_code)


def _none_empty(arguments: list[str]) -> None:
    """Raise BadInput for an argument without a character, which as a path would be the current
    folder.
    """
    options = True  # until --
    for number, argument in enumerate(arguments):
        before = arguments[number - 1] if number else "fedspine"
        if not argument.strip():
            raise BadInput(
                f"what comes after {before!r} is empty; give it a value, or leave it out"
            )
        if options and argument.startswith("--") and argument.endswith("="):
            raise BadInput(f"{argument} has no value; give it one, or leave it out")
        options = options and argument != "--"


def _fail_usage(error: Any) -> NoReturn:
    """One line for a command that cannot be parsed, help for one without arguments."""
    if isinstance(error, getattr(usage, "NoArgsIsHelpError", ())):  # which older versions lack
        error.show()
        sys.exit(error.exit_code)
    command = error.ctx.command_path if error.ctx else "fedspine"
    if not isinstance(error, usage.NoSuchOption):
        said = " ".join(error.format_message().split()).rstrip(".")
        _fail(f"{said[:1].lower()}{said[1:]}; see: {command} --help", error.exit_code)
    line = f"unknown option {error.option_name!r} of {command}"
    if guess := difflib.get_close_matches(error.option_name, error.possibilities or (), 1, 0.7):
        line += f"; did you mean {guess[0]!r}?"
    if command.endswith(" predict"):
        line += (
            "; a text that begins with a dash comes after --, as in: fedspine predict DIR -- TEXT"
        )
    _fail(f"{line}; see: {command} --help", error.exit_code)


@app.callback(invoke_without_command=True)
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.")
    ] = False,
) -> None:
    if version:
        print(fedspine.__version__)
        raise typer.Exit


@app.command()
@ends_when_told()
def run(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE.toml", help="What to run; default: the embedded job."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Change one value of the recipe; may be repeated.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for results; default: runs/METHOD-N.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    from_round: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="With --resume: go back to round N, as a damaged run says.", min=0
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set run.seed=N.")] = None,
    fleet: Annotated[
        Path | None,
        typer.Option(
            metavar="KIT", help="Run at the sites of a real fleet; KIT is the operator's."
        ),
    ] = None,
    sites: Annotated[
        int, typer.Option(help="With --fleet: begin when so many sites are connected.", min=1)
    ] = 1,
    quorum: Annotated[
        int,
        typer.Option(
            help="With --fleet: stop where fewer sites reply (a number; fleet.quorum is a share).",
            min=1,
        ),
    ] = 1,
    within: Annotated[
        float, typer.Option(help="With --fleet: seconds that a site has for one order.", min=1)
    ] = 600.0,
    largest_share: Annotated[
        float,
        typer.Option(
            help="With --fleet: what one site of three or more counts for at most, 0 to 1."
        ),
    ] = 0.5,
    json: Json = False,
) -> None:
    """Fine-tune and prune across a simulated fleet; without a recipe, the embedded job (80 devices,
    MiniLM).

    A recipe has the tables [task], [fleet], [method] and [run], and may have
    [privacy]; docs/recipes.md lists all keys.

    fedspine run --set method.sparsity=0.3 --set run.rounds=16

    fedspine run --set task.data=reviews.csv --set task.text=review --set task.label=stars
    """
    _prepare_torch()
    from fedspine.runs import config
    from fedspine.ui import python

    if resume is not None and out is not None:
        raise BadInput(
            "--resume goes on in its own folder, so --out "
            "has no place beside it; leave one of them out"
        )
    if resume is None and from_round is not None:
        raise BadInput("--from-round goes back in a run; name its folder with --resume")
    place = _backend(fleet, sites, quorum, within, largest_share)
    if resume is None:
        result = python.run(config.load(recipe, settings, seed), out, json, sites=place)
    else:
        wanted = _wanted(recipe, settings, seed, resume)
        result = python.resume(resume, wanted, json, sites=place, from_round=from_round)
    print(jsonlib.dumps(result.summary) if json else f"report: {result.report}")


def _prepare_torch() -> None:
    # oneDNN keeps what it compiled for each shape; its default of 1024 shapes takes hundreds of
    # megabytes a process. Set before torch is imported, because it is read once.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def _backend(kit: Path | None, sites: int, quorum: int, within: float, largest_share: float) -> Any:
    """The real sites, None for simulated devices."""
    from fedspine.flare.site_state import Timeouts
    from fedspine.runs.backend import RealSites

    if not 0 < largest_share <= 1:
        raise BadInput(
            f"--largest-share is {largest_share}, but a share above 0 and up to 1 was expected"
        )
    if kit is None:
        return None
    timeouts = Timeouts(
        sites=max(sites, quorum), quorum=quorum, within=within, largest_share=largest_share
    )
    return RealSites(kit, timeouts)


def _wanted(recipe: Path | None, settings: list[str] | None, seed: int | None, folder: Path) -> Any:
    """The recipe given with a resume, laid over the folder's own unless it is a file."""
    from fedspine.runs import config
    from fedspine.runs.run_dir import RECIPE, recipe_of

    if recipe is None and not settings and seed is None:
        return None
    recipe_of(folder)
    return config.load(recipe or folder / RECIPE, settings, seed)


@app.command()
@ends_when_told()
def sweep(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.toml", help="Methods, settings, data and seeds to run.")
    ],
    jobs: Annotated[int, typer.Option(help="Runs at once, which share the cores.", min=1)] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the sweep; default: sweeps/NAME OF THE FILE.")
    ] = None,
    only_list: Annotated[
        bool, typer.Option("--list", help="Say what is done; run nothing.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what failed before.")] = False,
    json: Json = False,
) -> None:
    """Run every method under every setting, data set and seed of a file; what is done already is
    not run again.

    docs/sweeps.md explains the file. Exit code 1: at least one run has failed, and the others are
    done.
    """
    from fedspine.ui.sweep.display import print_overview, sweep_progress_for
    from fedspine.ui.sweep.work import carry_out, listed, overview_of

    if only_list:
        found = overview_of(file, out)
    else:
        found = carry_out(
            file, out, jobs=jobs, retry=retry, progress=lambda: sweep_progress_for(json)
        )
    if json:
        print(jsonlib.dumps(found.table()))
    else:
        print_overview(listed(found), found.folder, found.unlisted, everything=only_list)
    if found.counts["failed"] and not only_list:
        raise typer.Exit(1)


@app.command()
def methods(json: Json = False) -> None:
    """List the methods and their settings, those of installed packages too."""
    from fedspine.core import parts
    from fedspine.methods import all_methods, broken, packages

    found = {
        name: {
            "what": (sys.modules[cls.__module__].__doc__ or cls.__name__).strip().splitlines()[0],
            "package": packages().get(name, f"fedspine {fedspine.__version__}"),
            "settings": {
                field.name: parts.table_of(field.default) for field in dataclasses.fields(cls)
            },
            "choices": {
                key: {name: parts.table_of(part()) for name, part in choices.items()}
                for key, choices in parts.choices_of(cls).items()
                if len(choices) > 1
            },
        }
        for name, cls in all_methods().items()
    }
    for one in broken():
        print(f"fedspine: {one.line}", file=sys.stderr)
    if json:
        print(jsonlib.dumps(found))
        return
    for name, entry in found.items():
        rows = [
            ("", entry["what"]),
            ("package", entry["package"]),
            ("settings", _lines(parts.dotted(entry["settings"]))),
        ]
        for key, choices in entry["choices"].items():
            tables = (_lines(parts.dotted({key: table})) for table in choices.values())
            rows.append((f"choices of {key}", "\n\n".join(tables)))
        _table(name, rows)


@app.command()
def devices(json: Json = False) -> None:
    """List the kinds of simulated devices and the default mix."""
    from fedspine.fleets.hardware import DEFAULT_MIX, GROUP_MBPS, KINDS, UTILISATION

    found = {
        kind.name: {
            "default_count": DEFAULT_MIX[kind.name],
            "memory_bytes": kind.memory_bytes,
            "peak_tflops_by_mode": list(kind.peaks_tflops),
        }
        for kind in KINDS.values()
    }
    if json:
        print(
            jsonlib.dumps(
                {"kinds": found, "link_mbps": list(GROUP_MBPS), "utilisation": UTILISATION}
            )
        )
        return
    table = Table(
        "kind", "of 80", "memory", "fp16 peak by power mode, TFLOP/s", title="simulated devices"
    )
    for name, kind in found.items():
        peaks = ", ".join(f"{peak:g}" for peak in kind["peak_tflops_by_mode"])
        table.add_row(
            name, str(kind["default_count"]), f"{kind['memory_bytes'] / 2**30:.0f} GiB", peaks
        )
    Console().print(table)
    print(f"links: four Wi-Fi groups of mean {', '.join(f'{mbps:g}' for mbps in GROUP_MBPS)} Mb/s")


@app.command()
@ends_when_told()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="New folder for results; default: runs/demo-N.")
    ] = None,
) -> None:
    """A first look in half a minute: a small run from data to report, an exported model, and what
    it answers.
    """
    _prepare_torch()
    from fedspine.ui.demo import demo as first_look
    from fedspine.ui.python import free_folder

    first_look(out or free_folder("demo"))


@app.command()
@ends_when_told()
def show(
    folder: RunFolder,
    everyone: Annotated[
        bool, typer.Option("--all", help="Score every device's model on the test set and show it.")
    ] = False,
    reference: Reference = None,
    json: Json = False,
) -> None:
    """Show a run's summary, or how far it is."""
    if everyone:
        if reference is not None:
            raise BadInput("--all shows no unpruned run; leave --reference or --all out")
        _show_everyone(folder, json)
        return
    from fedspine.report.tables import print_table, summary_table, unpruned_table
    from fedspine.runs.run_dir import status_of
    from fedspine.ui.compare.unpruned import unpruned_runs

    found, unpruned = status_of(folder), unpruned_runs(folder, reference)
    if json:
        more = {"unpruned_runs": unpruned_table(found, unpruned)} if unpruned else {}
        print(jsonlib.dumps(found | more))
        return
    print_table(summary_table(found, unpruned), sys.stdout)
    for line in found.get("warnings", ()):
        print(f"warning: {line}")
    if "state_sha256" not in found:
        then = found.get("ended", f"go on with: fedspine run --resume {folder}")
        print(f"not finished: {found['rounds_done']} of {found['rounds']} rounds; {then}")


@app.command()
@ends_when_told()
def report(folder: RunFolder, reference: Reference = None, json: Json = False) -> None:
    """Write a run's report.html again, read against an unpruned run of the same budget."""
    from fedspine.report.page import write_page
    from fedspine.ui.compare.unpruned import unpruned_runs
    from fedspine.ui.progress import progress_for

    progress = progress_for(json)
    progress.stage("drawing the report")
    try:
        page = write_page(folder, unpruned_runs(folder, reference))
    finally:
        progress.close()
    print(jsonlib.dumps({"page": str(page)}) if json else f"report: {page}")


def _show_everyone(folder: Path, json: bool) -> None:
    _prepare_torch()
    from fedspine.report.tables import device_table
    from fedspine.ui.device_scores import device_scores
    from fedspine.ui.progress import progress_for

    progress = progress_for(json)
    try:
        found = device_scores(folder, progress)
    finally:
        progress.close()
    if json:
        print(jsonlib.dumps({"devices": found}))
        return
    Console().print(device_table(found))


@app.command()
@ends_when_told()
def compare(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN...", help="Folders of runs, or of a sweep.", show_default=False
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="auto|X", help="Accuracy (0.7 or 70%) or loss that runs are timed to."
        ),
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder for page, table and plots; default: runs/compare-N.")
    ] = None,
    latency: Annotated[
        bool, typer.Option(help="Measure the deployed models on this machine.")
    ] = True,
    json: Json = False,
) -> None:
    """Compare methods over seeds: quality, time and bytes to a target, waiting, memory, latency;
    docs/compare.md.
    """
    from fedspine.ui import python
    from fedspine.ui.compare.terminal import show

    result = python.compare(runs or [], target, latency, json)
    page = result.write(out or python.free_folder("compare"))
    if json:
        print(jsonlib.dumps(result.table() | {"page": str(page)}))
        return
    show(result.report)
    print(f"page: {page}")


@app.command()
@ends_when_told()
def export(
    folder: RunFolder,
    to: Annotated[Path, typer.Option(help="New folder for the model.")],
    device: Annotated[
        str, typer.Option(help="A device's id, `global`, or `dense` (unpruned).")
    ] = "global",
    format: Annotated[
        str,
        typer.Option(
            help="hf (a merged model), onnx (the same as a graph) or peft (base name and adapter)."
        ),
    ] = "hf",
    with_base: Annotated[
        bool,
        typer.Option(
            "--with-base", help="With --format peft: write the model that the adapter fits, too."
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Where the run's base is now; default: where it was for the run."),
    ] = None,
    quantize: Annotated[
        str, typer.Option(help="With --format onnx: none (fp32), fp16 or int8.")
    ] = "none",
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="With --format onnx: data to compare the graph on; default: the run's test rows.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write one deployed model of a run to a folder: merged, physically smaller, ready for predict
    and bench.
    """
    from fedspine.ui import python

    found = python.export(
        folder,
        to,
        device=device,
        format=format,
        with_base=with_base,
        base=base,
        quantize=quantize,
        rows=rows,
    )
    if json:
        print(jsonlib.dumps(found))
        return
    parity = found.pop("parity", None)
    _table(f"exported to {to}", [(key, str(value)) for key, value in found.items()])
    if parity is not None:
        print(parity["line"])


@app.command()
@ends_when_told()
def predict(
    folder: ModelFolder,
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...",
            help="Texts to label or to continue; -- before one that begins with a dash.",
        ),
    ],
    pair: Annotated[
        list[str] | None,
        typer.Option(help="Second text of each pair, in order; for models of text pairs."),
    ] = None,
    json: Json = False,
) -> None:
    """Label texts, or continue them, with an exported model."""
    from fedspine.exports.hf import load_model
    from fedspine.exports.predict import predict as ask
    from fedspine.storage.records import plain

    found = [dataclasses.asdict(prediction) for prediction in ask(load_model(folder), texts, pair)]
    if json:
        print(jsonlib.dumps(plain({"predictions": found})))
        return
    table = Table("text", *found[0])
    for text, entry in zip(texts, found, strict=True):
        table.add_row(
            escape(text),
            *(f"{v:.3f}" if isinstance(v, float) else escape(str(v)) for v in entry.values()),
        )
    Console().print(table)


@app.command()
@ends_when_told()
def bench(
    folder: ModelFolder,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Another exported model, measured in turns with the first."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens in a row.", min=1)] = 128,
    threads: Annotated[int, typer.Option(help="Processor threads.", min=1)] = 1,
    json: Json = False,
) -> None:
    """Measure an exported model on this machine: latency at batch 1 and 32, file size, peak memory,
    parameters.
    """
    from fedspine.exports import bench as benches
    from fedspine.report.tables import bench_table

    if against is None:
        found = {"model": dataclasses.asdict(benches.bench(folder, tokens=tokens, threads=threads))}
    else:
        found = benches.compare(folder, against, tokens=tokens, threads=threads).table()
    if json:
        print(jsonlib.dumps(found))
        return
    Console().print(bench_table(found))


def _lines(settings: dict[str, Any]) -> str:
    return "\n".join(f"{key} = {jsonlib.dumps(value)}" for key, value in settings.items())


def _table(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=escape(title), show_header=False, title_justify="left")
    for key, value in rows:
        table.add_row(escape(key), escape(value))
    Console().print(table)
