"""What a peer's log says of a server that does not take it: what is wrong, once until that changes."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.client_reqrep import ConnectionKey

from aiodisagg.bootstrap.client import BootstrapClient
from aiodisagg.bootstrap.registry import Load
from aiodisagg.bootstrap.server import BootstrapConfig, BootstrapServer
from aiodisagg.errors import BootstrapError
from aiodisagg.link.hello import PeerRole
from tests.bootstrap.test_registry import record
from tests.bootstrap.test_server_and_client import free_port, watching

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


class Log(logging.Handler):
    """What a person sees, and a way to wait for so many attempts."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seen: list[str] = []
        self.attempts = 0
        self.more = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno > logging.DEBUG:
            self.seen.append(record.getMessage())
        self.attempts += "trying again" in record.getMessage()
        self.more.set()

    async def until(self, enough: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not enough():
                self.more.clear()
                await self.more.wait()

    async def tries(self, count: int) -> None:
        wanted = self.attempts + count
        await self.until(lambda: self.attempts >= wanted)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Log:
    monkeypatch.setattr("aiodisagg.bootstrap.client.FIRST_RETRY_S", 1e-3)
    monkeypatch.setattr("aiodisagg.bootstrap.client.LAST_RETRY_S", 4e-3)
    caplog.set_level(logging.DEBUG, "aiodisagg.bootstrap.client")
    handler = Log()
    logger = logging.getLogger("aiodisagg.bootstrap.client")
    monkeypatch.setattr(logger, "handlers", [handler])
    return handler


@pytest.mark.parametrize(("token", "why"), [(None, "wants a token, and we have none"), ("mine", "refuses our token")])
async def test_a_token_that_was_forgotten(log: Log, token: str | None, why: str) -> None:
    """JSON of the server every 2 s, for ever."""
    async with BootstrapServer(port=0, config=BootstrapConfig(token="theirs")) as server:
        async with BootstrapClient(server.url, record("l", PeerRole.LANGUAGE), token=token) as client, watching(client):
            await log.tries(20)
    said = f"it {why}: AIODISAGG_BOOTSTRAP_TOKEN or --bootstrap-token has to be what it was started with"
    assert log.seen[0] in (
        f"bootstrap {server.url}: {said}; trying again",
        f"membership of {server.url} is not heard: {said}; trying again",
    )
    assert len(log.seen) <= 2 and all(said in line for line in log.seen)


async def test_a_server_that_is_not_there_is_told_of_once_and_when_it_comes(log: Log) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with BootstrapClient(url, record("e")) as client:
        await log.tries(20)
        assert log.seen == [f"bootstrap {url}: cannot connect: Connection refused; trying again"]
        async with BootstrapServer(port=int(url.rpartition(":")[2])):
            async with asyncio.timeout(60):
                await client.registered.wait()
            await log.until(lambda: len(log.seen) > 1)
        assert log.seen[1:] == [f"registered at {url}: it works again"]
        await log.tries(20)
        assert log.seen[2:] == log.seen[:1]  # it is away once more


async def test_a_server_that_is_stopped(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that was said was "TimeoutError"."""
    monkeypatch.setattr("aiodisagg.bootstrap.client.REQUEST_TIMEOUT_S", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as stopped:
        url = f"http://127.0.0.1:{stopped.getsockname()[1]}"
        async with BootstrapClient(url, record("e")):
            await log.tries(20)
    assert log.seen == [f"bootstrap {url}: no answer within 0.02 s; trying again"]


async def test_another_server_at_its_address(log: Log) -> None:
    """``--bootstrap`` with a language peer's port: a 404 with the body of an OpenAI error, every 2 s."""

    async def refuse(request: web.Request) -> web.Response:
        error = {"message": "no such URL", "type": "invalid_request_error", "param": None, "code": "unknown_url"}
        return web.json_response({"error": error}, status=404)

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", refuse)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with BootstrapClient(url, record("e")):
            await log.tries(20)
    finally:
        await runner.cleanup()
    assert log.seen == [f"bootstrap {url}: it is no bootstrap server: it answers 404; trying again"]


async def test_a_name_in_the_url_beside_a_token_does_not_keep_a_peer_from_leaving(log: Log) -> None:
    """aiohttp takes no two of them: the end of the peer was a traceback."""
    url = f"http://user:word@127.0.0.1:{free_port()}"
    async with BootstrapClient(url, record("e"), token="mine"):
        await log.tries(20)
    assert log.seen and all("Cannot combine" in line for line in log.seen)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_server_that_lives_elsewhere_is_named(log: Log, status: int) -> None:
    """``http:`` where a proxy wants ``https:``. Registrations followed, heartbeats became GETs: the peer was registered
    anew for ever, its load never told, and no log said a word."""
    async with BootstrapServer(port=0, config=BootstrapConfig(lease_s=0.05)) as server:

        async def elsewhere(request: web.Request) -> web.Response:
            return web.Response(status=status, headers={"Location": server.url + request.path})

        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", elsewhere)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            async with BootstrapClient(url, record("e"), load=lambda: Load(queued=3)) as client:
                if status in (307, 308):
                    async with asyncio.timeout(60):
                        await client.registered.wait()
                        while server.registry.peers()[0].load != Load(queued=3):  # noqa: ASYNC110
                            await asyncio.sleep(0)
                else:
                    await log.tries(20)
        finally:
            await runner.cleanup()
        why = f"it sends us to {server.url}, which --bootstrap has to name itself"
    said = [f"registered at {url}"] if status in (307, 308) else [f"bootstrap {url}: {why}; trying again"]
    assert log.seen == said


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError("certificate has expired")),
        (aiohttp.ClientConnectorSSLError, ssl.SSLError(1, "wrong version number")),
    ],
)
async def test_what_is_wrong_with_tls_is_said(
    kind: type[aiohttp.ClientConnectorError], cause: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad certificate is a ValueError, too: it was no bootstrap server. The number of another error of TLS is none of
    the operating system's, whose first is 'Operation not permitted'."""
    error = kind(ConnectionKey("there", 443, True, None, None, None, None), cause)

    def refuse(*what: object, **how: object) -> object:
        raise error

    client = BootstrapClient("https://there", record("l", PeerRole.LANGUAGE))
    monkeypatch.setattr(client, "_session", SimpleNamespace(request=refuse), raising=False)
    with pytest.raises(BootstrapError, match=cause.args[-1]) as caught:
        await client._call("PUT", "https://there", "", b"")
    assert "no bootstrap server" not in str(caught.value)
