"""Cut at message k over real links and transports: the transfer resumes, and sends next to nothing twice."""

from __future__ import annotations

import importlib.util
from itertools import count
from pathlib import Path

import pytest

from aiodisagg.protocol.messages import Commit, Grant, Offer, Release, Want

from .pair import ROW_BYTES, Scissors, pair

pytestmark = pytest.mark.anyio

TRANSPORTS = [
    name for name in ("memory", "ipc", "stream", "zmq") if importlib.util.find_spec(f"aiodisagg.transport.{name}")
]
BLOCK_ROWS = 2
SIZES = (9, 4, 6)


@pytest.mark.parametrize(("scale", "step"), [(1, 1), (1280, 3)], ids=["small", "large"])
@pytest.mark.parametrize("delivered", [False, True], ids=["lost", "delivered"])
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_cut_at_every_message(
    transport: str,
    delivered: bool,
    scale: int,
    step: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_leaks: None,
) -> None:
    """Three items of up to five windows; the k-th message of either side never arrives, or is the last to arrive.

    Large chunks of 320 KiB are copied on threads, so that a cut finds them on their way.
    """
    scissors = Scissors(monkeypatch, delivered=delivered)
    async with pair(tmp_path, transport, blocks=3, block_rows=BLOCK_ROWS * scale) as made:
        counters = made.encoders[0].sender.counters
        for k in count(1, step):
            scissors.arm(k)
            resent = counters.total("resent")
            keys = await made.fetch([(100 * k + rows, rows * scale) for rows in SIZES])
            await made.idle()
            again = made.again(keys)
            assert all(rows <= BLOCK_ROWS * scale for rows in again.values()), (k, again)
            assert counters.total("resent") - resent == sum(again.values()) * ROW_BYTES, k
            made.written.clear()
            if not scissors.cut:
                break
        # The last one ran to its end undisturbed. How many grants and stages are said depends on time; not the rest.
        assert not again.total() and k > scissors.said.total()
        assert scissors.said[Commit] == sum(-(-rows // BLOCK_ROWS) for rows in SIZES)
        assert all(scissors.said[word] >= len(SIZES) for word in (Want, Offer, Grant, Release))
