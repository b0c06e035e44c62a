"""Socket files that others use, and who may be at the other end."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from aiodisagg.errors import ConfigError
from aiodisagg.link.address import UnixAddress, check_user, inode_of, listen_unix


def test_the_file_of_a_listener_that_is_busy_is_not_taken(tmp_path: Path) -> None:
    """Nobody would reach it again."""
    address = UnixAddress(str(tmp_path / "s"))
    with ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(address.raw)
        busy.listen(0)
        inode, full = inode_of(address), False
        while not full:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            full = client.connect_ex(address.raw) != 0
        with pytest.raises(ConfigError, match="in use"):
            listen_unix(address)
        assert inode_of(address) == inode


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_root_may_dial_a_users_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 65534)
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        check_user(one, "root's")
