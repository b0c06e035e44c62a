"""An encode peer ends in the middle of a transfer: another one goes on with the rows that are missing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from .pair import ROW_BYTES, pair
from .test_cut_transports import TRANSPORTS

pytestmark = pytest.mark.anyio
ROWS, BLOCK_ROWS = 24, 2


@pytest.mark.parametrize("writes", [2, 5, 9])
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_another_peer_continues_at_the_missing_rows(
    transport: str, writes: int, tmp_path: Path, no_leaks: None
) -> None:
    async with pair(tmp_path, transport, encoders=2, blocks=3, block_rows=BLOCK_ROWS) as made:
        fetching = asyncio.ensure_future(made.fetch([(5, ROWS)]))
        await made.until(lambda: len(made.written) >= writes)
        first, second = sorted(made.encoders, key=lambda peer: peer.name != made.written[0][0])
        made.addresses.remove(first.address)
        await first.__aexit__(None, None, None)
        keys = await fetching
        await made.idle()
        received = made.receiver.receiver.counters
        assert received.total("received", peer=first.config.incarnation) > 0
        missing = ROWS * ROW_BYTES - received.total("received", peer=first.config.incarnation)
        assert second.sender.counters.total("sent") == received.total("received", peer=second.config.incarnation)
        assert second.sender.counters.total("sent") == missing
        # Written by the first, but its word was lost with it: at most what it had been lent.
        assert made.again(keys).total() <= 2 * BLOCK_ROWS
