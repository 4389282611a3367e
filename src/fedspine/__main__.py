"""`python -m fedspine` is `fedspine`."""

from fedspine.cli import main

main()
