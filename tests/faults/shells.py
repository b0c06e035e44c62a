"""Some language peers and some encode peers in virtual time: their real shells, links and machines, in bad weather.

Links are cut and fall silent, processes of both kinds die and come back at the same address, drain, fail to encode,
to write, to deliver; requests share pictures, are cancelled, run out of time. Every item ends once, with every row
delivered once, and when the weather is calm again nothing of it is left anywhere.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import numpy as np

from aiodisagg.bench.synthetic import SyntheticEncoder, item_of
from aiodisagg.encode.service import EncodeService
from aiodisagg.language.rows import RowReceiver
from aiodisagg.peer.config import EncodeConfig, LanguageConfig
from aiodisagg.protocol.events import Fail, ItemSpec
from aiodisagg.protocol.messages import ItemKey, Urgency

from .pair import MODEL, ROW_BYTES, rows_of
from .virtual import Proxy, Weather

PATIENT_S = 600.0


class Words:
    """A language peer, and what it was given and told, in all of its lives."""

    def __init__(self, world: Shells, number: int) -> None:
        self._world, self._random, self.number = world, world.random, number
        self.ends: dict[ItemKey, str] = {}
        self.open: dict[ItemKey, tuple[ItemSpec, float]] = {}
        self._delivered: dict[ItemKey, np.ndarray] = {}
        self._rooms = self._life = 0
        self.here = False

    async def start(self) -> None:
        self._life += 1
        choice = self._random.choice
        block_rows = choice((1, 2, 4))
        config = LanguageConfig(
            model=self._world.folder,
            transports=("memory",),
            pool_bytes=choice((1, 2, 3, 8)) * block_rows * ROW_BYTES,
            block_rows=block_rows,
            window_blocks=choice((1, 2, 4)),
            failover_s=choice((0.0, 1.0, 3.0)),
            cache_bytes=choice((0, 2000, 100_000)),
            hedge_s=choice((0.0, 0.1, 2.0)),
            peer_wait_s=PATIENT_S,
            incarnation=f"L{self.number}.{self._life}",
        )
        self.rows = RowReceiver(config, MODEL, name=f"L{self.number}", deliver=self._deliver, ended=self._ended)
        await self.rows.__aenter__()
        for tower in self._world.towers:
            self.rows.peers.add(tower.proxy.address)
        self.here = True

    async def die(self) -> None:
        self.here = False
        self.open.clear()
        await self.rows.__aexit__(None, None, None)

    def ask(self) -> None:
        """A request of some pictures, which may be given up again."""
        if not self.here:
            return
        self._rooms += 1
        timeout_s = self._random.choice((PATIENT_S,) * 4 + (0.5, 3.0, 20.0))
        items = []
        for index in range(self._random.choice((1, 1, 2, 5))):
            key = ItemKey(self.number << 32 | self._rooms, index)
            urgency = Urgency(self._random.choice((0.0, 5.0)), self._random.randrange(-1, 2), self._random.randrange(5))
            spec = dataclasses.replace(item_of(*self._random.choice(self._world.pictures)), urgency=urgency)
            self.open[key], self._delivered[key] = (spec, timeout_s), np.zeros(spec.rows, int)
            items.append((key, spec))
        self.rows.request(items, timeout_s)
        if self._random.random() < 0.25:
            soon_s = self._random.choice((0.0, 0.01, 0.3, 3.0)) * self._random.random()
            asyncio.get_running_loop().call_later(soon_s, self._give_up, self.rows, [key for key, _ in items])

    def _give_up(self, rows: RowReceiver, keys: list[ItemKey]) -> None:
        for key in keys if rows is self.rows else ():
            if self.open.pop(key, None) is not None:
                rows.cancel(key)

    def _deliver(self, key: ItemKey, start: int, data: memoryview) -> None:  # type: ignore[override]
        if (found := self.open.get(key)) is None:
            return
        if self._world.weather.strikes(self._world.weather.deliver_fails):
            raise RuntimeError("planned")
        spec, stop = found[0], start + data.nbytes // ROW_BYTES
        true = rows_of(int(spec.media[0]), spec.rows)[start * ROW_BYTES : stop * ROW_BYTES]
        self._world.check(bytes(data) == true, f"{key} of {spec.digest} is given wrong rows from {start} on")
        self._delivered[key][start:stop] += 1

    def _ended(self, key: ItemKey, failed: Fail | None) -> None:
        spec, timeout_s = self.open.pop(key)  # once, and not after it was given up
        self.ends[key] = how = "success" if failed is None else failed.code
        weather, killed = self._world.weather, self._world.struck["_kill"] + self._world.struck["_drain"]
        excused = {
            "success": True,
            "deadline": timeout_s < PATIENT_S,
            "undelivered": weather.deliver_fails > 0,
            "corrupt": weather.corrupt > 0,
            "poison": killed > 1,
        }
        self._world.check(excused.get(how, False), f"{key} of {spec.digest} failed: {failed}")
        times = self._delivered.pop(key)
        self._world.check(
            times.max() <= 1 and (how != "success" or times.min() == 1), f"{key}: {times} times delivered"
        )

    def left(self) -> dict[str, object]:
        rows, sharing, placing = self.rows, self.rows.sharing, self.rows.placing
        return {
            "open": self.open,
            "items": rows.receiver.items,
            "lent": rows.pool.blocks - rows.pool.free,
            "takes": rows.receiver._taking,
            "timer": rows.receiver.next_timer(),
            "revoking": rows._revoking,
            "unplaced": rows.unplaced,
            "errands": placing.errands,
            "hedges": [*placing.hedges._due._armed, *placing.hedges._hedged],
            "complaints": placing._complaints._open,
            "wanted": sharing._wanted,
            "fans": sharing._fans,
            "kept while they come": sharing._keeping_bytes,
            "flights": [*sharing.flights._by_digest, *sharing.flights._by_leg, *sharing.flights._by_sharer],
            "books": [peer.name for peer in rows.peers.linked if peer.book.open or peer.outbox],
            "not linked": len(self._world.towers) - len(rows.peers.linked),
        }


class Towers:
    """An encode peer, at one address in all of its lives."""

    def __init__(self, world: Shells, number: int) -> None:
        self._world, self.number, self._life = world, number, 0
        self.proxy = Proxy(f"aiodisagg-shells-{os.getpid()}-{world.seed}-{number}", world.weather)
        self.service: EncodeService | None = None

    async def start(self) -> None:
        self._life += 1
        choice = self._world.random.choice
        config = EncodeConfig(
            model=self._world.folder,
            transports=("memory",),
            self_test_s=0.0,
            source_bytes=choice((24, 60, 2000)) * ROW_BYTES,
            retain_s=choice((1.0, 30.0)),
            incarnation=f"E{self.number}.{self._life}",
        )
        service = EncodeService(config, encoder=SyntheticEncoder(MODEL))
        await service.__aenter__()
        service.sender.sources.capacity_file_bytes = choice((2, 6, 1000))
        await self.proxy.up(service.address)
        self.service = service

    async def die(self) -> None:
        """What it had begun goes on for a moment, as writes of a dead process may."""
        assert self.service is not None
        service, self.service = self.service, None
        self.proxy.down()
        assert service._server is not None
        service._server.cut()
        await asyncio.sleep(self._world.random.random())
        await service.__aexit__(None, None, None)

    def left(self) -> dict[str, object]:
        assert self.service is not None and self.service._server is not None
        service, words = self.service, len(self._world.words)
        sources = service.sender.sources
        return {
            "items": service.sender.items,
            "timer": service.sender.next_timer(),
            "queues": [*sources._queues, *sources._aside],
            "wanted": [source for source in sources._sources.values() if source.users],
            "files": sources.file_bytes,
            "patches": sources.waiting_patches,
            "yielding": sources._yielding_bytes,
            "held": dict(sources._held),
            "jobs": service.pipeline.waiting,
            "writers": service._writers,
            "links too many": [service._server.links - words, len(service._sessions) - words, *service._waiting],
        }


class Shells:
    """A world from a seed. ``problems``: what should not be."""

    def __init__(self, seed: int, folder: Path, random: Random) -> None:
        self.seed, self.folder, self.random = seed, folder, random
        self.weather = Weather(random)
        self.problems: list[str] = []
        self.struck: Counter[str] = Counter()
        self.pictures = [(number, random.choice((1, 3, 8, 15, 24))) for number in range(random.choice((1, 3, 10)))]
        self.towers = [Towers(self, number) for number in range(random.choice((1, 2, 3)))]
        self.words = [Words(self, number) for number in range(1, 1 + random.choice((1, 2, 3)))]
        self._span_s = random.choice((1.0, 8.0, 40.0))

    def check(self, good: bool, what: str) -> None:
        if not good:
            self.problems.append(what)

    async def run(self) -> None:
        peers: list[Towers | Words] = [*self.towers, *self.words]
        for peer in peers:
            await peer.start()
        await asyncio.gather(self._ask(), self._strike())
        self.weather.calm = True
        async with asyncio.timeout(PATIENT_S + 1.0):
            while any(words.open for words in self.words):  # noqa: ASYNC110 - virtual time
                await asyncio.sleep(1.0)
        await asyncio.sleep(100.0)  # deadlines of sources that nobody asks for, of links, of suspects
        for peer in peers:
            left = {what: which for what, which in peer.left().items() if which and which != [0, 0]}
            self.check(not left, f"left at {type(peer).__name__} {peer.number}: {left}")
        for peer in reversed(peers):
            await peer.die()
        await asyncio.sleep(20.0)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        self.check(not tasks, f"tasks are left: {tasks}")

    async def _ask(self) -> None:
        for _ in range(self.random.choice((3, 10, 30))):
            await asyncio.sleep(self.random.random() * self._span_s / 10)
            self.random.choice(self.words).ask()

    async def _strike(self) -> None:
        faults: list[Callable[[Towers], Awaitable[None]]] = [
            self._cut, self._cut, self._fall_silent, self._kill, self._drain, self._abort, self._kill_words,
        ]  # fmt: skip
        for _ in range(self.random.choice((0, 2, 6, 15))):
            await asyncio.sleep(self.random.random() * self._span_s / 4)
            fault = self.random.choice(faults)
            self.struck[fault.__name__] += 1
            await fault(self.random.choice(self.towers))

    async def _cut(self, towers: Towers) -> None:
        towers.proxy.cut()

    async def _fall_silent(self, towers: Towers) -> None:
        towers.proxy.fall_silent(self.random.choice((0.2, 2.0, 8.0, 20.0)))

    async def _kill(self, towers: Towers) -> None:
        await towers.die()
        await asyncio.sleep(self.random.choice((0.0, 0.1, 2.0)))
        await towers.start()

    async def _drain(self, towers: Towers) -> None:
        assert towers.service is not None
        await asyncio.wait([asyncio.ensure_future(towers.service.drain())], timeout=5.0)
        await self._kill(towers)

    async def _abort(self, towers: Towers) -> None:
        assert towers.service is not None
        for session in list(towers.service._sessions.values()):
            session.link.abort()

    async def _kill_words(self, towers: Towers) -> None:
        words = self.random.choice(self.words)
        await words.die()
        await words.start()
