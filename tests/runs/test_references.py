"""Yardsticks beside a run, and the line that a run says which does not learn."""

import json
from dataclasses import replace

import numpy as np
import pytest
from runs import tiny_job, write_csv
from toy import toy_rows

from fedspine.core.errors import Stopped
from fedspine.data.dataset import ArrayRows, Rows
from fedspine.report.page import REPORT, write_page
from fedspine.report.rows import Note, ScoreRow, read_rows
from fedspine.report.rows import RunRows as Recorded
from fedspine.report.tables import headlines
from fedspine.runs import config, references
from fedspine.runs.loop import new_run, resume
from fedspine.runs.run_dir import SUMMARY, summary_of
from fedspine.runs.run_warnings import CheckContext, doubt, due, skewed
from fedspine.ui.progress import Silent

RECIPE = config.load(None, ["run.rounds=24"])
SEEN = CheckContext(rows=400, commonest=0.64)  # a standard error of sqrt(0.64 * 0.36 / 400) = 0.024


def score(round, accuracy=0.9, loss=0.5, dense=None, loss_dense=None):
    return ScoreRow(round, 1.0, accuracy, accuracy, loss, loss, 0.0, False, dense, loss_dense)


def noted(*by_round):
    notes = [
        Note(round, f"d{i}", None, None, None, loss)
        for round, losses in enumerate(by_round)
        for i, loss in enumerate(losses)
    ]
    return Recorded(notes=tuple(notes))


class Saying(Silent):
    def __init__(self, until=None):
        self.lines, self.until = [], until

    def say(self, line):
        self.lines.append(line)

    def round_done(self, status):
        if status.round == self.until:
            raise KeyboardInterrupt

    @property
    def warned(self):
        return [line for line in self.lines if line.startswith("warning")]


# --- when and what is doubted ---


@pytest.mark.parametrize(
    ("every", "rounds", "first"), [(4, 24, 8), (1, 24, 5), (10, 24, 10), (5, 25, 5), (4, 3, 4)]
)
def test_it_is_asked_once_at_the_first_check_after_a_fifth(every, rounds, first) -> None:
    recipe = config.load(None, [f"run.rounds={rounds}", f"run.evaluate_every={every}"])
    checks = range(every, max(rounds, first) + 1, every)
    assert [round for round in checks if due(recipe, round)] == [first]
    assert not any(due(config.load(None, ["run.evaluate_every=0"]), r) for r in range(24))


def test_no_better_than_the_commonest_class_is_said_with_what_to_change() -> None:
    for accuracy in (0.3, 0.64, 0.66):  # the last within a standard error of chance
        line = doubt(RECIPE, Recorded(scores=(score(8, accuracy),)), SEEN, 8)
        assert "most common class is 64.0 %" in line
        assert "lower method.learning_rate from 0.003 to 0.00075" in line
        assert "run.rounds = 48" in line and line.startswith("after 8 of 24 rounds")
    assert doubt(RECIPE, Recorded(scores=(score(8, 0.67),)), SEEN, 8) is None


def test_where_labels_are_skewed_their_adjustment_is_advised() -> None:
    seen = replace(SEEN, skewed=True)
    rows = Recorded(scores=(score(8, 0.3),))
    assert 'method.logit_adjustment.name = "label-skew"' in doubt(RECIPE, rows, seen, 8)
    adjusted = config.load(None, ["method.logit_adjustment.name=label-skew"])
    assert "lower method.learning_rate" in doubt(adjusted, rows, seen, 8)


def test_labels_are_skewed_where_devices_have_little_but_one_class() -> None:
    labels = np.array([0, 1, 2, 3] * 6)
    even = [np.arange(0, 12), np.arange(12, 24)]
    single = [np.flatnonzero(labels == each) for each in range(4)]
    assert not skewed(labels, even)
    assert skewed(labels, single) and skewed(labels, [*single, np.array([], int)])


def test_what_pruning_alone_costs_is_not_doubted() -> None:
    pruned = score(8, 0.5, loss=2.0, dense=0.8, loss_dense=0.4)
    assert doubt(RECIPE, Recorded(scores=(score(4, loss=0.5), pruned)), SEEN, 8) is None


# three errors of hypot(2, last) / 20 are 0.42, 0.46 and 0.48
@pytest.mark.parametrize(("last", "said"), [(2.0, False), (2.3, False), (2.5, True)])
def test_a_test_loss_that_rises_beyond_noise_is_said_of_language_models_too(last, said) -> None:
    scores = (score(4, None, 2.0), score(8, None, last))
    line = doubt(RECIPE, Recorded(scores=scores), CheckContext(400, None), 8)
    assert (line is not None) == said
    assert not said or "the test loss has risen from 2.000 to 2.500" in line


def test_a_training_loss_that_rises_beyond_noise_is_said() -> None:
    wide, seen = (0.1, 0.9, 0.2, 0.8), CheckContext(400, None)
    assert doubt(RECIPE, noted(wide, wide, [x + 0.1 for x in wide]), seen, 3) is None
    assert "training loss has risen from 0.500 to 3.500" in doubt(
        RECIPE, noted(wide, wide, [x + 3 for x in wide]), seen, 3
    )
    assert doubt(RECIPE, noted((0.5,), (9.0,)), seen, 2) is None  # of one device nothing is known


# --- references ---


def test_the_share_of_the_commonest_class() -> None:
    assert references.commonest_share(np.array([2, 2, 0, 1, 2])) == 0.6
    assert references.commonest_share(None) is None
    assert references.commonest_share(np.array([], int)) is None


