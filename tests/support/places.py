"""Paths of the repository's parts and of the data beside it."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
SHARED = ROOT.parent / "shared"
DATA = SHARED / "data"
