"""A network that is cut under a run, by the script that tries every fault several times."""

import subprocess
import sys

import pytest
from places import ROOT

FAULTS = ROOT / "benchmarks" / "faults.py"


@pytest.mark.network
def test_a_network_that_is_cut_costs_replies_and_nothing_else():
    # twice as long as an order may take, and less than the benchmark's half minute
    seconds = ["--cut", "10", "--within", "5"]
    command = [sys.executable, FAULTS, "--only", "network cut", "--times", "1", "--no-write"]
    done = subprocess.run([*command, *seconds], capture_output=True, text=True, timeout=600)
    if "not tried" in done.stdout:
        pytest.skip("no network namespace can be made here; it takes Linux and root")
    assert done.returncode == 0, done.stdout + done.stderr
