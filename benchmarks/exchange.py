"""The cost of one exchange on a fleet of real processes: two sites, 40 KB and 4 MB each way,
compared with Flower; with `--noise`, the cost of a site's noise.

`python benchmarks/exchange.py --flower PYTHON`, where PYTHON is an interpreter that has flwr.
Writes results/exchange.md. On loopback, an order goes from the run over the server to both sites at
once. Each site's worker decodes it, does nothing, writes its (empty) memory to disk and replies.
The clock stops when both replies are decoded. Ours uses mutual TLS; Flower's is not encrypted.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from fedspine.flare import startup_kit as kits
from fedspine.flare.provision import Project, create, write_site_file
from fedspine.lm.tiny import write_tiny
from fedspine.ui.fleet_demo import free_port, running

HERE = Path(__file__).parent
SITES = ("one", "two")
SIZES = (40_000, 4_000_000)
GOALS = {40_000: 0.050, 4_000_000: 0.150}  # seconds
ROWS = "text,label\n" + "a good row,fine\na bad row,fault\n" * 20
Seconds = dict[int, list[float]]
RANK, NOISES = 8, (0.0, 8.0)  # of the adapter in answers with noise, and `allow.noise`
RUN, WARM_UP = "0" * 32, 3
NOISE_TITLE = "## With the noise of a site"


def main() -> None:
    options = _options()
    if options.noise:
        _noise(options.exchanges, options.write)
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        ours = _fedspine(Path(folder), options.exchanges, options.repeats, options.scheme)
        between = os.getloadavg()[0]
        flower = (
            None
            if options.flower is None
            else _flower(Path(folder), options.flower, options.exchanges)
        )
    found = {
        "scheme": options.scheme,
        "load": [load, between],
        "nice": os.nice(0),
        "ours": ours,
        "flower": flower,
    }
    kept = HERE / "results" / "exchange.json"
    before = (
        [] if options.fresh or not kept.exists() else json.loads(kept.read_text(encoding="utf-8"))
    )
    # through JSON, so that old and new measurements have the same keys
    entries = [*before, json.loads(json.dumps(found))]
    text = _table(entries, options.exchanges)
    print(text)
    if options.write:
        kept.write_text(json.dumps(entries), encoding="utf-8")
        page = kept.with_suffix(".md")
        _, title, noise = page.read_text(encoding="utf-8").partition(NOISE_TITLE)
        page.write_text(text + (f"\n{title}{noise}" if title else ""), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exchanges", type=int, default=30, help="of each size, in each repeat")
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of ours; the best median counts"
    )
    parser.add_argument(
        "--flower", type=Path, help="interpreter that has flwr; without it ours alone is measured"
    )
    parser.add_argument(
        "--scheme",
        default="tcp",
        choices=["tcp", "grpc", "http"],
        help="how ours goes over the wire",
    )
    parser.add_argument(
        "--noise", action="store_true", help="the answers of sites with and without noise alone"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what earlier calls measured")
    parser.add_argument("--no-write", dest="write", action="store_false", help="only print")
    return parser.parse_args()


# --- ours ---


def _fedspine(folder: Path, exchanges: int, repeats: int, scheme: str) -> list[Seconds]:
    """The seconds of each exchange by size, for each repeat."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(HERE / "exchange_site"), os.environ.get("PYTHONPATH")])
    )
    model = write_tiny(folder / "tiny", "bert")
    project = Project(
        name="exchange", host="127.0.0.1", port=free_port(), sites=SITES, scheme=scheme
    )
    made = create(project, folder / "kits")
    for site in SITES:
        (made.folder / site / "rows.csv").write_text(ROWS)
        write_site_file(
            made.folder / site,
            name=site,
            data={"path": "rows.csv"},
            models={"tiny": str(model)},
            allow={"methods": ["echo"]},
        )
    (folder / "data.csv").write_text(ROWS)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        tomli_w.dumps(
            {
                "task": {"model": str(model), "data": str(folder / "data.csv"), "max_tokens": 8},
                "fleet": {"per_round": len(SITES)},
                "method": {"name": "echo", "sizes": list(SIZES), "exchanges": exchanges},
                "run": {"rounds": 1, "evaluate_every": 0, "precision": "fp32"},
            }
        )
    )
    with running(made) as federation:
        return [
            _one_run(recipe, federation.admin, folder / f"run-{number}")
            for number in range(repeats)
        ]


