"""Virtual time for real shells: an event loop whose clock leaps, threads that are calls, a tower that is a timer, a
data plane and links that misbehave. Sockets are real ones, of this process: what was sent is there at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np

from aiodisagg.bench.synthetic import fill
from aiodisagg.errors import PeerGone, WriteFailed
from aiodisagg.protocol.events import ChangeEncode, EncodeStopped, RowsReady, StageEntered, StartEncode
from aiodisagg.transport.base import Remote, Slice
from aiodisagg.transport.memory import MemoryTransport

from .pair import ROW_BYTES

STUCK_S = 5.0
"""Of real time in which nothing happens and no timer runs."""


class LeapingSelector:
    """Lets the clock leap to the next timer as soon as no socket has anything to say."""

    def __init__(self, leap: Callable[[float], None]) -> None:
        self._real, self._leap = selectors.DefaultSelector(), leap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def select(self, timeout: float | None = None) -> Any:
        ready = self._real.select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if timeout is None:
            ready = self._real.select(STUCK_S)
            assert ready, "nothing will ever happen"
            return ready
        self._leap(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """What is given to a thread is done on the loop, a little later."""

    def __init__(self, random: Random) -> None:
        self._virtual, self._random = 1000.0, random
        super().__init__(LeapingSelector(self._leap))  # type: ignore[arg-type]
        self._clock_resolution = 1e-6

    def _leap(self, seconds: float) -> None:
        self._virtual += seconds

    def time(self) -> float:
        return self._virtual

    def run_in_executor(self, executor: Any, call: Any, *arguments: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        done = self.create_future()

        def work() -> None:
            try:
                result = call(*arguments)
            except Exception as error:
                if not done.cancelled():
                    done.set_exception(error)
            else:
                if not done.cancelled():
                    done.set_result(result)

        self.call_later(self._random.choice((0.0, 0.001, 0.01, 0.2)) * self._random.random(), work)
        return done


class Weather:
    """How likely what is; ``calm``: nothing fails any more."""

    def __init__(self, random: Random) -> None:
        self.random, self.calm = random, False
        self.encode_fails = random.choice((0.0, 0.0, 0.1))
        self.connect_fails = random.choice((0.0, 0.1))
        self.write_fails = random.choice((0.0, 0.05, 0.3))
        self.corrupt = random.choice((0.0, 0.0, 0.05))
        self.deliver_fails = random.choice((0.0, 0.0, 0.0, 0.02))
        self.slow = random.choice((0.0, 0.05, 0.3))
        self.latency_s = random.choice((0.0, 0.001, 0.1))

    def strikes(self, chance: float) -> bool:
        return not self.calm and self.random.random() < chance


class TimedPipeline:
    """Stands for EncodePipeline: rows become ready by timers. What is dropped is overwritten."""

    def __init__(self, weather: Weather, encoder: object, tell: Callable[[Any], None], **settings: object) -> None:
        self._weather, self._tell, self._closed = weather, tell, False
        self._jobs: dict[str, StartEncode] = {}
        self._rows: dict[str, tuple[np.ndarray, int]] = {}
        self.broken, self.items_encoded = "", 0

    async def __aenter__(self) -> TimedPipeline:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._closed = True

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def start(self, job: StartEncode) -> None:
        assert job.digest not in self._jobs and job.digest not in self._rows, "it is here already"
        self._jobs[job.digest] = job
        random = self._weather.random
        after_s, row_s = random.random() * 0.02, random.choice((0.0001, 0.001, 0.02, 0.3))
        rows = np.zeros((job.rows, ROW_BYTES), np.uint8)
        fill(rows, int(job.media[0]))
        for stage in ("preparing", "encoding"):
            self._later(after_s, job, StageEntered(job.digest, stage, 0.01))
        if self._weather.strikes(self._weather.encode_fails):
            self._later(after_s + row_s, job, EncodeStopped(job.digest, "encode_failed", "planned", True))
            return
        for stop in sorted({*random.choices(range(1, job.rows + 1), k=random.randrange(3)), job.rows}):
            self._later(after_s + stop * row_s, job, RowsReady(job.digest, stop, 0.01), rows)

    def _later(self, seconds: float, job: StartEncode, event: Any, rows: np.ndarray | None = None) -> None:
        def happens() -> None:
            if self._closed or self._jobs.get(job.digest) is not job:
                return
            if isinstance(event, RowsReady):
                assert rows is not None
                self._rows[job.digest] = rows, event.stop
            if isinstance(event, EncodeStopped) or (isinstance(event, RowsReady) and event.stop == job.rows):
                del self._jobs[job.digest]
            self._tell(event)

        asyncio.get_running_loop().call_later(seconds, happens)

    def change(self, change: ChangeEncode) -> None:
        assert change.digest in self._jobs or change.digest in self._rows

    def cancel(self, digest: str) -> None:
        if (job := self._jobs.get(digest)) is not None:
            self._later(self._weather.random.random() * 0.2, job, EncodeStopped(digest, "cancelled", "", True))

    def rows(self, digest: str, start: int, stop: int) -> memoryview:
        rows, ready = self._rows[digest]
        assert stop <= ready, "rows that do not exist are asked for"
        return memoryview(rows[start:stop].reshape(-1))

    def drop(self, digest: str) -> None:
        if (held := self._rows.pop(digest, None)) is not None:
            held[0][:] = 0xEE


class WildTransport(MemoryTransport):
    """Slow, failing and spoiling."""

    def __init__(self, weather: Weather) -> None:
        super().__init__()
        self._weather = weather

    async def connect(self, description: bytes, *, peer: str) -> Any:
        await asyncio.sleep(self._weather.random.random() * 0.01)
        if self._weather.strikes(self._weather.connect_fails):
            raise PeerGone(self.name, "planned", peer=peer)
        return await super().connect(description, peer=peer)

    async def write(self, remote: Remote, slices: Sequence[Slice]) -> None:
        weather, random = self._weather, self._weather.random
        (one,) = slices
        if weather.strikes(weather.slow):
            half_s = random.uniform(0.5, 6.0)
        else:
            half_s = random.choice((0.0001, 0.003, 0.05)) * random.random()
        fails, after = weather.strikes(weather.write_fails), bool(random.randrange(2))
        await asyncio.sleep(half_s)
        if fails and not after:
            raise WriteFailed(self.name, "planned", peer=remote.peer)
        await super().write(remote, slices)
        if weather.strikes(weather.corrupt):
            self._mine(remote).landing._pool[one.offset] ^= 0x10
        await asyncio.sleep(half_s)
        if fails:
            raise WriteFailed(self.name, "planned", peer=remote.peer)


class Proxy:
    """An address for ever, in front of whoever lives there now; it cuts links, falls silent, or refuses."""

    def __init__(self, name: str, weather: Weather) -> None:
        self.address = f"unix:@{name}"
        self._path, self._weather = f"\0{name}", weather
        self._behind = ""
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._heard = asyncio.Event()
        self._heard.set()

    async def up(self, address: str) -> None:
        self._behind = "\0" + address.removeprefix("unix:@")
        self._server = await asyncio.start_unix_server(self._serve, path=self._path)

    async def _serve(self, near: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        try:
            far, far_out = await asyncio.open_unix_connection(path=self._behind)
        except OSError:
            near_out.transport.abort()
            return
        self._writers |= {near_out, far_out}
        try:
            await asyncio.gather(self._pump(near, far_out), self._pump(far, near_out))
        finally:
            for out in (near_out, far_out):
                out.transport.abort()
                self._writers.discard(out)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                await self._heard.wait()
                await asyncio.sleep(self._weather.random.random() * self._weather.latency_s)
                target.write(data)
                await target.drain()
        except OSError:
            pass
        finally:
            target.close()

    def cut(self) -> None:
        for out in list(self._writers):
            out.transport.abort()

    def down(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()

    def fall_silent(self, seconds: float) -> None:
        self._heard.clear()
        asyncio.get_running_loop().call_later(seconds, self._heard.set)
