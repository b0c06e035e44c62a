"""What a membership stream tells, when, and to whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec
import pytest

from aiodisagg.bootstrap.client import NOTHING_NEW, BootstrapClient, _merge
from aiodisagg.bootstrap.registry import Load, PeerEntry, PeerRecord, PeerState
from aiodisagg.bootstrap.server import BootstrapConfig, BootstrapServer
from aiodisagg.bootstrap.wire import Heartbeat, Watched
from aiodisagg.link.hello import PeerRole
from tests.bootstrap.test_registry import record
from tests.bootstrap.test_server_and_client import until, watching

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


class Asking:
    """A session with a server whose leases do not run out."""

    def __init__(self, server: BootstrapServer, session: aiohttp.ClientSession) -> None:
        self.url, self._session = server.url, session

    async def join(self, one: PeerRecord) -> None:
        path = f"/v1/peers/{one.incarnation}"
        async with self._session.put(self.url + path, data=msgspec.json.encode(one)) as response:
            assert response.status == 200

    async def beat(self, name: str, load: Load, state: PeerState | None = None) -> None:
        path = f"/v1/peers/{name}-life/heartbeat"
        async with self._session.post(self.url + path, data=msgspec.json.encode(Heartbeat(load, state))) as response:
            assert response.status == 200

    async def leave(self, name: str) -> None:
        async with self._session.delete(f"{self.url}/v1/peers/{name}-life") as response:
            assert response.status == 204

    @asynccontextmanager
    async def watch(self, query: str = "") -> AsyncIterator[aiohttp.StreamReader]:
        async with self._session.get(f"{self.url}/v1/watch{query}") as response:
            assert response.status == 200
            yield response.content


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loads are collected for longer than a test takes."""
    monkeypatch.setattr("aiodisagg.bootstrap.server.TOGETHER_S", 600.0)
    yield


@asynccontextmanager
async def asking() -> AsyncIterator[Asking]:
    async with BootstrapServer(port=0, config=BootstrapConfig(lease_s=3600)) as server, asyncio.timeout(60):
        async with aiohttp.ClientSession() as session:
            yield Asking(server, session)


async def told(lines: aiohttp.StreamReader) -> list[PeerEntry]:
    return list(msgspec.json.decode(await lines.readline(), type=Watched).entries)


def said(entries: list[PeerEntry]) -> list[tuple[str, PeerState, int]]:
    return [(entry.record.name, entry.state, entry.load.queued) for entry in entries]


@pytest.mark.usefixtures("slow")
async def test_loads_are_told_together_and_who_comes_drains_or_goes_at_once() -> None:
    """Each heartbeat was a line of 4 kB for every watcher."""
    async with asking() as server, server.watch() as lines:
        assert await told(lines) == []
        await server.join(record("a"))
        assert said(await told(lines)) == [("a", PeerState.READY, 0)]
        for queued in range(1, 21):
            await server.beat("a", Load(queued=queued))
        await server.join(record("b"))
        assert said(await told(lines)) == [("a", PeerState.READY, 20), ("b", PeerState.READY, 0)]
        await server.beat("a", Load(queued=20), PeerState.DRAINING)
        assert said(await told(lines)) == [("a", PeerState.DRAINING, 20)]
        await server.leave("b")
        assert said(await told(lines)) == [("b", PeerState.GONE, 0)]


async def test_a_load_alone_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiodisagg.bootstrap.server.TOGETHER_S", 0.01)
    async with asking() as server, server.watch() as lines:
        await server.join(record("a"))
        await server.beat("a", Load(queued=3))
        while ("a", PeerState.READY, 3) not in said(await told(lines)):
            pass


@pytest.mark.usefixtures("slow")
async def test_who_asks_for_a_role_is_told_of_it_only() -> None:
    """Language peers were told how busy all others are."""
    async with asking() as server, server.watch("?role=encode") as lines, server.watch() as all_lines:
        assert await told(lines) == await told(all_lines) == []
        for role in (PeerRole.LANGUAGE, PeerRole.BOTH, PeerRole.ENCODE):
            await server.join(record(role.value, role))
        assert [(await told(lines))[0].record.name for _ in range(2)] == ["both", "encode"]
        assert [(await told(all_lines))[0].record.name for _ in range(3)] == ["language", "both", "encode"]
        async with aiohttp.ClientSession() as session, session.get(f"{server.url}/v1/watch?role=king") as response:
            assert response.status == 422 and "king" in (await response.json())["error"]


