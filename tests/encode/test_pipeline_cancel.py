"""The pipeline: what is cancelled in the moment in which it goes from the preparing thread to the tower."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from stepped import PATIENCE_S, Stepped, bench

from aiodisagg.protocol.events import EncodeStopped, RowsReady

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


@pytest.mark.parametrize("moment", ["before it is in the line", "after"])
async def test_what_is_cancelled_before_the_loop_hears_that_it_is_prepared_never_reaches_the_tower(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tower encoded it for nobody, if the loop was busy."""
    encoder, cancelled = Stepped(), threading.Event()
    prepared = {"1": threading.Event(), "2": threading.Event()}
    async with bench(encoder, prepare_threads=1) as made:
        pipeline, first = made.pipeline, made.start(0)
        await made.call()
        add = pipeline._tower.add

        def adds(digest: str, *what: Any, **more: Any) -> None:
            if digest == "1" and moment != "after":
                prepared[digest].set()
                assert cancelled.wait(PATIENCE_S)
            add(digest, *what, **more)
            prepared[digest].set()

        monkeypatch.setattr(pipeline._tower, "add", adds)
        made.start(1)
        assert prepared["1"].wait(PATIENCE_S)  # the loop has no turn from here on
        pipeline.cancel("1")
        cancelled.set()
        last = made.start(2)
        assert prepared["2"].wait(PATIENCE_S)
        encoder.permits.release(2)
        assert encoder.calls.get(timeout=PATIENCE_S) == [(2, 16)]
        await made.until(RowsReady(first, 4))
        await made.until(RowsReady(last, 4))
        await made.until(EncodeStopped("1", "cancelled", "nobody wants it any more", True))
        assert pipeline.prepared_patches == 0 and pipeline.waiting == 0


async def test_a_late_thread_takes_nobody_elses_item_out_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that was cancelled, encoded all the same and asked for again was never encoded, and nobody was told."""
    encoder, go_on, adding = Stepped(), threading.Event(), [threading.Event(), threading.Event()]
    encoder.slow[3] = threading.Event()
    async with bench(encoder, prepare_threads=2) as made:
        pipeline, times = made.pipeline, iter(adding)
        add = pipeline._tower.add

        def adds(digest: str, *what: Any, **more: Any) -> None:
            add(digest, *what, **more)
            if digest == "1":
                (added := next(times)).set()
                assert added is not adding[0] or go_on.wait(PATIENCE_S)

        monkeypatch.setattr(pipeline._tower, "add", adds)
        made.start(1)
        assert await made.call() == [(1, 16)]
        pipeline.cancel("1")
        encoder.permits.release()
        await made.until(RowsReady("1", 4))
        pipeline.drop("1")
        await made.in_order(2)
        made.start(1)
        assert await asyncio.to_thread(adding[1].wait, PATIENCE_S)
        made.start(3)  # the other thread is at it
        go_on.set()
        await made.in_order(4)
        encoder.permits.release(3)
        await made.until(RowsReady("4", 4))
        await made.until(RowsReady("1", 4), times=2)
