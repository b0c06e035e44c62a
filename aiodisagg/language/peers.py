"""Links to encode peers: dialled as membership says, redialled as long as it does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl as tls
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from aiodisagg.errors import AiodisaggError, LinkClosed, LinkError, MessageTooLarge, NoEncodePeer, RemoteProtocolError
from aiodisagg.link.config import LinkConfig
from aiodisagg.link.hello import Hello
from aiodisagg.link.link import Link, dial
from aiodisagg.peer.driver import Tasks
from aiodisagg.protocol.events import LinkLost, LinkUp, MessageReceived
from aiodisagg.protocol.messages import Cancel, ItemKey, Message, Refuse, Want
from aiodisagg.protocol.rows import ModelFingerprint
from aiodisagg.scheduler.book import PeerBook
from aiodisagg.scheduler.cost import PeerCosts, Rates

logger = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 0.05, 1.0
SETTLE_S = 0.15
"""When nobody was linked and the first peer is, the others are waited for so long, and dialled at once."""
LOOK_AGAIN_S = 30.0
"""An address of a peer that is linked by another one is dialled this seldom: perhaps it leads elsewhere by now."""

SAME_HOST = Rates(transfer_s=1e-4, transfer_byte_s=2e-10)
"""Before anything is known of a peer: shared memory is faster than most networks."""

LinkEvent = LinkUp | LinkLost | MessageReceived


def _now() -> float:
    return asyncio.get_running_loop().time()


@dataclass(slots=True)
class EncodePeer:
    """One address at which an encode peer is kept linked; ``incarnation`` is who answered there last.

    A process may be known by two spellings of its address: it is linked by one, and the other waits.
    """

    address: str
    incarnation: str = ""
    name: str = ""
    link: Link | None = None
    book: PeerBook[ItemKey] = field(default_factory=lambda: PeerBook(PeerCosts()))
    """Of this incarnation: what it was asked for, and what that costs. One book, whatever its addresses."""
    digests: frozenset[str] = frozenset()
    """Prefixes of what its last heartbeat says it holds."""
    parted: bool = False
    """Its last link ended with a goodbye."""
    wanted: bool = True
    refused: str = ""
    """Why nobody there is of use, as it was said last."""
    useless: bool = False
    """Somebody answers there, and ``refused`` says why it is of no use."""
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    dialling: asyncio.Timeout | None = None
    """Ends an attempt to reach it, and another begins at once."""
    outbox: dict[ItemKey, deque[Message]] = field(default_factory=dict)
    """Media that wait for the link, by item, and what was said of the same item after them. The first item's first word
    is under way. Bounded by the items under way: only refers."""
    filled: asyncio.Event = field(default_factory=asyncio.Event)


class EncodePeers:
    """Keeps a link to every known encode peer. Methods belong to the loop's thread.

    Args:
        hello: what to say of this side, made anew for each attempt.
        tell: gets LinkUp, LinkLost and MessageReceived; may raise RemoteProtocolError, which closes that link.
        model: only peers of this model are linked.
    """

    def __init__(
        self, hello: Callable[[], Hello], tell: Callable[[LinkEvent], None], *, model: ModelFingerprint,
        secret: bytes | None, config: LinkConfig, ssl: tls.SSLContext | None = None,
    ) -> None:  # fmt: skip
        self._hello, self._tell, self._model, self._secret, self._config = hello, tell, model, secret, config
        self._ssl = ssl
        self._by_address: dict[str, EncodePeer] = {}
        self._linked: dict[str, EncodePeer] = {}
        self._tasks = Tasks("links")
        self._changed, self._closed = asyncio.Condition(), False
        self._ended_bytes = [0, 0]
        self._hoped = _now()
        """When there was a peer last, or somebody named one."""
        self._settled = 0.0
        self.judged: Callable[[str], dict[str, object]] = lambda incarnation: {}
        """How a peer stands, for ``described``: set by who judges them."""

    def add(self, address: str, *, news: bool = True) -> None:
        """Keeps a link to whoever encodes at ``address``. Idempotent; wakes a dialler that is backing off. ``news``: it
        is not only said again, so there is hope."""
        known = self._by_address.get(address)
        if news:
            self._hoped = _now()
        if known is None:
            peer = self._by_address[address] = EncodePeer(address)
            self._tasks.start(self._keep(peer), f"keep {address}")
        else:
            known.wanted = True
            if known.incarnation not in self._linked:
                known.moved.set()

    def remove(self, address: str) -> None:
        """The peer there is gone, says whoever should know. A link that lives proves otherwise and is kept."""
        peer = self._by_address.get(address)
        if peer is not None:
            peer.wanted = False
            peer.moved.set()

    @property
    def absent_s(self) -> float:
        """For how long there has been no peer, nor a new address of one."""
        return 0.0 if self._linked else self.hoped_s

    @property
    def hoped_s(self) -> float:
        """How long ago a link ended or somebody named a new address, whichever was last."""
        return _now() - self._hoped

    @property
    def settling_s(self) -> float:
        """For how long what waits should wait for more peers than the first that are linked; 0.0 once all are."""
        left_s = self._settled - _now()
        if left_s <= 0 or all(peer.incarnation in self._linked for peer in self._by_address.values()):
            return 0.0
        return left_s

    @property
    def linked(self) -> list[EncodePeer]:
        return list(self._linked.values())

    @property
    def useless(self) -> str:
        """Why those who answer and are not linked are of no use."""
        return "; ".join(dict.fromkeys(peer.refused for peer in self._by_address.values() if peer.useless))

    @property
    def why_none(self) -> str:
        """What to say when none is linked."""
        return "no encode peer is linked" + (f": {self.useless}" if self.useless else "")

    def get(self, incarnation: str) -> EncodePeer | None:
        """The peer, if it is linked."""
        return self._linked.get(incarnation)

    def by_incarnation(self, incarnation: str) -> EncodePeer | None:
        """The peer, linked or not, as long as nobody else answered at its address."""
        linked = self._linked.get(incarnation)
        return linked or next((p for p in self._by_address.values() if p.incarnation == incarnation), None)

    def described(self) -> list[dict[str, object]]:
        """The linked peers, and those that are of no use, for people."""
        linked: list[dict[str, object]] = [
            {"name": peer.name, "address": peer.address, "items": len(peer.book.open), "bytes": peer.book.size_bytes}
            | self.judged(peer.incarnation)
            for peer in self._linked.values()
        ]
        useless = [peer for peer in self._by_address.values() if peer.useless]
        linked += [{"name": p.name, "address": p.address, "standing": "unusable", "why": p.refused} for p in useless]
        return linked

    @property
    def link_bytes(self) -> tuple[int, int]:
        """(sent, received) through all links so far, framing included."""
        links = [peer.link for peer in self._linked.values() if peer.link is not None]
        sent, received = self._ended_bytes
        return sent + sum(link.bytes_sent for link in links), received + sum(link.bytes_received for link in links)

    async def wait_any(self, timeout_s: float) -> None:
        """Returns when at least one encode peer is linked. Raises NoEncodePeer when there has been none for
        ``timeout_s``, or at the end."""
        while not (self._linked or self._closed):
            left_s = timeout_s - self.absent_s  # more again when somebody names one meanwhile
            if left_s <= 0:
                known = ", ".join(self._by_address) or "none known"
                why = "".join(f"; {peer.refused}" for peer in self._by_address.values() if peer.refused)
                said = f"no encode peer could be linked within {timeout_s:g} s (addresses: {known}){why}"
                raise NoEncodePeer(said, self.useless)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s), self._changed:
                    await self._changed.wait_for(lambda: self._linked or self._closed)
        if self._closed:
            raise NoEncodePeer("the links to encode peers are closed")

    def send(self, incarnation: str, message: Message) -> bool:
        """Sends if the link is up; what does not get out is asked for again by the protocol.

        Media wait until the link has room, since all items of a lost link ask again at once. Other words pass them,
        unless they are of the same item: a grant that waits for others' files looks like a peer that is silent.

        Returns whether media of the item that waited will not be sent, since nobody wants them any more.
        """
        peer = self._linked.get(incarnation)
        if peer is None or peer.link is None:
            return False
        unsent = isinstance(message, Cancel) and self._unsend(peer, message.key)
        if message.key in peer.outbox or (isinstance(message, Want) and message.media is not None):
            peer.outbox.setdefault(message.key, deque()).append(message)
            peer.filled.set()
            return unsent
        try:
            peer.link.send_nowait(message)
        except LinkError as error:
            logger.debug("not sent to %s: %s", peer.name, error)
        return unsent

    @staticmethod
    def _unsend(peer: EncodePeer, key: ItemKey) -> bool:
        """Takes the item's questions out of the outbox; whether its media were among them, and not under way."""
        words = peer.outbox.get(key)
        if words is None:
            return False
        if key != next(iter(peer.outbox)):  # all of it was said before the peer could answer: there is nothing else
            del peer.outbox[key]
            return True
        first, *later = words
        words.clear()
        words.extend((first, *(word for word in later if not isinstance(word, Want))))
        return False

    async def _drain(self, peer: EncodePeer, link: Link) -> None:
        """Sends what is in the outbox for as long as the link lives."""
        while True:
            await peer.filled.wait()
            peer.filled.clear()
            while peer.outbox:
                key, words = next(iter(peer.outbox.items()))
                message, refused = words[0], None
                try:
                    await link.send(message)
                except LinkClosed:
                    return
                except MessageTooLarge as error:
                    refused = error
                words.popleft()
                if not words:
                    del peer.outbox[key]
                if refused is not None:
                    self._refuse(link, message, refused)

    def _refuse(self, link: Link, message: Message, error: MessageTooLarge) -> None:
        """What cannot be said to a peer is refused in its place; if the limit is its own, another peer may take it."""
        logger.error("item %s: %s", message.key, error)
        retryable = error.size_bytes <= self._config.max_frame_bytes
        said = f"its {error.size_bytes} bytes do not fit a frame of {error.limit_bytes}"
        refusal = Refuse(message.key, message.epoch, "too_large", said, retryable)
        self._tell(MessageReceived(link.remote.incarnation, refusal))

    async def _keep(self, peer: EncodePeer) -> None:
        retry_s, loop = FIRST_RETRY_S, asyncio.get_running_loop()
        try:
            while peer.wanted:
                if peer.incarnation in self._linked and not await self._pause(peer, LOOK_AGAIN_S):
                    await self._pause(peer, FIRST_RETRY_S)  # where that link was is dialled first
                    continue
                try:
                    link = await self._dial(peer)
                except AiodisaggError as error:
                    self._not_reached(peer, error)
                else:
                    began = loop.time()
                    await self._use(peer, link)
                    if loop.time() - began > FIRST_RETRY_S:  # it was of use: first see whether somebody is still there
                        retry_s = FIRST_RETRY_S
                        continue
                if peer.wanted:  # not all at once: a peer that starts anew is dialled by everybody
                    await self._pause(peer, retry_s * random.uniform(0.5, 1.0))
                retry_s = min(2 * retry_s, LAST_RETRY_S)
        finally:
            del self._by_address[peer.address]
            self._gone(peer)

    async def _dial(self, peer: EncodePeer) -> Link:
        """Begins anew, once, when the network is back: TCP says again what was dropped only after whole seconds."""

        async def begin() -> Link:
            return await dial(peer.address, self._hello(), secret=self._secret, config=self._config, ssl=self._ssl)

        try:
            async with asyncio.timeout(None) as peer.dialling:
                return await begin()
        except TimeoutError:  # of ``_settle``: who dials raises none
            return await begin()
        finally:
            peer.dialling = None

    async def _pause(self, peer: EncodePeer, seconds: float) -> bool:
        """Whether the time went by; it returns early when there is news of the peer."""
        try:
            async with asyncio.timeout(seconds):
                await peer.moved.wait()
        except TimeoutError:
            return True
        peer.moved.clear()
        return False

    def _not_reached(self, peer: EncodePeer, error: AiodisaggError) -> None:
        said = f"encode peer at {peer.address}: {error}"
        logger.log(logging.DEBUG if said == peer.refused else logging.WARNING, "%s; trying again", said)
        peer.refused, peer.useless = said, False
        if isinstance(error.__cause__, ConnectionRefusedError | FileNotFoundError):
            self._gone(peer)

    def _gone(self, peer: EncodePeer) -> None:
        """Nobody listens where this incarnation did: it will not come back, unless it answered by another address."""
        incarnation, peer.incarnation = peer.incarnation, ""
        if incarnation and self.by_incarnation(incarnation) is None:
            self._tell(LinkLost(incarnation, gone=True))

    async def _use(self, peer: EncodePeer, link: Link) -> None:
        remote = link.remote
        if remote.incarnation != peer.incarnation:
            self._gone(peer)
        if said := remote.unfit_for(link.local, self._model):
            if said != peer.refused:  # once for each life of a process, not at every attempt
                level = logging.ERROR if remote.model != self._model else logging.WARNING
                logger.log(level, "encode peer at %s is not usable: %s", peer.address, said)
            peer.refused, peer.useless, peer.name = said, True, remote.name
            await link.aclose()
            await self._pause(peer, LAST_RETRY_S)
            return
        peer.refused, peer.useless = "", False
        if remote.incarnation != peer.incarnation:
            known = self.by_incarnation(remote.incarnation)
            peer.book = PeerBook(self._costs(remote)) if known is None else known.book
            peer.incarnation, peer.name, peer.digests = remote.incarnation, remote.name, frozenset()
        if remote.incarnation in self._linked:
            logger.info("%s is linked already, by another address than %s", remote.name, peer.address)
            await link.aclose()  # without a word through it: the encode peer goes on with the other one
            return
        if not self._linked:
            self._settle(peer)
        peer.link = link
        self._linked[remote.incarnation] = peer
        logger.info("linked to encode peer %s at %s", peer.name, peer.address)
        sending = self._tasks.start(self._drain(peer, link), f"send to {peer.name}")
        try:
            self._tell(LinkUp(remote.incarnation))
            async with self._changed:
                self._changed.notify_all()
            await link.deliver(lambda message: self._tell(MessageReceived(remote.incarnation, message)))
        except LinkClosed as error:
            logger.warning("%s", error)
        except RemoteProtocolError as error:
            logger.error("closing the link: %s", error)
        except Exception:  # a bug; the other peers, and this one's next link, must not suffer from it
            logger.exception("closing the link to %s", peer.name)
        finally:
            del self._linked[remote.incarnation]
            self._hoped = _now()
            sending.cancel()
            peer.link, peer.parted = None, link.parted
            for other in self._by_address.values():
                if other is not peer and other.incarnation == remote.incarnation:
                    other.parted = link.parted
                    other.moved.set()
            peer.outbox.clear()
            self._ended_bytes[0] += link.bytes_sent
            self._ended_bytes[1] += link.bytes_received
            try:
                self._tell(LinkLost(remote.incarnation))
            except Exception:  # as above: an address that is not dialled any more is a peer lost for ever
                logger.exception("the loss of the link to %s", peer.name)
            await link.aclose()

    def _settle(self, first: EncodePeer) -> None:
        """What cut all of them off is over, perhaps: dials the others at once, however long they were to be left."""
        self._settled = _now() + SETTLE_S
        for peer in self._by_address.values():
            if peer.incarnation != first.incarnation:
                peer.moved.set()
                if peer.incarnation and peer.dialling is not None:  # else it was never linked, and nothing was lost
                    peer.dialling.reschedule(0.0)
                    peer.dialling = None

    def _costs(self, remote: Hello) -> PeerCosts:
        """What to expect of a peer before it did anything."""
        near = self._hello().same_host(remote)
        costs = PeerCosts(SAME_HOST if near else Rates())
        if remote.times is not None:
            costs.believe(remote.times)
        return costs

    async def aclose(self) -> None:
        """Ends every link, and every wait for one."""
        self._closed = True
        async with self._changed:
            self._changed.notify_all()
        await self._tasks.aclose()
