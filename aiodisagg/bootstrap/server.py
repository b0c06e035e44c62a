"""The bootstrap server: the registry behind HTTP. It is on nobody's request path and holds soft state only.

PUT    /v1/peers/{incarnation}            register (PeerRecord)            -> Lease
POST   /v1/peers/{incarnation}/heartbeat  renew (Heartbeat)                -> Lease, 404: register again
DELETE /v1/peers/{incarnation}            leave
GET    /v1/peers?role=encode              everyone                         -> [PeerEntry]
GET    /v1/match/{incarnation}            who can encode for this peer     -> [PeerEntry], least busy first
GET    /v1/watch?role=encode              membership, one Watched a line: a snapshot, then changes
GET    /health, /metrics
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, TypeVar

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from aiodisagg.bootstrap.registry import PeerRecord, Registry
from aiodisagg.bootstrap.sending import SLOWEST_S, send, taken
from aiodisagg.bootstrap.wire import Failure, Heartbeat, Lease, Watched, check_token
from aiodisagg.errors import ConfigError, LinkError
from aiodisagg.link.address import TcpAddress, cannot_listen, check_port, is_loopback, reachable_host, resolve
from aiodisagg.link.hello import PeerRole

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 * 1024
MAX_PEERS = 10_000
TOGETHER_S = 0.5
"""For so long changes of loads are collected. Who comes, goes, drains or is suspect is told at once."""
STUCK_S = 10.0
"""Who takes nothing of an answer for this long is dropped; a watcher comes back for a snapshot."""

KEEPALIVE_S = 75.0
"""Of every HTTP server here: a connection on which nobody asks anything. A proxy in front should keep it less long."""

WATCH_HEADERS = {"Content-Type": "application/x-ndjson", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""The last is for nginx, which else keeps lines until it has many, and clients hear nothing for too long."""

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapConfig:
    """``lease_s``: a peer unheard of for this long is suspect. ``token``: bearer token that every call must carry."""

    lease_s: float = 5.0
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0.05 <= self.lease_s <= 3600:
            raise ConfigError("lease_s", f"must be between 0.05 and 3600, not {self.lease_s}")
        check_token("token", self.token)


class _Known(NamedTuple):
    """How far a watcher is, and what it asked for. ``revision`` -1: it knows nothing."""

    revision: int
    role: PeerRole | None
    settled: bool


