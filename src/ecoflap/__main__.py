"""``python -m ecoflap``: the command line."""

from ecoflap.cli import main

main()
