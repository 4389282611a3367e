"""Sweeps: what a file comes to, what is refused before anything runs, and that nothing is lost,
mixed or repeated.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from places import ROOT
from processes import alive
from rich.console import Console
from runs import (
    environment,
    ignoring_ctrl_c,
    in_process,
    records_of,
    summary_of,
    without_wall,
    write_csv,
)
from warm import Forked, forked

from fedspine.control.controllers import Deadline, Fixed, SUcb
from fedspine.core.errors import BadInput
from fedspine.methods import all_methods
from fedspine.runs import config
from fedspine.runs.config import Recipe
from fedspine.runs.loop import new_run
from fedspine.storage.store import lock
from fedspine.ui.progress import Silent
from fedspine.ui.sweep import display
from fedspine.ui.sweep.eta import Ahead, seconds_left
from fedspine.ui.sweep.names import distinct
from fedspine.ui.sweep.plan import Cell, plan
from fedspine.ui.sweep.sweep_dir import SweepFolder, held
from fedspine.ui.sweep.work import GOODBYE_SECONDS, overview_of, reason_of

EXPERIMENTS = ROOT / "experiments"
GONE_SECONDS = 2.0  # within which the processes of a killed sweep have ended; cells take longer

GOOD = """
seeds = [0, 1]
[task]
model = "./bert"
data = "rows.csv"
[fleet]
devices = 3
per_round = 2
[run]
rounds = 2
evaluate_every = 0
precision = "fp32"
references = false
[method]
steps = 2
[methods.fedspine]
ranks = [2, 4]
[methods.lora]
name = "fedlora"
rank = 2
"""


@pytest.fixture
def place(tiny_folder, tmp_path, monkeypatch):
    """The current folder, with a tiny model and data in it."""
    (tmp_path / "bert").symlink_to(tiny_folder("bert"))
    write_csv(tmp_path / "rows.csv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda *arguments: in_process(monkeypatch, capsys, *arguments)


def planned(text):
    Path("sweep.toml").write_text(text)
    return plan(Path("sweep.toml"))


# --- what a file comes to ---


def test_every_method_meets_every_setting_and_seed(place):
    cells = planned(GOOD + '[grid]\n"fleet.alpha" = [1.0, 0.1]\n')
    assert [(cell.label, cell.settings["fleet.alpha"], cell.seed) for cell in cells] == [
        (label, alpha, seed)
        for seed in (0, 1)
        for alpha in (1.0, 0.1)
        for label in ("fedspine", "lora")
    ]  # so that a sweep that is cut short has all methods of its first seeds
    cell = cells[3]
    assert cell.name == "lora--alpha=0.1--seed=0"
    assert cell.settings == {"fleet.alpha": 0.1}
    assert (cell.recipe.method.name, cell.recipe.method.rank, cell.recipe.method.steps) == (
        "fedlora",
        2,
        2,
    )
    assert (cell.recipe.fleet.alpha, cell.recipe.run.seed, cell.recipe.run.rounds) == (0.1, 0, 2)
    # as in a recipe: seen from where the command runs
    assert cell.recipe.task.data == str(place / "rows.csv")


def test_dotted_keys_need_no_quotes(place):
    assert planned(GOOD + "[grid]\nfleet.alpha = [1.0, 0.1]") == planned(
        GOOD + '[grid]\n"fleet.alpha" = [1.0, 0.1]'
    )


def test_a_recipe_with_seeds_is_a_sweep(place):
    cells = planned('seeds = [3, 4]\n[method]\nname = "fedlora"\nrank = 2\n')
    assert [cell.name for cell in cells] == ["fedlora--seed=3", "fedlora--seed=4"]
    assert {cell.recipe.method.rank for cell in cells} == {2}
    (cell,) = planned("[run]\nseed = 5\n")
    assert (cell.label, cell.seed, cell.recipe.run.seed) == ("fedspine", 5, 5)


def test_a_name_may_be_shared_or_be_the_label(place):
    cells = planned(
        '[method]\nname = "fedlora"\nscale = 1.0\n[methods.a]\n'
        '[methods.fedspine]\nname = "fedspine"\n'
    )
    assert [(cell.label, cell.recipe.method.name) for cell in cells] == [
        ("a", "fedlora"),
        ("fedspine", "fedspine"),
    ]
    assert {cell.recipe.method.scale for cell in cells} == {1.0}
    (cell,) = planned("[methods.fedlora]")
    assert (cell.label, cell.recipe.method.name) == ("fedlora", "fedlora")


PARTS = """
[method]
name = "fedspine"
controller.name = "fixed"
controller.rank = 4
[methods.four]
[methods.eight]
controller.rank = 8
[methods.plain]
controller.name = "s-ucb"
[methods.plan]
controller.name = "deadline"
[methods.plan.grid]
controller.latency_margin = [0.3, 1.0]
"""


def test_settings_of_parts_are_laid_over_each_other(place):
    cells = planned(PARTS)
    assert [(cell.label, cell.recipe.method.controller) for cell in cells] == [
        ("four", Fixed(rank=4)),
        ("eight", Fixed(rank=8)),
        ("plain", SUcb()),
        ("plan controller.latency_margin=0.3", Deadline(latency_margin=0.3)),
        ("plan controller.latency_margin=1.0", Deadline(latency_margin=1.0)),
    ]
    named = planned(
        '[method]\nname = "fedspine"\n[grid]\nmethod.controller.name = ["s-ucb", "random"]'
    )
    assert [cell.recipe.method.controller.name for cell in named] == ["s-ucb", "random"]


def test_named_data_may_set_several_keys(place):
    write_csv(place / "pairs.csv")
    data = (
        '[data.one]\n[data.two]\ntask.data = "pairs.csv"\n'
        "task.max_tokens = 16\nrun.rounds = 5\nmethod.batch = 4\n"
    )
    cells = planned(GOOD + data)
    assert [cell.settings for cell in cells[:4]] == [
        {"data": name} for name in ("one", "one", "two", "two")
    ]
    assert cells[0].recipe.task.data == str(place / "rows.csv")
    two = cells[3].recipe
    assert (two.task.data, two.task.max_tokens, two.run.rounds) == (str(place / "pairs.csv"), 16, 5)
    assert two.method.batch == 4
    assert cells[3].name == "lora--two--seed=0"


def test_a_grid_under_a_method_is_its_own(place):
    cells = planned(
        GOOD.replace("rank = 2", "") + "[methods.lora.grid]\nrank = [2, 4]\nscale = [1.0]\n"
    )
    assert [cell.label for cell in cells[:3]] == [
        "fedspine",
        "lora rank=2 scale=1.0",
        "lora rank=4 scale=1.0",
    ]
    assert [cell.recipe.method.rank for cell in cells[1:3]] == [2, 4]
    assert {json.dumps(cell.settings) for cell in cells} == {
        "{}"
    }  # what all methods share, and nothing else


def test_a_method_may_be_offered_more_devices(place):
    cells = planned(GOOD + "fleet.per_round = 3\n")
    offered = {cell.label: cell.recipe.fleet.per_round for cell in cells}
    assert offered == {"fedspine": 2, "lora": 3}
    assert {json.dumps(cell.settings) for cell in cells} == {"{}"}


def test_a_method_may_wait_for_a_share_of_its_replies(place):
    cells = planned(GOOD + "fleet.quorum = 0.5\n")
    waits = {cell.label: cell.recipe.fleet.quorum for cell in cells}
    assert waits == {"fedspine": 1, "lora": 0.5}


def test_folders_names_stay_apart():
    names = distinct(["a b, seed=0", "A-b, seed=0", "../c, seed=0", "x" * 300, "x" * 301])
    assert len({name.casefold() for name in names}) == len(names)
    assert all(re.fullmatch(r"[\w=+][\w=.+-]*", name) and len(name) < 140 for name in names)


BAD = {  # what is added to the good file, or another file, and what the line must say
    "part": ("[gird]\n", ["part of a sweep 'gird'", "did you mean 'grid'"]),
    "key": (
        "[grid]\nfleet.alhpa = [1.0]\n",
        ["key in [grid] 'fleet.alhpa'", "did you mean 'fleet.alpha'"],
    ),
    "section": (
        "[grid]\nfleeet.alpha = [1.0]\n",
        ["section in [grid] 'fleeet'", "did you mean 'fleet'"],
    ),
    "no section": ("[grid]\nalpha = [1.0]\n", ["[grid] names 'alpha'", '"fleet.alpha"']),
    "field": (
        "[grid]\nmethod.learning_rat = [1.0]\n",
        ["'learning_rat'", "did you mean 'learning_rate'"],
    ),
    "field of one": (
        "[grid]\nmethod.sparsity = [0.5]\n",
        ["lora has no such field", "[methods.LABEL.grid]"],
    ),
    "own field": ("sparsty = 0.5\n", ["lora, seed=0", "key of [method] for fedlora 'sparsty'"]),
    "own grid": (
        "[methods.lora.grid]\nranks = [1]\n",
        ["[methods.lora.grid] 'ranks'", "did you mean 'rank'"],
    ),
    "part twice": (
        (
            "[methods.x]\nname = 'fedspine'\ncontroller.name = 'fixed'\n[methods.x.grid]\n"
            "controller.name = ['random']\n"
        ),
        ["controller.name is set in [methods.x] and", "keep one"],
    ),
    "no such part": (
        "[methods.x]\nname = 'fedspine'\ncontroller.name = 'fixd'\n",
        ["unknown method.controller.name 'fixd'", "did you mean 'fixed'"],
    ),
    "own grid again": (
        "[methods.lora.grid]\nrank = [1]\n",
        ["rank is set in [methods.lora] and", "keep one"],
    ),
    "method": (
        '[methods.x]\nname = "fedlra"\n',
        ["methods.x: unknown method 'fedlra'", "did you mean 'fedlora'"],
    ),
    "label alone": (
        "[methods.fedspin]\n",
        ["methods.fedspin: unknown method", "did you mean 'fedspine'"],
    ),
    "name": ("[methods.x]\nname = 3\n", ["methods.x: name is 3"]),
    "data": (
        '[data.x]\ntask.dat = "y"\n',
        ["key in [data.x] 'task.dat'", "did you mean 'task.data'"],
    ),
    "data twice": (
        '[data.x]\ntask.data = "rows.csv"\n[grid]\ntask.data = ["rows.csv"]\n',
        ["keep one of the two"],
    ),
    "field twice": (
        "steps = 3\n[grid]\nmethod.steps = [1]\n",
        ["steps is set in [methods.lora] and in [grid]"],
    ),
    "own grid and grid": (
        "[methods.lora.grid]\nsteps = [3, 4]\n[grid]\nmethod.steps = [1, 2]\n",
        ["steps is set in [methods.lora.grid] and in [grid]"],
    ),
    "own and grid": (
        "fleet.per_round = 3\n[grid]\nfleet.per_round = [2]\n",
        ["fleet.per_round is set in [methods.lora]"],
    ),
    "not its own": (
        "fleet.alpha = 3.0\n",
        ["key beside the fields of [methods.lora]", "fleet.alpha", "fleet.per_round"],
    ),
    "no file": (
        '[data.x]\ntask.data = "../no/rows"\n',
        ["x, seed=0", "task.data is '../no/rows'", "check the path"],
    ),
    "no table": (
        '[data.x]\ntask.data = "rwos.csv"\n',
        ["task.data is 'rwos.csv'", "nothing is at that path"],
    ),
    "value": (
        "[grid]\nfleet.alpha = [-1.0]\n",
        ["alpha=-1.0", "fleet.alpha is -1.0", "greater than 0"],
    ),
    "no list": ("[grid]\nfleet.alpha = 1.0\n", ["fleet.alpha in [grid] is 1.0", "such as [1.0]"]),
    "empty": (
        "[grid]\nfleet.alpha = []\n",
        ["fleet.alpha in [grid] is an empty list", "at least one"],
    ),
    "twice": ("[grid]\nfleet.alpha = [1.0, 0.1, 1.0]\n", ["holds 1.0 twice"]),
    "seed in the grid": (
        "[grid]\nrun.seed = [1]\n",
        ["[grid] cannot set run.seed", "seeds = [0, 1, 2]"],
    ),
    "workers": ("[grid]\nrun.workers = [1]\n", ["cannot set run.workers", "--jobs"]),
    "names in the grid": (
        '[grid]\nmethod.name = ["fedlora"]\n',
        ["method.name", "[methods.LABEL]"],
    ),
    "no table of data": ("[data]\nx = 3\n", ["[data.x] must be a table"]),
    "broken": ("[grid\n", ["cannot be read"]),
}
OTHER = {
    "no seeds": ("seeds = []", ["seeds is an empty list"]),
    "one seed": ("seeds = 3", ["seeds is 3", "[3]"]),
    "negative seed": ("seeds = [-1]", ["seeds holds -1"]),
    "seed twice": ("seeds = [1]\n[run]\nseed = 1", ["both seeds and run.seed"]),
    "no methods": ("[methods]", ["[methods] is empty"]),
    "same again": (
        "[methods.fedlora.grid]\nscale = [1, 2]\n[methods.'fedlora scale=1']\nname = 'fedlora'",
        ["same"],
    ),
    "methods no table": ("methods = 3", ["[methods] must be a table"]),
}


@pytest.mark.parametrize("name", [*BAD, *OTHER])
def test_a_bad_file_ends_in_one_line_before_anything_runs(place, command, name):
    text, says = (GOOD + BAD[name][0], BAD[name][1]) if name in BAD else OTHER[name]
    Path("bad.toml").write_text(text)
    before = set(os.listdir(place))
    code, out, lines = command("sweep", "bad.toml", "--json")
    assert (code, out) == (2, "")
    (line,) = lines
    assert line.startswith("fedspine: bad.toml: ")
    for words in says:
        assert words in line
    assert set(os.listdir(place)) == before


@pytest.mark.parametrize("words", ["no.toml", "sweep.toml --out rows.csv", "sweep.toml --out full"])
def test_bad_places(place, command, words):
    Path("sweep.toml").write_text(GOOD)
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    code, out, (line,) = command("sweep", *words.split())
    assert (code, out) == (2, "")
    assert words.split()[-1] in line
    assert os.listdir("full") == ["mine.txt"]


SWEEPS = [
    file for file in sorted(EXPERIMENTS.glob("*.toml")) if "seeds = " in file.read_text()
]  # others are recipes


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.name)
def test_the_sweeps_of_the_experiments_can_be_run(file, monkeypatch, tmp_path):
    """Where the data sets lie beside the repository; a seed that settings were chosen with is not
    among those measured.
    """
    shared = EXPERIMENTS.parent.parent / "shared"
    if not (shared / "data").is_dir():
        pytest.skip("the data sets are not beside the repository, in shared/data")
    made = ("emoji", "snippets/reviews", "snippets/tweets", "snippets/editorials")  # by scripts
    for name in ("here", *made):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "shared").symlink_to(shared)
    monkeypatch.chdir(tmp_path / "here")
    cells = plan(file)
    assert len({cell.seed for cell in cells}) >= 3
    assert {cell.recipe.method.name for cell in cells} <= set(all_methods())


# --- what is shown ---


def test_time_left():
    finished = {"a": [100.0, 100.0, 100.0, 9000.0], "b": [10.0]}
    assert seconds_left([], finished, 1) == 0
    assert seconds_left([Ahead("a", 0, 4)], {}, 1) is None
    # nothing is finished: 2 of 8 rounds took 30 s, so all take 120 s, of which 90 s are left, and
    # 120 s of the other
    assert (
        seconds_left([Ahead("a", 3, 8, began=1, seconds=30.0), Ahead("b", 0, 4)], {}, 1)
        == 120 * 5 / 8 + 120
    )
    # the median of its own label, three quarters of it left; the other of its own
    assert seconds_left([Ahead("a", 1, 4), Ahead("b", 0, 4)], finished, 1) == 75 + 10
    # never less than the longest of what runs side by side
    assert seconds_left([Ahead("a", 1, 4), Ahead("b", 0, 4)], finished, 8) == 75


def test_a_run_that_ends_by_time_is_judged_by_its_clock(tmp_path):
    folder = SweepFolder(tmp_path)
    recipe = Recipe(method="fedlora", rounds=400, seconds=100.0)
    cell = Cell(name="a", label="a", recipe=recipe, settings={}, seed=0)
    run = folder.run_of(cell)
    run.mkdir(parents=True)
    assert folder.rounds_expected(cell, 0) == 400
    rows = [{"row": "note", "now": 90.0}, {"row": "round", "now": 25.0}, {"row": "note"}]
    (run / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert folder.rounds_expected(cell, 8) == 32
    unlimited = replace(cell, recipe=Recipe(method="fedlora", rounds=400))
    assert folder.rounds_expected(unlimited, 8) == 400


STATUS = display.SweepStatus(
    cells=12,
    done=3,
    failed=1,
    seconds_left=125.0,
    running=(display.RunningCell("lora--seed=1", 5, 24),),
)


def test_lines_go_to_stderr(capsys):
    shown = display.SweepLines(sys.stderr)
    shown.update(STATUS)
    shown.update(STATUS)  # within the same minute
    shown.ended("fedspine--seed=1", "accuracy 71.0 %, 12.3 s", STATUS)
    shown.close()
    counts = "3 of 12 cells done, 1 failed, about 2 min 05 s left"
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"{counts}; lora--seed=1 5/24",
        f"fedspine--seed=1: accuracy 71.0 %, 12.3 s; {counts}",
    ]


def test_a_terminal_gets_one_display_and_its_cursor_back():
    out = io.StringIO()
    shown = display.SweepBars(Console(file=out, force_terminal=True, width=120))
    shown.update(STATUS)
    shown.bar.refresh()
    shown.ended("fedspine[x]", "failed: no [red]room[/red]", STATUS)
    shown.close()
    shown.close()
    text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())
    for expected in ("4/12", "1 failed, about 2 min 05 s left", "lora--seed=1", "5/24", "rounds"):
        assert expected in text
    assert "fedspine[x]: failed: no [red]room[/red]" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_help(command):
    code, out, _ = command("sweep", "--help")
    assert code == 0
    for option in ("--jobs", "--out", "--list", "--retry", "--json"):
        assert option in out


def test_list_runs_nothing(place, command):
    Path("sweep.toml").write_text(GOOD)
    before = set(os.listdir(place))
    code, out, lines = command("sweep", "sweep.toml", "--list")
    assert (code, lines) == (0, [])
    assert out.count("open") == 4 + 1
    code, out, _ = command("sweep", "sweep.toml", "--list", "--json")
    found = json.loads(out)
    assert (found["open"], found["done"], len(found["cells"])) == (4, 0, 4)
    assert set(os.listdir(place)) == before


# --- what is run ---


def swept(*arguments):
    """Exit code, stdout and the lines of stderr of a sweep that is carried out."""
    done = forked("sweep", *arguments)
    return done.returncode, done.stdout, done.stderr.splitlines()


def wait_for(true, process, seconds=120.0):
    """Wait until something is true or the process has ended; returns whether it came true."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.01)
    return bool(true())


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def assert_as_alone(cell, folder, tmp_path):
    """The cell's run ended as the same recipe does by itself."""
    run = folder / "cells" / cell.name
    alone = tmp_path / "alone" / cell.name
    alone.parent.mkdir(exist_ok=True)
    recipe = config.load(run / "recipe.toml", ["run.workers=1"])
    new_run(recipe, alone, Silent())
    assert without_wall(summary_of(run)) == without_wall(summary_of(alone))
    assert records_of(run) == records_of(alone)


