"""Comparing runs: the numbers by hand, the intervals by law, and one clear line for runs that
cannot be compared.
"""

import functools
import json
import math
import re
import shutil

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from made_runs import ROUND_BYTES, made_cell, made_run
from runs import carried_out, in_process, tiny_job, write_csv

from fedspine.core.errors import BadInput
from fedspine.ui.compare.comparison import find
from fedspine.ui.compare.curves import on_a_grid
from fedspine.ui.compare.groups import grouped
from fedspine.ui.compare.intervals import holm, paired, paired_ratio
from fedspine.ui.compare.runs import select
from fedspine.ui.progress import Silent


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs `fedspine compare` in this process: its exit code, stdout, and the lines
    of stderr.
    """
    return functools.partial(in_process, monkeypatch, capsys, "compare")


@pytest.fixture
def compare(command, tmp_path):
    """A function that compares folders without latency: what --json prints."""

    def run(*arguments):
        out = "" if "--out" in arguments else tmp_path / "compared"
        code, out, lines = command(
            *arguments, "--no-latency", "--json", *(["--out", out] if out else [])
        )
        assert (code, lines) == (0, [])
        return json.loads(out)

    return run


def two_methods(tmp_path, seeds=(0, 1, 2)):
    """FedLoRA at 0.7, 0.72, 0.74 and a faster FedSpine 1, 2 and 3 points below it, by seed."""
    folders = []
    for seed in seeds:
        top = 0.7 + 0.02 * seed
        folders.append(
            made_run(tmp_path / f"lora-{seed}", seed=seed, curve=(0.4, 0.6, top), seconds=10 + seed)
        )
        lower = top - 0.01 * (seed + 1)
        folders.append(
            made_run(
                tmp_path / f"spine-{seed}",
                method="fedspine",
                seed=seed,
                curve=(0.4, lower, lower),
                seconds=8,
            )
        )
    return folders


# --- intervals ---


@pytest.mark.parametrize("t", [0.3, 1.0, 2.5, 40.0])
def test_p_of_two_and_three_seeds_has_a_closed_form(t):
    # n seeds of mean t and standard error 1 have the statistic t
    two = paired([t - 1, t + 1])
    assert two.p == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-9)  # Cauchy
    three = paired([t - math.sqrt(3), t, t + math.sqrt(3)])
    assert three.p == pytest.approx(1 - t / math.sqrt(2 + t**2), rel=1e-9)
    assert three.beyond_noise is (three.p < 0.05)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6))
def test_the_interval_and_its_p_value_agree(values):
    found = paired(values)
    # both come from the same statistic, so they may differ in its last digits only
    assume(abs(found.p - 0.05) > 1e-9)
    assert (found.p < 0.05) is not (found.low <= 0 <= found.high)


def test_holm_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, and 0.04 is raised to 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.3, 0.9]) == pytest.approx([0.6, 0.9])
    assert holm([0.7, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni(p_values):
    for before, after in zip(p_values, holm(p_values), strict=True):
        assert before <= after <= min(1.0, len(p_values) * before) + 1e-12 or after == 1.0
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(holm(p_values))[order]) >= 0).all()


def test_without_any_difference_five_of_a_hundred_comparisons_err():
    """The share of comparisons of ten pairs in which at least one seems to differ."""
    rng, tries = np.random.default_rng(0), 2000
    found = [[paired([*rng.normal(size=3)]).p for _ in range(10)] for _ in range(tries)]
    standard_error = math.sqrt(0.05 * 0.95 / tries)
    assert np.mean([min(holm(p_values)) < 0.05 for p_values in found]) < 0.05 + 4 * standard_error
    assert np.mean([min(p_values) < 0.05 for p_values in found]) > 0.3  # 1 - 0.95^10 is 0.40


def test_nineteen_of_twenty_intervals_hold_the_truth():
    rng, tries = np.random.default_rng(0), 4000
    found = [paired([*rng.normal(0.3, 2.0, 3)]) for _ in range(tries)]
    held = np.mean([interval.low <= 0.3 <= interval.high for interval in found])
    assert abs(held - 0.95) < 4 * math.sqrt(0.95 * 0.05 / tries)  # four standard errors


def test_intervals_by_hand():
    # differences 1, 2, 3: mean 2, standard deviation 1, t 4.302653 at two degrees
    found = paired([0.01, 0.02, 0.03])
    assert (found.mean, found.n) == (pytest.approx(0.02), 3)
    assert found.high - found.mean == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    assert found.beyond_noise is False
    assert paired([0.02, 0.02]).beyond_noise is True
    assert paired([0.0, 0.0]).beyond_noise is False
    assert paired([0.5]).beyond_noise is None
    ratio = paired_ratio([2.0, 8.0])  # geometric mean 4; half width of the logarithms 12.7062 ln(2)
    assert ratio.mean == pytest.approx(4.0)
    assert ratio.high / ratio.mean == pytest.approx(2**12.706205, rel=1e-6)
    assert ratio.beyond_noise is False


# --- the numbers of a comparison ---


def test_numbers_by_hand(compare, tmp_path):
    (found,) = compare(*two_methods(tmp_path))["comparisons"]
    assert found["measure"] == "accuracy"
    # the best checks of the runs are 0.70, 0.72, 0.74 and 0.69, 0.70, 0.71
    assert found["target"]["best_of_all"] == pytest.approx(0.69)
    assert found["target"]["value"] == pytest.approx(0.685)
    lora, spine = found["methods"]
    assert (lora["name"], spine["name"]) == ("fedlora", "fedspine")
    assert lora["final"]["mean"] == pytest.approx(0.72)
    assert lora["final"]["spread"] == pytest.approx(0.02)
    assert lora["final"]["by_seed"] == pytest.approx({"0": 0.7, "1": 0.72, "2": 0.74})
    # FedLoRA reaches 0.685 at its third check, FedSpine at its second
    assert lora["simulated_seconds_to_target"]["by_seed"] == {"0": 30, "1": 33, "2": 36}
    assert lora["bytes_to_target"]["mean"] == 3 * ROUND_BYTES
    assert spine["simulated_seconds_to_target"]["mean"] == 16
    assert spine["bytes_to_target"]["mean"] == 2 * ROUND_BYTES
    assert lora["waiting_share"]["mean"] == pytest.approx(0.3)
    assert lora["peak_memory_bytes_simulated"]["mean"] == 50_000_000
    assert lora["bytes"]["mean"] == 4 * ROUND_BYTES
    (pair,) = found["differences"]
    assert pair["seeds"] == [0, 1, 2]
    assert pair["final"]["mean"] == pytest.approx(0.02)  # of 1, 2 and 3 points
    assert pair["final"]["low"] == pytest.approx(0.02 - 4.302653 * 0.01 / math.sqrt(3))
    # t = 2 sqrt(3) at two degrees of freedom, and one pair needs no correction
    p = 1 - 2 * math.sqrt(3) / math.sqrt(2 + 12)
    assert (pair["final"]["p"], pair["final"]["p_corrected"]) == pytest.approx((p, p))
    assert (pair["final"]["tests"], pair["final"]["beyond_noise"]) == (1, False)
    assert pair["speed_up"]["mean"] == pytest.approx(16 / (30 * 33 * 36) ** (1 / 3))
    assert pair["speed_up"]["beyond_noise"] is True
    assert pair["bytes_saving"]["mean"] == pytest.approx(2 / 3)
    # equally many rounds
    assert pair["shorter_run"]["mean"] == pytest.approx(8 / (10 * 11 * 12) ** (1 / 3))
    assert pair["verdict"].startswith(
        "fedlora is 2.0 points more accurate than fedspine "
        "(95 % interval -0.5 to +4.5, 3 seeds; p = 0.074): within the seeds' noise."
    )
    logs = np.log([30 / 16, 33 / 16, 36 / 16])  # of how much slower it is, by seed
    error = logs.std(ddof=1) / math.sqrt(3)
    low, high = np.exp(logs.mean() + np.array([-4.302653, 4.302653]) * error)
    t = logs.mean() / error
    p = 1 - t / math.sqrt(2 + t**2)
    slower = f"It reaches the target 2.06 times slower ({low:.2f} to {high:.2f}; p = {p:.2g})"
    assert slower in pair["verdict"]
    assert pair["verdict"].endswith("beyond the noise.")


def test_p_values_are_corrected_for_all_pairs_of_all_sections(compare, tmp_path):
    """Three methods in two settings are six pairs; a pair's gaps are g - 0.1 %, g, g + 0.1 %."""
    sweep = tmp_path / "sweep"
    for alpha, gaps in ((0.1, (0.0, 0.004, 0.012)), (1.0, (0.0, 0.03, 0.05))):
        for place, (name, gap) in enumerate(zip("abc", gaps, strict=True)):
            for seed in (0, 1, 2):
                made_cell(
                    *(sweep, f"{name}-{alpha}-{seed}", name, {"fleet.alpha": alpha}),
                    seed=seed,
                    curve=(0.3, 0.7 - gap - 0.001 * place * (seed - 1)),
                    settings=(f"fleet.alpha={alpha}", f"method.rank={place + 1}"),
                )
    found = compare(sweep)
    intervals = [pair["final"] for each in found["comparisons"] for pair in each["differences"]]
    assert [interval["tests"] for interval in intervals] == [6] * 6
    raw = [interval["p"] for interval in intervals]
    after = [interval["p_corrected"] for interval in intervals]
    # mean g and standard error s / sqrt(3) have t = sqrt(3) g / s at two degrees of freedom
    expected = [
        1 - t / math.sqrt(2 + t**2)
        for g, s in ((4, 1), (12, 2), (8, 1), (30, 1), (50, 2), (20, 1))
        if (t := math.sqrt(3) * g / s)
    ]
    assert raw == pytest.approx(expected, rel=1e-6)
    assert after == pytest.approx(holm(raw))
    # 0.020 alone is below 0.05, but not as the largest of six that it is compared with
    small = intervals[0]
    assert small["p"] < 0.05
    assert small["beyond_noise"] is (small["p_corrected"] < 0.05)
    assert found["correction"].startswith("Holm")
    text = found["comparisons"][0]["differences"][0]["verdict"]
    assert "corrected for 6 pairs" in text
    for name in ("compare.html", "compare.md"):
        page = (tmp_path / "compared" / name).read_text()
        assert "corrected for 6 pairs" in page
        assert "Holm's correction" in page.replace("&#39;", "'")


