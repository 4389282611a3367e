"""Sweeps: many runs from one file, each in a folder of its own, gone on with where they were left."""