class BootstrapServer:
    """Serves while it is entered. ``port`` 0 takes a free one; see ``url``.

    ``async with`` raises ConfigError if the address cannot be had, or is open to other hosts without a token.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 8500, config: BootstrapConfig | None = None) -> None:
        check_port(port)
        self._host, self._port, self._config = host, port, config or BootstrapConfig()
        self.registry = Registry(self._config.lease_s)
        self._life = secrets.token_hex(8)
        self._changed = asyncio.Event()
        """Set, and replaced, when there is something to tell."""
        self._timer: asyncio.TimerHandle | None = None
        self._telling: asyncio.TimerHandle | None = None
        self._watchers: set[asyncio.Task[object]] = set()
        self._disputed: set[str] = set()
        """Addresses that several living peers say are theirs, as it was warned of."""
        self._told = 0
        self._lines: dict[_Known, tuple[bytes, bool]] = {}
        """Of this revision, for all watchers that are as far."""
        self._lines_at = 0

    async def __aenter__(self) -> BootstrapServer:
        literal = await self._literal_host()
        if self._config.token is None and not is_loopback(literal):
            said = "can be reached by other hosts; that needs a token (--token, AIODISAGG_BOOTSTRAP_TOKEN)"
            raise ConfigError("host", f"{self._host} {said}")
        self._reachable = reachable_host(literal)
        app = web.Application(middlewares=[self._serve], client_max_size=MAX_BODY_BYTES)
        app.router.add_put("/v1/peers/{incarnation}", self._register)
        app.router.add_post("/v1/peers/{incarnation}/heartbeat", self._heartbeat)
        app.router.add_delete("/v1/peers/{incarnation}", self._leave)
        app.router.add_get("/v1/peers", self._list)
        app.router.add_get("/v1/match/{incarnation}", self._match)
        app.router.add_get("/v1/watch", self._watch)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0, keepalive_timeout=KEEPALIVE_S
        )  # fmt: skip
        await self._runner.setup()
        site = web.TCPSite(self._runner, literal, self._port, reuse_address=True)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise cannot_listen(self._host, self._port, error) from error
        self._port = self._runner.addresses[0][1]
        self._born = self._now()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for timer in (self._timer, self._telling):
            if timer is not None:
                timer.cancel()
        for watcher in self._watchers:
            watcher.cancel()
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        """Base URL as peers use it: with the real port, never with a wildcard host. Valid once entered."""
        host = f"[{self._reachable}]" if ":" in self._reachable else self._reachable
        return f"http://{host}:{self._port}"

    async def _literal_host(self) -> str:
        try:
            return (await resolve(TcpAddress(self._host, self._port)))[0]
        except LinkError as error:
            raise ConfigError("host", f"{self._host!r} cannot be resolved") from error

    # -- handlers ------------------------------------------------------------------------------------------------

    @web.middleware
    async def _serve(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        return await send(request, await self._guard(request, handler), STUCK_S)

    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        token = self._config.token
        if token is not None and request.path != "/health":
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(errors="surrogateescape"), token.encode()):
                return _json(Failure("the bearer token is missing or wrong"), 401)
        try:
            return await handler(request)
        except web.HTTPException as error:  # no such path, no such method, body too large
            return _json(Failure(error.reason), error.status)
        except msgspec.ValidationError as error:
            return _json(Failure(f"the body is not valid: {error}"), 422)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _json(Failure(f"the body is not JSON: {error}"), 400)

    async def _register(self, request: web.Request) -> web.Response:
        record = await _body(request, PeerRecord)
        if record.incarnation != request.match_info["incarnation"]:
            return _json(Failure("the URL names another incarnation than the body"), 422)
        if record.role.encodes and not record.addresses:
            return _json(Failure("addresses: a peer that encodes needs one"), 422)
        if any("0.0.0.0" in address or "[::]" in address for address in record.addresses):
            return _json(Failure("addresses: a wildcard address cannot be dialled by others"), 422)
        if len(self.registry) >= MAX_PEERS and record.incarnation not in self.registry:
            return _json(Failure(f"{MAX_PEERS} peers are registered already"), 429)
        self._warn_of(record, self.registry.rivals(record))
        self.registry.register(record, self._now())
        self._publish()
        return _json(self._lease())

    def _warn_of(self, record: PeerRecord, rivals: list[PeerRecord]) -> None:
        if rivals and self._disputed.isdisjoint(record.addresses) and len(self._disputed) < MAX_PEERS:
            self._disputed.update(record.addresses)
            names, where = ", ".join(one.name for one in (record, *rivals)), ", ".join(record.addresses)
            text = "%s take the place of each other again and again: all say that they listen at %s (--listen)"
            logger.warning(text, names, where)

    async def _heartbeat(self, request: web.Request) -> web.Response:
        beat = await _body(request, Heartbeat)
        entry = self.registry.heartbeat(request.match_info["incarnation"], beat.load, beat.state, self._now())
        if entry is None:
            return _json(Failure("not registered here"), 404)
        self._publish()
        return _json(self._lease())

    async def _leave(self, request: web.Request) -> web.Response:
        known = self.registry.remove(request.match_info["incarnation"])
        self._publish()
        return web.Response(status=204) if known else _json(Failure("not registered here"), 404)

    async def _list(self, request: web.Request) -> web.Response:
        return _json(self.registry.peers(_role(request)))

    async def _match(self, request: web.Request) -> web.Response:
        found = self.registry.match(request.match_info["incarnation"])
        return _json(Failure("not registered here"), 404) if found is None else _json(found)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        known = _Known(-1, _role(request), False)
        response = web.StreamResponse(headers=WATCH_HEADERS)
        await taken(request, response.prepare(request), STUCK_S)
        task = asyncio.current_task()
        assert task is not None
        self._watchers.add(task)
        try:
            while True:
                if self._settled() and not known.settled:
                    known = known._replace(revision=-1, settled=True)
                (line, _), now = self._line(known), self.registry.revision
                await taken(request, response.write(line), STUCK_S + len(line) * SLOWEST_S)
                known = known._replace(revision=now)
                await self._next_change(known)
        except asyncio.CancelledError:
            return response
        finally:
            self._watchers.discard(task)

    def _settled(self) -> bool:
        return self._now() >= self._born + 2 * self._config.lease_s

    def _line(self, known: _Known) -> tuple[bytes, bool]:
        """What a watcher is told next, and whether that is news."""
        if self._lines_at != self.registry.revision:
            self._lines_at, self._lines = self.registry.revision, {}
        if known not in self._lines:
            changes = self.registry.changes_since(known.revision, known.role) if known.revision >= 0 else None
            entries = self.registry.peers(known.role) if changes is None else changes
            line = Watched(self._life, self.registry.revision, changes is None, known.settled, tuple(entries))
            self._lines[known] = msgspec.json.encode(line) + b"\n", bool(entries) or line.snapshot
        return self._lines[known]

    async def _next_change(self, known: _Known) -> None:
        """Returns at the next change, or after a third of a lease: a line a watcher can tell a live server by."""
        try:
            async with asyncio.timeout(self._config.lease_s / 3):
                while not (self._told > known.revision and self._line(known)[1]):
                    await self._changed.wait()
        except TimeoutError:
            return

    async def _health(self, request: web.Request) -> web.Response:
        return _json({"status": "ok", "peers": len(self.registry.peers()), "server": self._life})

    async def _metrics(self, request: web.Request) -> web.Response:
        registry = CollectorRegistry()
        peers = Gauge("aiodisagg_bootstrap_peers", "Registered peers.", ("role", "state"), registry=registry)
        for (role, state), count in Counter((e.record.role, e.state) for e in self.registry.peers()).items():
            peers.labels(role.value, state.value).set(count)
        Gauge("aiodisagg_bootstrap_watchers", "Open membership streams.", registry=registry).set(len(self._watchers))
        return web.Response(body=generate_latest(registry), headers={"Content-Type": "text/plain; version=0.0.4"})

    # -- time ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def _lease(self) -> Lease:
        return Lease(self._config.lease_s, self._life)

    def _publish(self) -> None:
        """Wakes watchers if there is news, now or soon, and sets the one timer to the next lease that may run out."""
        if self.registry.turned > self._told:
            self._tell()
        elif self.registry.revision > self._told and self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TOGETHER_S, self._tell)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.registry.next_expiry()
        if due is not None:
            self._timer = asyncio.get_running_loop().call_at(due, self._expire)

    def _expire(self) -> None:
        self.registry.expire(self._now())
        self._publish()

    def _tell(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        self._told = self.registry.revision
        self._changed.set()
        self._changed = asyncio.Event()


def _role(request: web.Request) -> PeerRole | None:
    role = request.query.get("role")
    if role is not None and role not in PeerRole.__members__.values():
        raise web.HTTPUnprocessableEntity(reason=f"role: there is no {role!a}")
    return PeerRole(role) if role is not None else None


async def _body(request: web.Request, kind: type[T]) -> T:
    return msgspec.json.decode(await request.read(), type=kind)


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")
