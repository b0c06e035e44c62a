"""Who shares a fetch, and what each of them is told."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from aiodisagg.language.fanout import Data
from aiodisagg.language.sharing import INLINE_BYTES, Sharing
from aiodisagg.language.trace import Traces
from aiodisagg.peer.driver import Tasks
from aiodisagg.protocol.events import Fail, ItemSpec
from aiodisagg.protocol.messages import ItemKey, Urgency

pytestmark = pytest.mark.anyio
A, B = ItemKey(1, 0), ItemKey(2, 0)
SPEC = ItemSpec("digest", "image", (1, 4, 4), 4, 1.0, (b"",))


def nothing(*what: object) -> None: ...


@pytest.mark.parametrize("row_bytes", [4, INLINE_BYTES], ids=["on the loop", "on a thread"])
async def test_who_cannot_be_given_the_rows_that_came_before_is_told_so_and_the_other_is_served(row_bytes: int) -> None:
    told: dict[ItemKey, Fail | None] = {}
    all_told = asyncio.Event()

    def deliver(key: ItemKey, start: int, data: Data) -> None:
        if key == B and start == 0:
            raise MemoryError("no room")

    def ended(key: ItemKey, failed: Fail | None) -> None:
        told[key] = failed
        if len(told) == 2:
            all_told.set()

    tasks = Tasks("test")
    sharing = Sharing(
        nothing, nothing, nothing, deliver=deliver, ended=ended, cache_bytes=4 * row_bytes,
        row_bytes=row_bytes, tasks=tasks, traces=Traces(), accelerator=None,
    )  # fmt: skip
    two_rows = memoryview(bytes(2 * row_bytes))
    sharing.request([(A, SPEC)], 60.0)
    sharing.deliver(A, 0, two_rows)
    sharing.request([(B, SPEC)], 60.0)
    sharing.deliver(A, 2, two_rows)
    sharing.landed(A)
    async with asyncio.timeout(30):
        await all_told.wait()
    assert told == {A: None, B: Fail(B, "undelivered", "MemoryError('no room')", ())}
    assert sharing.has("digest")
    await tasks.aclose()


async def test_who_began_a_fetch_that_fails_beside_a_second_one_still_has_its_deadline() -> None:
    told: list[tuple[ItemKey, str]] = []
    one_told = asyncio.Event()

    def ended(key: ItemKey, failed: Fail | None) -> None:
        told.append((key, "" if failed is None else failed.code))
        one_told.set()

    sharing = Sharing(
        nothing, nothing, nothing, deliver=lambda key, start, data: None, ended=ended, cache_bytes=1 << 20,
        row_bytes=4, tasks=Tasks("test"), traces=Traces(), accelerator=None,
    )  # fmt: skip
    sharing.request([(A, SPEC)], 0.02)
    sharing.request([(B, SPEC)], 60.0)
    assert sharing.hedge(A) is not None
    sharing.failed(Fail(A, "encode_failed", "the encoder raised", ()))
    async with asyncio.timeout(30):
        await one_told.wait()
    assert told == [(A, "deadline")]
    sharing.cancel(B)
    sharing.close()


@pytest.mark.parametrize("code", ["invalid_media", "wrong_shape", "too_large", "poison"])
async def test_what_is_the_items_own_fault_is_told_at_once_whatever_a_second_fetch_does(code: str) -> None:
    """A picture that is none was told so after its deadline: its hedge waited for a peer."""
    told: list[tuple[ItemKey, Fail | None]] = []
    dropped: list[ItemKey] = []
    sharing = Sharing(
        nothing, dropped.append, nothing, deliver=lambda key, start, data: None,
        ended=lambda key, failed: told.append((key, failed)), cache_bytes=1 << 20, row_bytes=4,
        tasks=Tasks("test"), traces=Traces(), accelerator=None,
    )  # fmt: skip
    sharing.request([(A, SPEC)], 60.0)
    sharing.request([(B, SPEC)], 60.0)
    second = sharing.hedge(A)
    assert second is not None
    failed = Fail(A, code, "why", ())
    sharing.failed(failed)
    assert told == [(A, failed), (B, dataclasses.replace(failed, key=B))] and dropped == [second[0]]
    sharing.close()


async def test_who_has_left_gets_no_rows_of_what_the_others_still_wait_for() -> None:
    given: list[ItemKey] = []
    sharing = Sharing(
        nothing, nothing, nothing, deliver=lambda key, start, data: given.append(key), ended=nothing,
        cache_bytes=1 << 20, row_bytes=4, tasks=Tasks("test"), traces=Traces(), accelerator=None,
    )  # fmt: skip
    sharing.request([(A, SPEC)], 60.0)
    sharing.request([(B, SPEC)], 60.0)
    sharing.deliver(A, 0, memoryview(bytes(8)))
    sharing.cancel(A)
    sharing.deliver(A, 2, memoryview(bytes(8)))
    assert given == [A, B, B]
    sharing.close()


async def test_when_one_of_two_fetches_has_landed_the_other_is_dropped() -> None:
    told: list[tuple[ItemKey, Fail | None]] = []
    dropped: list[ItemKey] = []
    sharing = Sharing(
        nothing, dropped.append, nothing, deliver=nothing, ended=lambda key, failed: told.append((key, failed)),
        cache_bytes=1 << 20, row_bytes=4, tasks=Tasks("test"), traces=Traces(), accelerator=None,
    )  # fmt: skip
    sharing.request([(A, SPEC)], 60.0)
    second = sharing.hedge(A)
    assert second is not None and sharing.hedge(A) is None, "two are enough"
    sharing.deliver(second[0], 0, memoryview(bytes(16)))
    sharing.landed(second[0])
    assert told == [(A, None)] and dropped == [A] and sharing.has("digest")
    assert sharing._keeping_bytes == 0, "of what is on its way, each digest once"
    sharing.close()


async def test_a_second_fetch_goes_first_and_one_that_goes_on_has_waited_already() -> None:
    fetched: list[tuple[ItemKey, ItemSpec, float]] = []
    sharing = Sharing(
        fetched.extend, nothing, nothing, deliver=lambda key, start, data: None, ended=lambda key, failed: None,
        cache_bytes=1 << 20, row_bytes=4, tasks=Tasks("test"), traces=Traces(), accelerator=None,
    )  # fmt: skip
    spec = dataclasses.replace(SPEC, urgency=Urgency(10.0, 3, 64))
    sharing.request([(A, spec)], 5.0)
    sharing.request([(B, spec)], 3600.0)
    second = sharing.hedge(A)
    assert second is not None and second[1].urgency == Urgency(0.0, 3, 64)
    for leg in (A, second[0]):
        sharing._loop = Later(sharing._loop, 3.0)  # type: ignore[assignment]
        sharing.failed(Fail(leg, "deadline", "late", ()))
    key, heir, left_s = fetched[-1]
    assert key == B and heir.urgency.due_s == pytest.approx(10.0 - (3600.0 - left_s))
    assert heir.urgency.due_s < 4.0
    sharing.close()


async def test_a_fetch_that_goes_on_goes_as_early_as_the_first_of_those_who_are_left() -> None:
    """It went by the next one to come, whose class may be the lowest."""
    fetched: list[tuple[ItemKey, ItemSpec, float]] = []
    sharing = Sharing(
        fetched.extend, nothing, nothing, deliver=nothing, ended=nothing,
        cache_bytes=1 << 20, row_bytes=4, tasks=Tasks("test"), traces=Traces(), accelerator=None,
    )  # fmt: skip
    for room, (priority, timeout_s) in enumerate([(-8, 5.0), (8, 60.0), (-1, 60.0), (0, 60.0)]):
        spec = dataclasses.replace(SPEC, urgency=Urgency(10.0, priority, 64))
        sharing.request([(ItemKey(room, 0), spec)], timeout_s)
    sharing._loop = Later(sharing._loop, 6.0)  # type: ignore[assignment]
    sharing.failed(Fail(ItemKey(0, 0), "deadline", "late", ()))
    (_, (key, spec, _)) = fetched
    assert (key, spec.urgency.priority) == (ItemKey(1, 0), -1) and 0.0 <= spec.urgency.due_s <= 4.0
    sharing.close()


async def test_whoever_joins_a_fetch_says_how_urgent_it_is_to_all_that_fetch() -> None:
    told: list[tuple[ItemKey, Urgency]] = []
    sharing = Sharing(
        nothing, nothing, lambda key, urgency: told.append((key, urgency)), deliver=nothing, ended=nothing,
        cache_bytes=1 << 20, row_bytes=4, tasks=Tasks("test"), traces=Traces(), accelerator=None,
    )  # fmt: skip
    sharing.request([(A, SPEC)], 60.0)
    second = sharing.hedge(A)
    assert second is not None and not told
    urgent = Urgency(10.0, -1, 64)
    sharing.request([(B, dataclasses.replace(SPEC, urgency=urgent))], 60.0)
    assert told == [(A, urgent), (second[0], urgent)]
    sharing.close()


class Later:
    """A loop whose clock is ahead."""

    def __init__(self, loop: asyncio.AbstractEventLoop, by_s: float) -> None:
        self._loop, self._by_s = loop, by_s

    def time(self) -> float:
        return self._loop.time() + self._by_s

    def __getattr__(self, name: str) -> object:
        return getattr(self._loop, name)
