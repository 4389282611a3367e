"""`python -m fedspine` is `fedspine`."""

from fedspine.ui.cli import main

main()
