"""What a peer's death, stop and silence look like from the other process, for transports that cross processes."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from aiodisagg.errors import PeerGone, WriteFailed
from aiodisagg.transport.base import Slice, Transport
from aiodisagg.transport.testing import Kit, Receiver
from tests.conftest import LOOPS
from tests.transport.child import SIZE, SLOWNESS, make

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)]
every = pytest.mark.parametrize("name", ["ipc", "zmq", "stream"])
placed = pytest.mark.parametrize("name", ["zmq", "stream"])


class Child:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def say(self, **words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words).encode() + b"\n")
        await self.process.stdin.drain()

    async def hear(self) -> dict[str, object]:
        assert self.process.stdout is not None
        heard = await asyncio.wait_for(self.process.stdout.readline(), 30 * SLOWNESS)
        assert heard, "the child ended"
        return json.loads(heard)

    def signal(self, number: signal.Signals) -> None:
        """Of SIGSTOP, returns when all threads have stopped: on busy processors they go on for a while."""
        self.process.send_signal(number)
        if number is signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    async def die(self) -> None:
        self.signal(signal.SIGKILL)
        await self.process.wait()


@asynccontextmanager
async def child(role: str, name: str, **words: object) -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.transport.child", role, name),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    one = Child(process)
    try:
        await one.say(**words)
        yield one
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def written_by_child(name: str, *, forever: bool) -> AsyncIterator[tuple[Receiver, Child, int]]:
    make_one: Callable[[], Transport] = lambda: make(name)  # noqa: E731
    async with Kit(make_one).receiver(SIZE + 4096) as receiver:
        lease = receiver.lender.lend(0, SIZE)
        description = base64.b64encode(receiver.transport.describe()).decode()
        words = {"description": description, "peer": receiver.incarnation, "size_bytes": SIZE, "lease": lease}
        async with child("writer", name, forever=forever, **words) as one:
            yield receiver, one, lease


@every
async def test_bytes_of_another_process_arrive_and_a_clean_end_fences(name: str, no_leaks: None) -> None:
    async with written_by_child(name, forever=False) as (receiver, one, lease):
        assert await one.hear() == {"written": True}
        assert receiver.holds(b"\xaa" * SIZE, 0)
        assert receiver.untouched(SIZE)
        await one.say(do="end")
        assert await one.hear() == {"closed": True}
        async with asyncio.timeout(60):
            await receiver.transport.revoke("child-writer", [lease])


@every
async def test_a_writer_killed_in_mid_write_is_fenced(name: str, no_leaks: None) -> None:
    async with written_by_child(name, forever=True) as (receiver, one, lease):
        assert await one.hear() == {"writing": True}
        receiver.lender.withdraw(lease)
        await one.die()
        async with asyncio.timeout(60):
            await receiver.transport.revoke("child-writer", [lease])
        receiver.arena.view[:] = b"\x33" * receiver.arena.size_bytes
        async with child("writer", name, **await _next_writer(receiver)) as other:  # the next life of that peer
            assert await other.hear() == {"written": True}
        assert receiver.arena.view[100:] == b"\x33" * (receiver.arena.size_bytes - 100)


async def _next_writer(receiver: Receiver) -> dict[str, object]:
    description = base64.b64encode(receiver.transport.describe()).decode()
    lease = receiver.lender.lend(0, 100)
    return {
        "description": description,
        "peer": receiver.incarnation,
        "size_bytes": 100,
        "lease": lease,
        "forever": False,
    }


@pytest.mark.parametrize("then", [signal.SIGCONT, signal.SIGKILL])
async def test_a_stopped_ipc_writer_holds_its_leases(then: signal.Signals, no_leaks: None) -> None:
    async with written_by_child("ipc", forever=True) as (receiver, one, lease):
        assert await one.hear() == {"writing": True}
        one.signal(signal.SIGSTOP)
        revoke = asyncio.ensure_future(receiver.transport.revoke("child-writer", [lease]))
        done, _ = await asyncio.wait([revoke], timeout=0.3)  # the one thing here that has no event: nothing happens
        assert not done
        one.signal(then)
        async with asyncio.timeout(60):
            await revoke
        receiver.arena.view[:] = b"\x33" * receiver.arena.size_bytes
        if then == signal.SIGCONT:  # its next write under the lease is refused on its own side, and it ends
            assert await asyncio.wait_for(one.process.wait(), 60) == 1
        assert receiver.arena.view == b"\x33" * receiver.arena.size_bytes


@placed
async def test_a_stopped_writer_cannot_hold_a_lease_where_the_receiver_places(name: str, no_leaks: None) -> None:
    async with written_by_child(name, forever=True) as (receiver, one, lease):
        assert await one.hear() == {"writing": True}
        one.signal(signal.SIGSTOP)
        receiver.lender.withdraw(lease)
        async with asyncio.timeout(60):
            await receiver.transport.revoke("child-writer", [lease])
        receiver.arena.view[:] = b"\x33" * receiver.arena.size_bytes
        one.signal(signal.SIGCONT)
        assert await asyncio.wait_for(one.process.wait(), 60) == 1  # refused, by the receiver
        assert receiver.arena.view == b"\x33" * receiver.arena.size_bytes


@asynccontextmanager
async def writing_to_child(name: str) -> AsyncIterator[tuple[Transport, asyncio.Task[None], Child]]:
    """A task of this process that writes into the child's pool until it fails."""
    async with child("receiver", name, size_bytes=SIZE) as one, Kit(lambda: make(name)).writer() as (writer, _):
        description = base64.b64decode(str((await one.hear())["description"]))
        remote = await writer.connect(description, peer="child-receiver")
        source = memoryview(bytearray(SIZE))
        started = asyncio.Event()

        async def write() -> None:
            while True:
                await writer.write(remote, [Slice(source, 0, 1)])
                started.set()

        task = asyncio.ensure_future(write())
        await asyncio.wait_for(started.wait(), 10 * SLOWNESS)
        try:
            yield writer, task, one
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            async with asyncio.timeout(10 * SLOWNESS):
                await writer.fence(remote)


@every
async def test_a_receiver_killed_in_mid_write_is_gone(name: str, no_leaks: None) -> None:
    async with writing_to_child(name) as (_, task, one):
        await one.die()
        with pytest.raises(PeerGone):
            await asyncio.wait_for(task, 60)


@placed
async def test_a_stopped_receiver_is_given_up(name: str, no_leaks: None) -> None:
    async with writing_to_child(name) as (_, task, one):
        one.signal(signal.SIGSTOP)
        with pytest.raises((PeerGone, WriteFailed)):
            await asyncio.wait_for(task, 60)
