"""`python -m ratoon`."""

from ratoon.cli.main import main

main()