def test_what_is_beyond_the_noise_alone_may_not_be_among_many(compare, tmp_path):
    # 2 points, 3 seeds, standard deviation 0.6: t = 5.77, p = 0.029, and of three pairs 0.086
    shift = (-0.006, 0.0, 0.006)
    for name, accuracy, own in (("a", 0.70, 0), ("b", 0.68, 1), ("c", 0.68, -1)):
        for seed in (0, 1, 2):
            value = accuracy + own * shift[seed]
            rank = f"method.rank={ord(name)}"
            made_cell(tmp_path, f"{name}{seed}", name, seed=seed, curve=(value,), settings=(rank,))
    alone = compare(*(tmp_path / "cells" / f"{n}{s}" for n in "ab" for s in (0, 1, 2)))
    many = compare(tmp_path)
    one = alone["comparisons"][0]["differences"][0]["final"]
    other = many["comparisons"][0]["differences"][0]["final"]
    assert one["p"] == pytest.approx(other["p"]) == pytest.approx(0.0287, abs=5e-5)
    assert (one["beyond_noise"], other["beyond_noise"]) == (True, False)
    assert other["p_corrected"] == pytest.approx(3 * other["p"])
    assert other["low"] > 0  # the interval is not corrected


def test_the_final_score_is_not_a_check(compare, tmp_path):
    folder = made_run(tmp_path / "run", curve=(0.4, 0.5), accuracy=0.9)
    (found,) = compare(folder, "--target", "0.6")["comparisons"]
    (method,) = found["methods"]
    assert method["final"]["mean"] == 0.9
    assert method["seeds_that_reach_the_target"] == 0
    assert found["target"]["best_of_all"] == 0.5


