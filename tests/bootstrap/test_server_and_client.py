"""The bootstrap server and the client that peers keep open, over real HTTP on loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import aiohttp
import msgspec
import pytest

from aiodisagg.bootstrap.client import BootstrapClient, MembershipChange
from aiodisagg.bootstrap.registry import Load, PeerEntry, PeerRecord, PeerState
from aiodisagg.bootstrap.server import BootstrapConfig, BootstrapServer
from aiodisagg.bootstrap.wire import Heartbeat
from aiodisagg.errors import ConfigError
from aiodisagg.link.hello import PeerRole
from tests.bootstrap.test_registry import record

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

QUICK = BootstrapConfig(lease_s=0.3)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@asynccontextmanager
async def watching(
    client: BootstrapClient, role: PeerRole | None = None
) -> AsyncIterator[asyncio.Queue[MembershipChange]]:
    """The client's changes in a queue."""
    queue: asyncio.Queue[MembershipChange] = asyncio.Queue()

    async def follow() -> None:
        async for change in client.watch(role):
            queue.put_nowait(change)

    task = asyncio.create_task(follow())
    try:
        yield queue
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(queue: asyncio.Queue[MembershipChange], name: str, *, gone: bool = False) -> PeerRecord:
    """The record of ``name`` as soon as a change has it."""
    async with asyncio.timeout(60):
        while True:
            change = await queue.get()
            for found in change.gone if gone else change.present:
                if found.name == name:
                    return found


async def names(url: str, path: str = "/v1/peers") -> list[str]:
    async with aiohttp.ClientSession() as session, session.get(url + path) as response:
        return [entry["record"]["name"] for entry in await response.json()]


async def test_peers_register_before_the_server_is_up_and_see_each_other() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with BootstrapClient(url, record("l", PeerRole.LANGUAGE)) as language, watching(language) as changes:
        async with BootstrapClient(url, record("e"), load=lambda: Load(queued=3)) as encode:
            assert not encode.registered.is_set()
            async with BootstrapServer(port=port, config=QUICK):
                found = await until(changes, "e")
                assert found == encode.record
                assert found.host == language.record.host != ""
                await language.registered.wait()
                assert await names(url, "/v1/match/l-life") == ["e"]


