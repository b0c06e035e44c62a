"""A receiver that is stopped during a quarantine: the time in which it did not run does not count."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from aiodisagg.transport.mooncake_side import Attachment, Bar, Barred, Message, Quarantine, Wire

pytestmark = pytest.mark.anyio

QUARANTINE_S = 1000.0


class Words:
    """What a writer says, and then the end of its connection."""

    def __init__(self, *words: Message) -> None:
        self.words = list(words)
        self.said: list[Message] = []

    def say(self, message: Message) -> None:
        self.said.append(message)

    async def hear(self) -> Message | None:
        return self.words.pop(0) if self.words else None

    async def drain(self) -> None:
        pass


class Stops:
    """Time that passes at once, as a process sees it that was stopped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop, self.passed_s = asyncio.get_running_loop(), 0.0
        real = self.loop.time
        monkeypatch.setattr(self.loop, "time", lambda: real() + self.passed_s)

    async def stop(self, seconds: float) -> None:
        self.passed_s += seconds
        for _ in range(10):
            await asyncio.sleep(0)


async def test_a_stop_is_not_the_quarantine_of_a_writer_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    stops = Stops(monkeypatch)
    attachment = Attachment(cast(Wire, Words()), "writer", QUARANTINE_S, lambda _: None)
    (revoked,) = attachment.bar([1])
    await attachment.serve(lambda nonce: True)
    await stops.stop(100 * QUARANTINE_S)
    assert not revoked.done(), "what it had sent is read only now"
    for _ in range(Quarantine.STEPS):
        await stops.stop(QUARANTINE_S / Quarantine.STEPS)
    assert revoked.done() and attachment.ended.done()


async def test_a_stop_is_not_the_quarantine_after_a_late_word(monkeypatch: pytest.MonkeyPatch) -> None:
    stops = Stops(monkeypatch)
    words = Words(Barred(1, late=True))
    attachment = Attachment(cast(Wire, words), "writer", 2 * QUARANTINE_S, lambda _: None)
    (revoked,) = attachment.bar([1])
    assert words.said == [Bar(1, [1])]
    await attachment.serve(lambda nonce: True)
    await stops.stop(100 * QUARANTINE_S)
    assert not revoked.done()
    for _ in range(Quarantine.STEPS):
        await stops.stop(2 * QUARANTINE_S / Quarantine.STEPS)
    assert revoked.done()
