"""The HTTP server: routes, keys, request ids, errors as OpenAI writes them, counters, a graceful stop."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType

import msgspec
from aiohttp import web
from aiohttp.abc import AbstractResolver

from aiodisagg.api.backend import ChatBackend
from aiodisagg.api.callers import Caller, Callers, tenant_of
from aiodisagg.api.chat import ChatHandler, EventStream, model_not_found
from aiodisagg.api.config import HttpConfig
from aiodisagg.api.counters import HttpCounters
from aiodisagg.api.failures import Refused, failure_of
from aiodisagg.api.fetch import MediaFetcher
from aiodisagg.api.media_cache import MediaCache
from aiodisagg.api.schema import ModelBody, ModelList
from aiodisagg.bootstrap.sending import send
from aiodisagg.bootstrap.server import KEEPALIVE_S
from aiodisagg.errors import Draining
from aiodisagg.link.address import cannot_listen, check_port, is_loopback
from aiodisagg.peer.http import add_probes
from aiodisagg.peer.metrics import render
from aiodisagg.peer.turns import Workers

logger = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_CHAT = "/v1/chat/completions"
_CLIENT_GONE = 499  # nginx's word for it; in the log and the counters only
_ID = re.compile(r"[!-~]{1,128}")


@dataclass(slots=True)
class _Running:
    """A request that is being handled."""

    request_id: str
    task: asyncio.Task[object]
    caller: Caller | None = None
    """None before it is known, and for what anybody may see."""
    has_begun: bool = False
    """Whether a part of the response has left."""


class HttpServer:
    """Serves ``backend`` while it is entered; the backend belongs to the caller and must outlive it.

    Args:
        port: 0 takes a free one, see :attr:`url`.
        debug: what ``GET /debug/NAME`` shows as JSON, by name; behind the operator's key.
        resolver: for the hosts of media URLs; None: the operating system's.

    ``async with`` raises ConfigError if the address cannot be bound. Leaving it stops listening, refuses new requests
    with a 503, lets the running ones finish for up to ``config.grace_s`` and then cuts them.
    """

    def __init__(
        self,
        backend: ChatBackend,
        host: str = "127.0.0.1",
        port: int = 8000,
        config: HttpConfig | None = None,
        *,
        debug: Mapping[str, Callable[[], object]] | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        check_port(port)
        self._backend, self._host, self._port = backend, host, port
        self._config = config or HttpConfig()
        self._resolver = resolver
        self._debug = dict(debug or {})
        self._counters = HttpCounters()
        self._media = MediaCache(self._config.media_cache_bytes)
        self._running: dict[int, _Running] = {}  # by id(): aiohttp's requests have no hash
        self._callers = Callers(self._config)
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._stack = AsyncExitStack()

    def __repr__(self) -> str:
        state = "stopping" if self._stopping else f"{len(self._running)} requests"
        return f"<HttpServer {self._host}:{self._port} {state}>"

    @property
    def url(self) -> str:
        """``http://host:port``, to be used on this host; OpenAI clients append ``/v1``."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self._host, self._host)
        return f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"

    async def __aenter__(self) -> HttpServer:
        async with AsyncExitStack() as stack:
            workers = Workers(2, "aiodisagg-http")
            # Waits for at most two data URLs in the making: their requests are gone by now.
            stack.callback(workers.close)
            fetcher = MediaFetcher(self._config, workers, self._media, self._resolver)
            await stack.enter_async_context(fetcher)
            self._chat = ChatHandler(self._backend, self._config, fetcher, workers)
            runner = web.AppRunner(
                self._application(),
                handler_cancellation=True,
                auto_decompress=False,
                access_log=None,
                shutdown_timeout=1.0,  # requests have had their grace by then; this is for the last bytes
                keepalive_timeout=KEEPALIVE_S,
            )
            stack.push_async_callback(runner.cleanup)
            await runner.setup()
            site = web.TCPSite(runner, self._host, self._port)
            try:
                await site.start()
            except (OSError, UnicodeError) as error:
                raise cannot_listen(self._host, self._port, error) from error
            self._port = int(runner.addresses[0][1])
            stack.push_async_callback(self._drain, site)
            self._stack = stack.pop_all()
        logger.info("serving %s on %s", self._backend.model_names[0], self.url)
        if self._callers.anybody and not all(is_loopback(address[0]) for address in runner.addresses):
            logger.warning("%s:%d can be reached from other hosts, and needs no key", self._host, self._port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _drain(self, site: web.TCPSite) -> None:
        self._stopping = True
        await site.stop()
        try:
            async with asyncio.timeout(self._config.grace_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("cutting %d requests after %g s", len(self._running), self._config.grace_s)
        finally:  # also if the stop itself is cancelled: nobody waits then
            for running in self._running.values():
                running.task.cancel()
        await self._idle.wait()

    # -- routes ---------------------------------------------------------------------------------------------------

    def _application(self) -> web.Application:
        app = web.Application(middlewares=[self._serve])
        app.on_response_prepare.append(self._begin)
        app.router.add_post(_CHAT, self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._model)
        add_probes(app, self._ready, lambda: self._backend.broken)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/debug/{name}", self._show)
        return app

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        if self._stopping:
            raise Draining
        running = self._running[id(request)]
        assert running.caller is not None
        tenant = tenant_of(request, running.caller)
        with self._callers.chat(tenant):
            return await self._chat(request, running.request_id, tenant)

    async def _models(self, request: web.Request) -> web.Response:
        return _json(ModelList([self._described(name) for name in self._backend.model_names]))

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._backend.model_names:
            raise model_not_found(name, self._backend.model_names)
        return _json(self._described(name))

    def _described(self, name: str) -> ModelBody:
        return ModelBody(name, self._backend.created)

    def _ready(self) -> tuple[bool, str]:
        return (False, "stopping") if self._stopping else self._backend.ready()

    async def _show(self, request: web.Request) -> web.Response:
        show = self._debug.get(request.match_info["name"])
        if show is None:
            raise web.HTTPNotFound
        return _json(show())

    async def _metrics(self, request: web.Request) -> web.Response:
        text = self._backend.metrics()
        newline = "" if not text or text.endswith("\n") else "\n"
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        own = self._counters.text() + render(self._media.metrics())
        return web.Response(body=(text + newline + own).encode(), headers=headers)

    # -- around every request -------------------------------------------------------------------------------------

    @web.middleware
    async def _serve(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Names, authorizes, counts and logs a request, and turns what it raises into OpenAI's errors."""
        given = request.headers.get("X-Request-Id", "")
        request_id = given if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "none"
        started, status = time.monotonic(), _CLIENT_GONE
        task = asyncio.current_task()
        assert task is not None
        running = self._running[id(request)] = _Running(request_id, task)
        self._idle.clear()
        try:
            response = await self._answered(request, handler, running)
            status = (isinstance(response, EventStream) and response.failed) or response.status
            return response
        finally:
            del self._running[id(request)]
            if not self._running:
                self._idle.set()
            took_s = time.monotonic() - started
            self._counters.answered(route, status, took_s)
            level = logging.INFO if route == _CHAT or status >= 400 else logging.DEBUG
            path = ascii(request.path[:200])
            logger.log(level, "%s %s %s: %d, %.1f ms", request_id, request.method, path, status, took_s * 1e3)

    async def _answered(self, request: web.Request, handler: _Handler, running: _Running) -> web.StreamResponse:
        ends = False
        try:
            running.caller = self._authorize(request)
            response = await handler(request)
        except Exception as error:
            if request.transport is None or request.transport.is_closing():
                raise asyncio.CancelledError("the client is gone, there is nobody to tell") from error
            failure = failure_of(error, running.request_id)
            if running.has_begun:  # no room for a second response behind the first
                request.transport.close()
                raise asyncio.CancelledError("a response that had begun failed") from error
            if failure.status < 500:
                logger.info("%s refused: %s", running.request_id, ascii(failure.message))
            response, ends = failure.as_response(), isinstance(error, Draining)
        if not running.has_begun and (self._stopping or ends):
            response.force_close()
        return await send(request, response, self._config.write_timeout_s)

    async def _begin(self, request: web.Request, response: web.StreamResponse) -> None:
        """Runs before a response's first byte."""
        running = self._running.get(id(request))
        if running is not None:
            running.has_begun = True
            response.headers["X-Request-Id"] = running.request_id

    def _authorize(self, request: web.Request) -> Caller | None:
        """Who asks, where that counts."""
        if not request.path.startswith(("/v1/", "/debug/")):
            return None
        caller = self._callers.recognize(request)
        if request.path.startswith("/debug/") and not caller.is_operator:
            raise Refused(403, "this is for the operator's key", code="operator_only")
        return caller


def _json(body: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")
