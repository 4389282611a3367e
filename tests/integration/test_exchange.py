"""The benchmark of an exchange runs over real processes, however short."""

import subprocess
import sys

from places import ROOT


def test_an_exchange_with_two_sites_is_timed():
    command = [sys.executable, ROOT / "benchmarks" / "exchange.py", "--no-write", "--fresh"]
    short = ["--exchanges", "1", "--repeats", "1"]
    done = subprocess.run([*command, *short], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 4000 KB |" in done.stdout
