"""An encode peer and a receiver in one process, over real links and transports; and scissors for their link."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from aiodisagg.bench.synthetic import SyntheticEncoder, fill, item_of, synthetic_model
from aiodisagg.encode.service import EncodeService
from aiodisagg.language.rows import RowReceiver
from aiodisagg.link.config import LinkConfig
from aiodisagg.link.link import Link
from aiodisagg.peer.config import EncodeConfig, LanguageConfig
from aiodisagg.protocol.events import Fail, LinkLost, Write
from aiodisagg.protocol.messages import ItemKey, Message
from aiodisagg.protocol.ranges import RangeSet

MODEL = synthetic_model(hidden_size=16, levels=3)
ROW_BYTES = 128
PATIENCE_S = 60.0


def rows_of(seed: int, rows: int) -> bytes:
    found = np.empty((rows, ROW_BYTES), np.uint8)
    fill(found, seed)
    return found.tobytes()


class Scissors:
    """Cuts the link of the k-th message of either side: instead of it, or right after it was handled.

    ``said``: messages since ``arm``, by their type.
    """

    def __init__(self, monkeypatch: Any, *, delivered: bool) -> None:
        self.said, self.at = Counter[type](), -1
        send_nowait, send, deliver = Link.send_nowait, Link.send, Link.deliver

        def send_or_cut(link: Link, message: Message) -> None:
            if not delivered and self._now(message):
                link.abort()
            send_nowait(link, message)

        async def wait_or_cut(link: Link, message: Message) -> None:
            if not delivered and self._now(message):
                link.abort()
            await send(link, message)

        async def deliver_and_cut(link: Link, handle: Callable[[Message], None]) -> None:
            def handle_and_cut(message: Message) -> None:
                handle(message)
                if delivered and self._now(message):
                    link.abort()

            await deliver(link, handle_and_cut)

        monkeypatch.setattr(Link, "send_nowait", send_or_cut)
        monkeypatch.setattr(Link, "send", wait_or_cut)
        monkeypatch.setattr(Link, "deliver", deliver_and_cut)

    def _now(self, message: Message) -> bool:
        self.said[type(message)] += 1
        return self.said.total() == self.at

    def arm(self, at: int) -> None:
        self.said, self.at = Counter[type](), at

    @property
    def cut(self) -> bool:
        return 0 < self.at <= self.said.total()


class Pair:
    """``written``: rows written by item and encode peer, once for each time."""

    def __init__(self) -> None:
        self.encoders: list[EncodeService] = []
        self.receiver: RowReceiver
        self.addresses: list[str] = []
        self.written: list[tuple[str, ItemKey, int, int]] = []
        self._turn = asyncio.Event()
        self._rooms = 0
        self._found: dict[ItemKey, bytearray] = {}
        self._delivered: dict[ItemKey, np.ndarray] = {}
        self._ends: dict[ItemKey, asyncio.Future[None]] = {}

    def deliver(self, key: ItemKey, start: int, data: memoryview) -> None:
        self._found[key][start * ROW_BYTES : start * ROW_BYTES + data.nbytes] = data
        self._delivered[key][start : start + data.nbytes // ROW_BYTES] += 1

    def ended(self, key: ItemKey, failed: Fail | None) -> None:
        if failed is None:
            self._ends[key].set_result(None)
        else:
            self._ends[key].set_exception(AssertionError(f"{failed.code}: {failed.message}: {failed.story}"))

    async def fetch(self, items: Sequence[tuple[int, int]]) -> list[ItemKey]:
        """Fetches items given as (seed, rows); every byte is compared and every row was delivered once."""
        self._rooms += 1
        keys = [ItemKey(self._rooms, index) for index in range(len(items))]
        for key, (seed, rows) in zip(keys, items, strict=True):
            self._ends[key] = asyncio.get_running_loop().create_future()
            self._found[key] = bytearray(rows * ROW_BYTES)
            self._delivered[key] = np.zeros(rows, int)
            self.receiver.request([(key, item_of(seed, rows))], PATIENCE_S)
        await asyncio.gather(*(self._ends[key] for key in keys))
        for key, (seed, rows) in zip(keys, items, strict=True):
            assert self._found.pop(key) == rows_of(seed, rows)
            assert (self._delivered.pop(key) == 1).all()
        return keys

    def again(self, keys: Sequence[ItemKey]) -> Counter[ItemKey]:
        """Rows of each item that were written more than once, by whomever."""
        found: Counter[ItemKey] = Counter()
        for key in keys:
            seen = RangeSet()
            for _, who, start, stop in self.written:
                found[key] += stop - start - seen.add(start, stop) if who == key else 0
        return found

    def watch(self, driver: Any, react: Callable[[object], None] = lambda event: None) -> None:
        """Every event of a driver is a turn."""
        feed = driver.feed

        def fed(event: object) -> None:
            feed(event)
            react(event)
            self._turn.set()

        driver.feed = fed

    async def until(self, condition: Callable[[], object]) -> None:
        """Returns when the condition holds; looks after every event."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._turn.clear()
                await self._turn.wait()

    async def idle(self) -> None:
        """Every block is free again, no item is left at the receiver, and every link is up."""
        rows = self.receiver
        await self.until(
            lambda: (
                (rows.pool.free, len(rows.receiver.items)) == (rows.pool.blocks, 0)
                and len(rows.peers.linked) == len(self.addresses)
            )
        )

    def redial(self, event: object) -> None:
        """A lost link is dialled again at once, not after a pause."""
        if isinstance(event, LinkLost):
            for address in self.addresses:
                asyncio.get_running_loop().call_soon(self.receiver.peers.add, address)


@asynccontextmanager
async def pair(
    folder: Path,
    transport: str,
    *,
    encoders: int = 1,
    blocks: int = 3,
    block_rows: int = 2,
    link: LinkConfig | None = None,
    encode_link: LinkConfig | None = None,
    **encode: Any,
) -> AsyncIterator[Pair]:
    made = Pair()
    async with AsyncExitStack() as stack:
        config = LanguageConfig(
            model=folder,
            transports=(transport,),
            pool_bytes=blocks * block_rows * ROW_BYTES,
            block_rows=block_rows,
            window_blocks=2,
            failover_s=PATIENCE_S if encoders == 1 else 0.0,
            cache_bytes=0,
            link=link or LinkConfig(),
        )
        receiver = RowReceiver(config, MODEL, name="language", deliver=made.deliver, ended=made.ended)
        made.receiver = await stack.enter_async_context(receiver)
        made.watch(receiver.driver, made.redial)
        for i in range(encoders):
            settings = {"name": f"encode-{i + 1}", "transports": (transport,), "self_test_s": 0.0, **encode}
            encode_config = EncodeConfig(model=folder, link=encode_link or LinkConfig(), **settings)
            service = EncodeService(encode_config, encoder=SyntheticEncoder(MODEL))
            made.encoders.append(await stack.enter_async_context(service))
            _record_writes(service, made)
            made.watch(service.driver)
            made.addresses.append(service.address)
            receiver.peers.add(service.address)
        await made.idle()
        yield made


def _record_writes(service: EncodeService, made: Pair) -> None:
    write = service._write

    def recorded(action: Write) -> None:
        made.written.append((service.name, action.key, action.start, action.stop))
        write(action)

    service._write = recorded  # type: ignore[method-assign]
