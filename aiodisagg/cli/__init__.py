"""The command line: ``aiodisagg bootstrap | encode | language | demo | bench``. Heavy imports wait for the command."""

from aiodisagg.cli.main import main

__all__ = ["main"]
