"""Number formats with units, a run's headline numbers, and the table of a finished run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, isfinite
from typing import Any, Literal, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

MISSING = "-"
REFERENCES = (  # key of the summary, name, what it is
    ("reference_commonest", "Commonest class", "reference: always answering it"),
    ("reference_tfidf", "TF-IDF", "reference: fitted on all rows"),
    ("reference_logistic", "Logistic", "reference: fitted on all rows"),
    ("reference_base", "Untuned base", "reference: loss before training"),
)


@dataclass(frozen=True)
class Headline:
    """A headline number; `note` says what it means or how it splits."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class UnprunedRun:
    """A run without pruning at the same budget; `name` is its method's, or its label in a sweep."""

    name: str
    folder: str
    accuracy: float | None
    loss: float | None

    def quality(self, name: str) -> float | None:
        """Its accuracy or its loss."""
        return self.accuracy if name == "accuracy" else self.loss


def percent(share: float | None) -> str:
    """A share of one, in percent.

    >>> percent(0.7112), percent(None)
    ('71.1 %', '-')
    """
    return MISSING if _missing(share) else f"{100 * share:.1f} %"


def points(difference: float | None) -> str:
    """A difference of two shares, in percentage points and with its sign.

    >>> points(0.71 - 0.723)
    '-1.3 points'
    """
    # adding zero turns -0.0 into 0.0
    return MISSING if _missing(difference) else f"{round(100 * difference, 1) + 0.0:+.1f} points"


def decimal(value: float | None, digits: int = 3) -> str:
    """A number without a unit, such as a loss.

    >>> decimal(1.23456), decimal(float("nan"))
    ('1.235', '-')
    """
    return MISSING if _missing(value) else f"{value:.{digits}f}"


def bytes_text(count: float | None) -> str:
    """Bytes in decimal units.

    >>> bytes_text(512), bytes_text(999_960), bytes_text(22_700_000)
    ('512 B', '1.0 MB', '22.7 MB')
    """
    if _missing(count):
        return MISSING
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):  # noqa: B007 - the last one tried is the unit
        count /= 1000
        # compared as it will be printed, so that 999,960 never reads as 1000.0 kB
        if round(count, 1) < 1000:
            break
    return f"{count:.1f} {unit}"


def seconds_text(seconds: float | None) -> str:
    """Seconds in readable units.

    >>> seconds_text(0.351), seconds_text(12.34), seconds_text(125)
    ('0.35 s', '12.3 s', '2 min 05 s')
    >>> seconds_text(3720), seconds_text(100_000)
    ('1 h 02 min', '1 d 3 h')
    """
    if _missing(seconds):
        return MISSING
    if round(seconds, 1) < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    return "{} d {} h".format(*divmod(hours, 24))


def counted(count: int, thing: str) -> str:
    """A count with its noun.

    >>> counted(1, "round"), counted(20, "round")
    ('1 round', '20 rounds')
    """
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def headlines(summary: Mapping[str, Any], unpruned: Sequence[UnprunedRun] = ()) -> list[Headline]:
    """The headline numbers of a run, in reading order; those that the summary lacks are left out.

    `unpruned` are runs of the same budget that a pruned one is read against. `waiting_seconds` is
    the sum over rounds of a device's mean wait, so its share of `simulated_seconds` is below one.
    """
    lines = (*_quality(summary, unpruned), *_price(summary))
    return [line for line in lines if line.value != MISSING]


def summary_line(summary: Mapping[str, Any]) -> str:
    """What ran, in one line.

    >>> summary_line({"method": "fedspine", "seed": 0, "rounds": 20, "devices": 80})
    'fedspine, 20 rounds, 80 devices, seed 0'
    """
    parts = [str(summary.get("method") or "")]
    parts += [
        counted(summary[name], name[:-1])
        for name in ("rounds", "devices")
        if summary.get(name) is not None
    ]
    parts += [f"seed {summary['seed']}"] if summary.get("seed") is not None else []
    return ", ".join(part for part in parts if part)


