"""What `simulator.py` measured, as a page with tables and a plot."""

import datetime
import json
import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median, quantiles, stdev
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from peers.meters import key
from peers.work import Way

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "peft", "flwr", "ray", "pfl")
GIB, MISSING = 2**30, ""


@dataclass(frozen=True)
class Row:
    """One contender over all its seeds."""

    name: str
    what: str
    seconds: list[float]  # of every round of every seed
    samples_per_round: int
    of_ceiling: float  # share, of whole rounds
    passes_of_ceiling: float | None  # of the training passes alone
    outside: float | None  # share of a round that is not training
    peak_bytes: int
    accuracies: list[float]

    @property
    def speed(self) -> float:
        """Samples per second of the median round."""
        return self.samples_per_round / median(self.seconds)


def write(
    results: dict[str, Any], contenders: dict[str, Any], groups: dict[str, list[str]], folder: Path
) -> None:
    """Write simulator.json, .md and .png into `folder`; `groups` are the names in each of the three
    tables.
    """
    results = {**_where(), **results}
    folder.mkdir(exist_ok=True)
    (folder / "simulator.json").write_text(json.dumps(results, indent=1) + "\n")
    rows = [row for name in groups["peers"] if (row := _row(name, contenders[name], results))]
    text = "\n".join(
        [
            *_head(results),
            *_peer_table(rows),
            *_failures(results, contenders),
            *_ratios({row.name: row for row in rows}),
            *_pruned_table(results, contenders, groups["pruned"]),
            *_fleet_table(results, groups["fleets"]),
        ]
    )
    (folder / "simulator.md").write_text(text + "\n")
    if rows:
        _plot(rows, folder / "simulator.png")
    print(text)


# --- numbers ---


