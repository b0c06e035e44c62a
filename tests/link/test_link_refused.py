"""Who dials without success is named at the other side, and not at every attempt."""

from __future__ import annotations

import os

import pytest

from aiodisagg.errors import AuthenticationFailed
from aiodisagg.link import Link, LinkServer, dial
from aiodisagg.link import server as server_module
from tests.link.helpers import SECRET, RawPeer, hello

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


async def until_closed(link: Link) -> None:
    await link.wait_closed()


def serving(address: str) -> LinkServer:
    return LinkServer(address, lambda: hello("server"), on_link=until_closed, secret=SECRET)


async def test_who_dials_in_vain_is_told_of_once(address: str, caplog: pytest.LogCaptureFixture) -> None:
    """A peer with another secret made a warning a second, for ever, which did not say who it was."""
    wrong = b"not the right secret"
    async with serving(address) as server:
        who = "127.0.0.1" if address.startswith("tcp") else f"process {os.getpid()} of this host"
        said = f"no link from {who} to {server.address}: the other side does not know our shared secret: "
        said += "--secret-file must have the same bytes on both sides"
        for _ in range(3):
            with pytest.raises(AuthenticationFailed, match="--secret-file"):
                await dial(server.address, hello(), secret=wrong)
        assert caplog.messages == [said]
        raw = await RawPeer.connect(server)
        raw.writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await raw.end()
        await raw.aclose()
        _, other = caplog.messages
        assert other.startswith(f"no link from {who} to {server.address}: ") and other != said
        await (await dial(server.address, hello("good"), secret=SECRET)).aclose()
        with pytest.raises(AuthenticationFailed):
            await dial(server.address, hello(), secret=wrong)
    assert caplog.messages == [said, other, said]


async def test_of_many_who_dial_in_vain_the_last_are_remembered(caplog: pytest.LogCaptureFixture) -> None:
    async with serving("unix:") as server:
        for number in (*range(server_module.REFUSED + 1), 0, server_module.REFUSED):
            server._warn(f"192.0.2.{number}", "no greeting")
    assert len(caplog.messages) == server_module.REFUSED + 2 and " 192.0.2.0 " in caplog.messages[-1]


async def test_who_was_let_in_meanwhile_is_told_of_again(address: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(address) as server:
        for _ in range(2):
            with pytest.raises(AuthenticationFailed):
                await dial(server.address, hello(), secret=b"not the right secret")
            link = await dial(server.address, hello(), secret=SECRET)
            await link.aclose()
    assert len(caplog.messages) == 2
