"""How long the hand-off takes when the producer writes inside the receiver's block: offer, grant, view, commit.

    python examples/zero_copy.py

Two processes with a real link and the ipc transport. The time is from the offer's sending to the commit's arrival,
read from the one monotonic clock that processes of a machine share. The block counts as filled when the view is made:
what is measured is what handing over costs besides the producing, for blocks of 64 KiB to 64 MiB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time

import uvloop

from aiodisagg.link.hello import Hello, PeerRole
from aiodisagg.link.link import Link, dial
from aiodisagg.link.server import LinkServer
from aiodisagg.protocol.messages import Chunk, Commit, Grant, ItemKey, Lend, Offer
from aiodisagg.protocol.rows import ModelFingerprint
from aiodisagg.transport.arena import Arena
from aiodisagg.transport.ipc import IpcRemote, IpcTransport

SIZES = tuple(1 << shift for shift in (16, 20, 24, 26))
MODEL = ModelFingerprint("synthetic", 2048, 3, "bfloat16", "")
ROW_BYTES = 16384


async def receive(address: str, count: int) -> None:
    """Grants what is offered; prints when each commit came."""
    arena, transport = Arena(max(SIZES)), IpcTransport()
    await transport.open(arena, lambda *_: True, incarnation="receiver")
    hello = Hello.here(
        name="receiver", incarnation="receiver", role=PeerRole.LANGUAGE, transports={"ipc": transport.describe()}
    )
    link = await dial(address, hello)
    came = []
    for lease in range(count):
        offer = await link.recv()
        assert isinstance(offer, Offer)
        link.send_nowait(Grant(offer.key, 1, (Lend(lease, 0, 0, offer.rows),), ()))
        commit = await link.recv()
        came.append(time.monotonic())
        assert isinstance(commit, Commit) and commit.chunk.stop == offer.rows
    print(json.dumps(came), flush=True)
    await link.aclose()
    await transport.aclose()
    arena.close()


async def hand_over(link: Link, remote: IpcRemote, rows: int) -> float:
    """When the offer was sent."""
    key, began = ItemKey(1, 0), time.monotonic()
    link.send_nowait(Offer(key, 1, rows, MODEL, False, rows, ()))
    grant = await link.recv()
    assert isinstance(grant, Grant)
    (lend,) = grant.lends
    block = remote.view(lend.offset, rows * ROW_BYTES, lend.lease)
    block[0] = 1
    del block
    link.send_nowait(Commit(key, 1, Chunk(lend.lease, 0, rows, 0), None))
    return began


async def measure(count: int) -> dict[int, list[float]]:
    """Seconds by block size, ``count`` of each, the sizes taking turns."""
    sizes = SIZES * (count + 1)
    began: list[float] = []
    ended = asyncio.Event()

    async def serve(link: Link) -> None:
        transport = IpcTransport()
        await transport.open(None, lambda *_: False, incarnation="writer")
        remote = await transport.connect(link.remote.transports["ipc"], peer="receiver")
        for size in sizes:
            began.append(await hand_over(link, remote, size // ROW_BYTES))
            await asyncio.sleep(0.002)  # one at a time, on a quiet link
        await transport.aclose()
        ended.set()
        await link.wait_closed()

    hello = Hello.here(name="writer", incarnation="writer", role=PeerRole.ENCODE)
    async with LinkServer("unix:", lambda: hello, on_link=serve) as server:
        command = (sys.executable, __file__, "receiver", server.address, str(len(sizes)))
        child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        assert child.stdout is not None
        await ended.wait()
        came = json.loads(await child.stdout.readline())
        await child.wait()
    times = [end - start for start, end in zip(began, came, strict=True)][len(SIZES) :]  # the first are warm-up
    return {size: times[index :: len(SIZES)] for index, size in enumerate(SIZES)}


def main() -> None:
    if sys.argv[1:2] == ["receiver"]:
        uvloop.run(receive(sys.argv[2], int(sys.argv[3])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    options = parser.parse_args()
    print(f"{'block':>10} {'p50 us':>8} {'p99 us':>8}")
    for size, times in uvloop.run(measure(options.count)).items():
        p99 = statistics.quantiles(times, n=100)[98] if len(times) > 1 else times[0]
        print(f"{size >> 10:>6} KiB {statistics.median(times) * 1e6:>8.0f} {p99 * 1e6:>8.0f}")


if __name__ == "__main__":
    main()
