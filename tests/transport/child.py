"""The other process of a two-process test: a receiver or a writer that reports on stdout what it does, line by line.

Run as ``python -m tests.transport.child ROLE TRANSPORT``; the first line on stdin is JSON with what the role needs.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys

from aiodisagg.transport.arena import Arena
from aiodisagg.transport.base import Slice, Transport

SLOWNESS = int(os.environ.get("AIODISAGG_TEST_SLOWNESS", "1"))
"""How much longer than usual everything may take: in an emulated machine, ten times."""
SIZE = (16 << 20) // SLOWNESS // 4096 * 4096


def make(name: str) -> Transport:
    """Imports only what is asked for: a child starts in a third of the time."""
    if name == "ipc":
        from aiodisagg.transport.ipc import IpcTransport

        return IpcTransport()
    if name == "stream":
        from aiodisagg.transport.stream import StreamTransport

        return StreamTransport(stall_s=0.5, connect_timeout_s=10)
    if name.startswith("mooncake"):
        from aiodisagg.transport.mooncake import MooncakeTcpTransport, MooncakeTransport

        kind = MooncakeTcpTransport if name == "mooncake-tcp" else MooncakeTransport
        return kind(heartbeat_s=0.2 * SLOWNESS, connect_timeout_s=60, quarantine_s=1.0, chunk_bytes=SIZE // 4)
    from aiodisagg.transport.zmq import ZmqTransport

    return ZmqTransport(heartbeat_s=0.1, connect_timeout_s=10)


def say(**words: object) -> None:
    print(json.dumps(words), flush=True)


async def line() -> dict[str, object]:
    text = await asyncio.to_thread(sys.stdin.readline)
    return json.loads(text) if text else {"do": "end"}


async def receiver(transport: Transport, asked: dict[str, object]) -> None:
    arena = Arena(int(str(asked["size_bytes"])))
    await transport.open(arena, lambda offset, size, lease: True, incarnation="child-receiver")
    say(description=base64.b64encode(transport.describe()).decode())
    while (words := await line())["do"] == "count":
        say(count=bytes(arena.view).count(bytes([int(str(words["byte"]))])))
    await transport.aclose()


async def writer(transport: Transport, asked: dict[str, object]) -> None:
    await transport.open(None, lambda offset, size, lease: False, incarnation="child-writer")
    description = base64.b64decode(str(asked["description"]))
    remote = await transport.connect(description, peer=str(asked["peer"]))
    size, lease = int(str(asked["size_bytes"])), int(str(asked["lease"]))
    source = memoryview(bytes([0xAA])) if size == 0 else memoryview(bytes([0xAA]) * size)
    if asked["forever"]:
        say(writing=True)
        while True:
            await transport.write(remote, [Slice(source, 0, lease)])
    await transport.write(remote, [Slice(source, 0, lease)])
    say(written=True)
    await line()
    await transport.disconnect(remote)
    await transport.aclose()
    say(closed=True)


async def leaver(transport: Transport, asked: dict[str, object]) -> None:
    """Starts writes of many pieces through several engines and leaves everything as it is."""
    source = memoryview(bytes([0xAA]) * (64 << 10))
    for one in (transport, *(make(transport.name) for _ in range(7))):
        await one.open(None, lambda offset, size, lease: False, incarnation="child-writer")
        remote = await one.connect(base64.b64decode(str(asked["description"])), peer=str(asked["peer"]))
        everything.append(asyncio.ensure_future(one.write(remote, [Slice(source, 0, 1)] * 4000)))
        await one.write(remote, [Slice(source, 0, 1)])
    everything.append(Lingering())


everything: list[object] = []


class Lingering:
    """While the interpreter is taken down, other threads get their turn."""

    def __del__(self) -> None:
        for _ in range(1000):
            self.stat(".")

    stat = staticmethod(os.stat)


async def main() -> None:
    role, name = sys.argv[1:]
    await {"receiver": receiver, "writer": writer, "leaver": leaver}[role](make(name), await line())


if __name__ == "__main__":
    if sys.argv[1] == "leaver":  # asyncio.run would cancel what is under way
        asyncio.new_event_loop().run_until_complete(main())
        sys.exit(7)
    asyncio.run(main())
