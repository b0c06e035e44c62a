"""Every transport keeps every promise of the interface, on both loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aiodisagg.errors import TransportError
from aiodisagg.transport.base import Transport
from aiodisagg.transport.conformance import CHECKS
from aiodisagg.transport.ipc import IpcTransport
from aiodisagg.transport.memory import MemoryTransport
from aiodisagg.transport.stream import StreamTransport
from aiodisagg.transport.testing import ConformanceError, Kit, check_transport
from aiodisagg.transport.zmq import ZmqTransport
from tests.conftest import LOOPS
from tests.transport.certificate import contexts

MAKERS: dict[str, Callable[[], Transport]] = {
    "memory": MemoryTransport,
    "ipc": lambda: IpcTransport(handshake_timeout_s=10),
    "stream": lambda: StreamTransport(connect_timeout_s=10),
    "zmq": lambda: ZmqTransport(connect_timeout_s=10),
}

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("transport", MAKERS)
async def test_conformance(transport: str, check: str, no_leaks: None) -> None:
    huge_bytes = (64 if check.startswith("huge") else 32) << 20
    await CHECKS[check](Kit(MAKERS[transport], huge_bytes=huge_bytes))


@pytest.mark.parametrize(
    "check",
    [
        "bytes_are_exact_and_nothing_else_changes",
        "slices_scatter_and_gather",
        "source_is_free_after_cancel_and_fence",
        "closed_peer_is_gone",
        "damaged_descriptions_are_transport_errors",
    ],
)
async def test_conformance_of_zmq_with_curve(check: str, no_leaks: None) -> None:
    await CHECKS[check](Kit(lambda: ZmqTransport(encrypt=True, chunk_bytes=1 << 20, connect_timeout_s=10)))


@pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)
@pytest.mark.parametrize(
    "check",
    [
        "bytes_are_exact_and_nothing_else_changes",
        "slices_scatter_and_gather",
        "source_is_free_after_cancel_and_fence",
        "closed_peer_is_gone",
        "huge_write_leaves_the_loop_free",
    ],
)
async def test_conformance_of_stream_with_tls(check: str, no_leaks: None) -> None:
    await CHECKS[check](Kit(lambda: StreamTransport(tls=contexts(), connect_timeout_s=10)))


class Forgetful(MemoryTransport):
    """Says that everything arrived, and drops what is larger than a kilobyte."""

    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        await super().write(remote, [one for one in slices if one.source.nbytes <= 1024])


class Untyped(MemoryTransport):
    async def connect(self, description, *, peer):  # type: ignore[no-untyped-def]
        try:
            return await super().connect(description, peer=peer)
        except TransportError as error:
            raise ValueError("untyped") from error


class OnTheLoop(MemoryTransport):
    """Copies several times over on the loop's thread before it writes."""

    async def write(self, remote, slices) -> None:  # type: ignore[no-untyped-def]
        for one in slices:
            for _ in range(4):
                bytes(one.source)
        await super().write(remote, slices)


class Hasty(MemoryTransport):
    """Does not wait for the copies in progress."""

    async def revoke(self, peer, leases) -> None:  # type: ignore[no-untyped-def]
        self._check_open()


class HastyZmq(ZmqTransport):
    async def revoke(self, peer, leases) -> None:  # type: ignore[no-untyped-def]
        self._opened()


@pytest.mark.parametrize("kind", [Hasty, HastyZmq])
async def test_the_suite_finds_a_revoke_that_waits_for_nothing(kind: type[Transport], no_leaks: None) -> None:
    with pytest.raises(ConformanceError, match="revoke waits for a copy"):
        await check_transport(kind, only=["revoke_waits_for_what_was_admitted"])


async def test_the_suite_finds_broken_transports(no_leaks: None) -> None:
    with pytest.raises(ConformanceError, match="arrived as written") as found:
        await check_transport(Forgetful)
    assert found.value.__notes__ == ["in check bytes_are_exact_and_nothing_else_changes"]
    with pytest.raises(ConformanceError, match="untyped"):
        await check_transport(Untyped, only=["damaged_descriptions_are_transport_errors"])
    with pytest.raises(ConformanceError, match="the loop's thread worked for"):
        await check_transport(OnTheLoop, only=["huge_write_leaves_the_loop_free"])
