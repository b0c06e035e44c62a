"""Mooncake's engine: every promise of the interface on both loops, and what is its own.

Over its TCP; ``AIODISAGG_MOONCAKE=mooncake`` runs the same over RDMA, as ``make test-rdma`` does.
"""

from __future__ import annotations

import os

import pytest

from aiodisagg.errors import TransportUnavailable
from aiodisagg.transport.conformance import CHECKS
from aiodisagg.transport.mooncake import MooncakeTcpTransport, MooncakeTransport
from aiodisagg.transport.mooncake_engine import Engine
from aiodisagg.transport.testing import Kit
from tests.conftest import LOOPS

RDMA = os.environ.get("AIODISAGG_MOONCAKE") == "mooncake"

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module", autouse=True)
def engine_imported() -> None:
    """The library opens some descriptors with its first engine and keeps them; not a leak of any test."""
    name, protocol = ("mooncake", "rdma") if RDMA else ("mooncake-tcp", "tcp")
    try:
        Engine(name, protocol, "127.0.0.1", "", 5).close()
    except TransportUnavailable as error:
        if isinstance(error.__cause__, ImportError):
            pytest.skip(str(error))
        raise


def kit(huge_bytes: int) -> Kit:
    if RDMA:  # without a device, in an emulated machine: everything takes fifty times as long
        return Kit(
            lambda: MooncakeTransport(chunk_bytes=1 << 20, connect_timeout_s=60),
            12 << 20,
            lag_s=60,
            lag_cpu_s=5,
            patience_s=1800,
        )
    return Kit(MooncakeTcpTransport, huge_bytes)


@pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)
@pytest.mark.parametrize("check", CHECKS)
async def test_conformance(check: str, no_leaks: None) -> None:
    await CHECKS[check](kit((64 if check.startswith("huge") else 32) << 20))
