"""Mooncake's transfer engine: one-sided writes over RDMA, or over TCP where that is asked for by name.

``mooncake`` is RDMA and nothing else: a machine without it raises TransportUnavailable, never runs TCP in silence.
``mooncake-tcp`` is the engine's TCP. The engine listens on all interfaces without authentication, and who reaches its
data port can write into every registered range: keep that network to yourselves.

What an engine does not tell comes over a small connection of its own (:mod:`aiodisagg.transport.mooncake_side`):
liveness, incarnations, and the writer's word that it stopped. Transfers run on a thread
(:mod:`aiodisagg.transport.mooncake_pump`), everything that opens, registers or closes on others; nothing of the
engine is called on the loop's thread.

When memory is free again
-------------------------
* **Sources** after ``fence`` or ``disconnect``: the engine ended every piece. On TCP the progress time-out bounds that.
  On RDMA pieces are staged, so a transfer that never ends (its target was killed) keeps a staging slot, not the
  caller's memory.
* **Destinations** after ``revoke`` (``FenceKind.WRITER``): the writer said so; or said goodbye; or its connection
  ended twice the progress time-out ago. A writer that is stopped or cut off but not dead holds ``revoke`` up.
* After a TCP write that *failed* both take that time more, by each side's own clock: its bytes are in the kernels.
* ``fence`` ends when the destinations are free, too. ``disconnect`` does not wait for that: a transfer that never ends
  holds up the goodbye, which the background sees to, and so the leases of the receiver, and nobody else.
* ``leased_bytes`` and ``revoking`` say how much waits for that.
* ``aclose`` destroys the engine, the one hard fence there is, before it says goodbye to anybody.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

from aiodisagg.errors import ConfigError, PeerGone, TransportClosed, TransportUnavailable, WriteFailed
from aiodisagg.strangers import Strangers
from aiodisagg.transport.arena import Arena
from aiodisagg.transport.attach import MAX_LEASE, BarList
from aiodisagg.transport.base import Admit, Capabilities, FenceKind, Remote, Slice, Transport, check_slices
from aiodisagg.transport.description import pack, unpack
from aiodisagg.transport.mooncake_greeting import Greeting, Pool, ipv4
from aiodisagg.transport.mooncake_job import Job, Lane
from aiodisagg.transport.mooncake_open import Opened, Openers, Places, open_engine, reach
from aiodisagg.transport.mooncake_remote import BARRED_PER_PEER, MooncakeRemote
from aiodisagg.transport.mooncake_side import PLACE_BYTES, Attach, Attached, Attachment, Goodbye, Refused, Side, Wire

log = logging.getLogger(__name__)

RDMA_CHUNK_BYTES, TCP_CHUNK_BYTES = 4 << 20, 256 << 20
_BARRED_PEERS = 1024


class MooncakeTransport(Transport):
    """RDMA; see the module's text.

    Args:
        host: IPv4 address under which others reach this host, and on which the side connection listens.
        devices: RDMA devices to use, with commas; empty: all.
        progress_timeout_s: a TCP transfer without progress for so long has failed; one value per process.
        heartbeat_s: a receiver that misses five answers is lost to its writers.
        connect_timeout_s: for the connection, the engine's handshake and the check of the data plane.
        overdue_s: an RDMA transfer that is pending for so long has failed.
        chunk_bytes: largest transfer, and size of a staging slot. staging_slots: of them, for RDMA.
        quarantine_s: how long a dead peer's leases and writes are held, and those of a TCP write that failed; None:
            twice ``progress_timeout_s``.
    """

    name: ClassVar[str] = "mooncake"
    protocol: ClassVar[str] = "rdma"
    capabilities: ClassVar[Capabilities] = Capabilities(
        one_sided=True, fence=FenceKind.WRITER, device_memory=False, integrity=True
    )

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        devices: str = "",
        progress_timeout_s: int = 5,
        heartbeat_s: float = 1.0,
        connect_timeout_s: float = 10.0,
        overdue_s: float = 30.0,
        chunk_bytes: int | None = None,
        staging_slots: int = 32,
        quarantine_s: float | None = None,
    ) -> None:
        self._host = host
        if progress_timeout_s < 1 or heartbeat_s <= 0:
            raise ConfigError("progress_timeout_s" if progress_timeout_s < 1 else "heartbeat_s", "must be positive")
        self._devices, self._progress_timeout_s = devices, progress_timeout_s
        self._heartbeat_s, self._connect_timeout_s, self._overdue_s = heartbeat_s, connect_timeout_s, overdue_s
        self._quarantine_s = 2.0 * progress_timeout_s if quarantine_s is None else quarantine_s
        self._chunk_bytes = chunk_bytes or (RDMA_CHUNK_BYTES if self.protocol == "rdma" else TCP_CHUNK_BYTES)
        self._depth, self._staging_slots = ((16, 8), staging_slots) if self.protocol == "rdma" else ((4, 1), 0)
        self._lands_for_s = None if self.protocol == "rdma" else self._quarantine_s
        self._state = "new"
        self._incarnation = ""
        self._token = secrets.token_bytes(16)
        self._arena: Arena | None = None
        self._engines: list[Opened] = []
        self._opening: set[asyncio.Future[Opened]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._openers = Openers(self.name)
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[object]] = set()
        self._greeting: Strangers[Wire] = Strangers(connect_timeout_s, Wire.abort)
        self._attachments: set[Attachment] = set()
        self._barred: OrderedDict[str, BarList] = OrderedDict()
        self._remotes: set[MooncakeRemote] = set()
        self._incoming_places, self._outgoing_places = Places(), Places()

    async def open(self, arena: Arena | None, admit: Admit, *, incarnation: str) -> None:
        if self._state != "new":
            raise TransportClosed(self.name, f"opened when {self._state}")
        self._host = ipv4(self.name, self._host)
        self._state, self._incarnation, self._arena = "opening", incarnation, arena
        try:
            await self._open_engine(arena)
            if arena is not None:
                self._server = await asyncio.start_server(self._serve, self._host, 0, backlog=128)
        except OSError as error:
            await self.aclose()
            raise TransportUnavailable(self.name, f"cannot listen on {self._host}: {error}") from error
        except BaseException:
            await self.aclose()
            raise
        self._state = "open"

    async def _open_engine(self, arena: Arena | None) -> Opened:
        """The first is the receiver's and sends, too; for others see :class:`Opened`."""
        make = open_engine(
            self.name,
            self.protocol,
            self._host,
            self._devices,
            self._progress_timeout_s,
            arena=arena,
            depth=self._depth,
            slot_bytes=self._chunk_bytes,
            slots=self._staging_slots,
            overdue_s=self._overdue_s,
        )
        opening = asyncio.ensure_future(self._openers.run(make))
        self._opening.add(opening)
        opening.add_done_callback(self._engine_opened)
        return await asyncio.shield(opening)

    def _engine_opened(self, opening: asyncio.Future[Opened]) -> None:
        self._opening.discard(opening)
        if opening.exception() is None:
            self._engines.append(opening.result())

    def describe(self) -> bytes:
        self._engaged()
        if self._server is None:
            raise TransportUnavailable(self.name, "opened without a pool")
        port = self._server.sockets[0].getsockname()[1]
        return pack(self.name, Pool(self._host, port, self._incarnation, self._token))

    @property
    def leased_bytes(self) -> int:
        """Bytes of writes that are over for their callers and still with the engine."""
        return sum(one.pump.leased_bytes for one in self._engines)

    @property
    def revoking(self) -> int:
        """Leases of this pool whose revocation waits for a writer."""
        return sum(one.held for one in self._attachments)

    # -- the receiver's side --------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        wire = Wire(reader, writer)
        try:
            await self._greet(wire)
        except asyncio.CancelledError:
            pass  # closed; asyncio's own server would report this as an error
        finally:
            self._greeting.discard(wire)
            self._serving.discard(task)
            await wire.close()

    async def _greet(self, wire: Wire) -> None:
        self._greeting.add(wire)
        asked = await wire.hear()
        in_time = self._greeting.discard(wire)
        if not in_time or not isinstance(asked, Attach) or not hmac.compare_digest(asked.token, self._token):
            return
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                place = await self._incoming_places.take()
        except TimeoutError:
            return
        arena = self._arena
        with place:
            if self._state != "open" or arena is None or asked.expected != self._incarnation:
                wire.say(Refused(f"incarnation {self._incarnation} answers there, {self._state}"))
                await wire.drain()
                return
            opened = self._engines[0]
            start = opened.place(place.number)
            opened.fill(start, bytes(PLACE_BYTES))
            barred = self._barred.get(asked.writer)
            known = barred.newest(BARRED_PER_PEER) if barred else []
            attachment = Attachment(wire, asked.writer, self._quarantine_s, self._attachments.discard)
            self._attachments.add(attachment)  # from here on, its leases need its word
            wire.say(Attached(arena.size_bytes, arena.address, opened.engine.port, opened.address(start), known))
            await attachment.serve(lambda nonce: place.check(opened, nonce))  # which gives the place back

    async def revoke(self, peer: str, leases: Sequence[int]) -> None:
        self._engaged()
        wanted = [lease for lease in leases if 0 <= lease < MAX_LEASE]
        barred = self._barred.setdefault(peer, BarList(BARRED_PER_PEER))
        self._barred.move_to_end(peer)
        if len(self._barred) > _BARRED_PEERS:
            self._barred.popitem(last=False)
        barred.add(wanted)
        if words := [word for one in self._attachments if one.peer == peer for word in one.bar(wanted)]:
            await asyncio.wait(words)

    # -- the writer's side ----------------------------------------------------------------------------------------

    async def connect(self, description: bytes, *, peer: str) -> MooncakeRemote:
        self._engaged()
        pool = unpack(self.name, Pool, description)
        host = ipv4(self.name, pool.host)
        wire: Wire | None = None
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                wire = Wire(*await asyncio.open_connection(host, pool.port))
                return await self._attach(wire, host, pool, peer)
        except BaseException as error:
            if wire is not None:
                wire.say(Goodbye())  # the check's bytes have a place of their own: nothing else was ever sent
                await wire.close()
            if isinstance(error, TimeoutError):
                raise PeerGone(self.name, f"no answer in {self._connect_timeout_s:g} s", peer=peer) from error
            if isinstance(error, OSError | OverflowError):
                raise PeerGone(self.name, f"cannot connect: {error}", peer=peer) from error
            raise

    async def _attach(self, wire: Wire, host: str, pool: Pool, peer: str) -> MooncakeRemote:
        greeting = Greeting(self.name, wire, peer)
        words = await greeting.attach(pool.token, self._incarnation)
        segment = f"{host}:{words.engine_port}"
        nonce = secrets.token_bytes(PLACE_BYTES)
        opened = next((one for one in self._engines if one.knows_only(segment, peer)), None)
        if opened is None:
            opened = await self._open_engine(None)
            opened.knows_only(segment, peer)
        place, limit_s = await self._outgoing_places.take(), self._connect_timeout_s
        await self._openers.run(
            lambda: reach(self.name, peer, opened, segment, words.place, place.number, nonce, limit_s),
            ended=place.give_back,
        )
        await greeting.check(nonce)
        self._engaged()
        lane = Lane(peer, segment, words.address)
        remote = MooncakeRemote(self.name, peer, words.size_bytes, opened.pump, lane, greeting.barred)
        remote.side = Side(
            self.name,
            peer,
            wire,
            self._heartbeat_s,
            self._quarantine_s,
            on_bar=remote.bar,
            on_lost=lambda error: self._lost(remote, error),
        )
        self._remotes.add(remote)
        return remote

    async def write(self, remote: Remote, slices: Sequence[Slice]) -> None:
        pool = self._mine(remote)
        self._engaged()
        total = check_slices(self.name, remote, slices)
        pool.check(frozenset(one.lease for one in slices))
        if not total:
            return
        job = Job(pool.lane, slices, self._chunk_bytes, self._lands_for_s)
        pool.send(job)
        try:
            await asyncio.shield(job.outcome)
        except asyncio.CancelledError:
            pool.stop(job, WriteFailed(self.name, "cancelled", peer=pool.peer))
            raise
        except WriteFailed as error:  # the engine does not say why; a dead peer is the usual reason
            if not await pool.side.alive():
                raise PeerGone(self.name, f"ended in mid-write ({pool.side.lost})", peer=pool.peer) from error
            raise

    async def fence(self, remote: Remote) -> None:
        """A piece under way is waited for: on TCP at most the progress time-out, and if it fails the quarantine; on
        RDMA for ever, if it does not end and the receiver does not."""
        await self._mine(remote).settled()

    async def disconnect(self, remote: Remote) -> None:
        """Returns when the sources are free; see the module's text."""
        pool = self._mine(remote)
        pool.closed = True
        await pool.freed()
        if all(job.end.done() for job in pool.jobs):
            await self._take_leave(pool)
        else:
            self._take_leave_later(pool)

    def _lost(self, remote: MooncakeRemote, error: PeerGone) -> None:
        log.info("%s: writer side: %s", self.name, error)
        for job in remote.jobs:
            remote.stop(job, error)
        remote.pump.give_up(remote.lane, error)
        if remote.side.gone and not remote.closed:  # it may be closing, and then it waits for our word
            self._take_leave_later(remote)

    def _take_leave_later(self, remote: MooncakeRemote) -> None:
        if not remote.leaving:
            remote.leaving = True
            self._openers.after(self._take_leave(remote))

    async def _take_leave(self, remote: MooncakeRemote) -> None:
        await remote.settled()
        self._remotes.discard(remote)
        await remote.side.close(goodbye=remote.goodbye)

    async def aclose(self) -> None:
        """Whoever calls it a second time, or again after a cancelled call, waits for the end of the same close."""
        if self._state in ("opening", "open"):
            self._closing = asyncio.ensure_future(self._close())
        self._state = "closed"
        if self._closing is not None:
            await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for remote in self._remotes:
            for job in remote.jobs:
                remote.stop(job, TransportClosed(self.name, "closed in mid-write", peer=remote.peer))
        if self._server is not None:
            self._server.close()
        if waiting := [one.ended for one in self._attachments]:
            for attachment in self._attachments:
                attachment.closing()
            await asyncio.wait(waiting, timeout=2 * self._heartbeat_s)
        if self._opening:  # cancelled while they opened
            await asyncio.wait(self._opening)
        for opened in self._engines:
            await self._openers.run(opened.close(self._progress_timeout_s * 2.0))
        for attachment in list(self._attachments):
            attachment.end()  # its bytes have nowhere to land
        for remote in list(self._remotes):
            for job in list(remote.jobs):
                job.over()
                job.ended()
            await self._take_leave(remote)
        await self._openers.aclose()
        for task in list(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def _engaged(self) -> None:
        if self._state != "open":
            raise TransportClosed(self.name, f"used when {self._state}")

    def _mine(self, remote: Remote) -> MooncakeRemote:
        if not isinstance(remote, MooncakeRemote):
            raise TypeError(f"{remote!r} was not made by this transport")
        return remote


class MooncakeTcpTransport(MooncakeTransport):
    """The engine's TCP, where it is asked for by name; ``stream`` is faster."""

    name: ClassVar[str] = "mooncake-tcp"
    protocol: ClassVar[str] = "tcp"
    capabilities: ClassVar[Capabilities] = Capabilities(
        one_sided=True, fence=FenceKind.WRITER, device_memory=False, integrity=False
    )
