"""The report: what it reads, what it draws, and the page as one file."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fedspine.core.errors import BadInput
from fedspine.report import figures
from fedspine.report.page import write_page
from fedspine.report.rows import READERS, RunRows, read_rows
from fedspine.report.series import (
    bands,
    device_classes,
    exchange_seconds,
    summary_so_far,
    traffic,
    troubles,
    waiting,
)
from fedspine.report.tables import UnprunedRun
from fedspine.report.trust import trust_lines, trust_of

pytestmark = pytest.mark.usefixtures("drawn")
ROUNDS = 20
SECONDS = {"tx2": 9.0, "nx": 4.0, "agx": 2.0}  # of an exchange before anything is pruned
RANKS = {"tx2": 6, "nx": 12, "agx": 16}
DEVICES = [
    f"{kind}-{number:02d}"
    for kind, count in (("tx2", 4), ("nx", 5), ("agx", 1))
    for number in range(count)
]
LOST = ("nx-01", 7)
RECIPE = (
    '[task]\ndata = "pydoc-topics"\nlabel = "<b>x</b>"\n\n'
    "[fleet]\ndevices = 10\n\n[method]\n\n[run]\nseed = 0\n"
)
VOID = {"meta", "br", "hr", "img", "input", "link"}


def exchanges(round: int, rng: np.random.Generator, start: float) -> list[dict]:
    """One exchange of every device; the one of LOST brings nothing back."""
    rows = []
    for device in DEVICES:
        kind = device.split("-")[0]
        lost = (device, round) == LOST
        seconds = SECONDS[kind] * max(0.5, 1 - 0.025 * round) * float(rng.lognormal(0, 0.12))
        down, up = 400_000 - 3_000 * round, 0 if lost else 390_000 - 3_000 * round
        rows.append(
            {
                "row": "exchange",
                "round": round,
                "device": device,
                "kind": kind,
                "work": "prune_and_tune",
                "lost": lost,
            }
            | {"bytes_down": down, "bytes_up": up, "flops": 1e12, "peak_memory_bytes": 900_000_000}
            | {"started": start, "seconds": seconds}
        )
    return rows


def generated(rounds: int = ROUNDS, *, language: bool = False, prunes: bool = True) -> list[dict]:
    """Rows as a run over three device classes leaves them."""
    rng, rows, now = np.random.default_rng(0), [], 0.0
    for round in range(rounds):
        asked = exchanges(round, rng, now)
        rows += asked
        times = np.array([row["seconds"] for row in asked])
        now += times.max()
        for number, device in enumerate(DEVICES):
            sparsity = min(0.5, 0.03 * round * (1 + 0.05 * number)) if prunes else None
            rank = RANKS[device.split("-")[0]] + 2 * int(rng.integers(-1, 2)) if prunes else 8
            values = {"device": device, "rank": rank, "loss": 1.2, "extra": [1, 2]}
            values |= {"sparsity": sparsity, "reward": 0.6} if prunes else {}
            rows.append({"row": "note", "round": round, "values": values})
        done = 1 - float(np.exp(-(round + 1) / 5))
        quality = (
            {"accuracy": 0.12 + 0.72 * done, "accuracy_global": 0.12 + 0.7 * done}
            if not language
            else {}
        )
        rows.append(
            {
                "row": "score",
                "round": round,
                "now": now,
                "loss": 4.1 - done,
                "final": round == rounds - 1,
            }
            | {"sparsity": min(0.5, 0.03 * round), "devices": 10, "unheard_of": None}
            | quality
        )
        waited = float(np.mean(times.max() - times))
        rows.append(
            {"row": "round", "round": round, "now": now, "devices": 10, "waiting_seconds": waited}
        )
    rows.append(
        {"row": "note", "round": 3, "values": {"device": "tx2-01", "left_out": "loss is <nan>"}}
    )
    return [
        *rows,
        {"row": "note", "round": 3, "values": {"clusters": 2}},
        {"row": "of a later version"},
    ]


def summary_of(rows: list[dict], *, language: bool = False) -> dict:
    scores = [row for row in rows if row["row"] == "score"]
    waits = [row["waiting_seconds"] for row in rows if row["row"] == "round"]
    found = {
        "method": "fedspine",
        "seed": 0,
        "rounds": len(waits),
        "devices": len(DEVICES),
        "sparsity": 0.5,
    }
    found |= {"loss": scores[-1]["loss"], "loss_global": 3.2, "loss_dense": 3.0} if scores else {}
    if scores and not language:
        found |= {
            "accuracy": scores[-1]["accuracy"],
            "accuracy_global": 0.81,
            "accuracy_dense": 0.85,
        }
    else:
        found |= {"accuracy": None, "accuracy_global": None, "accuracy_dense": None}
    found |= {"simulated_seconds": 150.0, "waiting_seconds": sum(waits), "bytes_up": 50_000_000}
    found |= {
        "bytes_down": 60_000_000,
        "peak_memory_bytes_simulated": 900_000_000,
        "wall_seconds": 95.0,
    }
    return found | {
        "samples_per_second": 137.0,
        "state_sha256": "ab" * 32,
        "kind": "classification",
    }


def write_run(folder: Path, rows: list[dict], summary: dict | None) -> Path:
    """A run's folder with these rows."""
    folder.mkdir(exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.toml").write_text(RECIPE)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = generated()
    return write_run(tmp_path / "toy", rows, summary_of(rows))


def drawn(folder: Path) -> dict[str, figures.Panel]:
    summary = json.loads((folder / "summary.json").read_text())
    return {
        panel.name: panel for panel in figures.panels(read_rows(folder / "records.jsonl"), summary)
    }


class Balance(HTMLParser):
    """Fails where a tag closes that is not the open one; collects what a reader sees."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(html: str) -> Balance:
    parser = Balance()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    return parser


def test_the_page_is_one_file_that_fetches_nothing(run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    path = write_page(run)
    assert path == run / "report.html"
    assert {path.name for path in run.iterdir()} - before == {"report.html"}
    html = re.sub(r'\bxmlns(:\w+)?="[^"]*"', "", path.read_text())
    for forbidden in (
        "http://",
        "https://",
        "<script",
        "<link",
        "@import",
        "<?xml",
        "<!DOCTYPE svg",
        "src=",
    ):
        assert forbidden not in html
    assert html.count("<svg") == 6


def test_the_page_escapes_and_balances(run: Path) -> None:
    html = write_page(run).read_text()
    assert "<b>" not in html
    assert "&lt;b&gt;x&lt;/b&gt;" in html
    assert "loss is &lt;nan&gt;" in html
    assert 'label = "<b>x</b>"' in parsed(html).text


def test_the_page_says_the_headline_numbers(run: Path) -> None:
    text = parsed(write_page(run).read_text()).text
    accuracy = json.loads((run / "summary.json").read_text())["accuracy"]
    for expected in (
        f"{100 * accuracy:.1f} %",
        "81.0 %",
        "85.0 %",
        "same adapter, for which it was not tuned",
        "2 min 30 s",
        "110.0 MB",
        "1 min 35 s",
    ):
        assert expected in text
    assert "Gap" not in text


def test_an_unpruned_run_stands_beside_a_pruned_one(run: Path) -> None:
    accuracy = json.loads((run / "summary.json").read_text())["accuracy"]
    other = UnprunedRun("<b>lora</b>", "runs/a", 0.9, 0.4)
    text = parsed(write_page(run, [other]).read_text()).text
    assert "90.0 %" in text
    assert f"{100 * (accuracy - 0.9):+.1f} points" in text
    assert "<b>lora</b> 90.0 %" in text  # beside its line in the figure
    assert "Unpruned base" not in text


def test_writing_twice_gives_the_same_bytes(run: Path) -> None:
    first = write_page(run).read_bytes()
    assert write_page(run).read_bytes() == first


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([], set()),
        (
            [row for row in generated() if row["row"] != "score"],
            {"seconds", "sparsity", "rank", "waiting", "traffic"},
        ),
        (generated(1), {"quality", "seconds", "rank", "waiting", "traffic"}),
        (generated(2, prunes=False), {"quality", "seconds", "waiting", "traffic"}),
    ],
    ids=["empty", "without scores", "one round", "without pruning"],
)
def test_a_figure_is_there_when_its_data_is(
    tmp_path: Path, rows: list[dict], names: set[str]
) -> None:
    run = write_run(tmp_path / "run", rows, summary_of(rows))
    parsed(write_page(run).read_text())
    assert set(drawn(run)) == names


def test_language_modelling_shows_loss(tmp_path: Path) -> None:
    rows = generated(5, language=True)
    run = write_run(tmp_path / "lm", rows, summary_of(rows, language=True))
    text = parsed(write_page(run).read_text()).text
    assert "loss (nats)" in text
    assert "Loss over simulated time" in text
    assert "accuracy" not in text.lower()
    assert f"{rows_loss(rows):.3f}" in text


def rows_loss(rows: list[dict]) -> float:
    return [row["loss"] for row in rows if row["row"] == "score"][-1]


def test_an_unfinished_run_is_reported_from_its_records(tmp_path: Path) -> None:
    rows = generated(3)
    text = parsed(write_page(write_run(tmp_path / "run", rows, None)).read_text()).text
    assert "has not finished" in text
    assert "3 rounds, 10 devices" in text


def test_a_folder_without_a_run_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"records\.jsonl"):
        write_page(tmp_path)


def test_a_torn_last_line_is_passed_over(run: Path) -> None:
    path = run / "records.jsonl"
    whole = read_rows(path)
    path.write_bytes(path.read_bytes() + '{"row": "score", "accuracy": 0.9, "é'.encode()[:-1])
    assert read_rows(path) == whole
    assert len(whole.exchanges) == ROUNDS * len(DEVICES)


def test_a_broken_line_elsewhere_is_bad_input(run: Path) -> None:
    path = run / "records.jsonl"
    path.write_text('{"row": "sco\n' + path.read_text())
    with pytest.raises(BadInput, match="line 1 of records.jsonl"):
        read_rows(path)


def test_quality_is_drawn_over_simulated_seconds(run: Path) -> None:
    rows = read_rows(run / "records.jsonl")
    axes = drawn(run)["quality"].figure.axes[0]
    devices, last, common, _, dense = axes.lines
    assert devices.get_xydata().tolist() == [[score.now, score.accuracy] for score in rows.scores]
    assert common.get_ydata().tolist() == [score.accuracy_global for score in rows.scores]
    assert last.get_xydata().tolist() == [[rows.scores[-1].now, rows.scores[-1].accuracy]]
    assert set(dense.get_ydata()) == {0.85}
    assert axes.get_xlabel() == "simulated seconds"


def test_bands_are_drawn_per_class(run: Path) -> None:
    panels = drawn(run)
    for name in ("sparsity", "rank"):
        axes = panels[name].figure.axes[0]
        assert [line.get_label() for line in axes.lines] == ["tx2", "nx", "agx"]
        assert [len(line.get_xdata()) for line in axes.lines] == [ROUNDS] * 3
        assert [line.get_color() for line in axes.lines] == [*figures.CLASS_COLOURS.values()]


def test_waiting_bars_stack_to_the_rounds_length(run: Path) -> None:
    top, share = drawn(run)["waiting"].figure.axes
    found = waiting(read_rows(run / "records.jsonl"))
    heights = [bar.get_height() for bar in top.patches]
    np.testing.assert_allclose(np.add(heights[:ROUNDS], heights[ROUNDS:]), found.lengths)
    assert share.lines[0].get_ydata().tolist() == found.shares.tolist()
    assert 0 < found.shares.min() <= found.shares.max() < 1


def test_traffic_is_the_sum_of_the_exchanges(run: Path) -> None:
    rows = read_rows(run / "records.jsonl")
    down, up = drawn(run)["traffic"].figure.axes[0].lines
    assert down.get_ydata()[-1] == sum(exchange.bytes_down for exchange in rows.exchanges)
    assert up.get_ydata()[-1] == sum(exchange.bytes_up for exchange in rows.exchanges)
    assert (np.diff(traffic(rows).up) > 0).all()


def test_what_was_lost_costs_no_time_and_is_named(run: Path) -> None:
    rows = read_rows(run / "records.jsonl")
    assert len(exchange_seconds(rows)["nx"]) == 5 * ROUNDS - 1
    assert [(line.device, line.lost, line.left_out, line.reason) for line in troubles(rows)] == [
        ("nx-01", 1, 0, ""),
        ("tx2-01", 0, 1, "loss is <nan>"),
    ]


def test_classes_by_hand() -> None:
    rows = RunRows(
        exchanges=tuple(
            read_one(
                {
                    "row": "exchange",
                    "round": number,
                    "device": device,
                    "kind": "nx",
                    "seconds": seconds,
                }
            )
            for number, device, seconds in ((0, "a", 1.0), (1, "a", 2.0), (0, "b", 6.0))
        ),
        notes=tuple(
            read_one(
                {
                    "row": "note",
                    "round": number,
                    "values": {"device": device, "sparsity": sparsity, "rank": rank},
                }
            )
            for number, device, sparsity, rank in (
                (0, "a", 0.1, 4),
                (1, "a", 0.3, 8),
                (0, "b", 0.5, 12),
            )
        ),
    )
    (line,) = device_classes(rows)
    # last sparsities 0.3 and 0.5; ranks 4, 8, 12; seconds 1, 2, 6
    assert (line.devices, line.sparsity, line.rank, line.seconds) == (
        2,
        pytest.approx(0.4),
        8.0,
        3.0,
    )
    band = bands(rows, lambda note: note.sparsity)["nx"]
    assert (band.mean.tolist(), band.low.tolist(), band.high.tolist()) == (
        [0.3, 0.3],
        [0.1, 0.3],
        [0.5, 0.3],
    )
    assert summary_so_far(rows)["devices"] == 2


def read_one(row: dict) -> object:
    return READERS[row["row"]](row)


def test_other_classes_get_colours_of_their_own() -> None:
    colours = figures.class_colours(["tx2", "pi5", "laptop"])
    assert colours["tx2"] == figures.CLASS_COLOURS["tx2"]
    assert len(set(colours.values())) == 3


def test_show_and_report_say_who_spent_what_and_who_was_bounded(tmp_path: Path) -> None:
    rows = generated(3)
    devices = [row["device"] for row in rows if row["row"] == "exchange"]
    first, second = sorted(set(devices))[:2]
    for row in rows:
        if row["row"] == "exchange" and row["device"] == first:
            row["epsilon"] = 0.5 + row["round"]
            row["noise"] = 4.0 - row["round"]
    for round, share in ((1, 0.5), (2, 0.25), (2, 0.75)):
        bounded = {"device": second, "bounded": "adapter", "share": share}
        rows.append({"row": "note", "round": round, "values": bounded})
    folder = write_run(tmp_path / "run", rows, None)
    (folder / "recipe.toml").write_text(
        '[privacy]\nlevel = "rows"\nepsilon = 8.0\ndelta = 1e-5\nclip = 1.0\n'
    )
    found = trust_of(folder)
    assert found["privacy"]["epsilon_spent"] == {first: 2.5}
    assert found["bounded"] == {second: {"rounds": 2, "smallest_share": 0.25}}
    assert found["noise"] == {first: 2.0}
    lines = trust_lines(found)
    noise = lines.pop(1)
    assert noise == f"noise beside the change of weights that left, at least: {first} 2"
    assert lines[0].startswith("privacy of rows: epsilon 8 at delta 1e-05 promised to each device")
    assert lines[0].endswith(f"spent: {first} 2.5")
    assert lines[1] == f"bounded to a usual change: {second} in 2 rounds (25.0 % counted at least)"
    left = [row["values"] for row in rows if "left_out" in row.get("values", {})]
    assert lines[2].startswith(f"left out: {left[-1]['device']} 1 time (")
    page = write_page(folder).read_text()
    assert all(html.escape(line) in page for line in lines)


def test_the_page_shows_no_folder_of_this_machine(run: Path) -> None:
    recipe = run / "recipe.toml"
    recipe.write_text(f'[task]\nmodel = "{run}/bert"\ndata = "{run}/rows.csv"\n')
    page = html.unescape(write_page(run).read_text())
    assert str(run) not in page
    assert 'model = "bert"\ndata = "rows.csv"' in page


def test_of_many_devices_a_line_names_the_first(tmp_path: Path) -> None:
    many = {f"d{n:02d}": {"rounds": 1, "smallest_share": 0.5} for n in range(80)}
    (line,) = trust_lines({"bounded": many})
    assert line.endswith(", and 72 more")
