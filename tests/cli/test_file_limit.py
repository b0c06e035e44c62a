"""How many descriptors a long-running process may have."""

from __future__ import annotations

import resource
import subprocess
import sys

ASK = """
import resource
from aiodisagg.cli.process import raise_file_limit
raise_file_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_a_shells_limit_is_raised_as_far_as_the_host_allows() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for given in (256, 1024):
        command = ["bash", "-c", f'ulimit -Sn {given}; exec "$@"', "-", sys.executable, "-c", ASK]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        assert int(said.stdout) == most


def test_a_limit_that_cannot_be_raised_is_told() -> None:
    """Whoever connected when there were no more was hung up on, and no log said why."""
    for given, told in ((64, 1), (1024, 0)):
        command = ["bash", "-c", f'ulimit -n {given}; exec "$@"', "-", sys.executable, "-c", ASK]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert said.count(f"only {given} files may be open at once (ulimit -Hn)") == said.count("\n") == told