@pytest.mark.parametrize("text", ["0.7", "70", "70%", "70.0 %"])
def test_a_target_is_a_share_or_a_percentage(compare, tmp_path, text):
    (found,) = compare(*two_methods(tmp_path), "--target", text)["comparisons"]
    assert found["target"]["value"] == pytest.approx(0.7)


def test_a_file_among_the_folders_is_named(tmp_path):
    (tmp_path / "run.log").touch()
    with pytest.raises(BadInput, match="run.log is not the folder of a run"):
        select([tmp_path / "run.log"])


@pytest.mark.parametrize("text", ["fast", "0", "-1", "101", "nan", "inf", ""])
def test_a_bad_target(command, tmp_path, text):
    made_run(tmp_path / "run")
    refused(
        command(tmp_path / "run", "--target", text, "--out", tmp_path / "new"),
        ["--target", "0.7 or 70%" if text else "is empty"],
    )
    assert not (tmp_path / "new").exists()


def test_who_does_not_reach_the_target_is_shown_and_given_no_speed_up(compare, tmp_path):
    folders = two_methods(tmp_path)
    page = compare(*folders, "--target", "0.705")
    (found,) = page["comparisons"]
    lora, spine = found["methods"]
    assert (lora["seeds_that_reach_the_target"], spine["seeds_that_reach_the_target"]) == (2, 1)
    assert lora["simulated_seconds_to_target"]["mean"] is None  # the seeds that do would flatter
    assert lora["simulated_seconds_to_target"]["by_seed"] == {"0": None, "1": 33, "2": 36}
    (pair,) = found["differences"]
    assert pair["speed_up"] is pair["bytes_saving"] is None
    assert pair["final"]["n"] == 3
    says = (
        "No speed-up is given: fedlora reaches the target in 2 "
        "of 3 seeds and fedspine reaches the target in 1 of 3"
    )
    assert says in pair["verdict"]
    for name in ("compare.html", "compare.md"):
        assert "2 of 3 seeds" in (tmp_path / "compared" / name).read_text()
    (found,) = compare(*folders, "--target", "0.99")["comparisons"]
    assert "none of 3 seeds" in found["differences"][0]["verdict"]
    assert len(found["methods"]) == 2


