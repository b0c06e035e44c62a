"""The command line, ``aiodisagg COMMAND``. Heavy imports wait for the command."""

from aiodisagg.cli.main import main

__all__ = ["main"]
