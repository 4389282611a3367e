"""The contenders of `benchmarks/simulator.py`, one file each, and the work that they all do."""