def test_one_seed_has_no_interval(compare, tmp_path):
    (found,) = compare(*two_methods(tmp_path, seeds=(0,)))["comparisons"]
    (pair,) = found["differences"]
    assert (pair["final"]["low"], pair["final"]["beyond_noise"]) == (None, None)
    assert "no interval, so this may be noise" in pair["verdict"]
    assert found["methods"][0]["final"]["spread"] is None
    assert "one seed" in (tmp_path / "compared" / "compare.html").read_text()


def test_only_common_seeds_are_paired(compare, tmp_path):
    folders = [
        made_run(tmp_path / f"lora-{seed}", seed=seed, curve=(0.5, 0.6 + 0.1 * seed))
        for seed in (0, 1, 2)
    ]
    folders += [
        made_run(tmp_path / f"spine-{seed}", method="fedspine", seed=seed) for seed in (1, 5)
    ]
    (found,) = compare(*folders)["comparisons"]
    (pair,) = found["differences"]
    assert (pair["seeds"], pair["final"]["n"]) == ([1], 1)
    (found,) = compare(*folders[:3], folders[4], "--out", tmp_path / "apart")["comparisons"]
    (pair,) = found["differences"]
    assert (pair["seeds"], pair["final"], pair["speed_up"]) == ([], None, None)
    assert "share no seed" in pair["verdict"]


def test_without_checks_there_is_no_target(compare, tmp_path):
    folders = [
        made_run(tmp_path / name, method=name, curve=(None, None), accuracy=0.7) for name in METHODS
    ]
    for asked in ("auto", "0.6"):
        found = compare(*folders, "--target", asked)["comparisons"][0]
        assert found["target"]["value"] is None
        assert found["differences"][0]["speed_up"] is None
        assert "reaches" not in found["differences"][0]["verdict"]
    assert (
        "No accuracy was checked on the way" in (tmp_path / "compared" / "compare.md").read_text()
    )


METHODS = ("fedlora", "fedspine")
LANGUAGE = ("task.kind='causal-lm'",)


def test_language_models_are_compared_by_their_loss(drawn, compare, tmp_path):
    folders = [
        made_run(
            tmp_path / f"{name}-{seed}",
            method=name,
            seed=seed,
            curve=(2.0, low + seed / 100),
            settings=LANGUAGE,
        )
        for name, low in zip(METHODS, (1.5, 1.4), strict=True)
        for seed in (0, 1)
    ]
    (found,) = compare(*folders)["comparisons"]
    assert (found["measure"], found["higher_is_better"]) == ("loss", False)
    assert [method["name"] for method in found["methods"]] == ["fedspine", "fedlora"]
    assert found["target"]["best_of_all"] == 1.51  # the worst of the lowest
    assert found["target"]["value"] == pytest.approx(1.515)
    assert found["differences"][0]["verdict"].startswith(
        "fedspine has a loss 0.100 nats lower than fedlora"
    )
    (found,) = compare(*folders, "--target", "1.45")["comparisons"]
    assert [method["seeds_that_reach_the_target"] for method in found["methods"]] == [2, 0]
    assert "loss (nats)" in (tmp_path / "compared" / "loss-over-seconds.svg").read_text()


def test_a_run_that_diverged_is_not_left_out(compare, tmp_path):
    folders = [
        made_run(tmp_path / f"{seed}", seed=seed, settings=LANGUAGE, curve=(2.0, 1.5))
        for seed in (0, 1)
    ]
    lost = made_run(tmp_path / "lost", method="fedspine", settings=LANGUAGE, curve=(2.0, None))
    (found,) = compare(*folders, lost)["comparisons"]
    last = found["methods"][-1]
    assert (last["name"], last["final"]["mean"], last["final"]["n"]) == ("fedspine", None, 1)
    assert "ended without a finite loss" in found["differences"][0]["verdict"]


# --- which runs are one method, which are one comparison ---


def test_methods_are_named_by_what_sets_them_apart(compare, tmp_path):
    made_run(tmp_path / "a", curve=(0.7,), settings=("method.rank=4",))
    made_run(tmp_path / "b", curve=(0.6,), settings=("method.rank=8",))
    made_run(tmp_path / "c", curve=(0.5,), settings=("method.rank=8", "task.layers=3"))
    made_run(tmp_path / "d", curve=(0.4,), method="fedspine", settings=("run.workers=2",))
    (found,) = compare(*(tmp_path / name for name in "abcd"))["comparisons"]
    names = [method["name"] for method in found["methods"]]
    assert names == ["fedlora rank=4", "fedlora rank=8", "fedlora rank=8 layers=3", "fedspine"]