@pytest.mark.parametrize("address", ["tcp:127.0.0.1:7000", "unix:/run/encode.sock"])
async def test_two_containers_of_a_host_stay_registered_side_by_side(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with BootstrapServer(port=0) as server, AsyncExitStack() as stack:
        for name, namespaces in (("one", ("net:[1]", "mnt:[1]")), ("two", ("net:[2]", "mnt:[2]"))):
            monkeypatch.setattr("aiodisagg.bootstrap.client.host_identity", lambda at=namespaces: ("boot", *at))
            client = BootstrapClient(server.url, record(name, address=address))
            await stack.enter_async_context(client)
            await client.registered.wait()
        assert await names(server.url) == ["one", "two"]


async def test_a_peer_that_leaves_is_gone_at_once() -> None:
    async with BootstrapServer(port=0) as server:
        language = BootstrapClient(server.url, record("l", PeerRole.LANGUAGE))
        async with language, watching(language) as changes:
            async with BootstrapClient(server.url, record("e")):
                await until(changes, "e")
            await until(changes, "e", gone=True)
            assert await names(server.url) == ["l"]


async def test_a_restarted_server_relearns_everyone() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    language = BootstrapClient(url, record("l", PeerRole.LANGUAGE))
    async with language, watching(language) as changes, BootstrapClient(url, record("e")):
        async with BootstrapServer(port=port, config=QUICK):
            await until(changes, "e")
        async with BootstrapServer(port=port, config=QUICK), BootstrapClient(url, record("new")):
            await until(changes, "new")
            async with asyncio.timeout(60):
                while await names(url) != ["e", "l", "new"]:
                    await changes.get()


async def test_a_young_server_that_knows_nobody_declares_nobody_gone() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    language = BootstrapClient(url, record("l", PeerRole.LANGUAGE))
    async with language, watching(language) as changes:
        async with BootstrapServer(port=port), aiohttp.ClientSession() as session:
            body = {"name": "e", "incarnation": "e-life", "role": "encode", "addresses": ["unix:@e"]}
            async with session.put(f"{url}/v1/peers/e-life", json=body):
                await until(changes, "e")
        async with BootstrapServer(port=port), BootstrapClient(url, record("new")):
            seen = []
            async with asyncio.timeout(60):
                while not seen or "new" not in [found.name for found in seen[-1].present]:
                    seen.append(await changes.get())
        assert [change.gone for change in seen if change.gone] == []


async def test_a_peer_that_vanished_during_a_restart_is_gone_after_two_leases() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    language = BootstrapClient(url, record("l", PeerRole.LANGUAGE))
    async with language, watching(language) as changes:
        async with BootstrapServer(port=port, config=QUICK), BootstrapClient(url, record("e")):
            await until(changes, "e")
        async with BootstrapServer(port=port, config=QUICK):
            assert (await until(changes, "e", gone=True)).name == "e"


async def test_a_silent_peer_expires_by_itself() -> None:
    async with BootstrapServer(port=0, config=QUICK) as server:
        async with BootstrapClient(server.url, record("l", PeerRole.LANGUAGE)) as client, watching(client) as changes:
            async with aiohttp.ClientSession() as session:
                body = {"name": "e", "incarnation": "e-life", "role": "encode", "addresses": ["unix:@e"]}
                async with session.put(f"{server.url}/v1/peers/e-life", json=body) as response:
                    assert response.status == 200 and (await response.json())["lease_s"] == 0.3
                await until(changes, "e")
                await until(changes, "e", gone=True)


async def test_a_new_state_does_not_wait_for_the_next_heartbeat() -> None:
    """A peer that drains would get items for a third of a lease."""
    async with BootstrapServer(port=0, config=BootstrapConfig(lease_s=3600)) as server:
        async with BootstrapClient(server.url, record("e")) as client, asyncio.timeout(60):
            await client.registered.wait()
            client.announce(PeerState.DRAINING)
            while [entry.state for entry in server.registry.peers()] != [PeerState.DRAINING]:  # noqa: ASYNC110
                await asyncio.sleep(0)


async def test_two_servers_side_by_side_are_one_membership() -> None:
    async with BootstrapServer(port=0, config=QUICK) as one, BootstrapServer(port=0, config=QUICK) as two:
        language = BootstrapClient((one.url, two.url), record("l", PeerRole.LANGUAGE))
        async with language, watching(language) as changes:
            async with BootstrapClient(two.url, record("e")):
                await until(changes, "e")


async def test_a_server_that_died_does_not_keep_a_peer_that_another_says_is_gone() -> None:
    async with BootstrapServer(port=0) as one:
        language = BootstrapClient((one.url, f"http://127.0.0.1:{free_port()}/"), record("l", PeerRole.LANGUAGE))
        two = BootstrapServer(port=int(language.urls[1].rpartition(":")[2]))
        async with language, watching(language) as changes:
            async with two, BootstrapClient(language.urls, record("e")):
                async with asyncio.timeout(60):
                    while not all("e-life" in language._there[url] for url in language.urls):
                        await changes.get()
                await two._runner.cleanup()  # without a word: the streams end, the peer is not deregistered
                async with asyncio.timeout(60):
                    while language._reached != {one.url}:  # noqa: ASYNC110  (nothing tells of a lost server)
                        await asyncio.sleep(0)
            await until(changes, "e", gone=True)


@asynccontextmanager
async def two_servers() -> AsyncIterator[tuple[str, str, asyncio.Queue[MembershipChange], aiohttp.ClientSession]]:
    """Two servers that both know peer e, and a peer that watches them; leases do not run out."""
    config = BootstrapConfig(lease_s=3600)
    async with BootstrapServer(port=0, config=config) as one, BootstrapServer(port=0, config=config) as two:
        language = BootstrapClient((one.url, two.url), record("l", PeerRole.LANGUAGE))
        async with language, watching(language) as changes, aiohttp.ClientSession() as session:
            for server in (one, two):
                async with session.put(
                    f"{server.url}/v1/peers/e-life", data=msgspec.json.encode(record("e"))
                ) as response:
                    assert response.status == 200
                await heartbeat(session, server.url, queued=1 if server is one else 2)
            seen: set[int] = set()
            async with asyncio.timeout(60):
                while seen != {1, 2}:
                    seen |= {entry.load.queued for entry in of_e(await changes.get())} - {0}
            yield one.url, two.url, changes, session


def of_e(change: MembershipChange) -> list[PeerEntry]:
    return [entry for entry in change.entries if entry.record.name == "e"]


async def heartbeat(session: aiohttp.ClientSession, url: str, state: PeerState | None = None, queued: int = 0) -> None:
    body = msgspec.json.encode(Heartbeat(Load(queued=queued), state))
    async with session.post(f"{url}/v1/peers/e-life/heartbeat", data=body) as response:
        assert response.status == 200


async def told_until_now(
    changes: asyncio.Queue[MembershipChange], session: aiohttp.ClientSession, url: str, name: str
) -> list[PeerEntry]:
    """What was told of e before this server's word of one more peer."""
    body = msgspec.json.encode(record(name))
    async with session.put(f"{url}/v1/peers/{name}-life", data=body) as response:
        assert response.status == 200
    found: list[PeerEntry] = []
    async with asyncio.timeout(60):
        while True:
            change = await changes.get()
            assert not change.gone
            found += of_e(change)
            if name in [there.name for there in change.present]:
                return found


async def test_a_peer_that_one_of_two_servers_does_not_hear_of_is_as_good_as_the_other_says() -> None:
    async with two_servers() as (one, two, changes, session):
        await heartbeat(session, two, PeerState.SUSPECT, 3)
        told = await told_until_now(changes, session, two, "a")
        assert {entry.state for entry in told} <= {PeerState.READY}
        await session.delete(f"{two}/v1/peers/e-life")
        told += await told_until_now(changes, session, two, "b")
        assert (told[-1].state, told[-1].load.queued) == (PeerState.READY, 1)  # the second server's word is void
        await heartbeat(session, one, PeerState.SUSPECT, 1)
        told = await told_until_now(changes, session, one, "c")
        assert [entry.state for entry in told] == [PeerState.SUSPECT]


async def test_a_peer_that_drains_does_so_whoever_has_not_heard_it_yet() -> None:
    async with two_servers() as (one, two, changes, session):
        await heartbeat(session, one, PeerState.DRAINING)
        await heartbeat(session, two, PeerState.READY, 5)
        told = [
            *await told_until_now(changes, session, one, "a"),
            *await told_until_now(changes, session, two, "b"),
        ]
        assert told[-1].state is PeerState.DRAINING


async def test_a_server_that_is_lost_is_not_believed_any_more_where_another_can_be_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its word stood until the next one of any server, which may have said all that it has to say."""
    monkeypatch.setattr("aiodisagg.bootstrap.client.QUIET_S", 3600.0)
    config = BootstrapConfig(lease_s=3600)
    async with BootstrapServer(port=0, config=config) as two, aiohttp.ClientSession() as session:
        async with BootstrapServer(port=0, config=config) as one:
            for server in (one, two):
                body = msgspec.json.encode(record("e"))
                async with session.put(f"{server.url}/v1/peers/e-life", data=body) as response:
                    assert response.status == 200
            await heartbeat(session, two.url, PeerState.SUSPECT)
            language = BootstrapClient((one.url, two.url), record("l", PeerRole.LANGUAGE))
            async with language, watching(language) as changes, asyncio.timeout(60):
                await told_until_now(changes, session, one.url, "a")
                told = await told_until_now(changes, session, two.url, "b")
                assert not told or told[-1].state is PeerState.READY
                await one._runner.cleanup()
                while not (told := of_e(await changes.get())):
                    pass
                assert [entry.state for entry in told] == [PeerState.SUSPECT]


async def test_a_watcher_that_does_not_read_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiodisagg.bootstrap.server.STUCK_S", 0.2)
    monkeypatch.setattr("aiodisagg.bootstrap.server.SLOWEST_S", 0.0)  # which is 17 s for so much
    async with BootstrapServer(port=0) as server:
        server.registry.register(record("e", address="x" * (1 << 24)), server._now())  # more than sockets buffer
        host, port = server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=4096)
        writer.write(b"GET /v1/watch HTTP/1.1\r\nHost: x\r\n\r\n")
        assert server._runner.server is not None
        async with asyncio.timeout(60):
            assert (await reader.readline()).endswith(b"200 OK\r\n")
            while server._runner.server.connections:  # noqa: ASYNC110  (nothing tells of it)
                await asyncio.sleep(0)
        assert not server._watchers
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def test_a_second_watch_is_told_everybody_again() -> None:
    async with BootstrapServer(port=0) as server:
        language = BootstrapClient(server.url, record("l", PeerRole.LANGUAGE))
        async with language, BootstrapClient(server.url + "/", record("e")):
            for _ in range(2):
                async with watching(language) as changes:
                    await until(changes, "e")


async def test_names_and_literals_of_this_host_give_a_url_that_works() -> None:
    for host in ("localhost", "::1"):
        async with BootstrapServer(host, 0) as server:
            assert await names(server.url) == []
    async with BootstrapServer("0.0.0.0", 0, BootstrapConfig(token="let me in")) as server:
        assert "0.0.0.0" not in server.url
    with pytest.raises(ConfigError, match="cannot be resolved"):
        async with BootstrapServer("no-such-host.invalid", 0):
            pass


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "JSON"),
        (b'{"name": "\xff"}', 400, "JSON"),
        (b"[]", 422, "object"),
        (b'{"name": "e"}', 422, "incarnation"),
        (b'{"name": "e", "incarnation": "e-life", "role": "king"}', 422, "role"),
        (b'{"name": "", "incarnation": "e-life", "role": "encode"}', 422, "name"),
        (b'{"name": "e", "incarnation": "e-life", "role": "encode"}', 422, "addresses"),
        (b'{"name": "e", "incarnation": "other", "role": "language"}', 422, "incarnation"),
        (
            b'{"name": "e", "incarnation": "e-life", "role": "encode", "addresses": ["tcp:0.0.0.0:7"]}',
            422,
            "wildcard",
        ),
    ],
)
async def test_bad_registrations_say_what_is_wrong(body: bytes, status: int, said: str) -> None:
    async with BootstrapServer(port=0) as server, aiohttp.ClientSession() as session:
        async with session.put(f"{server.url}/v1/peers/e-life", data=body) as response:
            assert response.status == status
            assert said in (await response.json())["error"]
        assert await names(server.url) == []


async def test_heartbeats_of_strangers_and_unknown_roles_are_told_apart_from_success() -> None:
    async with BootstrapServer(port=0) as server, aiohttp.ClientSession() as session:
        async with session.post(f"{server.url}/v1/peers/x/heartbeat", json={}) as response:
            assert response.status == 404
        async with session.get(f"{server.url}/v1/peers?role=king") as response:
            assert response.status == 422
        async with session.get(f"{server.url}/v1/match/x") as response:
            assert response.status == 404
        async with session.get(f"{server.url}/v1/nothing") as response:
            assert response.status == 404 and (await response.json())["error"] == "Not Found"
        async with session.put(f"{server.url}/v1/peers/x", data=b" " * 300_000) as response:
            assert response.status == 413 and "Large" in (await response.json())["error"]
        async with session.get(f"{server.url}/health") as response:
            assert response.status == 200 and (await response.json())["status"] == "ok"
        async with session.get(f"{server.url}/metrics") as response:
            assert "aiodisagg_bootstrap_watchers 0.0" in await response.text()


async def test_whom_a_full_server_knows_may_say_something_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiodisagg.bootstrap.server.MAX_PEERS", 1)
    async with BootstrapServer(port=0) as server, aiohttp.ClientSession() as session:
        for name, status in (("known", 200), ("known", 200), ("another", 429)):
            one = record(name)
            url = f"{server.url}/v1/peers/{one.incarnation}"
            async with session.put(url, data=msgspec.json.encode(one)) as response:
                assert response.status == status


async def test_a_token_keeps_strangers_out() -> None:
    config = BootstrapConfig(token="let me in")
    async with BootstrapServer(port=0, config=config) as server:
        async with BootstrapClient(server.url, record("e"), token="let me in") as client:
            await client.registered.wait()
            async with aiohttp.ClientSession() as session, session.get(f"{server.url}/v1/peers") as response:
                assert response.status == 401


async def test_a_port_in_use_and_an_open_host_without_a_token_are_refused_by_name() -> None:
    async with BootstrapServer(port=0) as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"port: {port} .* in use"):
            async with BootstrapServer(port=port):
                pass
    with pytest.raises(ConfigError, match="token"):
        async with BootstrapServer("0.0.0.0", 0):
            pass
    with pytest.raises(ConfigError, match="bootstrap"):
        BootstrapClient("127.0.0.1:1", record("e"))
