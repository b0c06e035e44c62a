"""One request end to end: an encode peer in a process of its own, the language peer here, rows over one transport.

Asks for handwritten digits and wants the right answers; no other transport is open.
Run as ``python tests/rdma/end_to_end.py [mooncake|mooncake-tcp|...]``.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import time
from contextlib import aclosing
from multiprocessing.connection import Connection

import aiodisagg.engine.worker
import aiodisagg.models.vision  # noqa: F401
from aiodisagg import EncodeConfig, EncodeService, LanguageConfig, LanguageService, SamplingParams
from aiodisagg.data import digits_model
from aiodisagg.demo.tasks import digit_asks
from aiodisagg.link.config import LinkConfig

LINK = LinkConfig(heartbeat_s=10, timeout_s=120, handshake_timeout_s=120)
_began_s = time.monotonic()


def tell(text: str) -> None:
    print(f"{time.monotonic() - _began_s:6.1f} s  {text}", flush=True)


def encode(transport: str, ear: Connection) -> None:
    """The other process, forked before there is an engine, a thread or a loop: imports take minutes in the guest."""

    async def serve() -> None:
        config = EncodeConfig(model=digits_model(), transports=(transport,), link=LINK)
        async with EncodeService(config) as service:
            ear.send(service.address)
            await asyncio.to_thread(ear.recv)

    asyncio.run(serve())


async def language(transport: str, ear: Connection) -> None:
    config = LanguageConfig(
        model=digits_model(), transports=(transport,), link=LINK, peer_wait_s=300, stall_s=120, failover_s=120
    )
    async with LanguageService(config) as service:
        tell(f"language peer is up with {', '.join(service.rows.planes.open_transports)}")
        address = await asyncio.to_thread(ear.recv)
        tell(f"encode peer is up at {address}")
        service.add_peer(address)
        for ask in digit_asks(2):
            text = ""
            async with aclosing(service.generate(ask.chat(), SamplingParams(max_tokens=ask.max_tokens))) as deltas:
                async for delta in deltas:
                    text += delta.text
            tell(f"{len(ask.images)} images: {text.strip()!r}, the truth is {ask.truth!r}")
            assert text.strip() == ask.truth
        counted = [line for line in service.metrics().splitlines() if line.startswith("aiodisagg_row_bytes_total")]
        received = sum(float(line.rsplit(" ", 1)[1]) for line in counted if 'outcome="received"' in line)
        tell(f"{received:.0f} bytes of rows over {transport}")
        assert received > 0
    ear.send("end")


def main() -> None:
    transport = sys.argv[1] if len(sys.argv) > 1 else "mooncake"
    tell("imported")
    context = multiprocessing.get_context("fork")
    ear, mouth = context.Pipe()
    other = context.Process(target=encode, args=(transport, mouth), daemon=True)
    other.start()
    mouth.close()
    asyncio.run(language(transport, ear))
    other.join(120)
    assert other.exitcode == 0, f"the encode peer ended with {other.exitcode}"
    tell("both peers ended")


if __name__ == "__main__":
    main()