def test_the_number_of_workers_makes_no_method(compare, tmp_path):
    made_run(tmp_path / "a", settings=("run.workers=1",))
    made_run(tmp_path / "b", seed=1, settings=("run.workers=2",))
    (found,) = compare(tmp_path / "a", tmp_path / "b")["comparisons"]
    assert [method["seeds"] for method in found["methods"]] == [[0, 1]]
    assert found["differences"] == []


def made_sweep(folder):
    for alpha in (0.1, 1.0):
        for seed in (0, 1):
            for label, method, best in (("ours", "fedspine", 0.7), ("theirs", "fedlora", 0.6)):
                made_cell(
                    *(folder, f"{label}-{alpha}-{seed}", label, {"fleet.alpha": alpha}),
                    **{"method": method, "seed": seed, "curve": (0.3, best + alpha / 100)},
                    settings=(f"fleet.alpha={alpha}",),
                )
    return folder


def test_a_sweep_is_one_comparison_for_each_setting(compare, tmp_path):
    found = compare(made_sweep(tmp_path / "sweep"))["comparisons"]
    assert [each["title"].rpartition(", ")[2] for each in found] == ["alpha 0.1", "alpha 1"]
    for each, best in zip(found, (0.701, 0.71), strict=True):
        assert [method["name"] for method in each["methods"]] == ["ours", "theirs"]
        assert each["methods"][0]["final"]["mean"] == pytest.approx(best)
        assert each["methods"][0]["seeds"] == [0, 1]
    figures = {path.name for path in (tmp_path / "compared").glob("*.svg")}
    assert len(figures) == 8
    assert {"1-accuracy-over-seconds.svg", "2-final-accuracy.svg"} <= figures


def test_a_method_that_was_offered_more_devices_stays_in_the_comparison(compare, tmp_path):
    folder = tmp_path / "sweep"
    for label, method, offered in (("ours", "fedspine", 4), ("theirs", "fedlora", 2)):
        own = {"method": method, "seed": 0, "settings": (f"fleet.per_round={offered}",)}
        made_cell(folder, label, label, {"data": "rows"}, **own)
    (found,) = compare(folder)["comparisons"]
    assert [method["name"] for method in found["methods"]] == ["ours", "theirs"]


@pytest.mark.parametrize("theirs", [1.0, 0.7])
def test_a_quorum_of_replies_is_among_the_caveats(compare, tmp_path, theirs):
    one = made_run(tmp_path / "one", settings=("fleet.quorum=0.7",))
    two = made_run(tmp_path / "two", method="fedspine", settings=(f"fleet.quorum={theirs}",))
    compare(one, two)
    lines = (tmp_path / "compared" / "compare.md").read_text().splitlines()
    said = [line.removeprefix("- ") for line in lines if "fleet.quorum" in line]
    equal = "Rounds end at a share of their replies (fleet.quorum): fedlora 0.7, fedspine 0.7."
    unequal = (
        "Rounds end at different shares of their replies (fleet.quorum): fedlora 0.7, fedspine 1. "
        "So these methods were not compared on equal terms."
    )
    assert said == [unequal if theirs == 1 else equal]


def test_runs_that_wait_for_all_have_no_caveat_of_a_quorum(compare, tmp_path):
    compare(made_run(tmp_path / "one"), made_run(tmp_path / "two", method="fedspine"))
    assert "quorum" not in (tmp_path / "compared" / "compare.md").read_text()


def test_cells_named_one_by_one_have_to_be_one_comparison(compare, command, tmp_path):
    sweep = made_sweep(tmp_path / "sweep")
    (found,) = compare(*sorted((sweep / "cells").glob("*-0.1-*")))["comparisons"]
    assert [method["name"] for method in found["methods"]] == ["ours", "theirs"]
    refused(
        command(*(sweep / "cells").iterdir(), "--out", tmp_path / "x"),
        ["devices differ", "fleet.alpha"],
    )