@pytest.mark.slow
def test_a_sweep_from_its_start_to_its_end(place, tmp_path):
    """One cell fails and is put right; the others are done, and never again."""
    write_csv(place / "few.csv", rows=2)  # of which none can be set aside for testing
    text = GOOD.replace("[0, 1]", "[0]") + '[data.rows]\n[data.few]\ntask.data = "few.csv"\n'
    Path("sweep.toml").write_text(text.replace("[methods.fedspine]\nranks = [2, 4]\n", ""))
    good, bad = cells = plan(Path("sweep.toml"))
    folder = place / "sweeps" / "sweep"

    code, out, lines = swept("sweep.toml", "--jobs", "2")
    assert code == 1
    assert "2 cells in sweeps/sweep: 1 done, 1 failed" in out
    assert any(line.startswith(f"{bad.name}: failed: ") for line in lines)
    record = json.loads((folder / "cells" / good.name / "cell.json").read_text())
    assert record == {"label": "lora", "settings": {"data": "rows"}, "seed": 0}
    assert_as_alone(good, folder, tmp_path)

    before = stamps(folder / "cells")
    code, out, _ = swept("sweep.toml", "--json")
    found = json.loads(out)
    assert (code, found["done"], found["failed"]) == (1, 1, 1)
    assert "rows" in found["cells"][1]["reason"] and "\n" not in found["cells"][1]["reason"]
    assert stamps(folder / "cells") == before

    write_csv(place / "few.csv")
    code, out, _ = swept("sweep.toml", "--json", "--retry")
    assert (code, json.loads(out)["done"]) == (0, 2)
    assert {
        path: stamp for path, stamp in stamps(folder / "cells").items() if good.name in str(path)
    } == {path: stamp for path, stamp in before.items() if good.name in str(path)}
    assert not list((folder / "failed").iterdir())
    assert [
        cell_status.status for cell_status in overview_of(Path("sweep.toml"), None).cell_statuses
    ] == ["done"] * len(cells)

    # another version of the file is refused where the same cell means another run, and reported
    # where it lacks one
    Path("sweep.toml").write_text(
        Path("sweep.toml").read_text().replace("rounds = 2", "rounds = 3")
    )
    code, out, (line,) = swept("sweep.toml", "--json")
    assert (code, out) == (2, "")
    assert "run.rounds is 2 there, 3 here" in line and "--out" in line
    Path("sweep.toml").write_text(
        Path("sweep.toml").read_text().replace("rounds = 3", "rounds = 2").split("[data.few")[0]
    )
    code, out, _ = swept("sweep.toml")
    assert code == 0
    assert f"1 run in the folder that the file does not describe: {bad.name}" in out


