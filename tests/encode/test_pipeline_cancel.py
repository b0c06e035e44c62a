"""The pipeline: what is cancelled in the moment in which it goes from the preparing thread to the tower."""

from __future__ import annotations

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
