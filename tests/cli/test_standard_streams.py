"""Where a process's words for people go: nobody who reads them, a full disk or a closed descriptor ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from urllib.request import urlopen

import pytest

SERVES = """
from aiodisagg.bootstrap import server
from aiodisagg.cli import main

enter = server.BootstrapServer.__aenter__

async def enter_and_tell(self):
    entered = await enter(self)
    with open("/proc/self/fd/9", "w") as out:
        print(self.url, file=out)
    return entered

server.BootstrapServer.__aenter__ = enter_and_tell
main(["bootstrap", "--port", "0"])
"""


@pytest.mark.parametrize(
    "streams",
    ["> /dev/full", "> /dev/full 2> /dev/full", ">&{unread}", ">&-", "<&- >&- 2>&-", "2>&-"],
)
def test_a_server_serves_and_ends_well(streams: str) -> None:
    """It ended with a traceback when it was ready, or was aborted by libuv at the end of the first connection, whose
    socket had got the number of stdout."""
    read, unread = os.pipe()
    usual = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    os.close(read)
    shell = f'exec 9>&1; exec "$@" {streams.format(unread=unread)}'
    with subprocess.Popen(
        ["bash", "-c", shell, "-", sys.executable, "-c", SERVES], pass_fds=[unread],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=usual,
    ) as process:  # fmt: skip
        os.close(unread)
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().strip()
        for _ in range(3):
            with urlopen(f"{url}/health") as answer:
                assert answer.status == 200
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        assert process.wait(60) == 0, said
    assert "Traceback" not in said
    if streams in ("> /dev/full", ">&{unread}"):
        assert "ready: url" in said and said.count("\n") == 1
