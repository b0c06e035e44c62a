"""Mooncake's engine, over its TCP: every promise of the interface on both loops, and what is its own."""

from __future__ import annotations

import importlib.util

import pytest

from aiodisagg.transport.conformance import CHECKS
from aiodisagg.transport.mooncake import MooncakeTcpTransport
from aiodisagg.transport.mooncake_engine import Engine
from aiodisagg.transport.testing import Kit
from tests.conftest import LOOPS

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        importlib.util.find_spec("mooncake") is None, reason="needs the extra: pip install 'aiodisagg[mooncake-cpu]'"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def engine_imported() -> None:
    """The library opens some descriptors with its first engine and keeps them; not a leak of any test."""
    Engine("mooncake-tcp", "tcp", "127.0.0.1", "", 5).close()


@pytest.mark.parametrize("anyio_backend", LOOPS, indirect=True)
@pytest.mark.parametrize("check", CHECKS)
async def test_conformance(check: str, no_leaks: None) -> None:
    huge_bytes = (64 if check.startswith("huge") else 32) << 20
    await CHECKS[check](Kit(MooncakeTcpTransport, huge_bytes=huge_bytes))