def test_texts_pairs_and_arrays_have_a_classical_model() -> None:
    pytest.importorskip("sklearn")
    train, test = toy_rows(200, 0), toy_rows(60, 1)
    assert references.classical(train, test, np.arange(60)) == 1.0
    # a pair is alike or not: neither text tells alone, their overlap does
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(30)])

    def pairs(rows):
        labels = np.arange(rows) % 2
        firsts = [rng.choice(words, 4, replace=False) for _ in labels]
        seconds = [
            one if same else rng.choice(np.setdiff1d(words, one), 4, replace=False)
            for one, same in zip(firsts, labels, strict=True)
        ]
        return Rows(tuple(map(" ".join, firsts)), tuple(map(" ".join, seconds)), labels, {})

    # without the overlap 50 of 100 are right, with a standard deviation of 5
    assert references.classical(pairs(300), pairs(100), np.arange(100)) > 0.9
    labels = np.arange(200) % 2
    x = rng.normal(size=(200, 3, 40, 40)) + labels[:, None, None, None]
    rows = ArrayRows(x.astype(np.float32), labels, {})
    assert references.classical(rows, rows, np.arange(100)) == 1.0


def test_where_it_cannot_be_computed_there_is_no_line() -> None:
    pytest.importorskip("sklearn")
    rows = toy_rows(60, 0)
    some = np.arange(10)
    assert references.classical(replace(rows, labels=np.zeros(60, int)), rows, some) is None
    assert references.classical(replace(rows, labels=None), rows, some) is None
    assert references.classical(replace(rows, texts=("! ?",) * 60), rows, some) is None


def test_the_reference_is_kept(tmp_path) -> None:
    assert references.kept(tmp_path, lambda: {"reference_tfidf": 0.5}) == {"reference_tfidf": 0.5}
    assert references.kept(tmp_path, lambda: 1 / 0) == {"reference_tfidf": 0.5}


# --- whole runs ---


def job(tiny_folder, tmp_path, rate, **changed):
    data = tmp_path / "rows.csv"
    if not data.exists():
        write_csv(data, 300)
    fields = {
        "method__name": "fedlora",
        "method__learning_rate": rate,
        "method__steps": 20,
        "run__rounds": 4,
        "run__evaluate_every": 1,
        "run__references": "true",
    }
    settings = tiny_job(tiny_folder("bert"), data, **(fields | changed))[1::2]
    return config.load(None, [s for s in settings if "method.ranks" not in s])


def test_a_good_run_says_nothing_and_stands_beside_its_references(tiny_folder, tmp_path) -> None:
    pytest.importorskip("sklearn")
    said = Saying()
    summary = new_run(job(tiny_folder, tmp_path, 1e-2, run__rounds=8), tmp_path / "run", said)
    assert not said.warned and "warnings" not in summary
    assert 0.5 <= summary["reference_commonest"] < 0.65 and summary["reference_tfidf"] > 0.9
    shown = {line.label: line for line in headlines(summary)}
    assert shown["TF-IDF"].note.startswith("reference") and "Commonest class" in shown
    page = (tmp_path / "run" / REPORT).read_text()
    assert "TF-IDF" in page and "Warning" not in page
    # a kill before the summary: what was fitted is not fitted again
    (tmp_path / "run" / SUMMARY).unlink()
    kept = {"reference_tfidf": 0.125}
    (tmp_path / "run" / references.REFERENCES).write_text(json.dumps(kept))
    assert resume(tmp_path / "run", Silent())["reference_tfidf"] == 0.125


def test_references_can_be_switched_off(tiny_folder, tmp_path) -> None:
    recipe = job(tiny_folder, tmp_path, 1e-2, run__rounds=1, run__references="false")
    summary = new_run(recipe, tmp_path / "run", Silent())
    assert not any(key.startswith("reference") for key in summary)
    assert not (tmp_path / "run" / references.REFERENCES).exists()


def test_a_run_at_far_too_high_a_rate_says_so_once_and_again_at_its_end(
    tiny_folder, tmp_path
) -> None:
    recipe = job(tiny_folder, tmp_path, 3.0, run__references="false")
    whole, first, rest = Saying(), Saying(until=2), Saying()
    new_run(recipe, tmp_path / "whole", whole)
    assert len(whole.warned) == 3  # on the way, and both again at the end
    assert "lower method.learning_rate from 3 to 0.75" in whole.warned[0]
    with pytest.raises(Stopped):
        new_run(recipe, tmp_path / "killed", first)
    summary = resume(tmp_path / "killed", rest)
    assert first.warned == whole.warned[:1] and rest.warned == whole.warned[1:]
    for name in ("whole", "killed"):
        rows = read_rows(tmp_path / name / "records.jsonl")
        lines = [warned.line for warned in rows.warnings]
        assert lines == summary_of(tmp_path / name)["warnings"] == summary["warnings"]
        assert (tmp_path / name / REPORT).read_text().count("<strong>Warning:") == 2
    (tmp_path / "whole" / SUMMARY).unlink()  # as it would be under way
    assert write_page(tmp_path / "whole").read_text().count("<strong>Warning:") == 2


def test_without_checks_it_is_said_at_the_end(tiny_folder, tmp_path) -> None:
    recipe = job(tiny_folder, tmp_path, 3.0, run__evaluate_every=0, run__references="false")
    said = Saying()
    summary = new_run(recipe, tmp_path / "run", said)
    assert len(summary["warnings"]) == len(said.warned) == 1


def test_a_language_model_stands_beside_its_untuned_base(tiny_folder, tmp_path) -> None:
    recipe = job(
        tiny_folder,
        tmp_path,
        1e-2,
        task__model=tiny_folder("llama"),
        task__kind="causal-lm",
        run__rounds=1,
    )
    summary = new_run(recipe, tmp_path / "run", Silent())
    assert summary["loss"] < summary["reference_base"]
    assert "reference_commonest" not in summary and "reference_tfidf" not in summary
