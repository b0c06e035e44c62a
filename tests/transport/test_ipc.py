"""What is particular to shared memory: views without a copy, who may attach, and what a descriptor may be."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import socket
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aiodisagg import strangers
from aiodisagg.errors import PeerGone, TransportClosed, TransportUnavailable, WriteRefused
from aiodisagg.transport import attach, mapping
from aiodisagg.transport import ipc as module
from aiodisagg.transport.arena import Arena, is_sealed
from aiodisagg.transport.description import pack, unpack
from aiodisagg.transport.ipc import IpcTransport
from aiodisagg.transport.mapping import IpcRemote
from aiodisagg.transport.testing import Kit, Receiver
from tests.conftest import LOOPS

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)]


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage").exists()
"""Whether this kernel knows them."""


def pool_mappings() -> list[tuple[int, set[str]]]:
    """Kilobytes and flags of each mapping of a pool in this process, as the kernel tells them."""
    found, size, ours = [], 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if "-" in key and not key.endswith(":"):
            ours = "aiodisagg-pool" in line
        elif key == "Size:":
            size = int(values[0])
        elif key == "VmFlags:" and ours:
            found.append((size, set(values)))
    return found


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Receiver, IpcTransport, IpcRemote, str]]:
    async with Kit(IpcTransport).pair() as (receiver, writer, remote, name):
        assert isinstance(writer, IpcTransport)
        assert isinstance(remote, IpcRemote)
        yield receiver, writer, remote, name


async def still_waits(task: asyncio.Future[None]) -> bool:
    done, _ = await asyncio.wait([task], timeout=0.05)
    return not done


async def test_both_ends_ask_for_huge_pages(no_leaks: None) -> None:
    async with pair() as (receiver, _, _, _):
        kib = receiver.arena.size_bytes >> 10
        asked = ["hg" in flags for size, flags in pool_mappings() if size == kib]
    assert asked == [HUGE_PAGES] * 2


async def test_a_producer_writes_into_the_pool_itself(no_leaks: None) -> None:
    async with pair() as (receiver, _, remote, _name):
        lease = receiver.lender.lend(4096, 800)
        rows = np.frombuffer(remote.view(4096, 800, lease), np.float32)
        rows[:] = 1.5
        assert (np.frombuffer(receiver.arena.view[4096:4896], np.float32) == 1.5).all()
        assert receiver.untouched(0, 4096)
        assert receiver.untouched(4896)


@pytest.mark.parametrize("what", ["revoke", "fence"])
async def test_a_view_is_waited_for(what: str, no_leaks: None) -> None:
    async with pair() as (receiver, writer, remote, name):
        lease = receiver.lender.lend(0, 100)
        rows = np.frombuffer(remote.view(0, 100, lease), np.uint8)[10:]  # something made from something made from it
        waiting = asyncio.ensure_future(
            receiver.transport.revoke(name, [lease]) if what == "revoke" else writer.fence(remote)
        )
        assert await still_waits(waiting)
        rows[:] = 1
        del rows
        await asyncio.wait_for(waiting, 60)
        if what == "revoke":
            with pytest.raises(WriteRefused):
                remote.view(0, 100, lease)


async def test_the_goodbye_waits_for_the_last_view(no_leaks: None) -> None:
    async with pair() as (receiver, writer, remote, name):
        view = remote.view(0, 100, receiver.lender.lend(0, 100))
        await writer.disconnect(remote)
        revoke = asyncio.ensure_future(receiver.transport.revoke(name, [1]))
        assert await still_waits(revoke)
        view[:] = b"y" * 100  # no crash: the mapping is still there
        assert receiver.holds(b"y" * 100, 0)
        del view
        await asyncio.wait_for(revoke, 60)


@pytest.mark.parametrize("viewed", [False, True])
async def test_a_pool_is_unmapped_beside_the_loop(
    viewed: bool, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    """A gigabyte took 0.1 to 0.3 s, in which a writer's loop did nothing for its other peers."""
    threads, begun, go, ended = list[int](), threading.Event(), threading.Event(), threading.Event()
    unmap = mapping.unmap

    def slowly(*what: Any) -> None:
        threads.append(threading.get_ident())
        begun.set()
        assert go.wait(60)
        unmap(*what)
        ended.set()

    monkeypatch.setattr(mapping, "unmap", slowly)
    async with pair() as (receiver, writer, remote, _):
        mapped = len(pool_mappings())
        view = remote.view(0, 100, receiver.lender.lend(0, 100)) if viewed else None
        leaving = asyncio.ensure_future(writer.disconnect(remote))
        if viewed:
            await leaving  # which does not wait for views
            del view
        assert await asyncio.to_thread(begun.wait, 60)
        assert leaving.done() == viewed and threads != [threading.get_ident()]
        go.set()
        await leaving
        assert await asyncio.to_thread(ended.wait, 60) and len(pool_mappings()) == mapped - 1


