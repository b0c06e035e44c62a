"""Words between an ipc receiver and those that map its pool."""

from __future__ import annotations

import pytest

from aiodisagg.errors import WriteRefused
from aiodisagg.transport.attach import LEASES_PER_MESSAGE
from aiodisagg.transport.base import Slice
from aiodisagg.transport.ipc import IpcTransport
from aiodisagg.transport.testing import Kit

pytestmark = pytest.mark.anyio


async def test_any_number_of_leases_is_barred_at_once(no_leaks: None) -> None:
    """Of which only so many fit a message."""
    async with Kit(IpcTransport).pair() as (receiver, writer, remote, name):
        last = 2 * LEASES_PER_MESSAGE + 1
        await receiver.transport.revoke(name, range(1, last + 1))
        for lease in (1, LEASES_PER_MESSAGE + 1, last):
            with pytest.raises(WriteRefused, match="revoked"):
                await writer.write(remote, [Slice(memoryview(b"x"), 0, lease)])