@pytest.mark.slow
def test_a_pruned_cell_is_read_against_the_unpruned_one(place):
    """The unpruned cell is done later, and the report of the pruned one is written again."""
    Path("sweep.toml").write_text(GOOD.replace("[0, 1]", "[0]"))
    pruned, unpruned = plan(Path("sweep.toml"))
    assert swept("sweep.toml")[0] == 0
    cells = place / "sweeps" / "sweep" / "cells"
    page = (cells / pruned.name / "report.html").read_text()
    assert "Unpruned run" in page and "Unpruned base" not in page
    assert "lora: same data, seed, rounds and steps" in page
    assert "Unpruned" not in (cells / unpruned.name / "report.html").read_text()


# once a second round is being saved, the first one is; two rounds at a time are there
SAVED = "cells/*/state/round-*[2-9].safetensors"
MOMENTS = {  # when a sweep is killed: what must be there, somewhere in its folder
    "its first cell begins": "cells/*/cell.json",
    "a round is saved": SAVED,
    "a cell is scored": "cells/*/summary.json",
}


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(place, tmp_path):
    Path("sweep.toml").write_text(
        GOOD.replace("rounds = 2", "rounds = 8").replace("[methods.fedspine]\nranks = [2, 4]", "")
    )
    cells, folder = plan(Path("sweep.toml")), place / "out"
    kills, seen = 0, set()
    for number, (moment, pattern) in enumerate(MOMENTS.items()):
        jobs = ["--jobs", "2"] if number % 2 else []
        sweep = Forked("sweep", "sweep.toml", "--out", "out", "--json", *jobs)
        if not wait_for(lambda pattern=pattern: list(folder.glob(pattern)), sweep):
            raise AssertionError(f"{moment} never came: {sweep.communicate()}")
        children = (
            psutil.Process(sweep.pid).children(recursive=True) if sweep.poll() is None else []
        )
        sweep.kill()
        sweep.communicate()
        kills += sweep.returncode == -signal.SIGKILL
        assert alive(children, GONE_SECONDS) == []
        cell_statuses = overview_of(Path("sweep.toml"), folder).cell_statuses
        seen |= {cell_status.status for cell_status in cell_statuses}
        done = {
            cell_status.cell.name: stamps(folder / "cells" / cell_status.cell.name)
            for cell_status in cell_statuses
            if cell_status.status == "done"
        }
    assert kills >= 2
    assert seen >= {"open", "half-done"}
    assert "failed" not in seen

    code, out, lines = swept("sweep.toml", "--out", "out", "--json")
    assert (code, lines) == (0, [])
    assert json.loads(out)["done"] == len(cells)
    for name, before in done.items():
        assert stamps(folder / "cells" / name) == before  # what was done is not touched again
    for cell in cells:
        assert_as_alone(cell, folder, tmp_path)