def test_what_is_not_finished_is_named_and_left_out(compare, tmp_path):
    sweep = made_sweep(tmp_path / "sweep")
    cells = sweep / "cells"
    for name in ("ours-0.1-0", "theirs-0.1-1"):
        (cells / name / "summary.json").unlink()
    (cells / "ours-1.0-1" / "recipe.toml").unlink()
    (sweep / "failed").mkdir()
    (sweep / "failed" / "theirs-0.1-1.txt").write_text("all devices were lost\n\nTraceback\n")
    shutil.copytree(cells / "ours-1.0-0", cells / ".ours-1.0-2.77.part")  # what a kill left
    found = compare(sweep)
    left = {left["folder"].rpartition("/")[2]: left["why"] for left in found["left_out"]}
    assert left == {
        "ours-0.1-0": "not finished",
        "theirs-0.1-1": "failed: all devices were lost",
        "ours-1.0-1": "not begun",
    }
    assert [[m["seeds"] for m in each["methods"]] for each in found["comparisons"]] == [
        [[1], [0]],
        [[0], [0, 1]],
    ]
    for name in ("compare.html", "compare.md"):
        assert "theirs-0.1-1" in (tmp_path / "compared" / name).read_text()


# --- bad input ---


def refused(said, words):
    """One line on stderr with these words, exit code 2, nothing on stdout."""
    code, out, lines = said
    assert (code, out) == (2, "")
    (line,) = lines
    assert line.startswith("fedspine: ")
    for word in words:
        assert word in line


INCOMPARABLE = {  # what the second run has, and what the line must say
    "data": (
        {"settings": ("task.data='rows.csv'",)},
        ["their data differ", "task.data", "rows.csv"],
    ),
    "label": ({"settings": ("task.label='kind'",)}, ["their data differ", "task.label"]),
    "kind": ({"settings": LANGUAGE}, ["their data differ", "task.kind"]),
    "devices": (
        {"settings": ("fleet.devices=16",)},
        ["their devices differ", "fleet.devices is 80", "16"],
    ),
    "partition": (
        {"settings": ("fleet.alpha=0.1",)},
        ["their devices differ", "fleet.alpha is 1.0", "0.1"],
    ),
    "clock": ({"settings": ("fleet.spread=3.0",)}, ["their clocks differ", "fleet.spread"]),
    "losses": ({"settings": ("fleet.drop=0.1",)}, ["their clocks differ", "fleet.drop"]),
    "checks": (
        {"settings": ("run.evaluate_rows=64",)},
        ["scored differently", "run.evaluate_rows is 256"],
    ),
    "test rows": ({"test_rows": 400}, ["their data differ", "test rows is 500", "400"]),
    "classes": ({"classes": 6}, ["their data differ", "number of classes is 8", "6"]),
}


@pytest.mark.parametrize("name", INCOMPARABLE)
def test_runs_that_cannot_be_compared(command, tmp_path, name):
    other, says = INCOMPARABLE[name]
    one = made_run(tmp_path / "one", classes=8)
    two = made_run(tmp_path / "two", method="fedspine", **{"classes": 8} | other)
    refused(
        command(one, two, "--out", tmp_path / "new", "--json"),
        ["cannot be compared", str(one), str(two), *says],
    )
    assert not (tmp_path / "new").exists()


def test_an_empty_selection(command, tmp_path):
    refused(command("--json"), ["no run was named"])
    (tmp_path / "sweep" / "cells").mkdir(parents=True)
    refused(command(tmp_path / "sweep"), ["no cell"])
    (made_run(tmp_path / "run") / "summary.json").unlink()
    refused(command(tmp_path / "run"), ["none of 1", "finished", str(tmp_path / "run")])
    refused(command(tmp_path / "nowhere"), ["nowhere", "does not exist"])
    assert not (tmp_path / "runs").exists()


def test_the_same_run_twice_is_one(compare, tmp_path):
    one = made_run(tmp_path / "one")
    (found,) = compare(one, tmp_path / "one" / ".." / "one")["comparisons"]
    assert found["methods"][0]["seeds"] == [0]


def test_two_runs_of_one_seed(command, tmp_path):
    made_run(tmp_path / "one")
    made_run(tmp_path / "two")
    refused(command(tmp_path / "one", tmp_path / "two"), ["same method and seed", "one", "two"])


def test_a_damaged_summary(command, tmp_path):
    folder = made_run(tmp_path / "run")
    for text, word in (("{", "damaged"), ("{}", "lacks 'test_rows'")):
        (folder / "summary.json").write_text(text)
        refused(command(folder), ["summary.json", word, "remove it"])


def test_a_run_at_real_sites(command, tmp_path):
    folder = made_run(tmp_path / "run", fleet_seconds=10.0)
    refused(command(folder), ["run ran at the sites of a real fleet", "leave it out"])


@pytest.mark.parametrize("text", ["{", "[]", '{"label": "a"}', '{"label": "a", "settings": 3}'])
def test_a_damaged_cell(tmp_path, text):
    made_cell(tmp_path, "a", "a")
    (tmp_path / "cells" / "a" / "cell.json").write_text(text)
    with pytest.raises(BadInput, match=r"cell\.json is damaged"):
        select([tmp_path])