def summary_table(summary: Mapping[str, Any], unpruned: Sequence[UnprunedRun] = ()) -> Table:
    """The headline numbers and the state's fingerprint, for the end of a run and for looking at it
    later.
    """
    table = Table(
        title=Text(summary_line(summary)), title_justify="left", box=box.SIMPLE, show_header=False
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for line in headlines(summary, unpruned):
        # Text, since a string would be read as markup
        table.add_row(Text(line.label), Text(line.value), Text(line.note))
    if summary.get("state_sha256"):
        table.add_row(
            "state",
            Text(str(summary["state_sha256"])[:12]),
            "sha256 of the final state, first 12 digits",
        )
    return table


def print_table(table: Table, stream: TextIO) -> None:
    """Write a table; plain text where `stream` is not a terminal."""
    Console(file=stream).print(table)


def quality_of(summary: Mapping[str, Any]) -> Literal["accuracy", "loss"]:
    """The quality measure of a run."""
    return "accuracy" if summary.get("accuracy") is not None else "loss"


def unpruned_base(summary: Mapping[str, Any]) -> tuple[float, str] | None:
    """The quality of a pruned run's adapter on the unpruned base, and what that is.

    It does not say what pruning costs: only a run that never prunes does. None where nothing is
    pruned, since that is the run's own model.
    """
    value = summary.get(f"{quality_of(summary)}_dense")
    if _missing(value) or summary.get("sparsity") == 0:
        return None
    tuned = summary.get("tuned_unpruned", False)
    return value, f"same adapter, {'as it was tuned' if tuned else 'for which it was not tuned'}"


def difference(summary: Mapping[str, Any], unpruned: UnprunedRun) -> float | None:
    """The quality of the device models minus that of an unpruned run."""
    name = quality_of(summary)
    devices, other = summary.get(name), unpruned.quality(name)
    return None if _missing(devices) or _missing(other) else devices - other


def unpruned_table(
    summary: Mapping[str, Any], unpruned: Sequence[UnprunedRun]
) -> list[dict[str, Any]]:
    """The same as plain data: each unpruned run with the difference to it."""
    return [asdict(run) | {"difference": difference(summary, run)} for run in unpruned]


def _quality(summary: Mapping[str, Any], unpruned: Sequence[UnprunedRun]) -> list[Headline]:
    name = quality_of(summary)
    form, gap_form = (percent, points) if name == "accuracy" else (decimal, _signed)
    devices, common = summary.get(name), summary.get(f"{name}_global")
    lines = [
        Headline("Device models", form(devices), f"mean {name} of {_sample(summary)}"),
        Headline("Global model", form(common), f"{name} of the one shared model"),
    ]
    if f"{name}_own" in summary:
        note = f"mean {name} on the rows that {counted(summary['devices_own'], 'device')} hold out"
        lines += [
            Headline("Own models", form(summary[f"{name}_own"]), note),
            Headline("Global there", form(summary[f"{name}_own_global"]), "on the same rows"),
        ]
    for run in unpruned:
        gap = gap_form(difference(summary, run))
        lines += [
            Headline(
                "Unpruned run",
                form(run.quality(name)),
                f"{run.name}: same data, seed, rounds and steps",
            ),
            Headline("Gap to unpruned", gap, "device models minus unpruned run, one seed"),
        ]
    if not unpruned and (base := unpruned_base(summary)) is not None:
        value, note = base
        lines.append(Headline("Unpruned base", form(value), note))
    return [
        *lines,
        *(Headline(what, form(value), note) for what, note, value in references(summary)),
        *_answer_lines(summary),
    ]


def answer_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Of each model that answered test rows: its name, exact match, ROUGE-L, and the perplexity of
    the data's answers.
    """
    losses = {
        "untuned": summary.get("reference_base"),
        "unpruned": summary.get("loss_dense"),
        "pruned": summary.get("loss_global"),
    }
    return [
        (
            name,
            percent(each.get("exact_match")),
            decimal(each.get("rouge_l")),
            decimal(None if _missing(losses.get(name)) else exp(losses[name]), 2),
        )
        for name, each in (summary.get("answer_scores") or {}).items()
    ]


def _answer_lines(summary: Mapping[str, Any]) -> list[Headline]:
    """ROUGE-L of the last model, with that of the models that it comes from."""
    *others, last = answer_rows(summary) or [None]
    if last is None:
        return []
    beside = ", ".join(f"{name} {rouge}" for name, _, rouge, _ in others)
    to = counted(summary.get("answers") or 0, "test row")
    return [Headline("ROUGE-L", last[2], f"{last[0]}, answers to {to}; {beside}")]


def _signed(difference: float | None) -> str:
    return MISSING if _missing(difference) else f"{difference:+.3f}"


def references(summary: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Name, meaning and value of the reference scores beside a run's results."""
    return [
        (what, note, summary[key])
        for key, what, note in REFERENCES
        if not _missing(summary.get(key))
    ]


def _sample(summary: Mapping[str, Any]) -> str:
    """Which of the devices' models were scored."""
    scored, devices = summary.get("devices_scored"), summary.get("devices")
    if scored is None or devices is None or scored >= devices:
        return "what devices run"
    return f"{scored} of {devices} devices' models; all: fedspine show --all"


def _price(summary: Mapping[str, Any]) -> list[Headline]:
    get = summary.get
    waiting, wall = get("waiting_seconds"), get("wall_seconds")
    real = get("fleet_seconds") is not None
    seconds, clock = (
        (get("fleet_seconds"), "measured") if real else (get("simulated_seconds"), "simulated")
    )
    share = None if waiting is None or not seconds else waiting / seconds
    down, up = get("bytes_down"), get("bytes_up")
    total = None if down is None or up is None else down + up
    speed = get("samples_per_second")
    return [
        Headline("Sparsity", percent(get("sparsity")), "prunable parameters removed"),
        *_structure(summary),
        *_vocabulary(summary),
        Headline("Fleet time", seconds_text(seconds), "on the wall, between real machines")
        if real
        else Headline("Simulated time", seconds_text(seconds), "on the devices' virtual clock"),
        Headline("Waiting share", percent(share), f"{seconds_text(waiting)} {clock}, mean device"),
        Headline("Traffic", bytes_text(total), f"{bytes_text(down)} down, {bytes_text(up)} up"),
        Headline(
            "Peak memory",
            bytes_text(get("peak_memory_bytes_simulated")),
            "simulated, of the fullest device",
        ),
        Headline(
            "Wall time",
            seconds_text(wall),
            "" if _missing(speed) else f"{speed:,.0f} samples per wall second",
        ),
    ]


def _structure(summary: Mapping[str, Any]) -> list[Headline]:
    """The kind of structure that a pruning method was asked for, and what is left of each layer."""
    kind = summary.get("structure")
    if kind is None:
        return []
    parts = []
    for name in ("heads", "channels"):
        kept = summary[f"{name}_kept"]
        few, many = min(kept), max(kept)
        parts.append(f"{few if few == many else f'{few} to {many}'} of {summary[name]} {name}")
    note = f"{', '.join(parts)} a layer; asked: {percent(summary['sparsity_asked'])}"
    return [Headline("Structure", kind, note)]


def _vocabulary(summary: Mapping[str, Any]) -> list[Headline]:
    """How many of the model's tokens are kept, and the bytes saved."""
    found = summary.get("vocabulary")
    if found is None:
        return []
    note = (
        f"of {found['whole']:,} tokens; {bytes_text(found['bytes_saved'])} saved in fp32; "
        f"{percent(found['same'])} of the test texts' tokens as before"
    )
    if found["epsilon"] is not None:
        note += f"; counted with epsilon {found['epsilon']:g} of each text"
    return [Headline("Vocabulary", f"{found['kept']:,}", note)]


def _missing(value: float | None) -> bool:
    return value is None or not isfinite(value)


def device_table(scores: Mapping[str, Mapping[str, float]]) -> Table:
    """Every device's model, worst first, and their mean."""
    judged = any("accuracy" in each for each in scores.values())
    table = Table("device", *(("accuracy",) if judged else ()), "loss", "sparsity")
    for column in table.columns[1:]:
        column.justify = "right"
    names = ("accuracy", "loss", "sparsity") if judged else ("loss", "sparsity")
    forms = {"accuracy": percent, "loss": decimal, "sparsity": percent}
    for id in sorted(scores, key=lambda id: -scores[id]["loss"]):
        table.add_row(Text(id), *(forms[name](scores[id][name]) for name in names))
    table.add_section()
    means = (forms[n](sum(each[n] for each in scores.values()) / len(scores)) for n in names)
    table.add_row(f"mean of {counted(len(scores), 'device')}", *means)
    return table
