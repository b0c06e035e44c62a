"""What words cost between two processes: a round trip of the control link, and the hand-off that copies nothing."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator

import msgspec

from aiodisagg.bench.echo import Caller
from aiodisagg.bench.partner import Came, Done, Join, Partner, Reflect
from aiodisagg.bench.paths import TransportPath
from aiodisagg.bench.serve_metrics import percentile
from aiodisagg.link import framing
from aiodisagg.link.hello import Hello, PeerRole
from aiodisagg.link.link import Link
from aiodisagg.link.server import LinkServer
from aiodisagg.protocol.messages import Cancel, Chunk, Commit, Grant, ItemKey, Message, Offer, encode
from aiodisagg.protocol.rows import ModelFingerprint
from aiodisagg.transport.mapping import IpcRemote

MODEL = ModelFingerprint("synthetic", 2048, 3, "bfloat16", "")
ROW_BYTES = 16384
PAUSE_S = 0.002
HAND_OFF, HAND_OFF_AFTER_PAUSE = "hand-off, no copy", "hand-off, no copy, after 2 ms of silence"
UNIX, TCP = "link round trip, unix", "link round trip, TCP"
TASK_UNIX, TASK_TCP = "link, one side a task that waits, unix", "link, one side a task that waits, TCP"
BARE_UNIX, BARE_TCP = "its bytes by bare protocols, unix", "its bytes by bare protocols, TCP"
ROUNDS = 10


class Latency(msgspec.Struct, frozen=True):
    """``count`` times of one kind, in microseconds."""

    what: str
    size_bytes: int
    count: int
    p50_us: float
    p99_us: float


def latency(what: str, size_bytes: int, times_s: list[float]) -> Latency:
    ordered = sorted(times_s)
    return Latency(what, size_bytes, len(ordered), percentile(ordered, 50) * 1e6, percentile(ordered, 99) * 1e6)


@contextlib.asynccontextmanager
async def link_to(partner: Partner, address: str) -> AsyncIterator[Link]:
    """A link that the partner dialled; it answers as :class:`~aiodisagg.bench.partner.Join` says."""
    linked: asyncio.Future[Link] = asyncio.get_running_loop().create_future()

    async def serve(link: Link) -> None:
        linked.set_result(link)
        await link.wait_closed()

    hello = Hello.here(name="writer", incarnation="writer", role=PeerRole.ENCODE)
    async with LinkServer(address, lambda: hello, on_link=serve) as server:
        await partner.ask(Join(server.address), Done)
        yield await linked


@contextlib.asynccontextmanager
async def bare_to(partner: Partner, address: str) -> AsyncIterator[Caller]:
    """A connection that the partner dialled and on which it sends back every byte."""
    loop = asyncio.get_running_loop()
    made: asyncio.Future[Caller] = loop.create_future()

    def accept() -> Caller:
        caller = Caller()
        loop.call_soon(made.set_result, caller)  # when the connection is made
        return caller

    kind, _, where = address.partition(":")
    if kind == "unix":
        server: asyncio.Server = await loop.create_unix_server(accept, where)
    else:
        server = await loop.create_server(accept, where, 0)
        address = f"tcp:{where}:{server.sockets[0].getsockname()[1]}"
    try:
        await partner.ask(Reflect(address), Done)
        caller = await made
        yield caller
        caller.close()
    finally:
        server.close()
        await server.wait_closed()


async def round_trips(partner: Partner, count: int) -> list[Latency]:
    """Of a small message over a unix socket and over TCP, and of its bytes by bare protocols, taking turns."""
    found: dict[str, list[float]] = {}
    message = Cancel(ItemKey(1, 0), 1)
    data = framing.frame(framing.MESSAGE, encode(message))
    with tempfile.TemporaryDirectory(prefix="aiodisagg-bench-") as folder:
        async with (
            link_to(partner, "unix:") as unix, link_to(partner, "tcp:127.0.0.1:0") as tcp,
            bare_to(partner, f"unix:{folder}/echo") as bare_unix, bare_to(partner, "tcp:127.0.0.1") as bare_tcp,
        ):  # fmt: skip
            for turn in range(1 + ROUNDS):
                for what, link, ask in (
                    (UNIX, unix, _calls), (TCP, tcp, _calls), (TASK_UNIX, unix, _asks), (TASK_TCP, tcp, _asks),
                ):  # fmt: skip
                    times = await ask(link, message, count // ROUNDS)
                    found.setdefault(what, []).extend(times if turn else ())  # the first is warm-up
                for what, bare in ((BARE_UNIX, bare_unix), (BARE_TCP, bare_tcp)):
                    times = await bare.round_trips(data, count // ROUNDS)
                    found.setdefault(what, []).extend(times if turn else ())
    return [latency(what, 0, times) for what, times in found.items()]


async def _calls(link: Link, message: Message, count: int) -> list[float]:
    """As the services talk: the next one is sent by the handler that got the last one's answer."""
    times: list[float] = []
    began = 0.0

    def handle(_: Message) -> None:
        nonlocal began
        now = time.perf_counter()
        times.append(now - began)
        if len(times) == count:
            receiving.cancel()
            return
        began = now
        link.send_nowait(message)

    receiving = asyncio.ensure_future(link.deliver(handle))
    await asyncio.sleep(0)  # it has its first turn
    began = time.perf_counter()
    link.send_nowait(message)
    await asyncio.wait({receiving})
    if not receiving.cancelled():
        receiving.result()  # the link was lost
    return times


async def _asks(link: Link, message: Message, count: int) -> list[float]:
    """By a task that waits for the answer."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        link.send_nowait(message)
        await link.recv()
        times.append(time.perf_counter() - began)
    return times


async def hand_offs(partner: Partner, path: TransportPath, sizes: tuple[int, ...], count: int) -> list[Latency]:
    """From the offer's sending to the commit's arrival, by the one monotonic clock of a machine.

    The block counts as filled when its view is made: what is measured is what handing over costs besides producing.
    One right after the other, and after a pause in which the processors fall asleep.
    """
    remote = path.remote
    assert isinstance(remote, IpcRemote)
    kinds = [(what, size) for what in (HAND_OFF, HAND_OFF_AFTER_PAUSE) for size in sizes]
    began: list[float] = []
    async with link_to(partner, "unix:") as link:
        for _ in range(count + 1):
            for what, size in kinds:
                if what == HAND_OFF_AFTER_PAUSE:
                    await asyncio.sleep(PAUSE_S)
                began.append(await _hand_over(link, remote, size))
        link.send_nowait(Cancel(ItemKey(1, 0), 1))
        await link.recv()  # it has noted all of them
    came = (await partner.ask(Came(), Done)).times_s
    times = [end - start for start, end in zip(began, came, strict=True)][len(kinds) :]  # the first are warm-up
    return [latency(what, size, times[index :: len(kinds)]) for index, (what, size) in enumerate(kinds)]


async def _hand_over(link: Link, remote: IpcRemote, size: int) -> float:
    """When the offer was sent."""
    rows = max(1, size // ROW_BYTES)
    key, began = ItemKey(1, 0), time.monotonic()
    link.send_nowait(Offer(key, 1, rows, MODEL, False, rows, ()))
    grant = await link.recv()
    assert isinstance(grant, Grant)
    (lend,) = grant.lends
    block = remote.view(lend.offset, size, lend.lease)
    block[0] = 1
    del block
    link.send_nowait(Commit(key, 1, Chunk(lend.lease, 0, rows, 0), None))
    return began