async def test_a_client_asks_for_the_role_that_it_watches() -> None:
    async with asking() as server:
        language = BootstrapClient(server.url, record("l", PeerRole.LANGUAGE))
        async with language, watching(language, PeerRole.ENCODE) as changes:
            await server.join(record("other", PeerRole.LANGUAGE))
            await server.join(record("e"))
            await until(changes, "e")
            assert set(language._there[server.url]) == {"e-life"}


async def test_a_snapshot_of_all_peers_that_a_server_takes_is_read() -> None:
    """Ten thousand with 256 digests each are 42 MB, of which nothing was heard; fewer with long records are as much."""
    async with BootstrapServer("127.0.0.1", 0, BootstrapConfig(lease_s=3600)) as server:
        now = asyncio.get_running_loop().time()
        for number in range(170):
            long = tuple(f"{i:0250}" for i in range(1000))  # not addresses, which are compared with all others'
            server.registry.register(msgspec.structs.replace(record(f"e{number}"), transports=long), now)
        language = BootstrapClient(server.url, record("l", PeerRole.LANGUAGE))
        async with language, asyncio.timeout(60):
            async for change in language.watch(PeerRole.ENCODE):
                assert len(change.present) == 170
                break


@pytest.mark.usefixtures("slow")
async def test_a_line_is_made_once_for_all_who_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    made, encode = list[Watched](), msgspec.json.encode

    def counted(one: object) -> bytes:
        made.extend([one] if isinstance(one, Watched) else [])
        return encode(one)

    monkeypatch.setattr("aiodisagg.bootstrap.server.msgspec.json.encode", counted)
    async with asking() as server, server.watch() as one, server.watch() as two, server.watch() as three:
        for lines in (one, two, three):
            assert await told(lines) == []
        made.clear()
        await server.join(record("a"))
        assert [said(await told(lines)) for lines in (one, two, three)] == [[("a", PeerState.READY, 0)]] * 3
        assert len(made) == 1


def test_who_is_not_in_a_snapshot_is_gone_though_more_came_before_it_was_read() -> None:
    url = "http://127.0.0.1:1"

    def line(*names: str, snapshot: bool) -> Watched:
        entries = (PeerEntry(record=record(name), state=PeerState.READY, load=Load(), revision=1) for name in names)
        return Watched("life", 1, snapshot, True, tuple(entries))

    client = BootstrapClient(url, record("me", PeerRole.LANGUAGE))
    client._reached.add(url)
    assert len(client._apply(url, line("stays", "left", snapshot=True)).present) == 2
    change = client._apply(url, _merge(line("stays", snapshot=True), line("new", snapshot=False)))
    assert [one.name for one in change.gone] == ["left"] and [one.name for one in change.present] == ["new"]


def test_who_is_gone_and_comes_back_as_it_was_is_told_again() -> None:
    """A server's revisions begin anew with its next life."""
    url = "http://127.0.0.1:1"
    entry = PeerEntry(record=record("one"), state=PeerState.READY, load=Load(), revision=1)
    there, gone = Watched("life", 1, True, True, (entry,)), Watched("life", 2, True, True)
    client = BootstrapClient(url, record("me", PeerRole.LANGUAGE))
    client._reached.add(url)
    for line, present in ((there, ["one"]), (gone, []), (there, ["one"])):
        assert [one.name for one in client._apply(url, line).present] == present


def test_who_is_gone_is_gone_when_the_stream_of_a_server_of_the_same_host_ends_long_after_it() -> None:
    """A host with a server and peers lost its power: the other server said at once that they are gone, but its own
    stream ends by a timeout only. They were known, and dialled, until it came back."""
    dead, alive = "http://127.0.0.1:1", "http://127.0.0.1:2"

    def line(*names: str, state: PeerState = PeerState.READY, snapshot: bool = False) -> Watched:
        entries = (PeerEntry(record=record(name), state=state, load=Load(), revision=1) for name in names)
        return Watched("life", 1, snapshot, True, tuple(entries))

    client = BootstrapClient((dead, alive), record("me", PeerRole.LANGUAGE))
    client._reached.update((dead, alive))
    for url in (dead, alive):
        client._apply(url, line("lost", "cut off", "stays", snapshot=True))
    assert not client._apply(alive, line("lost", "cut off", state=PeerState.GONE)).gone  # the other may know better
    client._apply(alive, line("cut off"))
    client._reached.discard(dead)
    assert [one.name for one in client._apply(dead, NOTHING_NEW).gone] == ["lost"]
    assert not client._denied and "lost-life" not in client._there[dead]


async def test_a_proxy_is_asked_not_to_keep_lines_back() -> None:
    async with BootstrapServer(port=0) as server, aiohttp.ClientSession() as session:
        async with session.get(f"{server.url}/v1/watch") as response:
            assert response.headers["X-Accel-Buffering"] == "no"
