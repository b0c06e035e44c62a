"""The demo itself: start a system, send requests through its HTTP API, compare, show, write."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from rich.console import Console
from rich.live import Live

from aiodisagg.data import digits_model
from aiodisagg.demo.cluster import Cluster, start_system
from aiodisagg.demo.kill import kill_in_mid_transfer
from aiodisagg.demo.tasks import Ask, Monolith, all_digit_asks, digit_asks
from aiodisagg.demo.view import Moved, Row, moved_items, progress, row_of, table, what_moved
from aiodisagg.errors import ConfigError
from aiodisagg.peer.config import no_folder

logger = logging.getLogger(__name__)

REFRESH_S = 0.1
CONCURRENCY = 16
TABLE_ROWS = 40
KILL_CONCURRENCY = 64
KILL_OPTIONS = ("--block-rows", "1", "--pool-mib", "0.03125", "--hedge-s", "0")
"""A pool of a few rows: many items are half here at any moment, so that one of them can be seen to move."""
ENDED_S = 10.0
"""How long after an error the end of a process may become known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """The options of the command."""

    count: int = 24
    full: bool = False
    model: Path | None = None
    images: tuple[Path, ...] = ()
    prompt: str = "Describe the image."
    max_tokens: int = 64
    compare: bool | None = None
    transports: str = "ipc"
    encoders: int = 2
    device: str = "cpu"
    dtype: str | None = None
    zero_deepstack: bool = False
    kill_encoder: bool = False
    json_file: Path | None = None
    verbose: int = 0

    def __post_init__(self) -> None:
        for key in ("count", "encoders", "max_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(key, "must be at least 1")
        if self.kill_encoder and self.encoders < 2:
            raise ConfigError("encoders", "--kill-encoder needs at least 2: another has to go on")
        if self.images and self.model is None:
            raise ConfigError("image", "goes with --model; the packaged model reads digits only")
        if self.model is not None and not self.model.is_dir():
            raise no_folder(self.model)

    def asks(self) -> list[Ask]:
        if self.model is not None:
            return [Ask(tuple(p.read_bytes() for p in self.images), self.prompt, None, self.max_tokens)]
        return all_digit_asks() if self.full else digit_asks(self.count)


@dataclass(slots=True)
class _Answer:
    text: str = ""
    error: str = ""


class Demo:
    """One run."""

    def __init__(self, options: DemoOptions, console: Console) -> None:
        self.options, self.console = options, console
        self.folder = (options.model or digits_model()).resolve()
        self.asks = options.asks()
        self.answers = [_Answer() for _ in self.asks]
        self.done = 0
        self.killed = ""
        self.moved: list[Moved] = []
        self.traces: dict[str, dict[str, Any]] = {}
        """By request id, as they were seen last: a language peer forgets those that ended long ago."""

    async def run(self) -> None:
        """Asks the system. Raises ProcessEnded if a process of it ends by itself."""
        options = self.options
        language_options = () if options.dtype is None else ("--dtype", options.dtype)
        async with Cluster(verbose=options.verbose) as cluster:
            with self.console.status("starting bootstrap, encode and language peers"):
                url = await start_system(
                    cluster,
                    str(self.folder),
                    encoders=options.encoders,
                    transports=options.transports,
                    device=options.device,
                    encode_options=("--zero-deepstack",) if options.zero_deepstack else (),
                    language_options=(*language_options, *(KILL_OPTIONS if options.kill_encoder else ())),
                )
            watch = asyncio.ensure_future(cluster.watch())
            work = asyncio.ensure_future(self._work(cluster, url))
            try:
                await asyncio.wait([watch, work], return_when=asyncio.FIRST_COMPLETED)
                if not work.done() or work.exception() is not None:
                    # A process that ended fails the work as well, perhaps before its end is known: it is the cause.
                    await asyncio.wait([watch], timeout=ENDED_S)
                    if watch.done():
                        watch.result()
                await work
            finally:
                for task in (watch, work):
                    task.cancel()
                await asyncio.gather(watch, work, return_exceptions=True)

    def rows(self) -> list[Row]:
        """What came of it, beside the monolith's answers. Blocking, for as long as that loads: Ctrl-C would not end a
        thread that does."""
        options = self.options
        monolith: list[str | None] = [None] * len(self.asks)
        if options.compare if options.compare is not None else options.model is None:
            with self.console.status("asking the monolith the same"):
                reference = Monolith(self.folder, options.device, options.dtype)
                monolith = [reference.answer(ask) for ask in self.asks]
        return [
            row_of(i, ask, answer.text, answer.error, self.traces.get(f"demo-{i}"), truth)
            for i, (ask, answer, truth) in enumerate(zip(self.asks, self.answers, monolith, strict=True))
        ]

    async def _work(self, cluster: Cluster, url: str) -> None:
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(url, timeout=timeout) as session:
            await self._wait_linked(session)
            slots = asyncio.Semaphore(KILL_CONCURRENCY if self.options.kill_encoder else CONCURRENCY)
            with Live(console=self.console, refresh_per_second=10, transient=True) as live:
                async with asyncio.TaskGroup() as group:
                    show = group.create_task(self._show(cluster, session, live))
                    helpers = [show]
                    if self.options.kill_encoder:
                        helpers.append(group.create_task(self._kill_encoder(cluster, session)))
                    sends = [group.create_task(self._send(session, slots, i)) for i in range(len(self.asks))]
                    await asyncio.wait(sends)
                    for helper in helpers:
                        helper.cancel()
            await self._traces(session)
        self.moved = moved_items(self.traces.values())

    async def _wait_linked(self, session: aiohttp.ClientSession) -> None:
        """Waits until every encode peer is linked, so that the work is shared from the first request on."""
        while True:
            async with session.get("/debug/peers") as response:
                linked = [peer for peer in await response.json() if "why" not in peer]  # else it is of no use
                if len(linked) >= self.options.encoders:
                    return
            await asyncio.sleep(REFRESH_S)

    async def _traces(self, session: aiohttp.ClientSession) -> list[dict[str, Any]]:
        async with session.get("/debug/requests") as response:
            found: list[dict[str, Any]] = await response.json()
        self.traces.update((trace["request_id"], trace) for trace in found)
        return found

    async def _show(self, cluster: Cluster, session: aiohttp.ClientSession, live: Live) -> None:
        while True:
            traces = await self._traces(session)
            open_traces = [trace for trace in traces if trace["total_s"] < 0]
            moved = [trace for trace in traces if any(item["moves"] for item in trace["items"])]
            names = [*cluster.members, *([f"{self.killed} (killed)"] if self.killed else [])]
            live.update(progress(names, [*moved, *open_traces], self.done, len(self.asks)))
            await asyncio.sleep(REFRESH_S)

    async def _kill_encoder(self, cluster: Cluster, session: aiohttp.ClientSession) -> None:
        self.killed = await kill_in_mid_transfer(cluster, lambda: self._traces(session))

    async def _send(self, session: aiohttp.ClientSession, slots: asyncio.Semaphore, number: int) -> None:
        answer = self.answers[number]
        body = self.asks[number].body(self.folder.name)
        async with slots:
            try:
                headers = {"x-request-id": f"demo-{number}"}
                async with session.post("/v1/chat/completions", json=body, headers=headers) as response:
                    if response.status != 200:
                        answer.error = (await response.json())["error"]["message"]
                        return
                    async for line in response.content:
                        self._read(line, answer)
            except (aiohttp.ClientError, TimeoutError) as error:
                answer.error = str(error) or type(error).__name__
            finally:
                self.done += 1

    @staticmethod
    def _read(line: bytes, answer: _Answer) -> None:
        """One line of the event stream."""
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            return
        event = json.loads(line[6:])
        if "error" in event:
            answer.error = event["error"]["message"]
        for choice in event.get("choices", ()):
            answer.text += choice["delta"].get("content") or ""


def totals(rows: list[Row]) -> dict[str, Any]:
    """What the run adds up to; shares are of the requests that have a truth."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row.right is not None:
            groups[row.group].append(row.right)
    compared = [row.equal_to_monolith for row in rows if row.equal_to_monolith is not None]
    return {
        "requests": len(rows),
        "failed": sum(1 for row in rows if row.error),
        "right": sum(1 for row in rows if row.right),
        "right_by_group": {name: round(sum(hits) / len(hits), 4) for name, hits in sorted(groups.items())},
        "compared_with_monolith": len(compared),
        "equal_to_monolith": sum(compared),
        "rows": sum(row.rows for row in rows),
        "bytes_on_wire": sum(row.bytes_on_wire for row in rows),
        "items_moved": sum(row.moves for row in rows),
        "rows_kept": sum(row.rows_kept for row in rows),
    }


def run_demo(options: DemoOptions) -> int:
    """Runs the demo and returns the exit code: 0 if every request was answered as the monolith answers (and, where an
    encode peer was to be killed, one was)."""
    console = Console()
    demo = Demo(options, console)
    try:
        asyncio.run(demo.run())
        rows = demo.rows()
    except KeyboardInterrupt:
        console.print("stopped; every process has ended")
        return 130
    console.print(table(rows if len(rows) <= TABLE_ROWS else [row for row in rows if row.right is False or row.error]))
    summary = totals(rows)
    if demo.killed:
        for line in what_moved(demo.killed, demo.moved):
            console.print(line)
    elif options.kill_encoder:
        console.print("no encode peer was killed: no item was seen half here; try more --requests", style="red")
    for group, share in summary["right_by_group"].items():
        console.print(f"{group}: {share:.1%} right")
    equal, compared = summary["equal_to_monolith"], summary["compared_with_monolith"]
    if compared:
        style = "green" if equal == compared else "red"
        console.print(f"{equal} of {compared} answers equal the monolith's", style=style)
    if options.json_file is not None:
        found = {"requests": [msgspec.to_builtins(row) for row in rows], "totals": summary}
        options.json_file.write_text(json.dumps(found, indent=1) + "\n")
    shown = bool(demo.killed) or not options.kill_encoder
    return 0 if not summary["failed"] and equal == compared and shown else 1