def _runs(name: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    return [turn[name] for turn in results["turns"] if "rounds" in turn.get(name, {})]


def _row(name: str, contender: Any, results: dict[str, Any]) -> Row | None:
    runs = _runs(name, results)
    if not runs:
        return None
    first, way = results["turns"][0], contender.arguments[0]
    operations = first["operations"][key(way) if isinstance(way, Way) else "fedspine"]
    under = "ceiling_avx2" if contender.avx2 else "ceiling"
    ceiling = median(turn[under][contender.precision] for turn in results["turns"])
    samples = results["samples_per_round"]
    seconds = [round for run in runs for round in run["rounds"]]
    passes = None
    if all(run["passes"] for run in runs):
        passes = [used / run["processes"] for run in runs for used in run["passes"]]
    rate = samples * operations / ceiling
    return Row(
        name=name,
        what=contender.what,
        seconds=seconds,
        samples_per_round=samples,
        of_ceiling=rate / median(seconds),
        passes_of_ceiling=None if passes is None else rate / median(passes),
        outside=None if passes is None else 1 - sum(passes) / sum(seconds),
        peak_bytes=max(run["peak_memory_bytes"] for run in runs),
        accuracies=[run["accuracy"] for run in runs],
    )


def _where() -> dict[str, Any]:
    """Commit, date, versions and hardware."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], capture_output=True, text=True, cwd=HERE
        ).stdout.strip()

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    cpu = platform.processor()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = (
            next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
        )
    changed = " with changes" if git("status", "--porcelain", "--", "../src", ".") else ""
    return {
        "commit": git("rev-parse", "--short", "HEAD") + changed,
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "hardware": f"{cpu}, {len(os.sched_getaffinity(0))} cores",
    }


# --- text ---


def _head(results: dict[str, Any]) -> list[str]:
    settings, turns = results["settings"], results["turns"]
    ceilings = {
        name: median(turn["ceiling"][name] for turn in turns) / 1e9 for name in ("fp32", "bf16")
    }
    avx2 = {
        name: median(turn["ceiling_avx2"][name] for turn in turns) / 1e9
        for name in ("fp32", "bf16")
    }
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return [
        "# The simulator against its peers",
        "",
        f"`{results['command']}` on {results['date']}, commit {results['commit']}, "
        f"{results['hardware']}, {results['seconds'] / 60:.0f} minutes; {versions}.",
        "",
        f"The same work for all: MiniLM, LoRA rank {settings['rank']} on every linear layer of the "
        f"blocks, the pooler and the classifier trained with it; {results['data']}, "
        f"{settings['max_tokens']} tokens at most; {settings['devices']} devices with the same "
        f"rows ({settings['partition']}), {settings['per_round']} a round, the same ones, "
        f"{settings['steps']} steps of {settings['batch']} rows, {settings['rounds']} rounds; "
        f"AdamW, learning rate {settings['learning_rate']} falling linearly, no dropout, the same "
        "start. Contenders took turns over the seeds, each in processes of its own; none scores "
        "while it trains, and start-up is in no round. Seconds are medians over all rounds of all "
        "seeds, quartiles in brackets. Memory is the highest sum of proportional set sizes over "
        "all processes of a contender. Accuracy is the global model's on the same "
        f"{results['test_rows']} test rows, mean and standard deviation over the seeds.",
        "",
        "The ceiling is a product of two 2048 by 2048 matrices on all cores at once, one thread "
        f"each: {ceilings['fp32']:.0f} GFLOP/s in fp32, {ceilings['bf16']:.0f} in bf16; "
        f"{avx2['fp32']:.0f} and {avx2['bf16']:.0f} for rows marked AVX2, whose libraries are kept "
        "to it. A share of it counts the products that were executed (padding included), of whole "
        "rounds and of the training passes alone.",
        "",
    ]


def _peer_table(rows: list[Row]) -> list[str]:
    lines = [
        "| contender | samples/s | seconds a round | of the ceiling | passes alone "
        "| outside training | peak memory, GiB | accuracy | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lower, upper = _quartiles(row.seconds)
        cells = [
            row.what,
            f"{row.speed:.0f}",
            f"{median(row.seconds):.2f} ({lower:.2f} to {upper:.2f})",
            _percent(row.of_ceiling),
            _percent(row.passes_of_ceiling),
            _percent(row.outside, digits=1),
            f"{row.peak_bytes / GIB:.2f}",
            _accuracy(row.accuracies),
            str(len(row.accuracies)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _failures(results: dict[str, Any], contenders: dict[str, Any]) -> list[str]:
    lines = [
        f"- {contenders[name].what}, seed {seed}, did not run: `{found['error']}`"
        for seed, turn in enumerate(results["turns"])
        for name, found in turn.items()
        if name in contenders and "error" in found
    ]
    return [*lines, ""] if lines else []


def _ratios(rows: dict[str, Row]) -> list[str]:
    if "fedspine" not in rows:
        return []
    ours = rows["fedspine"]
    lines = []
    for row in rows.values():
        if row is not ours:
            apart = fmean(ours.accuracies) - fmean(row.accuracies)
            lines.append(
                f"- fedspine, bf16, trains {ours.speed / row.speed:.2f} times as many samples a "
                f"second as: {row.what} (accuracy {100 * apart:+.2f} points)."
            )
    return [*lines, ""]


def _pruned_table(
    results: dict[str, Any], contenders: dict[str, Any], names: list[str]
) -> list[str]:
    found = {name: runs[0] for name in names if (runs := _runs(name, results))}
    if len(found) < len(names):
        return []
    last = results["pruned_rounds"]
    lines = [
        (
            f"## Pruned against unpruned, the last {last} of "
            f"{len(found[names[0]]['rounds'])} rounds, 6 devices each"
        ),
        "",
        "| method, rank 8 | sparsity trained at | seconds a round | seconds of training passes |",
        "|---|---|---|---|",
    ]
    for name, run in found.items():
        passes = median(run["passes"][-last:]) / run["processes"]
        seconds = median(run["rounds"][-last:])
        lines.append(
            f"| {contenders[name].what} | {run['notes']['sparsity']:.3f} "
            f"| {seconds:.2f} | {passes:.2f} |"
        )
    return [*lines, ""]


def _fleet_table(results: dict[str, Any], names: list[str]) -> list[str]:
    found = {name: runs[0] for name in names if (runs := _runs(name, results))}
    if not found:
        return []
    lines = [
        (
            f"## Many devices, {results['settings']['per_round']} "
            "asked a round, the same rows over all (iid)"
        ),
        "",
        "| devices | start, s | peak memory, GiB | seconds a round | outside training, s |",
        "|---|---|---|---|---|",
    ]
    for run in found.values():
        outside = median(
            s - p / run["processes"] for s, p in zip(run["rounds"], run["passes"], strict=True)
        )
        lines.append(
            f"| {run['devices']:,} | {run['notes']['start_seconds']:.1f} "
            f"| {run['peak_memory_bytes'] / GIB:.2f} "
            f"| {median(run['rounds']):.2f} | {outside:.2f} |"
        )
    note = (
        "Start is from the call of the program to the first round: imports, model, data, partition."
    )
    return [*lines, "", note, ""]


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    lower, _, upper = quantiles(values, n=4, method="inclusive")
    return lower, upper


def _percent(share: float | None, digits: int = 0) -> str:
    return MISSING if share is None else f"{100 * share:.{digits}f} %"


def _accuracy(found: list[float]) -> str:
    spread = f" ± {100 * stdev(found):.2f}" if len(found) > 1 else ""
    return f"{100 * fmean(found):.2f}{spread} %"


# --- plot ---


def _plot(rows: list[Row], path: Path) -> None:
    shown = sorted(rows, key=lambda row: row.speed)
    figure, (left, right) = plt.subplots(
        1,
        2,
        sharey=True,
        figsize=(10, 0.5 * len(shown) + 1.4),
        width_ratios=(3, 1),
        layout="constrained",
    )
    names = [fill(row.what, 36) for row in shown]
    colours = ["#c04b2d" if row.name.startswith("fedspine") else "#7a8ca0" for row in shown]
    bars = left.barh(names, [row.speed for row in shown], color=colours, height=0.7)
    left.bar_label(bars, fmt="%.0f", padding=3)
    left.set(xlabel="samples per second", xlim=(0, 1.12 * shown[-1].speed))
    for place, (row, colour) in enumerate(zip(shown, colours, strict=True)):
        spread = stdev(row.accuracies) if len(row.accuracies) > 1 else 0.0
        right.errorbar(
            100 * fmean(row.accuracies), place, xerr=100 * spread, fmt="o", color=colour, capsize=3
        )
    right.set_xlabel("accuracy, %")
    right.margins(x=0.2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
