"""Sweeps: many runs from one file, each in its own folder, resumed where they stopped."""
