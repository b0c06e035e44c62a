"""Where data is received, as peers of this host and of others learn it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from aiodisagg.errors import ConfigError, TransportUnavailable
from aiodisagg.link import Hello, PeerRole
from aiodisagg.peer import planes
from aiodisagg.peer.config import EncodeConfig, LanguageConfig
from aiodisagg.peer.planes import Planes
from aiodisagg.transport.arena import Arena
from aiodisagg.transport.base import Remote, Slice
from aiodisagg.transport.description import loopback_of, pack

pytestmark = pytest.mark.anyio
SECRET = b"sixteen bytes at least"
FAR = "127.0.0.2"
"""Stands for an address of another host: it is loopback, and only who listens everywhere is heard there."""


def hello(boot_id: str, **transports: bytes) -> Hello:
    return Hello(
        name=boot_id, incarnation=boot_id, role=PeerRole.LANGUAGE, boot_id=boot_id, net_ns="n", transports=transports
    )


async def connect(
    monkeypatch: pytest.MonkeyPatch, name: str, host: str, far_host: str, *, other_host: bool = True
) -> tuple[str, bytes]:
    """Writes eight bytes to a peer that receives at ``host``; returns where it was looked for, and what is there."""
    monkeypatch.setattr(planes, "is_loopback", lambda address: address == "127.0.0.1")
    receiving, sending = Planes((name,), host), Planes((name,), host)
    arena = Arena(4096)
    try:
        await receiving.open(arena, lambda *_: True, incarnation="L")
        await sending.open(None, lambda *_: False, incarnation="E")
        remote, transport = hello("L", **receiving.describe()), sending.open_transports[name]
        looked, dial = [""], transport.connect

        async def seen(description: bytes, *, peer: str) -> Remote:
            looked.append(msgspec.msgpack.decode(description[4:].partition(b"\0")[2])[0])
            return await dial(description, peer=peer)

        monkeypatch.setattr(transport, "connect", seen)
        _, plane, _ = await sending.connect(hello("E" if other_host else "L"), remote, far_host=far_host)
        await plane.transport.write(plane.remote, [Slice(memoryview(b"received"), 0, 1)])
        return looked[-1], bytes(arena.view[:8])
    finally:
        await sending.aclose()
        await receiving.aclose()
        arena.close()


@pytest.mark.parametrize("name", ["stream", "zmq"])
async def test_a_peer_of_another_host_is_reached_where_its_link_comes_from(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the README's own commands it was offered 127.0.0.1, and nothing could be written."""
    assert await connect(monkeypatch, name, "0.0.0.0", FAR) == (FAR, b"received")


@pytest.mark.parametrize("name", ["stream", "zmq"])
async def test_on_one_host_loopback_stays_loopback(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = "127.0.0.1", b"received"
    assert await connect(monkeypatch, name, "127.0.0.1", FAR, other_host=False) == here
    assert await connect(monkeypatch, name, "127.0.0.1", "") == here, "linked over a unix socket"
    assert await connect(monkeypatch, name, "127.0.0.1", "127.0.0.1") == here


async def test_who_listens_on_loopback_only_is_not_reached_and_it_is_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TransportUnavailable, match=r"connect to 127\.0\.0\.2:.*127\.0\.0\.1 there"):
        await connect(monkeypatch, "stream", "127.0.0.1", FAR)


async def test_mooncake_on_another_hosts_loopback_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has one address; at this one of ours, somebody else may answer."""

    class Never:
        async def connect(self, description: bytes, *, peer: str) -> Any:
            raise AssertionError("tried")

    class Pool(msgspec.Struct, array_like=True):
        host: str = "127.0.0.1"
        port: int = 1

    sending = Planes(("mooncake",), "0.0.0.0")
    sending.open_transports["mooncake"] = Never()  # type: ignore[assignment]
    remote = hello("L", mooncake=pack("mooncake", Pool()))
    with pytest.raises(TransportUnavailable, match=r"mooncake: it receives at 127\.0\.0\.1 of another"):
        await sending.connect(hello("E"), remote, far_host="10.0.0.2")


@pytest.mark.parametrize("damaged", [b"", b"\0" * 9, b"1234stream\0\xc1", b"1234stream\0\x91\x01", b"1234s\0\x90"])
def test_what_is_no_description_has_no_loopback(damaged: bytes) -> None:
    assert loopback_of(damaged) == ""


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ({}, "127.0.0.1"),
        ({"secret": SECRET}, "0.0.0.0"),
        ({"secret": SECRET, "data_host": "10.0.0.2"}, "10.0.0.2"),
        ({"data_host": "127.0.0.1"}, "127.0.0.1"),
    ],
)
def test_only_who_may_be_linked_from_elsewhere_receives_from_elsewhere(
    given: dict[str, Any], host: str, tmp_path: Path
) -> None:
    assert LanguageConfig(model=tmp_path, **given).data_host == host


@pytest.mark.parametrize("kind", [EncodeConfig, LanguageConfig])
def test_a_short_secret_is_refused_at_the_start(kind: type, tmp_path: Path) -> None:
    """It was found at the first link, over and over, in the log of a peer that seemed to be well."""
    with pytest.raises(ConfigError, match=r"^secret: must have at least 16 bytes, not 5 \(--secret-file\)$"):
        kind(model=tmp_path, secret=b"short")


async def test_strangers_of_other_hosts_find_only_ports_that_send_them_away(tmp_path: Path) -> None:
    """``zmq`` cannot, and was open to every host beside ``stream``, which is preferred to it."""
    arena = Arena(4096)
    for named in ({}, {"transports": ("stream", "zmq")}):
        config = LanguageConfig(model=tmp_path, secret=SECRET, **named)
        opened = Planes(config.transports, config.data_host)
        try:
            await opened.open(arena, lambda *_: True, incarnation="L")
            assert "stream" in opened.describe() and ("zmq" in opened.describe()) == bool(named)
        finally:
            await opened.aclose()
    arena.close()
