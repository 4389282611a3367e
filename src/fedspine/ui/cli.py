"""The command line: its commands, and how it ends. The commands are in the files beside this one,
which parse and print only. Bad input ends with one line on stderr and exit code 2.
"""

import difflib
import errno
import sys
from typing import Annotated, Any, NoReturn

import typer

try:
    from typer._click import exceptions as usage  # typer brings a copy of click
except ImportError:  # which older versions need
    from click import exceptions as usage

import fedspine
from fedspine.core.errors import BadInput, Stopped
from fedspine.ui import (
    catalog_cli,
    data_cli,
    fit_cli,
    fleet_cli,
    model_cli,
    plan_cli,
    results_cli,
    run_cli,
)

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
for command in (
    *(run_cli.run, plan_cli.plan, run_cli.sweep),
    *(catalog_cli.methods, catalog_cli.devices),
    run_cli.demo,
    *(results_cli.show, results_cli.report, results_cli.compare),
    *(model_cli.export, model_cli.predict, model_cli.bench, model_cli.lm_eval, fit_cli.fit),
):
    app.command()(command)


def main() -> None:
    """Run the command line; every expected failure becomes one line and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # not everything that stands in for it has it
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters that it cannot hold
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
        place = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "mend that"
        _fail(f"{place}{error.strerror or error}; {remedy}, then give the same command again")


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
                f"the argument after {before!r} is empty; give it a value, or leave it out"
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
            "; put -- before a text that begins with a dash, as in: fedspine predict DIR -- TEXT"
        )
    _fail(f"{line}; see: {command} --help", error.exit_code)


@app.callback(invoke_without_command=True)
def about(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(fedspine.__version__)
        raise typer.Exit
