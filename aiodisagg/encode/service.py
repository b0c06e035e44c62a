"""EncodeService: an encode peer as an async context manager."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client.core import Metric

from aiodisagg.bootstrap.client import BootstrapClient
from aiodisagg.bootstrap.registry import Load, PeerRecord, PeerState
from aiodisagg.device.copies import open_accelerator
from aiodisagg.encode.ablation import WithoutDeepStack
from aiodisagg.encode.gate import Gate
from aiodisagg.encode.handoff import HandOff
from aiodisagg.encode.pipeline import EncodePipeline
from aiodisagg.encode.selftest import self_test
from aiodisagg.encode.session import Session, WriterEvent
from aiodisagg.errors import ConfigError, LinkClosed, LinkError, PeerBroken, RemoteProtocolError
from aiodisagg.link.hello import Hello, PeerRole
from aiodisagg.link.link import Link
from aiodisagg.link.server import LinkServer
from aiodisagg.models.base import VisionEncoder
from aiodisagg.peer import metrics
from aiodisagg.peer.config import EncodeConfig
from aiodisagg.peer.driver import Driver
from aiodisagg.peer.once import EnteredOnce
from aiodisagg.peer.planes import Planes, TlsContexts
from aiodisagg.protocol.counters import PeerLabels
from aiodisagg.protocol.events import (
    CancelEncode,
    ChangeEncode,
    DrainBegan,
    Drained,
    DropSource,
    Fence,
    LinkLost,
    LinkUp,
    MessageReceived,
    Send,
    SenderAction,
    SenderEvent,
    StartEncode,
    TimerFired,
    Write,
    WriteFailed,
    WritesFenced,
)
from aiodisagg.protocol.messages import ItemKey, Message
from aiodisagg.protocol.sending import Sender, SenderConfig
from aiodisagg.scheduler.advertise import advertise
from aiodisagg.scheduler.cost import ServiceTimes

logger = logging.getLogger(__name__)


@contextmanager
def _as_listen() -> Iterator[None]:
    """What is wrong with an address is wrong with ``listen``."""
    try:
        yield
    except ConfigError as error:
        if error.key != "address":
            raise
        raise error.under("listen") from error


def load_encoder(config: EncodeConfig) -> VisionEncoder:
    """The encode half of the configured folder. Blocking; raises CheckpointError, and ConfigError for the device."""
    from aiodisagg.models.loading import check_device
    from aiodisagg.models.vision import Qwen3VLVisionEncoder

    check_device(config.device)
    return Qwen3VLVisionEncoder(config.model, dtype=config.row_dtype, device=config.device)


class EncodeService(EnteredOnce):
    """Encodes items for language peers that link to it, and for as long as the context is open.

    ::

        async with EncodeService(EncodeConfig(model=folder, bootstrap=("http://127.0.0.1:8500",))) as peer:
            await peer.serve()

    Args:
        encoder: instead of the checkpoint's vision tower; anything that satisfies ``VisionEncoder``.
        gate: asked before the tower begins a batch; for a tower that shares its device.
        role: what it says of itself; ``BOTH`` for the encode half of such a peer.
        zero_deepstack: rows have zeros for DeepStack, to see what these are worth.
    """

    def __init__(
        self, config: EncodeConfig, *, encoder: VisionEncoder | None = None, gate: Gate | None = None,
        role: PeerRole = PeerRole.ENCODE, zero_deepstack: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.role, self._zero_deepstack = config, role, zero_deepstack
        self._gate = gate
        self.name = config.name or f"encode-{config.incarnation[:6]}"
        self._encoder = encoder
        self._labels = PeerLabels()
        self._sessions: dict[str, Session] = {}
        self._waiting: dict[str, Session] = {}
        """Of peers that have a session: one further link, through which nothing was said yet."""
        self._writers: dict[tuple[str, ItemKey], Session] = {}
        self._stopped = asyncio.Event()
        self._drained = asyncio.Event()
        self._draining = False
        self._broken = ""
        self._server: LinkServer | None = None
        self._client: BootstrapClient | None = None

    def _link_server(self, tls: TlsContexts | None) -> LinkServer:
        config = self.config
        return LinkServer(
            config.listen, lambda: self._hello, on_link=self._serve_link, secret=config.secret, config=config.link,
            ssl=None if tls is None else tls[0],
        )  # fmt: skip

    async def check(self) -> None:
        """Raises ConfigError if nobody could listen at ``config.listen`` now. Entering begins with it: loading may take
        minutes."""
        with _as_listen():
            await self._link_server(None).check()

    async def _open(self) -> None:
        config = self.config
        await self.check()
        tls = config.tls.contexts() if config.tls is not None else None
        logger.info("%s: loading the encode half of %s on %s", self.name, config.model, config.device)
        encoder = self._encoder if self._encoder is not None else await asyncio.to_thread(load_encoder, config)
        if self._zero_deepstack:
            encoder = WithoutDeepStack(encoder)
        self.model = encoder.fingerprint
        self.times: ServiceTimes | None = None
        if config.self_test_s > 0:
            logger.info("%s: measuring the tower, for %g s at most", self.name, config.self_test_s)
            threads = config.prepare_threads
            self.times = await asyncio.to_thread(self_test, encoder, config.self_test_s, prepare_threads=threads)
        sender_config = SenderConfig(retain_s=config.retain_s, capacity_bytes=config.source_bytes)
        self.sender = Sender(encoder.fingerprint, sender_config)
        self.sender.counters.labels = self._labels
        self.driver: Driver[SenderEvent, SenderAction] = Driver(self.sender, self._act, TimerFired)
        self._stack.callback(self.driver.close)
        accelerator = await asyncio.to_thread(open_accelerator, config.device)
        self._handoff: HandOff | None = None
        if accelerator is not None:
            self._stack.callback(accelerator.close)
            self._handoff = HandOff(accelerator, checksum=config.checksum)
            self._stack.push_async_callback(self._handoff.aclose)
        pipeline = EncodePipeline(
            encoder,
            self._feed,
            batch_patches=config.batch_patches,
            prepare_threads=config.prepare_threads,
            keep_on_device=accelerator is not None,
            device=config.device,
            gate=self._gate,
            broke=self._broke,
        )
        self.pipeline = await self._stack.enter_async_context(pipeline)
        self._planes = Planes(config.transports, config.data_host, tls)
        self._stack.push_async_callback(self._planes.aclose)
        await self._planes.open(None, lambda *_: False, incarnation=config.incarnation)
        self._hello = Hello.here(
            name=self.name,
            incarnation=config.incarnation,
            role=self.role,
            model=encoder.fingerprint,
            times=self.times,
            sends_by=tuple(self._planes.open_transports),
        )
        with _as_listen():
            self._server = await self._stack.enter_async_context(self._link_server(tls))
        if config.bootstrap:
            self._client = BootstrapClient(
                config.bootstrap, self.record(), load=self.load, token=config.bootstrap_token
            )  # fmt: skip
            await self._stack.enter_async_context(self._client)
        logger.info("%s encodes %s at %s", self.name, encoder.fingerprint.architecture, self.address)

    def _leave(self) -> None:
        self._stopped.set()
        self._drained.set()

    @property
    def address(self) -> str:
        """Where language peers link to this one."""
        if self._server is None:
            raise RuntimeError("the peer is not open")
        return self._server.address

    async def drain(self) -> None:
        """Takes no new item and returns when those that are open have ended; other peers are told to go elsewhere.

        Items whose receiver has no link are not waited for. The peer stays as it is: leave the context next.
        """
        logger.info("%s drains: %d items are open", self.name, len(self.sender.items))
        if self._client is not None:
            self._client.announce(PeerState.DRAINING)
        self._draining = True
        self.driver.feed(DrainBegan())
        await self._drained.wait()

    async def serve(self) -> None:
        """Returns when the context is left. Raises PeerBroken when the tower will not encode anything any more."""
        await self._stopped.wait()
        if self._broken:
            raise PeerBroken("tower", self._broken)

    def _broke(self, why: str) -> None:
        """What was in the tower may have done it. So language peers see an end like a process's death, for which they
        have rules: they do not take it to every other encode peer."""
        logger.error("%s: the tower is broken: %s", self.name, why)
        self._broken = why
        self._stopped.set()
        if self._server is not None:
            self._server.cut()

    @property
    def broken(self) -> str:
        """Why no item will be encoded any more, or empty."""
        why = self._broken or (self.pipeline.broken if self._opened else "")
        return f"the tower is broken: {why}" if why else ""

    def ready(self) -> tuple[bool, str]:
        """Can items be encoded now, and if not, why."""
        if not self._is_open or self._draining:
            return False, "draining" if self._draining else "not open"
        return (False, self.broken) if self.broken else (True, "ok")

    def load(self) -> Load:
        """How busy this peer is, for the bootstrap server."""
        sources = self.sender.sources
        return Load(
            queued=self.pipeline.waiting,
            active=len(self.sender.items),
            patches=sources.waiting_patches,
            digests=advertise(sources.newest()),
        )

    def record(self) -> PeerRecord:
        """What a bootstrap server is told of this peer."""
        return PeerRecord(
            name=self.name,
            incarnation=self.config.incarnation,
            role=self.role,
            addresses=(self.address,),
            transports=tuple(self._planes.open_transports),
            model=self.model,
            times=self.times,
        )

    def metrics(self) -> str:
        """Everything this peer counts, in Prometheus' text format."""
        return metrics.render(self.families())

    def families(self) -> list[Metric]:
        """The same, before it is text."""
        if not self._opened:
            return []
        pipeline, sources = self.pipeline, self.sender.sources
        return [
            metrics.byte_counters(self.sender.counters),
            metrics.gauge("items_open", "Items of receivers that may still ask for rows.", len(self.sender.items)),
            metrics.gauge("links", "Language peers with a link.", len(self._sessions)),
            metrics.gauge("encode_jobs_waiting", "Jobs whose rows are not complete.", pipeline.waiting),
            metrics.gauge("encode_patches_waiting", "Patches of those jobs.", self.load().patches),
            metrics.gauge("source_bytes", "Rows kept, in use or cached.", sources.used_bytes),
            metrics.gauge("file_bytes", "Files of items that are not encoded yet.", sources.file_bytes),
            metrics.gauge("leased_bytes", "Bytes of ended writes not yet fenced.", self._planes.leased_bytes),
            metrics.counter("sources_started", "Items whose encoding was begun.", sources.started),
            metrics.counter("source_hits", "Items whose rows were there or in the making.", sources.hits),
            metrics.counter("items_encoded", "Items that left the tower.", pipeline.items_encoded),
            metrics.counter("prepare_seconds", "Time that preparing took, over all threads.", pipeline.prepare_s),
            metrics.counter("tower_seconds", "Time that the tower worked.", pipeline.tower_s),
            metrics.counter("tower_batches", "Batches of the tower.", pipeline.batch_sizes.total()),
        ]

    # -- links ---------------------------------------------------------------------------------------------------

    async def _serve_link(self, link: Link) -> None:
        """A peer has one session. It may dial anew since it gave the older link up, and then says so by its first
        word; or because it knows two addresses of this process, and then closes the new link without one. Which of the
        two a further link is cannot be told, so the first of them is kept while it is heard: it may be in use."""
        if (other := self._waiting.get(link.remote.incarnation)) is not None:
            if not (other.link.closed or other.link.quiet):
                link.abort()
                return
            other.link.abort()
        session = Session(link, self._planes, self._answer, checksum=self.config.checksum, handoff=self._handoff)
        self._waiting[session.peer] = session
        try:
            before = self._sessions.get(session.peer)
            if before is None or before.link.closed:
                self._begin_session(session)
            await link.deliver(lambda message: self._heard(session, message))
        except LinkClosed as error:
            logger.info("%s: %s", self.name, error)
        except RemoteProtocolError as error:
            logger.warning("%s: closing the link: %s", self.name, error)
        finally:
            self._end_session(session)
            await session.aclose()

    def _heard(self, session: Session, message: Message) -> None:
        if self._waiting.get(session.peer) is session:
            self._begin_session(session)
        if self._sessions.get(session.peer) is session:  # else it was given up
            self._feed(MessageReceived(session.peer, message))

    def _begin_session(self, session: Session) -> None:
        peer = session.peer
        del self._waiting[peer]
        before, self._sessions[peer] = self._sessions.get(peer), session
        if before is not None:
            before.link.abort()  # not closed: a goodbye into a dead network takes a second
            self._feed(LinkLost(peer))
        self._labels.linked(peer, session.link.remote.name)
        logger.info("%s: %s linked", self.name, session.link.remote.name)
        self._feed(LinkUp(peer))

    def _end_session(self, session: Session) -> None:
        if self._waiting.get(session.peer) is session:
            del self._waiting[session.peer]
        elif self._sessions.get(session.peer) is session:
            del self._sessions[session.peer]
            self._labels.lost(session.peer, gone=False)
            self._feed(LinkLost(session.peer))
            waiting = self._waiting.get(session.peer)
            if waiting is not None and not waiting.link.closed:
                self._begin_session(waiting)

    # -- actions -------------------------------------------------------------------------------------------------

    def _feed(self, event: SenderEvent) -> None:
        self.driver.feed(event)

    def _answer(self, event: WriterEvent) -> None:
        """A session reports; a write that failed keeps its session in mind until the fence."""
        if not isinstance(event, WriteFailed):
            self._writers.pop((event.peer, event.key), None)
        self._feed(event)

    def _act(self, action: SenderAction) -> None:
        match action:
            case Send(peer, message):
                session = self._sessions.get(peer)
                if session is not None and not session.link.closed:
                    try:
                        session.link.send_nowait(message)
                    except LinkError as error:
                        logger.debug("%s: not sent: %s", self.name, error)
            case StartEncode():
                self.pipeline.start(action)
            case ChangeEncode():
                self.pipeline.change(action)
            case CancelEncode(digest):
                self.pipeline.cancel(digest)
            case DropSource(digest):
                self.pipeline.drop(digest)
            case Write():
                self._write(action)
            case Fence(peer, key):
                self._fence(peer, key)
            case Drained():
                self._drained.set()

    def _write(self, action: Write) -> None:
        session = self._sessions.get(action.peer)
        if session is None:
            self._feed(WriteFailed(action.peer, action.key, action.epoch, "the link is down"))
            return
        self._writers[action.peer, action.key] = session
        session.write(action, self.pipeline.rows(action.digest, action.start, action.stop))

    def _fence(self, peer: str, key: ItemKey) -> None:
        session = self._writers.get((peer, key))
        if session is None:
            self._feed(WritesFenced(peer, key))
        else:
            session.fence(key)
