"""How many remotes one ZMQ transport can hold, and what happens to one too many."""

from __future__ import annotations

import asyncio

import pytest
import zmq

from aiodisagg.errors import PeerGone
from aiodisagg.transport.testing import Kit
from aiodisagg.transport.zmq import ZmqTransport
from tests.conftest import LOOPS

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)]

_SOCKETS = 6
"""Of one remote: two links, each a DEALER and the two ends of its monitor."""


class Small(zmq.Context[zmq.Socket[bytes]]):
    """A context with room for few sockets, whatever is asked of it."""

    sockets = 1023

    def set(self, option: int, opt_val: int) -> None:
        super().set(option, self.sockets if option == zmq.MAX_SOCKETS else opt_val)


@pytest.mark.parametrize("spare", range(_SOCKETS))
async def test_one_remote_too_many_fails_at_once_and_the_others_go_on(
    spare: int, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    """The error of a DEALER that could not be made was nobody's: ``connect`` waited until its time was up.

    ``spare`` sockets are left for the one too many, so that each of its six is once the one that cannot be made.
    """
    async with Kit(ZmqTransport).receiver() as receiver:
        description = receiver.transport.describe()
        monkeypatch.setattr(Small, "sockets", _SOCKETS + spare)
        monkeypatch.setattr(zmq, "Context", Small)
        async with Kit(lambda: ZmqTransport(connect_timeout_s=10)).writer() as (writer, _):
            remote = await writer.connect(description, peer=receiver.incarnation)
            with pytest.raises(PeerGone, match="Too many open files"):
                await writer.connect(description, peer=receiver.incarnation)
            await writer.write(remote, [receiver.slice(b"fine", 0)])
            assert receiver.holds(b"fine", 0)
            await writer.disconnect(remote)
            async with asyncio.timeout(60):  # ZMQ gives sockets back on a thread of its own
                while True:
                    try:
                        remote = await writer.connect(description, peer=receiver.incarnation)
                        break
                    except PeerGone as error:
                        assert "Too many open files" in str(error)
            await writer.write(remote, [receiver.slice(b"next", 4)])
            assert receiver.holds(b"next", 4)


async def test_a_transport_has_as_many_sockets_as_zmq_allows(no_leaks: None) -> None:
    """The 171st remote failed: by default ZMQ allows 1023."""
    async with Kit(ZmqTransport).writer() as (writer, _):
        context = writer._pump._context  # type: ignore[attr-defined]
        assert context.get(zmq.MAX_SOCKETS) == context.get(zmq.SOCKET_LIMIT) >= 10_000