def _one_run(recipe: Path, admin: Path, out: Path) -> Seconds:
    arguments = ["run", recipe, "--fleet", admin, "--sites", len(SITES), "--out", out, "--json"]
    subprocess.run(
        [sys.executable, "-m", "fedspine", *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=600,
    )
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    found: Seconds = {size: [] for size in SIZES}
    for row in rows:
        if row["row"] == "note" and "size" in row["values"]:
            found[row["values"]["size"]].append(row["values"]["seconds"])
    return found


# --- the answer of a site, with noise and without ---


def _noise(answers: int, write: bool) -> None:
    """CPU time of a site's worker for an answer, in this process, with and without noise in turn;
    wall time would depend on other load.
    """
    sys.path.insert(0, str(HERE / "exchange_site"))
    import sitecustomize  # noqa: F401 - so that the method is found

    with tempfile.TemporaryDirectory() as folder:
        workers = {noise: Answering(Path(folder) / f"{noise:g}", noise) for noise in NOISES}
        found: dict[float, list[float]] = {noise: [] for noise in NOISES}
        for number in range(answers + WARM_UP):
            for noise, worker in workers.items():
                found[noise].append(1000 * worker.seconds(number))
    ms = {noise: sorted(each[WARM_UP:]) for noise, each in found.items()}
    without, with_noise = (statistics.median(ms[noise]) for noise in NOISES)
    rows = [f"| {n:g} | {ms[n][0]:.1f} | {statistics.median(ms[n]):.1f} |" for n in NOISES]
    text = (
        f"{NOISE_TITLE}\n\n`python benchmarks/exchange.py --noise`: CPU time of a site's worker "
        f"for one answer, from packed order to packed answer; an adapter of rank {RANK} for "
        f"MiniLM's 6 blocks in fp16 each way, no training; {answers} answers each, one thread, "
        f"load {os.getloadavg()[0]:.1f}. Sites work at the same time, so an exchange takes longer "
        "by the difference once.\n\n| `allow.noise` | least, ms | median, ms |\n|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\nThe noise, with the count of answers, adds {with_noise - without:.1f} ms.\n"
    )
    print(text)
    if write:
        page = HERE / "results" / "exchange.md"
        before = page.read_text(encoding="utf-8").split(NOISE_TITLE)[0].rstrip()
        page.write_text(f"{before}\n\n{text}", encoding="utf-8")


class Answering:
    """A site's worker in this process, which returns the adapters that it is sent."""

    def __init__(self, folder: Path, noise: float) -> None:
        import torch

        from fedspine.core.message import pack
        from fedspine.flare.run_terms import RunTerms
        from fedspine.flare.site import load_site
        from fedspine.flare.site_worker import SiteWorker
        from fedspine.flare.wire import Opening
        from fedspine.lm.content import content_sha256
        from fedspine.lm.load import load

        torch.set_num_threads(1)
        folder.mkdir()
        (folder / "rows.csv").write_text(ROWS)
        allow = {"methods": ["echo_adapter"], "noise": noise}
        data = {"path": "rows.csv"}
        write_site_file(folder, name="one", data=data, models={"minilm": "minilm"}, allow=allow)
        base, tokenizer = load("minilm", kind="classification", classes=2)
        terms = RunTerms(
            method="echo_adapter",
            kind="classification",
            model="minilm",
            model_sha256=content_sha256(base, tokenizer),
            layers=None,
            precision="fp32",
            pooling="auto",
            max_tokens=8,
            label_names=("fault", "fine"),
        )
        self._layout = base.layout
        self._worker = SiteWorker(load_site(folder), folder)
        self._worker.answer(pack(Opening(run=RUN, terms=terms)).payload)

    def seconds(self, number: int) -> float:
        """CPU time of one answer; another adapter each `number`, since the same counts once."""
        import numpy as np
        from fedspine.methods.echo_adapter import AdapterOrder, echo_trained

        from fedspine.core.device import name_of
        from fedspine.core.message import pack
        from fedspine.core.tensors import half
        from fedspine.flare.wire import NotDone, SiteAnswer, SiteOrder, as_array, decoded
        from fedspine.lm.lora import fresh

        adapter = half(fresh(self._layout.sites, RANK, np.random.default_rng(number)))
        order = SiteOrder(
            run=RUN,
            work=name_of(echo_trained),
            order=as_array(pack(AdapterOrder(adapter=adapter)).payload),
            seed=(0, 0, number),
            round=number,
            memory=None,
            version=number,
            needed=(),
        )
        packed = pack(order).payload
        began = time.process_time()
        reply = self._worker.answer(packed)
        seconds = time.process_time() - began
        assert isinstance(decoded(reply, SiteAnswer, NotDone), SiteAnswer)
        return seconds


# --- Flower's ---


def _flower(folder: Path, python: Path, exchanges: int) -> Seconds:
    home, port = folder / "flower", free_port()
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "lo"\n[superlink.lo]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    into = home / "seconds.json"
    app = shutil.copytree(HERE / "peers" / "flower_exchange", home / "app")
    os.environ |= {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    os.environ.pop("PYTHONPATH", None)
    # so that the processes it starts find each other
    os.environ["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    binaries = python.parent
    link = [binaries / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port]
    link += ["--disable-runtime-dependency-installation"]
    with _process(link, home / "superlink.log"):
        time.sleep(5)
        node = [
            binaries / "flower-supernode",
            "--insecure",
            "--superlink",
            f"127.0.0.1:{port}",
            "--host",
            "127.0.0.1",
        ]
        with (
            _process([*node, "--port", free_port()], home / "a.log"),
            _process([*node, "--port", free_port()], home / "b.log"),
        ):
            time.sleep(5)
            config = f'exchanges={exchanges} into="{into}" sizes="{",".join(map(str, SIZES))}"'
            subprocess.run(
                [binaries / "flwr", "run", str(app), "lo", "--run-config", config], check=True
            )
            return _when_complete(into, exchanges)


def _when_complete(into: Path, exchanges: int) -> Seconds:
    end = time.monotonic() + 60 + 15 * len(SIZES) * exchanges
    found: Seconds = {}
    while time.monotonic() < end and not (
        len(found) == len(SIZES) and all(len(s) == exchanges for s in found.values())
    ):
        time.sleep(2)
        if into.exists():
            try:
                found = {
                    int(size): seconds for size, seconds in json.loads(into.read_text()).items()
                }
            except ValueError:  # half written
                continue
    return found


@contextmanager
def _process(command: list[object], log: Path) -> Iterator[None]:
    with open(log, "wb") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield
    finally:
        kits.end(process)


# --- the page ---


def _medians(runs: list[dict[str, list[float]]], size: str) -> str:
    return " ".join(f"{1000 * statistics.median(run[size]):.0f}" for run in runs)


def _table(entries: list[dict[str, Any]], exchanges: int) -> str:
    """All calls so far: the machine may have been busy with other things in some of them."""
    calls = "; ".join(
        f"{entry['scheme']}, load {entry['load'][0]:.1f} to {entry['load'][1]:.1f}, "
        f"nice {entry.get('nice', 0)}: "
        + ", ".join(
            f"{int(size) // 1000} KB {_medians(entry['ours'], size)} ms"
            for size in entry["ours"][0]
        )
        for entry in entries
    )
    lines = [
        "# One exchange with two sites",
        "",
        f"`python benchmarks/exchange.py`, {os.cpu_count()} cores, all "
        f"processes on one machine. Medians of {exchanges} exchanges; "
        "of ours the best run, since other work shared the machine.",
        "",
        (
            "| message, each way | fedspine on NVIDIA FLARE, mutual TLS | goal "
            "| Flower, SuperLink and SuperNodes, no TLS |"
        ),
        "|---|---|---|---|",
    ]
    for size in map(str, SIZES):
        best, scheme = min(
            (statistics.median(run[size]), entry["scheme"])
            for entry in entries
            for run in entry["ours"]
        )
        theirs = [
            statistics.median(entry["flower"][size])
            for entry in entries
            if (entry["flower"] or {}).get(size)
        ]
        named = f"{min(theirs):.2f} s" if theirs else "not measured"
        lines.append(
            f"| {int(size) // 1000} KB | {1000 * best:.0f} ms ({scheme}) "
            f"| {1000 * GOALS[int(size)]:.0f} ms | {named} |"
        )
    return "\n".join([*lines, "", f"Every run: {calls}."]) + "\n"


if __name__ == "__main__":
    main()
