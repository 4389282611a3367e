"""Ctrl-C, SIGTERM and those who ignore Ctrl-C: what handles the signals; test_resume.py sends them
to whole runs.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from runs import environment, handling_ctrl_c, ignoring_ctrl_c, python

from fedspine.core import process
from fedspine.core.errors import Stopped
from fedspine.core.process import Terminated, ends_on_signal, ends_on_sigterm


def hit(number):
    """A signal to this process, which has come when this returns."""
    signal.raise_signal(number)


def test_sigterm_interrupts_within_the_block_only():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), ends_on_sigterm():
        hit(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_that_come_together_are_one(monkeypatch):
    """As `timeout` sends them; a later one does interrupt again, in case that the first was
    swallowed.
    """
    now = [100.0]
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    with ends_on_sigterm():
        with pytest.raises(Terminated):
            hit(signal.SIGTERM)
        now[0] += 0.9 * process._SAME_SECONDS
        hit(signal.SIGTERM)
        now[0] += process._SAME_SECONDS
        with pytest.raises(Terminated):
            hit(signal.SIGTERM)


@pytest.mark.parametrize(
    ("number", "word", "code"),
    [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)],
)
def test_a_command_that_gets_a_signal(number, word, code):
    with handling_ctrl_c(), pytest.raises(Stopped, match=f"^{word}$") as end, ends_on_signal():
        hit(number)
    assert end.value.exit_code == code


def test_what_is_ignored_stays_ignored():
    with ignoring_ctrl_c(), process.handling(process.SIGNALS_TO_END, lambda *_: None):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        hit(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("context", [handling_ctrl_c, ignoring_ctrl_c])
def test_what_tests_start_handles_ctrl_c_or_ignores_it(context):
    """The tests' own helpers hold where the parent of the tests ignores Ctrl-C, too."""
    with context():
        done = python(
            "-c",
            "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)",
        )
    assert done.stdout.strip() == str(context is handling_ctrl_c)


@pytest.mark.slow
def test_a_signal_while_it_loads(tmp_path):
    """Before there is anything to save; also where the signal comes while modules are imported."""
    child = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "fedspine", "run", "--out", tmp_path / "run"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    while "torch._C" not in child.stderr.readline():  # torch is half imported
        assert child.poll() is None
    os.kill(child.pid, signal.SIGTERM)
    begun = time.monotonic()
    _, said = child.communicate()
    assert child.returncode == 143
    (line,) = [line for line in said.splitlines() if not line.startswith("import time:")]
    assert line == "fedspine: terminated"
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - begun < 20
