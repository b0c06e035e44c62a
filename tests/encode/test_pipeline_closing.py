"""Leaving a pipeline while it works, by somebody who has no time to wait for it."""

from __future__ import annotations

import asyncio
import threading

import pytest
from stepped import Bench, Stepped

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


async def test_who_is_cancelled_while_threads_end_leaves_none_of_them_for_ever() -> None:
    """Only those that were waited for had been told to: the tower stayed, with its weights, as long as the process."""
    encoder, before = Stepped(), set(threading.enumerate())
    encoder.slow[2] = threading.Event()
    made = Bench(encoder)
    await made.pipeline.__aenter__()
    threads = set(threading.enumerate()) - before
    made.start(1)
    assert await made.call() == [(1, 16)]
    made.start(2)
    closing = asyncio.create_task(made.pipeline.__aexit__(None, None, None))
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    encoder.slow[2].set()
    encoder.permits.release()
    for thread in threads:
        await asyncio.to_thread(thread.join, 5.0)
    assert len(threads) == 3 and not any(thread.is_alive() for thread in threads)