async def test_a_pool_is_unmapped_though_nobody_waits_for_it_any_more(no_leaks: None) -> None:
    """The thread for it may be busy with something else for long."""
    with ThreadPoolExecutor(1) as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        async with pair() as (_, writer, remote, _name):
            mapped, go_on = len(pool_mappings()), threading.Event()
            threads.submit(go_on.wait, 60)
            leaving = asyncio.ensure_future(writer.disconnect(remote))
            while remote._unmapping is None:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            go_on.set()
            await asyncio.to_thread(str)  # behind it
            assert len(pool_mappings()) == mapped - 1


async def test_who_leaves_before_it_is_answered_leaves_no_descriptor(no_leaks: None) -> None:
    async with Kit(IpcTransport).receiver() as receiver, Kit(IpcTransport).writer() as (writer, _):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect("\0" + unpack("ipc", module._Pool, receiver.transport.describe()).address)
            sock.send(attach.encode(attach.Attach("rude", receiver.incarnation)))
        await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)  # behind it


async def test_a_writer_that_leaves_without_a_goodbye_is_not_trusted(no_leaks: None) -> None:
    """Its socket is closed, its process lives: it may still write."""
    async with Kit(IpcTransport).receiver() as receiver:
        address = "\0" + unpack("ipc", module._Pool, receiver.transport.describe()).address
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(address)
            sock.send(attach.encode(attach.Attach("rude", receiver.incarnation)))
            words, fds, _, _ = await asyncio.to_thread(socket.recv_fds, sock, 65536, 4)
            os.close(fds[0])
            assert isinstance(attach.decode(words), attach.Attached)
        revoke = asyncio.ensure_future(receiver.transport.revoke("rude", [1]))
        assert await still_waits(revoke)
        await receiver.transport.aclose()
        with pytest.raises(TransportClosed):
            await revoke


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_a_connect_that_ends_early_leaves_no_writer_behind(
    how: str, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    """The receiver had handed its pool out, and waited for a word of somebody who had never mapped it."""
    mapping, go_on = asyncio.Event(), asyncio.Event()

    async def fails(*_: object) -> None:
        mapping.set()
        await go_on.wait()
        raise OSError("no memory")

    kit = Kit(IpcTransport)
    async with kit.receiver() as receiver, kit.writer() as (writer, name):
        monkeypatch.setattr(module, "map_pool", fails)
        connecting = asyncio.ensure_future(writer.connect(receiver.transport.describe(), peer=receiver.incarnation))
        await asyncio.wait_for(mapping.wait(), 60)
        attachments = receiver.transport._attachments  # type: ignore[attr-defined]
        assert len(attachments) == 1
        if how == "cancelled":
            connecting.cancel()
        else:
            go_on.set()
        with pytest.raises(asyncio.CancelledError if how == "cancelled" else PeerGone):
            await connecting
        await asyncio.wait_for(receiver.transport.revoke(name, [1]), 10)
        assert not attachments


async def test_views_are_checked(no_leaks: None) -> None:
    async with pair() as (_receiver, writer, remote, _):
        for offset, size in ((-1, 5), (0, 0), (0, -1), (remote.size_bytes, 1), (remote.size_bytes - 4, 5)):
            with pytest.raises(WriteRefused):
                remote.view(offset, size, 1)
        await writer.disconnect(remote)
        with pytest.raises(TransportClosed):
            remote.view(0, 5, 1)


async def test_close_of_the_receiver_ends_a_revoke_without_a_lie(no_leaks: None) -> None:
    async with pair() as (receiver, _, remote, name):
        view = remote.view(0, 100, receiver.lender.lend(0, 100))
        revoke = asyncio.ensure_future(receiver.transport.revoke(name, [1]))
        assert await still_waits(revoke)
        await receiver.transport.aclose()
        with pytest.raises(TransportClosed):
            await revoke
        del view


async def test_another_user_may_not_attach(monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    kit = Kit(IpcTransport)
    async with kit.receiver() as receiver, kit.writer() as (writer, _):
        monkeypatch.setattr(attach, "same_user", lambda sock: False)
        with pytest.raises(TransportUnavailable, match="another user"):
            await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
        answers = itertools.chain(
            [True], itertools.repeat(False)
        )  # the writer's look at the receiver, the receiver's look at the writer
        monkeypatch.setattr(attach, "same_user", lambda sock: next(answers))
        with pytest.raises(PeerGone):
            await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)


def test_the_kernel_names_the_user_and_the_process(anyio_backend: object) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        assert attach.same_user(one)
        pidfd = attach.open_pidfd(one)
        try:
            assert f"Pid:\t{os.getpid()}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        finally:
            os.close(pidfd)


@pytest.mark.parametrize(("field", "value"), [("boot_id", "another"), ("net_namespace", 1)])
async def test_another_machine_or_namespace_is_unavailable(field: str, value: object, no_leaks: None) -> None:
    kit = Kit(IpcTransport)
    async with kit.receiver() as receiver, kit.writer() as (writer, _):
        pool = unpack("ipc", module._Pool, receiver.transport.describe())
        fields = {name: getattr(pool, name) for name in pool.__struct_fields__} | {field: value}
        with pytest.raises(TransportUnavailable):
            await writer.connect(pack("ipc", module._Pool(**fields)), peer=receiver.incarnation)


async def test_strangers_on_the_socket_hurt_nobody(no_leaks: None) -> None:
    kit = Kit(lambda: IpcTransport(handshake_timeout_s=0.2))
    async with kit.receiver() as receiver, Kit(IpcTransport).writer() as (writer, _):
        address = "\0" + unpack("ipc", module._Pool, receiver.transport.describe()).address
        strangers = []
        for words in (b"", b"hello?", attach.encode(attach.Goodbye()), None):
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stranger.setblocking(False)
            stranger.connect(address)
            if words is not None:
                stranger.send(words)
            strangers.append(stranger)
        while True:
            with suppress(PeerGone):  # a busy machine may be too slow for so short a time
                remote = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
                break
        await writer.write(remote, [receiver.slice(b"fine", 0)])
        assert receiver.holds(b"fine", 0)
        for stranger in strangers:  # even the silent one is sent away
            assert await asyncio.wait_for(asyncio.to_thread(_read_end, stranger), 60) == b""
            stranger.close()


def _read_end(sock: socket.socket) -> bytes:
    sock.settimeout(60)
    try:
        return sock.recv(100)
    except ConnectionResetError:  # it left with our words unread
        return b""


async def test_what_is_not_a_sealed_pool_of_that_size_is_not_mapped(no_leaks: None) -> None:
    kit = Kit(IpcTransport)
    async with kit.receiver() as receiver, kit.writer() as (writer, _):
        arena = receiver.arena
        assert is_sealed(arena.fd)
        with pytest.raises(OSError):
            os.ftruncate(arena.fd, 4096)
        loose = os.memfd_create("loose")
        os.ftruncate(loose, arena.size_bytes)
        sealed, arena.fd = arena.fd, loose
        try:
            with pytest.raises(PeerGone, match="not a pool"):
                await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
        finally:
            arena.fd = sealed
            os.close(loose)


def test_an_arena_outlives_its_close_for_those_who_look_at_it(anyio_backend: object, no_leaks: None) -> None:
    arena = Arena(5000)
    assert arena.size_bytes == 8192
    held = arena.view[10:20]
    mapped = f"{arena.address:x}-"
    arena.close()
    _, told = Path("/proc/self/smaps").read_text().split(mapped)
    assert re.search(r"^Rss: +(\d+) kB$", told, re.M)[1] == "0"  # type: ignore[index]  # its memory is given back
    held[:] = b"0123456789"  # no crash
    assert held == b"0123456789"
    held.release()
    arena.close()
    assert not pool_mappings()  # though the arena's own object is still there
    with pytest.raises(ValueError):
        Arena(0)


@asynccontextmanager
async def sockets(receiver: Receiver, count: int) -> AsyncIterator[list[socket.socket]]:
    """So many that connect and say nothing; the receiver has accepted those that it accepts."""
    address = "\0" + unpack("ipc", module._Pool, receiver.transport.describe()).address
    with ExitStack() as stack:
        opened = []
        for _ in range(count):
            opened.append(stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)))
            opened[-1].setblocking(False)
            await module._connect(opened[-1], address)
        yield opened


