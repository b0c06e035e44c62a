"""Every transport keeps every promise of the interface, on both loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aiodisagg.transport.base import Transport
from aiodisagg.transport.conformance import CHECKS
from aiodisagg.transport.ipc import IpcTransport
from aiodisagg.transport.memory import MemoryTransport
from aiodisagg.transport.testing import Kit
from tests.conftest import LOOPS

MAKERS: dict[str, Callable[[], Transport]] = {
    "memory": MemoryTransport,
    "ipc": lambda: IpcTransport(handshake_timeout_s=10),
}

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("transport", MAKERS)
async def test_conformance(transport: str, check: str, no_leaks: None) -> None:
    await CHECKS[check](Kit(MAKERS[transport]))
