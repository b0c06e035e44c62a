"""Threads that prepare items: decode, resize and cut them, the shortest request first, as far as there is room behind.

What is prepared and not yet encoded takes memory: at the bound the threads wait until ``free`` is told. An item is
taken off the line and begun by whoever is free, with no word to the loop in between, so many tiny items cost no turn of
it each.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable

from aiodisagg.errors import MediaError
from aiodisagg.models.base import ItemKind, Patches, item_digest
from aiodisagg.protocol.events import StartEncode
from aiodisagg.scheduler.order import Claim, Order, Queue

Prepare = Callable[[StartEncode], Patches]
_DIGEST = re.compile(r"[0-9a-f]{32}")


class Misnamed(MediaError):
    """The files are not those that the digest names."""


def check_name(job: StartEncode) -> None:
    """Raises Misnamed. Rows are kept by digest, for every language peer: one that sends other files for a picture of
    somebody else would have its own seen there. Digests of another form are the business of who made them up.
    """
    if not _DIGEST.fullmatch(job.digest):
        return
    kind = ItemKind(job.kind)
    written = [job.fps, int(job.fps)] if job.fps.is_integer() else [job.fps]  # older ones have it as their caller does
    if not any(item_digest(kind, job.grid_thw, fps, job.media) == job.digest for fps in written):
        raise Misnamed("media", f"the files are not those of {job.digest}")


class Preparer:
    """Owns the threads; its methods may be called on any thread.

    Args:
        prepare: called on the threads; what it raises goes to ``done``.
        began: called on a thread before ``prepare``.
        done: called on the same thread with the patches or the error, and the seconds it took.
        room_patches: nothing is begun while as many are prepared, by the memory that they take.
    """

    def __init__(
        self, prepare: Prepare, *, began: Callable[[StartEncode], None],
        done: Callable[[StartEncode, Patches | Exception, float], None], threads: int, room_patches: int,
    ) -> None:  # fmt: skip
        self._prepare, self._began, self._done, self._room_patches = prepare, began, done, room_patches
        self._line: Queue[str] = Queue(Order.SHORT_FIRST)
        self._waiting: dict[str, StartEncode] = {}
        self._prepared_patches = 0
        self._wake = threading.Condition()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, name=f"aiodisagg-prepare-{index}", daemon=True)
            for index in range(threads)
        ]

    @property
    def prepared_patches(self) -> int:
        """Patches that are prepared and were not freed."""
        return self._prepared_patches

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def add(self, job: StartEncode, claim: Claim) -> None:
        """``claim``: on ``time.monotonic``."""
        with self._wake:
            self._waiting[job.digest] = job
            self._line.add(job.digest, claim)
            self._wake.notify()

    def change(self, digest: str, claim: Claim) -> None:
        """From now on this is the claim of a job, if it waits."""
        with self._wake:
            if digest in self._waiting:
                self._line.remove(digest)
                self._line.add(digest, claim)

    def cancel(self, job: StartEncode) -> bool:
        """Takes a job off the line; False: it has begun."""
        with self._wake:
            if self._waiting.pop(job.digest, None) is None:
                return False
            self._line.remove(job.digest)
            return True

    def free(self, patches: int) -> None:
        """So many prepared patches are not needed any more."""
        with self._wake:
            was_full = self._prepared_patches >= self._room_patches
            self._prepared_patches -= patches
            if was_full:
                self._wake.notify_all()

    def stop(self) -> None:
        """The threads end, each after the item it is at; what waits is dropped."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()

    def close(self) -> None:
        """Stops them, and returns when they have ended. Blocking."""
        self.stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    # -- on the threads ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._next()) is not None:
            began = time.monotonic()
            self._began(job)
            outcome: Patches | Exception
            try:
                outcome = self._prepare(job)
            except Exception as error:
                outcome = error
            else:
                with self._wake:
                    self._prepared_patches += outcome.room
            self._done(job, outcome, time.monotonic() - began)

    def _next(self) -> StartEncode | None:
        with self._wake:
            self._wake.wait_for(lambda: self._closing or (self._waiting and self._has_room))
            first = None if self._closing else self._line.first(time.monotonic())
            if first is None:
                return None
            self._line.remove(first)
            return self._waiting.pop(first)

    @property
    def _has_room(self) -> bool:
        return self._prepared_patches < self._room_patches