def test_an_output_folder_that_cannot_be(command, tmp_path):
    made_run(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    refused(
        command(tmp_path / "run", "--no-latency", "--out", tmp_path / "file"), ["file", "--out"]
    )
    assert (tmp_path / "file").read_text() == "mine"


# --- what is written ---


def test_the_page_fetches_nothing_and_escapes(drawn, compare, tmp_path):
    for seed in (0, 1):
        made_cell(tmp_path / "s", f"a{seed}", "<b>$x$ _&amp; | 名", seed=seed, curve=(0.5, 0.6))
        made_cell(tmp_path / "s", f"b{seed}", "_under", seed=seed, method="fedspine")
    compare(tmp_path / "s")
    out = tmp_path / "compared"
    html = (out / "compare.html").read_text()
    assert "&lt;b&gt;$x$ _&amp;amp; | 名" in html
    assert "<b>" not in html
    bare = re.sub(r'\bxmlns(:\w+)?="[^"]*"', "", html)
    for forbidden in ("http://", "https://", "<link", "@import", "src=", "fetch(", "<?xml"):
        assert forbidden not in bare
    assert html.count("<svg") == 4
    assert html.count("<script>") == 1
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert "\\<b>$x$ \\_&amp; \\| 名" in (out / "compare.md").read_text()
    svg = (out / "accuracy-over-rounds.svg").read_text()
    assert "&lt;b&gt;$x$" in svg  # as it is, not as a formula
    assert "_under" in svg


def test_all_files_are_written_and_agree(drawn, compare, command, tmp_path):
    folders = two_methods(tmp_path)
    found = compare(*folders)
    out = tmp_path / "compared"
    assert found.pop("page") == str(out / "compare.html")
    assert json.loads((out / "compare.json").read_text()) == found
    text = (out / "compare.md").read_text()
    assert "| fedlora | 72.0 ± 2.0 % | 3 |" in text
    for name in re.findall(r"\]\((.*?)\)", text):
        figure = (out / name).read_text()
        assert figure.startswith("<svg") and "<path" in figure
        # it is white, and the page's is transparent
        paper = '<rect width="100%" height="100%" fill="#ffffff"/>'
        assert figure.count(paper) == 1
        assert figure.replace(f"\n {paper}", "") in (out / "compare.html").read_text()
    before = (out / "compare.html").read_bytes()
    compare(*folders)
    assert (out / "compare.html").read_bytes() == before
    code, said, lines = command(*folders, "--no-latency", "--out", out)
    assert (code, lines) == (0, [])
    assert "fedlora is 2.0 points more accurate" in " ".join(said.split())
    assert said.splitlines()[-1] == f"page: {out / 'compare.html'}"


def test_without_out_a_free_folder_is_taken(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_run(tmp_path / "run")
    for number in (1, 2):
        assert command("run", "--no-latency")[0] == 0
        assert (tmp_path / "runs" / f"compare-{number}" / "compare.html").is_file()


def test_curves_show_the_mean_and_its_band(tmp_path):
    found = find(two_methods(tmp_path), target="auto", latency=False, progress=Silent())
    over_rounds = next(
        panel for panel in found.sections[0].panels if panel.name == "accuracy-over-rounds"
    )
    axes = over_rounds.figure.axes[0]
    lora = next(line for line in axes.lines if line.get_label() == "fedlora")
    np.testing.assert_allclose(lora.get_xydata(), [[1, 0.4], [2, 0.6], [3, 0.72]])
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(0.74)  # 0.72 and one standard deviation, 0.02
    over_time = next(
        panel for panel in found.sections[0].panels if panel.name == "accuracy-over-seconds"
    )
    lora = next(line for line in over_time.figure.axes[0].lines if line.get_label() == "fedlora")
    # checks at 10, 20, 30 s; 11, 22, 33 s; 12, 24, 36 s: the grid begins when all have one
    assert lora.get_xdata().tolist() == [12, 20, 22, 24, 30, 33, 36]
    np.testing.assert_allclose(
        lora.get_ydata()[[0, 1, 4]], [0.4, (0.6 + 0.4 + 0.4) / 3, (0.7 + 0.6 + 0.6) / 3]
    )


def test_a_grid_of_one_curve_is_the_curve():
    xs, values = on_a_grid([np.array([1.0, 2.0])], [np.array([0.3, 0.4])])
    assert (xs.tolist(), values.tolist()) == ([1.0, 2.0], [[0.3, 0.4]])


def test_many_methods_are_distinguished(compare, tmp_path):
    for number in range(9):
        made_cell(
            tmp_path / "s",
            f"m{number}",
            f"method {number} of 9",
            settings=(f"method.rank={number + 1}",),
        )
    compare(tmp_path / "s")
    html = (tmp_path / "compared" / "compare.html").read_text()
    assert "28 other pairs" in html  # of 36, those of the best method are shown first
    found = find([tmp_path / "s"], target="auto", latency=False, progress=Silent())
    axes = found.sections[0].panels[0].figure.axes[0]
    lines = [line for line in axes.lines if line.get_label().startswith("method")]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(looks) == 9
    ends = {(end.lines[0].get_color(), end.lines[0].get_marker()) for end in axes.containers}
    assert len(ends) == 9  # the last scores have no dashes
    figure = axes.figure
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1


# --- the deployed model, measured ---


@pytest.fixture(scope="module")
def real_runs(tiny_folder, tmp_path_factory):
    """A run of each of two methods on the tiny model."""
    root = tmp_path_factory.mktemp("real")
    write_csv(root / "rows.csv")
    for name, more in (("fedlora", {"method__name": "fedlora"}), ("fedspine", {})):
        job = tiny_job(tiny_folder("bert"), root / "rows.csv", task__max_tokens=8, **more)
        if name == "fedlora":  # which has one rank
            at = next(i for i, part in enumerate(job) if part.startswith("method.ranks"))
            job = job[: at - 1] + job[at + 1 :]
        carried_out("run", *job, "--out", root / name, "--json")
    return root


@pytest.mark.slow
def test_latency_is_measured_once(real_runs, command, tmp_path, monkeypatch):
    # which costs a process for each model, and is tested in test_bench.py
    monkeypatch.setattr("fedspine.exports.bench.peak_memory_bytes", lambda *_, **__: 1)
    folders = [real_runs / name for name in METHODS]
    code, out, lines = command(*folders, "--json", "--out", tmp_path / "first")
    assert (code, lines) == (0, [])
    (found,) = json.loads(out)["comparisons"]
    for method in found["methods"]:
        latency = method["latency"]
        assert latency["seconds_by_batch"]["32"] > latency["seconds_by_batch"]["1"] > 0
        assert (latency["tokens"], latency["device"], latency["seed"]) == (8, "nx-01", 0)
    weights = {method["name"]: method["latency"]["block_parameters"] for method in found["methods"]}
    assert weights["fedspine-plus"] < weights["fedlora"]
    assert "nx-01" in (tmp_path / "first" / "compare.md").read_text()

    def never(*_, **__):
        raise AssertionError("measured twice")

    monkeypatch.setattr("fedspine.exports.bench.bench", never)
    code, again, _ = command(*folders, "--json", "--out", tmp_path / "first")
    assert (code, again) == (0, out)


def test_without_its_base_a_model_has_no_latency(real_runs, command, tmp_path):
    shutil.copytree(
        real_runs / "fedlora", tmp_path / "run", ignore=shutil.ignore_patterns("latency.json")
    )
    recipe = tmp_path / "run" / "recipe.toml"
    # its data may be gone
    recipe.write_text(recipe.read_text().replace('/bert"', '/gone"').replace("rows.csv", "no.csv"))
    code, out, lines = command(tmp_path / "run", "--json", "--out", tmp_path / "new")
    assert (code, lines) == (0, [])
    found = json.loads(out)
    assert found["comparisons"][0]["methods"][0]["latency"] is None
    assert "/gone is not a folder" in found["notes"][0]


@pytest.mark.parametrize(
    ("changed", "says"),
    [({"data_sha256": "cd" * 32}, "their data differ"), ({"model_sha256": "cd" * 32}, "the base")],
)
def test_what_changed_under_the_same_name_is_not_compared(tmp_path, changed, says):
    same = {"data_sha256": "ab" * 32, "model_sha256": "ab" * 32}
    runs = [
        made_run(tmp_path / "a", **same),
        made_run(tmp_path / "b", seed=1, **same | changed),
        made_run(tmp_path / "old", seed=2),  # which says nothing of either
    ]
    with pytest.raises(BadInput, match=says) as refused:
        grouped(select(runs))
    assert str(runs[0]) in str(refused.value)
    assert str(runs[1]) in str(refused.value)
    assert len(grouped(select(runs[::2]))[0].methods[0].runs) == 2


def test_a_sweep_whose_data_changed_on_the_way_is_not_compared(tmp_path):
    for seed, digest in enumerate(("ab", "ab", "cd")):
        made_cell(tmp_path, f"a-{seed}", "a", seed=seed, data_sha256=digest * 32)
    with pytest.raises(BadInput, match="the data pydoc-topics changed between the runs in"):
        grouped(select([tmp_path]))
