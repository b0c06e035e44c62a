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