@pytest.mark.slow
def test_interrupted_and_two_at_once(place, command):
    Path("sweep.toml").write_text(GOOD.replace("rounds = 2", "rounds = 5000"))
    sweep = Forked("sweep", "sweep.toml", "--jobs", "2")
    folder = Path("sweeps/sweep")
    assert wait_for(lambda: len({path.parent for path in folder.glob(SAVED)}) == 2, sweep), (
        sweep.communicate()
    )

    code, out, (line,) = command("sweep", "sweep.toml", "--json")  # a second one, meanwhile
    assert (code, out) == (2, "")
    assert "another process is working on the sweep in sweeps/sweep" in line
    code, out, _ = command("sweep", "sweep.toml", "--list", "--json")
    found = json.loads(out)
    assert (code, found["running"], found["open"]) == (0, 2, 2)
    assert all(
        0 < cell["rounds_done"] < 5000 for cell in found["cells"] if cell["status"] == "running"
    )

    children = psutil.Process(sweep.pid).children(recursive=True)
    os.killpg(sweep.pid, signal.SIGINT)
    out, err = sweep.communicate()
    assert (sweep.returncode, out) == (130, "")
    *_, line = err.splitlines()
    assert line == (
        "fedspine: interrupted; 0 of 4 cells done; resume with: fedspine sweep sweep.toml --jobs 2"
    )
    assert alive(children, GONE_SECONDS) == []
    statuses = [
        cell_status.status for cell_status in overview_of(Path("sweep.toml"), None).cell_statuses
    ]
    assert sorted(statuses) == ["half-done", "half-done", "open", "open"]


