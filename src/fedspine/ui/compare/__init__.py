"""Comparing runs: what each method reaches over seeds, what it costs, and whether a difference
exceeds the seeds' noise.
"""
