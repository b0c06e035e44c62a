"""A small HTTP server for peers without an API of their own: ``/live``, ``/health`` and ``/metrics``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType

from aiohttp import web

from aiodisagg.bootstrap.sending import send
from aiodisagg.bootstrap.server import KEEPALIVE_S, STUCK_S
from aiodisagg.link.address import cannot_listen, check_port

Ready = Callable[[], tuple[bool, str]]
"""Whether a peer can do its work now, and why not."""


def add_probes(app: web.Application, ready: Ready, broken: Callable[[], str]) -> None:
    """``/health`` and ``/live``: 200, or 503 with the reason. ``broken`` says why a peer will do no work any more, or
    nothing."""

    async def live(request: web.Request) -> web.Response:
        why = broken()
        return probed(not why, why or "ok")

    async def health(request: web.Request) -> web.Response:
        return probed(*ready())

    def probed(ok: bool, reason: str) -> web.Response:
        body = {"status": "ok" if ok else "unavailable", "reason": reason}
        return web.json_response(body, status=200 if ok else 503)

    app.router.add_get("/live", live)
    app.router.add_get("/health", health)


@web.middleware
async def _in_time(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:  # fmt: skip
    try:
        response = await handler(request)
    except web.HTTPException as error:
        await send(request, error, STUCK_S)
        raise
    return await send(request, response, STUCK_S)


class MetricsServer:
    """An async context manager.

    Args:
        metrics: the text of one scrape.
        ready, broken: see :func:`add_probes`.
        port: 0 takes a free one.

    Raises:
        ConfigError: on entering, the address is in use or not ours.
    """

    def __init__(
        self, metrics: Callable[[], str], ready: Ready, host: str, port: int, *, broken: Callable[[], str] = str
    ) -> None:  # fmt: skip
        check_port(port, "http_")
        self._metrics, self._ready, self._broken, self._host, self._port = metrics, ready, broken, host, port

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    async def __aenter__(self) -> MetricsServer:
        app = web.Application(middlewares=[_in_time])
        add_probes(app, self._ready, self._broken)
        app.router.add_get("/metrics", self._scrape)
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=KEEPALIVE_S)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except (OSError, UnicodeError) as error:
            await self._runner.cleanup()
            raise cannot_listen(self._host, self._port, error, "http_") from error
        self._port = int(self._runner.addresses[0][1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _scrape(self, request: web.Request) -> web.Response:
        return web.Response(text=self._metrics(), content_type="text/plain", charset="utf-8")
