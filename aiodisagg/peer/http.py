"""A small HTTP server for peers without an API of their own: ``/live``, ``/health`` and ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from aiohttp import web

from aiodisagg.bootstrap.server import KEEPALIVE_S
from aiodisagg.link.address import cannot_listen, check_port


class MetricsServer:
    """An async context manager.

    Args:
        metrics: the text of one scrape.
        ready: whether the peer can do its work now, and why not; ``/health`` is 200, or 503 with the reason.
        port: 0 takes a free one.
        broken: why it will do none any more, or empty: the same for ``/live``.

    Raises:
        ConfigError: on entering, the address is in use or not ours.
    """

    def __init__(
        self, metrics: Callable[[], str], ready: Callable[[], tuple[bool, str]], host: str, port: int, *,
        broken: Callable[[], str] = str,
    ) -> None:  # fmt: skip
        check_port(port, "http_")
        self._metrics, self._ready, self._broken, self._host, self._port = metrics, ready, broken, host, port

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    async def __aenter__(self) -> MetricsServer:
        app = web.Application()
        app.router.add_get("/live", self._live)
        app.router.add_get("/health", self._health)
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

    async def _live(self, request: web.Request) -> web.Response:
        broken = self._broken()
        return _probed(not broken, broken or "ok")

    async def _health(self, request: web.Request) -> web.Response:
        return _probed(*self._ready())

    async def _scrape(self, request: web.Request) -> web.Response:
        return web.Response(text=self._metrics(), content_type="text/plain", charset="utf-8")


def _probed(ok: bool, reason: str) -> web.Response:
    body = {"status": "ok" if ok else "unavailable", "reason": reason}
    return web.json_response(body, status=200 if ok else 503)
