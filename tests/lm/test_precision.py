"""Which precision a run takes: measured on this processor, resolved into the recipe, kept on a
resume.
"""

import pytest
import torch
from runs import records_of, summary_of, tiny_job, write_csv

from fedspine.lm import precision
from fedspine.runs import config
from fedspine.runs.assemble import settled
from fedspine.runs.run_dir import recipe_of

CPU = torch.device("cpu")


@pytest.fixture
def speed(monkeypatch):
    """A function that sets how many times faster than fp32 this processor multiplies in bf16."""
    return lambda ratio: monkeypatch.setattr(precision, "bf16_speed", lambda: ratio)


@pytest.mark.parametrize(
    ("wanted", "ratio", "chosen", "said"),
    [
        ("auto", 2.4, "bf16", "precision bf16 (measured: bf16 products take 0.42 times"),
        ("auto", 0.19, "fp32", "precision fp32 (measured: bf16 products take 5.3 times as long"),
        ("bf16", 0.19, "bf16", "warning: run.precision is bf16, which is slow here"),
    ],
)
def test_the_faster_precision_is_taken_and_said(speed, wanted, ratio, chosen, said) -> None:
    speed(ratio)
    found = precision.choose(wanted, CPU)
    assert found.precision == chosen and found.line.startswith(said)


@pytest.mark.parametrize(("wanted", "ratio"), [("fp32", 2.4), ("fp32", 0.1), ("bf16", 2.4)])
def test_an_explicit_precision_that_is_not_slow_needs_no_word(speed, wanted, ratio) -> None:
    speed(ratio)
    assert precision.choose(wanted, CPU) is None


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16")])
def test_a_gpu_is_known_by_its_generation(monkeypatch, capability, chosen) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.choose("auto", torch.device("cuda")).precision == chosen


def test_the_measurement_is_of_this_processor_and_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    ratio = precision.bf16_speed()
    assert ratio > 0 and torch.get_num_threads() == threads
    assert precision.bf16_speed() == ratio  # measured once


def test_a_run_writes_what_it_chose_and_goes_on_with_it(
    speed, tiny_folder, tmp_path, monkeypatch
) -> None:
    """Begun where fp32 is faster, killed after a round, gone on with where bf16 is: fp32 to the
    end.
    """
    from fedspine.core.errors import Stopped
    from fedspine.runs.loop import new_run, resume
    from fedspine.ui.progress import Silent

    class Interrupting(Silent):
        def round_done(self, status):
            raise KeyboardInterrupt

    speed(0.2)
    job = tiny_job(tiny_folder("bert"), write_csv(tmp_path / "rows.csv"), run__precision="auto")[
        1::2
    ]
    recipe = config.load(None, job)
    assert recipe.run.precision == "auto"
    for name, progress in (("whole", Silent()), ("killed", Interrupting())):
        try:
            new_run(recipe, tmp_path / name, progress)
        except Stopped:
            assert name == "killed"
    speed(3.0)
    resume(tmp_path / "killed", Silent(), recipe)
    assert recipe_of(tmp_path / "killed").run.precision == "fp32"
    whole, killed = (summary_of(tmp_path / name) for name in ("whole", "killed"))
    assert whole["state_sha256"] == killed["state_sha256"]
    assert records_of(tmp_path / "whole") == records_of(tmp_path / "killed")


def test_the_choices_are_lines_on_stderr(speed, tiny_folder, tmp_path) -> None:
    speed(0.5)
    job = tiny_job(tiny_folder("bert"), write_csv(tmp_path / "rows.csv"), run__precision="auto")[
        1::2
    ]
    recipe, lines = settled(config.load(None, job))
    assert (recipe.run.precision, recipe.task.pooling) == ("fp32", "cls")
    assert lines == [
        "precision fp32 (measured: bf16 products take 2 times as long as fp32)",
        "readout: the model's own classification head",
    ]
    assert not recipe.open_choices and settled(recipe) == (recipe, [])
