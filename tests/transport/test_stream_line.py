"""When a writer gives up a peer that does not answer, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from aiodisagg.transport.chunks import Chunk, Hello, Placed, Welcome
from aiodisagg.transport.stream import StreamRemote, StreamTransport
from aiodisagg.transport.testing import Kit
from aiodisagg.transport.wire import frame
from tests.transport.test_stream import server, unlent

pytestmark = pytest.mark.anyio
MiB = 1 << 20


async def test_a_peer_that_answers_now_and_then_is_not_given_up(skip: Callable[[float], None], no_leaks: None) -> None:
    """However long the whole write takes."""
    kit = Kit(lambda: StreamTransport(stall_s=1000.0, chunk_bytes=MiB))
    async with kit.writer() as (writer, _), server() as (accepted, description):
        connecting = asyncio.ensure_future(writer.connect(description, peer="p"))
        for _ in range(2):  # the second is for what is large
            other = await accepted.get()
            assert isinstance(await other.hear(), Hello)
            other.writer.write(frame(Welcome(1, 1 << 24)))
        remote = await connecting
        assert isinstance(remote, StreamRemote)
        writing = asyncio.ensure_future(writer.write(remote, [unlent(b"x" * (3 * MiB))]))
        chunks = []
        for _ in range(3):
            chunks.append(await other.hear())
            await other.reader.readexactly(MiB)
        for unanswered, chunk in zip((2, 1, 0), chunks, strict=True):
            skip(600.0)
            for _ in range(3):  # turns, in which it looks
                await asyncio.sleep(0)
            assert isinstance(chunk, Chunk) and not writing.done()
            other.writer.write(frame(Placed(chunk.number)))
            while len(remote.lines[1]._lane) > unanswered:  # noqa: ASYNC110 - nobody is told of an answer alone
                await asyncio.sleep(0)
        await writing