@pytest.mark.slow
def test_a_sweep_that_ignores_ctrl_c_ends_on_sigterm(place):
    """As under `nohup`; its cells ignore Ctrl-C too, so it must not rely on that to end them.

    The sweep and its cell are started as users start them.
    """
    Path("sweep.toml").write_text(GOOD.replace("rounds = 2", "rounds = 5000"))
    with ignoring_ctrl_c():
        sweep = subprocess.Popen(
            [sys.executable, "-m", "fedspine", "sweep", "sweep.toml"],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=True,  # so that Ctrl-C can be sent to all of it
        )
    folder = Path("sweeps/sweep")
    assert wait_for(lambda: list(folder.glob(SAVED)), sweep), sweep.communicate()
    (cell,) = psutil.Process(sweep.pid).children()
    os.killpg(sweep.pid, signal.SIGINT)
    cell.send_signal(signal.SIGINT)
    time.sleep(0.5)  # within which both would have begun to end
    assert sweep.poll() is None
    assert cell.is_running()
    asked = time.monotonic()
    sweep.terminate()
    out, err = sweep.communicate()
    assert time.monotonic() - asked < GOODBYE_SECONDS  # the cell needed no kill
    assert (sweep.returncode, out) == (143, "")
    *_, line = err.splitlines()
    assert line.startswith("fedspine: terminated; 0 of 4 cells done; resume with: fedspine sweep")
    assert alive([cell], GONE_SECONDS) == []
    statuses = [
        cell_status.status for cell_status in overview_of(Path("sweep.toml"), None).cell_statuses
    ]
    assert sorted(statuses) == ["half-done", "open", "open", "open"]