async def is_sent_away(one: socket.socket) -> bool:
    try:
        return await asyncio.get_running_loop().sock_recv(one, 1) == b""
    except ConnectionError:
        return True


async def test_other_users_hold_no_sockets(monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    """Each held one until its time to say something was over, and there could be any number."""
    monkeypatch.setattr(attach, "same_user", lambda sock: False)
    kit = Kit(lambda: IpcTransport(handshake_timeout_s=600))
    async with kit.receiver() as receiver, sockets(receiver, 3) as silent, asyncio.timeout(20):
        for one in silent:
            assert await is_sent_away(one)


async def test_silent_processes_make_room_for_each_other_and_for_writers(
    monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    monkeypatch.setattr(strangers, "GRACE_S", 0.0)
    kit = Kit(lambda: IpcTransport(handshake_timeout_s=600))
    async with kit.pair() as (receiver, writer, remote, _), sockets(receiver, 80) as silent, asyncio.timeout(20):
        for one in silent[:16]:
            assert await is_sent_away(one)
        late = await writer.connect(receiver.transport.describe(), peer=receiver.incarnation)
        assert await is_sent_away(silent[16])
        await writer.write(late, [receiver.slice(b"late", 0)])
        await writer.write(remote, [receiver.slice(b"fine", 4)])
        assert receiver.holds(b"latefine", 0)


async def test_a_copy_of_whose_end_the_loop_has_not_heard_keeps_no_mapping(no_leaks: None) -> None:
    """Neither goodbye nor unmapping came then, and both sides kept what they held."""
    async with pair() as (receiver, writer, remote, name):
        mapped = len(pool_mappings())
        lease = receiver.lender.lend(0, 1 << 20)
        copying = writer._threads.start(iter(()), remote.place, (lease,))
        remote.track(copying)
        await asyncio.wait([copying.done])
        remote._running.add(copying)  # as if its callbacks were still to come
        await asyncio.wait_for(writer.disconnect(remote), 60)
        assert len(pool_mappings()) == mapped - 1
        await asyncio.wait_for(receiver.transport.revoke(name, [lease]), 60)
