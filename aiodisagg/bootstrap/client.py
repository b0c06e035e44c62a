"""A peer's side of the bootstrap: stays registered, and follows who else is there, through any restart of a server."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import aiohttp
import msgspec

from aiodisagg.bootstrap.registry import Load, PeerEntry, PeerRecord, PeerState, host_name
from aiodisagg.bootstrap.wire import Failure, Heartbeat, Lease, Watched, check_url, read_watched
from aiodisagg.errors import BootstrapError
from aiodisagg.link.hello import PeerRole, host_identity

logger = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 0.05, 2.0
REQUEST_TIMEOUT_S = 5.0
QUIET_S = 30.0
"""A membership stream without a line for this long is dead; servers send one every third of a lease."""
MAX_LINE_BYTES = 64 * 1024 * 1024
"""As many peers as a server takes, 10,000, are 42 MB with all that they advertise."""
MAX_FAILURE_BYTES = 64 * 1024
KEEP_THE_METHOD = (307, 308)
"""Redirections that are followed: after others a heartbeat is a GET, and nobody hears it."""
MAX_REASONS = 64
"""Why entries cannot be read is warned of once a reason, and of so many reasons."""

NOTHING_NEW = Watched("", 0, snapshot=False, settled=False)
"""In place of a line, where a stream has ended."""

STATES = (PeerState.SUSPECT, PeerState.JOINING, PeerState.READY, PeerState.DRAINING)
"""Where servers disagree the later of these is believed: it is a later state of that life, and a server that suspects a
peer only does not hear from it."""


@dataclass(frozen=True, slots=True)
class MembershipChange:
    """What to know now: peers that are there, and peers that a reachable server says are gone.

    ``entries``: everybody of whom there is news, with state and load; also who joins or drains. A peer is as good as
    the best that a reachable server says of it.
    """

    present: tuple[PeerRecord, ...]
    gone: tuple[PeerRecord, ...]
    entries: tuple[PeerEntry, ...] = ()


class BootstrapClient:
    """Keeps one record registered at every given server while it is entered; leaving it deregisters.

    Nothing here fails because a server is away: registration is retried for ever, membership stays as last known.

    Args:
        urls: of servers that run side by side; none need be up.
        record: of this peer.
        load: asked at every heartbeat.
        token: bearer token of the servers.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        record: PeerRecord,
        *,
        load: Callable[[], Load] = Load,
        token: str | None = None,
    ) -> None:
        self.urls = tuple(url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls))
        for url in self.urls:
            check_url("bootstrap", url)
        self.record = record if record.host else msgspec.structs.replace(record, host=host_name(*host_identity()))
        self._load, self._token = load, token
        self.registered = asyncio.Event()
        """Set once any server has this peer."""
        self._tasks: list[asyncio.Task[None]] = []
        self._there: dict[str, dict[str, PeerEntry]] = {url: {} for url in self.urls}
        self._told: dict[str, PeerEntry] = {}
        """What ``watch`` said last of everybody."""
        self._reached: set[str] = set()
        """Servers whose membership stream is open."""
        self._denied: set[str] = set()
        """Gone, as a reachable server said when another one that could still be reached had them."""
        self._away: dict[str, str] = {}
        """Why this peer is not registered, by server, as it was warned of."""
        self._unread: set[str] = set()
        """Why entries could not be read, as it was warned of."""
        self._news = {url: asyncio.Event() for url in self.urls}
        """Set when a server should hear of a new state before the next heartbeat is due."""

    async def __aenter__(self) -> BootstrapClient:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        self._session = aiohttp.ClientSession(headers=headers, timeout=timeout)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._stay(url), name=f"bootstrap {url}") for url in self.urls]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await asyncio.gather(*(self._leave(url) for url in self.urls))
        finally:
            await self._session.close()

    # -- registration --------------------------------------------------------------------------------------------

    def announce(self, state: PeerState) -> None:
        """Tells every server of a new state, now or as soon as it can be reached."""
        self.record = msgspec.structs.replace(self.record, state=state)
        for news in self._news.values():
            news.set()

    async def _pause(self, url: str, seconds: float) -> None:
        """Returns early when there is news."""
        try:
            async with asyncio.timeout(seconds):
                await self._news[url].wait()
        except TimeoutError:
            pass

    async def _stay(self, url: str) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            try:
                lease = await self._call("PUT", url, "", msgspec.json.encode(self.record))
                logger.info("registered at %s%s", url, ": it works again" if self._away.pop(url, "") else "")
                self.registered.set()
                retry_s = FIRST_RETRY_S
                while True:
                    await self._pause(url, lease.lease_s / 3)
                    self._news[url].clear()
                    beat = Heartbeat(self._load(), self.record.state)
                    lease = await self._call("POST", url, "/heartbeat", msgspec.json.encode(beat))
            except BootstrapError as error:
                known = self._away.get(url) == error.message or (retry_s < LAST_RETRY_S and not error.lasting)
                if not known:  # once, until it changes: it may be so for days
                    self._away[url] = error.message
                logger.log(logging.DEBUG if known else logging.WARNING, "%s; trying again", error)
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _call(self, method: str, url: str, tail: str, body: bytes) -> Lease:
        target = f"{url}/v1/peers/{self.record.incarnation}{tail}"
        try:
            async with self._session.request(method, target, data=body) as response:
                said = await response.read()
                if response.status != 200 or _turned(response):
                    raise self._refused(url, response, said)
                return msgspec.json.decode(said, type=Lease)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:  # of a certificate, they are ValueErrors, too
            raise BootstrapError(url, _reason(error)) from error
        except (ValueError, RecursionError) as error:
            raise BootstrapError(url, f"it is no bootstrap server: {error}") from error

    def _refused(self, url: str, response: aiohttp.ClientResponse, said: bytes) -> BootstrapError:
        status = response.status
        if _turned(response) or (response.history and status == 401):  # the token is not told to another host
            there = response.url.origin()
            return BootstrapError(url, f"it sends us to {there}, which --bootstrap has to name itself", lasting=True)
        if status == 401:
            ours = "refuses our token" if self._token else "wants a token, and we have none"
            said_of_it = "AIODISAGG_BOOTSTRAP_TOKEN or --bootstrap-token has to be what it was started with"
            return BootstrapError(url, f"it {ours}: {said_of_it}", lasting=True)
        try:
            why = msgspec.json.decode(said, type=Failure).error
        except (ValueError, RecursionError):
            if status >= 500:  # of a proxy, perhaps
                return BootstrapError(url, f"it answers {status}")
            return BootstrapError(url, f"it is no bootstrap server: it answers {status}", lasting=True)
        return BootstrapError(url, f"{status}: {why[:500]}")

    async def _leave(self, url: str) -> None:
        try:
            async with asyncio.timeout(1.0):
                async with self._session.delete(f"{url}/v1/peers/{self.record.incarnation}"):
                    pass
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:  # the last: as in ``_call``
            logger.debug("could not leave %s: %s", url, error)

    # -- membership ----------------------------------------------------------------------------------------------

    async def watch(self, role: PeerRole | None = None) -> AsyncIterator[MembershipChange]:
        """Changes of membership over all servers, for ever. A peer is gone when the last server that had it says so.

        A server that just started knows nobody yet; what it does not list counts as gone only after two leases. What
        a server said that cannot be reached any more stands until a reachable one that had the peer says otherwise.

        One consumer at a time, which is first told everybody. What it has not taken yet is one state per peer.

        Args:
            role: who else there is need not be told; older servers do.
        """
        self._there, self._told = {url: {} for url in self.urls}, {}
        self._denied.clear()
        changed = asyncio.Event()
        news: dict[str, Watched] = {}
        query = "" if role is None else f"?role={role}"
        followers = [
            asyncio.create_task(self._follow(url, query, news, changed), name=f"watch {url}") for url in self.urls
        ]
        try:
            while True:
                await changed.wait()
                changed.clear()
                pending = dict(news)
                news.clear()
                for url, told in pending.items():
                    change = self._apply(url, told)
                    if change.entries or change.gone:
                        yield change
        finally:
            for follower in followers:
                follower.cancel()
            await asyncio.gather(*followers, return_exceptions=True)

    def _apply(self, url: str, told: Watched) -> MembershipChange:
        there = self._there[url]
        before = dict(there)
        if told.snapshot and told.settled:
            there.clear()
        for entry in told.entries:
            if entry.state is PeerState.GONE:
                there.pop(entry.record.incarnation, None)
            else:
                there[entry.record.incarnation] = entry
        if url in self._reached:
            self._denied.difference_update(there)
            left = [entry.record for who, entry in before.items() if who not in there]
            self._denied.update(record.incarnation for record in left)
        else:  # its stream has ended, perhaps long after its host: what others said meanwhile counts now
            left = [entry.record for who, entry in before.items() if who not in there or who in self._denied]
        gone = tuple(record for record in left if not self._listed(record.incarnation))
        for record in gone:
            self._denied.discard(record.incarnation)
            for entries in (*self._there.values(), self._told):
                entries.pop(record.incarnation, None)
        usable = (PeerState.READY, PeerState.SUSPECT)
        # Whether its stream has begun or ended makes a difference to everybody whom the server knows.
        spoken_of = told.entries if url in self._reached and not told.snapshot else tuple(there.values())
        touched = dict.fromkeys(record.incarnation for record in (*left, *(entry.record for entry in spoken_of)))
        best = [self._believed(who, url) for who in touched]
        news = tuple(entry for entry in best if entry and self._told.get(entry.record.incarnation) != entry)
        self._told.update((entry.record.incarnation, entry) for entry in news)
        present = tuple(entry.record for entry in news if entry.state in usable)
        return MembershipChange(present, gone, news)

    def _believed(self, who: str, url: str) -> PeerEntry | None:
        """The best of what reachable servers say of a peer, of equals what ``url`` says, which spoke last."""
        having = [at for at in (url, *self.urls) if who in self._there[at]]
        reached = [at for at in having if at in self._reached]
        said = [self._there[at][who] for at in reached or having]
        return max(said, key=lambda entry: STATES.index(entry.state), default=None)

    def _listed(self, incarnation: str) -> bool:
        """Whether a server that can be reached has the peer."""
        return any(incarnation in self._there[url] for url in self._reached)

    async def _follow(self, url: str, query: str, news: dict[str, Watched], changed: asyncio.Event) -> None:
        retry_s, warned = FIRST_RETRY_S, False
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=REQUEST_TIMEOUT_S, sock_read=QUIET_S)
        while True:
            try:
                target = f"{url}/v1/watch{query}"
                async with self._session.get(target, timeout=timeout, read_bufsize=MAX_LINE_BYTES) as stream:
                    if stream.status != 200:
                        raise self._refused(url, stream, await stream.content.read(MAX_FAILURE_BYTES))
                    self._reached.add(url)
                    async for line in stream.content:
                        told = self._read(url, line)
                        retry_s, warned = FIRST_RETRY_S, False
                        if told.entries or told.snapshot:
                            news[url] = _merge(news.get(url), told)
                            changed.set()
                    raise BootstrapError(url, "the membership stream ended")
            except (
                aiohttp.ClientError,
                TimeoutError,
                OSError,
                BootstrapError,
                ValueError,
                RecursionError,
            ) as error:
                # Once for each time that a server is away: what was known of its peers stands, and grows old.
                why = error.message if isinstance(error, BootstrapError) else _reason(error)
                known = warned or retry_s < LAST_RETRY_S or self._away.get(url) == why
                level = logging.DEBUG if known else logging.WARNING
                warned |= level == logging.WARNING
                logger.log(level, "membership of %s is not heard: %s; trying again", url, why)
            finally:
                if url in self._reached:
                    self._reached.discard(url)
                    news.setdefault(url, NOTHING_NEW)
                    changed.set()
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    def _read(self, url: str, line: bytes) -> Watched:
        told, wrong = read_watched(line)
        for why in dict.fromkeys(wrong):
            if why not in self._unread and len(self._unread) < MAX_REASONS:
                self._unread.add(why)
                logger.warning("membership of %s: a peer is left out, since its entry cannot be read: %s", url, why)
        return told


def _turned(response: aiohttp.ClientResponse) -> bool:
    return any(one.status not in KEEP_THE_METHOD for one in response.history)


def _reason(error: Exception) -> str:
    """Why a server was not reached, without what aiohttp says of its own."""
    if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, aiohttp.ClientSSLError):
        cause = error.os_error
        known = os.strerror(cause.errno) if cause.errno is not None and cause.errno in errno.errorcode else ""
        return f"cannot connect: {known or cause.strerror or cause}"
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer within {REQUEST_TIMEOUT_S:g} s"
    return str(error) or type(error).__name__


def _merge(first: Watched | None, second: Watched) -> Watched:
    """Two lines that nobody read yet, as one."""
    if first is None or second.snapshot:
        return second
    latest = {entry.record.incarnation: entry for entry in (*first.entries, *second.entries)}
    return Watched(second.server, second.revision, first.snapshot, second.settled, tuple(latest.values()))