@pytest.mark.slow
def test_a_run_that_somebody_else_works_on_is_waited_for(place):
    """As where a killed sweep's run outlives it, on systems that cannot end it."""
    Path("sweep.toml").write_text(
        GOOD.replace("[0, 1]", "[0]").replace("[methods.fedspine]\nranks = [2, 4]\n", "")
    )
    (cell,) = plan(Path("sweep.toml"))
    sweep = SweepFolder(Path("sweeps/sweep"))
    sweep.open(Path("sweep.toml"))
    run = sweep.prepare(cell)
    sweep.close()
    holder = lock(run / "state" / "lock", "it")
    waiting = Forked("sweep", "sweep.toml", "--json")
    assert wait_for(lambda: held(Path("sweeps/sweep/lock")), waiting), waiting.communicate()
    time.sleep(1)  # in which it would have begun
    assert not Path("sweeps/sweep/running.json").exists()
    holder.close()
    out, err = waiting.communicate()
    assert (waiting.returncode, err) == (0, "")
    assert json.loads(out)["done"] == 1


def test_a_killed_run_is_named_in_one_line(place):
    assert reason_of(-9, "") == "its process was ended by SIGKILL, perhaps for its memory"
    assert reason_of(2, "a warning\nfedspine: no room\n") == "no room"
    assert reason_of(1, "Traceback\n\nKeyError: 3\n") == "KeyError: 3"
    assert reason_of(7, "") == "its process ended with exit code 7"


def test_what_a_killed_sweep_left_behind(place):
    """Who runs what is only reported by a sweep that is at work; a leftover of a killed one says
    nothing.
    """
    cells = planned(GOOD)
    sweep = SweepFolder(Path("out"))
    sweep.open(Path("sweep.toml"))
    sweep.prepare(cells[0])
    sweep.fail(cells[1], "no room", "all that was said")
    sweep.write_running(cells[:1])
    sweep.close()
    found = [
        cell_status.status
        for cell_status in overview_of(Path("sweep.toml"), Path("out")).cell_statuses
    ]
    assert found == ["open", "failed", "open", "open"]
    with pytest.raises(BadInput, match="not the folder of a sweep"):
        SweepFolder(Path("out/cells")).check(cells)
