"""On a machine with a GPU: two processes share it, and rows go by every way. CI has none and skips this."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from aiodisagg import LanguageService
from tests.models.halves import PROMPTS
from tests.services.system import System, language_config

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# A receiver's device pool is described under a name; under another one nobody finds it.
ENCODER = """
import asyncio, logging, sys
from pathlib import Path
from aiodisagg import EncodeConfig, EncodeService
import aiodisagg.device.pool as pool

async def main(folder, transport, way):
    logging.basicConfig(level=logging.INFO)
    if way == "pinned":
        pool.NAME = "-"
    config = EncodeConfig(model=Path(folder), device="cuda", row_dtype="bfloat16", transports=(transport,))
    async with EncodeService(config) as peer:
        print(peer.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main(*sys.argv[1:]))
"""


@contextmanager
def encoder(folder: Path, transport: str, way: str, log: Path) -> Iterator[str]:
    """Its address."""
    command = [sys.executable, "-c", ENCODER, str(folder), transport, way]
    with log.open("w") as errors:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert child.stdin is not None and child.stdout is not None
        try:
            yield child.stdout.readline().strip()
            child.stdin.close()
            assert child.wait(60) == 0, log.read_text()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()


@pytest.mark.timeout(300)
async def test_answers_are_the_same_by_every_way(moe: Path, tmp_path: Path) -> None:
    answers = {}
    for way, transport in (("staged", "zmq"), ("pinned", "ipc"), ("device", "ipc")):
        log = tmp_path / way
        settings = {"transports": (transport,), "row_dtype": "bfloat16", "dtype": "bfloat16", "device": "cuda"}
        with encoder(moe, transport, way, log) as address:
            async with LanguageService(language_config(moe, **settings)) as service:
                made = System(service)
                service.add_peer(address)
                await made.linked(1)
                answers[way] = {name: await made.ask(messages) for name, messages in PROMPTS.items()}
                together = await asyncio.gather(*(made.ask(messages) for messages in PROMPTS.values()))
                assert len(together) == len(PROMPTS)
                await made.quiet()
        assert f"by way of: {way}" in log.read_text()
    assert answers["pinned"] == answers["staged"]
    assert answers["device"] == answers["staged"]
