"""A process that is still loading ends when it is told to, or when it can come to nothing; with all of its children."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PATIENCE_S = 120.0

LOADS_FOR_EVER = """
import asyncio, sys, threading
import aiodisagg.language.service
from aiodisagg.cli import main

create, created = asyncio.create_subprocess_exec, threading.Event()

async def create_and_tell(*arguments, **words):
    made = await create(*arguments, **words)
    created.set()
    return made

def load(config):
    if "--separate" in sys.argv:
        created.wait()
    print("loading", flush=True)
    threading.Event().wait()

asyncio.create_subprocess_exec = create_and_tell
aiodisagg.language.service.load_language_half = load
main()
"""


@contextmanager
def loading(model: Path, *command: str) -> Iterator[subprocess.Popen[str]]:
    """Whose end of stdout is that of all who inherited it."""
    arguments = [sys.executable, "-c", LOADS_FOR_EVER, *command, "--model", str(model), "--port", "0"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "loading\n", process.stderr and process.stderr.read()
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("command", [("language",), ("both", "--separate")], ids=" ".join)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_ends_it(command: tuple[str, ...], number: signal.Signals, tiny: Callable[..., Path]) -> None:
    """It went on loading, registered, said that it was ready, and drained."""
    with loading(tiny(moe=True, levels=3), *command) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + number
    assert not out and "Traceback" not in err


def test_a_tower_that_does_not_start_ends_its_peer(tiny: Callable[..., Path]) -> None:
    """That was told only when the other half was loaded."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"tcp:127.0.0.1:{taken.getsockname()[1]}"
        with loading(tiny(moe=True, levels=3), "both", "--separate", "--listen", listen) as process:
            _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    begun, first, last = err.splitlines()
    assert begun.startswith("loading both halves of ")
    assert first.startswith(f"Error: listen: cannot listen on {listen}") and last == "Error: tower ended with code 1"
