"""Rows of one digest on their way to everybody who wants them, from one fetch or two.

Chunks come on any thread. A chunk is claimed (what another fetch brought already is left out), delivered to whoever
shares, copied to the *keep*, published, and delivered to whoever joined meanwhile; whoever joins later is first given
what was published before. Publishing and joining take one lock, so nobody misses a row and nobody gets one twice. The
keep is what is cached when all rows are there.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from aiodisagg.device.copies import Accelerator, DeviceBytes, address_of
from aiodisagg.protocol.messages import ItemKey
from aiodisagg.protocol.ranges import RangeSet, Span

logger = logging.getLogger(__name__)

Data = memoryview | DeviceBytes
Deliver = Callable[[ItemKey, int, Data], None]


class FanOut:
    """One digest's rows. Methods say which threads they are for.

    Args:
        deliver: as ``RowReceiver`` has it.
        keeps: whether there is a keep: without one, nobody can join and nothing can be cached.
        accelerator: copies what lies in device memory.
    """

    def __init__(
        self, rows: int, row_bytes: int, deliver: Deliver, *, keeps: bool, accelerator: Accelerator | None
    ) -> None:  # fmt: skip
        self.rows, self.row_bytes, self.size_bytes = rows, row_bytes, rows * row_bytes
        self.counted = 0
        """Rows that were already told of; the loop's."""
        self.legs = 0
        """Fetches that fill it; the loop's."""
        self.failed: dict[ItemKey, Exception] = {}
        """Who could not be given its rows, and why; whole once no delivery is under way."""
        self._deliver, self._accelerator = deliver, accelerator
        self._keep = np.empty(rows * row_bytes, np.uint8) if keeps else None
        self._lock = threading.Lock()
        self._claimed, self._published = RangeSet(), RangeSet()
        self._sharers: dict[ItemKey, None] = {}
        self._active = 0
        self._loop = asyncio.get_running_loop()
        self._idle: Callable[[], None] | None = None

    @property
    def keeps(self) -> bool:
        return self._keep is not None

    @property
    def here(self) -> int:
        """Rows that were published. Any thread."""
        with self._lock:
            return len(self._published)

    @property
    def complete(self) -> bool:
        """Every row was delivered to every sharer that has not ``failed``. Any thread."""
        with self._lock:
            return self._active == 0 and self._published.covers(0, self.rows)

    def kept(self) -> np.ndarray | None:
        """All rows, uint8 [rows * row_bytes], once ``complete``."""
        return self._keep

    def share(self, key: ItemKey) -> tuple[Span, ...]:
        """The key gets all rows that are published from now on; ``catch_up`` owes it the spans returned. The loop."""
        with self._lock:
            self._sharers[key] = None
            self._active += bool(self._published)
            return self._published.spans()

    def leave(self, key: ItemKey) -> None:
        """The key gets nothing more, but for one delivery under way. Any thread."""
        with self._lock:
            self._sharers.pop(key, None)

    def shared_by(self, key: ItemKey) -> bool:
        return key in self._sharers

    def deliver(self, start: int, data: Data) -> None:
        """A chunk came. Any thread. Whoever cannot be given it has ``failed``, and the others do not suffer from it.

        If it cannot be kept, that is raised, and the chunk is as if it had never come.
        """
        size = data.size_bytes if isinstance(data, DeviceBytes) else data.nbytes
        stop = start + size // self.row_bytes
        with self._lock:
            gaps = tuple(self._claimed.gaps(start, stop))
            for gap in gaps:
                self._claimed.add(*gap)
            self._active += 1
        with self._working():
            for i, (first, last) in enumerate(gaps):
                part = self._part(data, first - start, last - start)
                try:
                    self._publish(first, last, part)
                except BaseException:
                    with self._lock:
                        self._published.remove(first, last)
                        for gap in gaps[i:]:
                            self._claimed.remove(*gap)
                    raise

    def _publish(self, first: int, last: int, part: Data) -> None:
        with self._lock:
            sharers = self._sharers.copy()
        for key in sharers:  # first who waits for it, then the copy for later
            self._give(key, first, part)
        if self._keep is not None:
            self._copy(self._keep[first * self.row_bytes : last * self.row_bytes], part)
        with self._lock:
            self._published.add(first, last)
            joined = [key for key in self._sharers if key not in sharers]
        for key in joined:
            self._give(key, first, part)

    def _give(self, key: ItemKey, first: int, part: Data) -> None:
        try:
            self._deliver(key, first, part)
        except Exception as error:
            logger.exception("item %s: rows could not be delivered", key)
            self.failed[key] = error
            self.leave(key)

    def catch_up(self, key: ItemKey, spans: tuple[Span, ...]) -> None:
        """Delivers what ``share`` returned, unless that was nothing, as ``deliver`` does. Any thread, once."""
        assert self._keep is not None
        with self._working():  # to its end: whoever is told that nothing is under way must see what failed
            for start, stop in spans:
                if self.shared_by(key):
                    self._give(key, start, self._keep[start * self.row_bytes : stop * self.row_bytes].data)

    def when_idle(self, then: Callable[[], None]) -> None:
        """Calls ``then`` once when no delivery is under way, now if that is so. The loop."""
        with self._lock:
            if self._active:
                self._idle = then
                return
        then()

    @contextmanager
    def _working(self) -> Iterator[None]:
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1
                then = self._idle if self._active == 0 else None
                if then is not None:
                    self._idle = None
            if then is not None:
                self._loop.call_soon_threadsafe(then)

    def _part(self, data: Data, first: int, last: int) -> Data:
        start, stop = first * self.row_bytes, last * self.row_bytes
        if isinstance(data, DeviceBytes):
            return DeviceBytes(data.address + start, stop - start, data.owner)
        return data[start:stop]

    def _copy(self, target: np.ndarray, part: Data) -> None:
        if isinstance(part, DeviceBytes):
            assert self._accelerator is not None
            self._accelerator.outward.copy(address_of(target.data), part.address, part.size_bytes)
        else:
            np.copyto(target, np.frombuffer(part, np.uint8))
