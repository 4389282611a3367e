"""How numbers read, the table of a finished run, and progress on stderr."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from fedspine.report import tables
from fedspine.ui import progress

SUMMARY = {
    "rounds": 2,
    "devices": 1,
    "accuracy": 0.8,
    "accuracy_dense": 0.85,
    "state_sha256": "ab" * 32,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (tables.percent(0.7149), "71.5 %"),
        (tables.percent(None), "-"),
        (tables.points(-0.0131), "-1.3 points"),
        (tables.points(-0.0001), "+0.0 points"),
        (tables.decimal(float("inf")), "-"),
        (tables.bytes_text(0), "0 B"),
        (tables.bytes_text(999), "999 B"),
        (tables.bytes_text(1_500), "1.5 kB"),
        (tables.bytes_text(999_999), "1.0 MB"),
        (tables.bytes_text(8_589_934_592), "8.6 GB"),
        (tables.bytes_text(3.2e16), "32000.0 TB"),
        (tables.seconds_text(0.004), "0.00 s"),
        (tables.seconds_text(59.94), "59.9 s"),
        (tables.seconds_text(59.96), "1 min 00 s"),
        (tables.seconds_text(3599.6), "1 h 00 min"),
        (tables.seconds_text(200_000), "2 d 7 h"),
        (tables.seconds_text(float("nan")), "-"),
    ],
)
def test_numbers_read(text: str, expected: str) -> None:
    assert text == expected


def test_the_table_is_plain_text_off_a_terminal() -> None:
    out = io.StringIO()
    tables.print_table(tables.summary_table(SUMMARY | {"method": "[red]x[/red]"}), out)
    assert "\x1b" not in out.getvalue()
    for expected in (
        "[red]x[/red], 2 rounds",
        "Device models",
        "85.0 %",
        "Unpruned base",
        "same adapter, for which it was not tuned",
        "abababababab",
    ):
        assert expected in out.getvalue()
    assert "Gap" not in out.getvalue()


def headlines(summary: dict, *unpruned: tables.UnprunedRun) -> dict[str, tuple[str, str]]:
    return {line.label: (line.value, line.note) for line in tables.headlines(summary, unpruned)}


def test_an_unpruned_run_takes_the_place_of_the_unpruned_base() -> None:
    found = headlines(SUMMARY, tables.UnprunedRun("fedlora", "runs/a", 0.824, 0.5))
    assert found["Unpruned run"] == ("82.4 %", "fedlora: same data, seed, rounds and steps")
    assert found["Gap to unpruned"][0] == "-2.4 points"
    assert "Unpruned base" not in found


def test_a_gap_in_loss_has_its_sign() -> None:
    summary = {"loss": 2.5, "loss_dense": 1.6, "sparsity": 0.3}
    found = headlines(summary, tables.UnprunedRun("fedlora", "runs/a", None, 1.4))
    assert (found["Unpruned run"][0], found["Gap to unpruned"][0]) == ("1.400", "+1.100")


def test_the_unpruned_base_is_named_for_what_it_is() -> None:
    assert headlines(SUMMARY)["Unpruned base"][1] == "same adapter, for which it was not tuned"
    # pruned after training: the adapter was tuned on the unpruned base
    tuned = headlines(SUMMARY | {"tuned_unpruned": True, "sparsity": 0.5})
    assert tuned["Unpruned base"][1] == "same adapter, as it was tuned"
    # of what prunes nothing, it is the run's own model
    assert "Unpruned base" not in headlines(SUMMARY | {"tuned_unpruned": True, "sparsity": 0.0})


STATUS = progress.RunStatus(
    round=3, now=125.0, accuracy=0.71, sparsity=0.22, bytes_moved=1_500, seconds_left=287.4
)


def test_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress.progress_for(json=False)
    shown.stage("loading the base")  # not said, so that an error while loading is the only line
    shown.started(20, "fedspine", done=2)
    shown.stage("scoring")
    shown.round_done(STATUS)
    shown.round_done(replace(STATUS, round=4, accuracy=None, loss=1.5, checked=2))
    shown.finished(tables.summary_table(SUMMARY))
    shown.close()
    out, err = capsys.readouterr()
    assert out == ""
    started, stage, third, fourth, *table = err.splitlines()
    assert (started, stage) == ("fedspine: 20 rounds, 2 of them done before", "scoring")
    assert third == (
        "round 3/20  accuracy 71.0 %  sparsity 22.0 %  simulated 2 min 05 s  traffic 1.5 kB"
        "  about 4 min 47 s left"
    )
    assert "loss 1.500 (round 2)" in fourth
    assert any("Device models" in line for line in table)


def test_scoring_says_when_it_is_done_and_little_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = progress.progress_for(json=False)
    shown.say("precision fp32")
    shown.started(1, "fedspine")
    for done in range(11):
        shown.scored(done, 10, 2.0 * (10 - done) if done else None)
    assert capsys.readouterr().err.splitlines() == [
        "precision fp32",
        "fedspine: 1 rounds",
        "scored all 10 deployed models",
    ]


def test_json_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress.progress_for(json=True)
    shown.stage("loading")
    shown.started(2, "fedspine")
    shown.round_done(STATUS)
    shown.finished(tables.summary_table({}))
    shown.close()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_one_bar_and_its_cursor_back() -> None:
    out = io.StringIO()
    shown = progress.Live(Console(file=out, force_terminal=True, width=120))
    shown.stage("loading the base")
    shown.started(20, "fedspine", done=2)
    shown.round_done(STATUS)
    shown.close()
    shown.close()
    text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())
    for expected in (
        "loading the base",
        "fedspine",
        "3/20",
        "accuracy 71.0 %  sparsity 22.0 %  simulated 2 min 05 s",
    ):
        assert expected in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
