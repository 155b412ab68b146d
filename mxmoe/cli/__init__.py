"""The command line, `mxmoe COMMAND`."""

from mxmoe.cli.commands import main

__all__ = ["main"]
