"""`python -m trimaran`, the same as `trimaran`."""

from trimaran.cli import main

main()
