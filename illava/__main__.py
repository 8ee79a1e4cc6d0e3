"""`python -m illava` is the command `illava`."""

from illava.cli import main

main()
