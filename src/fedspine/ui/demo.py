"""`fedspine demo`: the same path as a real run, from data to a report and an exported model, in
half a minute.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedspine.exports.hf import load_model, predict
from fedspine.exports.of_run import export_model
from fedspine.report.rows import read_rows
from fedspine.report.tables import percent, summary_table
from fedspine.runs.assemble import identities
from fedspine.runs.config import embedded
from fedspine.runs.config import recipe as recipe_from
from fedspine.runs.loop import new_run
from fedspine.runs.run_dir import RECORDS
from fedspine.ui.progress import progress_for

TEXTS = (
    "Return the number of seconds since the epoch as a float.",
    "Open a socket and listen for connections.",
    "Split the string at each separator.",
)
BAR = 40  # characters of an accuracy of 100 %


def demo(out: Path) -> None:
    """Run the small recipe into the new folder `out`, then show what it learnt and what one
    device's model answers.
    """
    recipe, console, progress = recipe_from(embedded("demo")), Console(), progress_for(json=False)
    summary = new_run(recipe, out, progress)
    progress.finished(summary_table(summary))
    console.print(curve(out))
    device = identities(recipe)[-1]
    folder = out / "models" / device
    found = export_model(out, device=device, format="hf", to=folder, parity=False)
    table = Table("text", "topic", "probability", title=f"the model of device {device} answers")
    for text, answer in zip(TEXTS, predict(load_model(folder), TEXTS), strict=True):
        table.add_row(text, answer.label, f"{answer.probability:.2f}")
    console.print(table)
    console.print(
        Text(
            f"report: {out / 'report.html'}\n"
            f"that model, {found['bytes'] / 1e6:.0f} MB: {folder}\n"
            "the same with your data: fedspine run --set task.data=FILE\n"
            "the whole job, 80 devices: fedspine run"
        )
    )


def curve(folder: Path) -> Table:
    """The accuracy of a run's checks as bars, one a line."""
    table = Table(
        title="accuracy of the devices' pruned models", box=None, show_header=False, padding=(0, 1)
    )
    for row in read_rows(folder / RECORDS).scores:
        label = "at the end" if row.final else f"round {row.round + 1}"
        bar = Text("█" * round((row.accuracy or 0.0) * BAR), style="cyan")
        table.add_row(label, bar, percent(row.accuracy))
    return table
