"""One request end to end: an encode peer in a process of its own, the language peer here, rows over one transport.

Asks for handwritten digits and wants the right answers; no other transport is open.
Run as ``python tests/rdma/end_to_end.py [mooncake|mooncake-tcp|...]``.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from contextlib import aclosing

from aiodisagg import EncodeConfig, EncodeService, LanguageConfig, LanguageService, SamplingParams
from aiodisagg.data import digits_model
from aiodisagg.demo.tasks import digit_asks
from aiodisagg.link.config import LinkConfig

LINK = LinkConfig(heartbeat_s=10, timeout_s=120, handshake_timeout_s=120)


async def encode(transport: str) -> None:
    config = EncodeConfig(model=digits_model(), transports=(transport,), link=LINK)
    async with EncodeService(config) as service:
        print(service.address, flush=True)
        await asyncio.to_thread(sys.stdin.readline)


async def language(transport: str) -> None:
    began_s = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began_s:6.1f} s  {text}", flush=True)

    other = await asyncio.create_subprocess_exec(
        sys.executable, __file__, transport, "encode", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin is not None and other.stdout is not None
    try:
        config = LanguageConfig(
            model=digits_model(), transports=(transport,), link=LINK, peer_wait_s=300, stall_s=120, failover_s=120
        )
        async with LanguageService(config) as service:
            tell(f"language peer is up with {', '.join(service.rows.planes.open_transports)}")
            address = (await other.stdout.readline()).decode().strip()
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
        other.stdin.close()
        assert await other.wait() == 0
    finally:
        if other.returncode is None:
            other.kill()
            await other.wait()
    tell("both peers ended")


def main() -> None:
    transport = sys.argv[1] if len(sys.argv) > 1 else "mooncake"
    asyncio.run(encode(transport) if sys.argv[2:] == ["encode"] else language(transport))


if __name__ == "__main__":
    main()
