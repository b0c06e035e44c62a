"""What a fault costs users: requests under way while a process dies, stops, or a network is cut, beside a calm round.

Every round sends the same requests at once, first undisturbed and then with one fault at a random moment of the time
in which items are under way. A request counts only if its answer is, token for token, what the first, undisturbed
round said. Added latency is a request's time in the disturbed round less its median over the undisturbed ones.
"""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from aiodisagg.bench.serve_metrics import percentile
from aiodisagg.bench.system import Answer, System, system
from aiodisagg.data import QUESTION
from aiodisagg.demo.cluster import Member
from aiodisagg.demo.tasks import Ask, digit_asks
from aiodisagg.errors import AiodisaggError, ConfigError
from aiodisagg.language.trace import MAX_FINISHED

Scenario = Literal["kill", "bootstrap", "stop", "netcut"]
AWAY_S = {"bootstrap": 10.0, "stop": 5.0, "netcut": 5.0}


@dataclass(frozen=True, slots=True)
class FaultOptions:
    scenario: Scenario = "kill"
    rounds: int = 20
    requests: int = 200
    """At most ``MAX_FINISHED``: the language peer remembers no more, and bytes are counted by what it remembers."""
    transports: str = "ipc"
    seed: int = 0
    block_rows: int = 2
    pool_mib: float = 1 / 16
    """For all requests at once: many items are half here at any moment."""
    verbose: int = 0

    def __post_init__(self) -> None:
        if self.requests > MAX_FINISHED:
            raise ConfigError("requests", f"must be at most {MAX_FINISHED}, not {self.requests}")


class Round(msgspec.Struct, frozen=True):
    """One round with a fault. Latencies in milliseconds, over all its requests."""

    number: int
    fault_s: float
    """When, after the first request was sent."""
    requests: int
    failed: int
    wrong: int
    """Answered, but not with the tokens of the undisturbed run."""
    items_open: int
    """Items under way when the fault came."""
    items_of_victim: int
    """Those of the encode peer that was struck: the busier one."""
    moved: int
    rows_kept: int
    """Rows of moved items that were here and were not sent again."""
    rows_needed: int
    received_twice_bytes: int
    resent_bytes: int
    """As counted by the encode peers that live."""
    added_p50_ms: float
    added_p99_ms: float
    calm_s: float
    seconds: float
    errors: list[str] = []


class FaultReport(msgspec.Struct, frozen=True):
    scenario: str
    transports: str
    requests: int
    images: int
    seed: int
    rounds: list[Round]
    failed: int
    wrong: int
    moved: int
    rows_kept: int
    received_twice_bytes: int
    resent_bytes: int
    added_p50_ms: float
    added_p99_ms: float
    """Over all requests of all rounds."""
    calm_p50_ms: float
    calm_p99_ms: float


async def bench_faults(options: FaultOptions, say: Callable[[str], None] = lambda text: None) -> FaultReport:
    """Raises ProcessEnded if a process ends by itself, NetworkUnavailable without namespaces, AiodisaggError if traces
    are missing without which nothing could be said of bytes."""
    asks = many_images(options.requests)
    network = options.scenario == "netcut"
    async with system(
        asks, transports=options.transports, encoders=2, network=network, block_rows=options.block_rows,
        pool_mib=options.pool_mib, verbose=options.verbose,
    ) as made:  # fmt: skip
        bench = _Bench(options, made)
        await bench.calm()
        for number in range(options.rounds):
            await bench.calm()
            found = await bench.disturbed(number)
            say(
                f"{options.scenario} {number + 1}/{options.rounds}: {found.failed} failed, {found.wrong} wrong, "
                f"{found.items_of_victim} of {found.items_open} items there, {found.moved} moved, "
                f"{found.rows_kept} rows kept, added p50 {found.added_p50_ms:.0f} ms, p99 {found.added_p99_ms:.0f} ms"
            )
            for error in found.errors[:3]:
                say(f"  {error}")
        return bench.report(sum(len(ask.images) for ask in asks))


def many_images(requests: int) -> list[Ask]:
    """Requests of three to six digits each."""
    asks = [ask for ask in digit_asks(3 * requests) if len(ask.images) >= 3][:requests]
    assert all(ask.question == QUESTION for ask in asks) and len(asks) == requests
    return asks


class _Bench:
    def __init__(self, options: FaultOptions, made: System) -> None:
        self._options, self._system = options, made
        self._draw = random.Random(options.seed)
        self._truth: list[Answer] = []
        self._calm: list[list[float]] = [[] for _ in range(options.requests)]
        self._calm_s = 0.0
        self._busy_s = 0.0
        self._rounds: list[Round] = []
        self._added: list[float] = []

    async def calm(self) -> None:
        """An undisturbed round; the first one says what is right."""
        tag, answers = await self._system.wave()
        if wrong := [a for a in answers if a.error]:
            raise RuntimeError(f"{len(wrong)} requests fail without any fault: {wrong[0].error}")
        if not self._truth:
            self._truth = answers  # and warms up: not timed
            return
        if any(a.said != b.said for a, b in zip(answers, self._truth, strict=True)):
            raise RuntimeError("two undisturbed rounds differ: exactness cannot be judged")
        for times, answer in zip(self._calm, answers, strict=True):
            times.append(answer.seconds)
        self._calm_s = max(answer.seconds for answer in answers)
        traces = await self._traces(tag, answers)
        self._busy_s = max(item["complete_s"] for trace in traces for item in trace["items"])

    async def _traces(self, tag: str, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Those of a wave, each with all of its items. Raises AiodisaggError if something of an answer is not there."""
        found = [t for t in await self._system.debug("requests") if t["request_id"].startswith(f"{tag}-")]
        known = {trace["request_id"] for trace in found}
        answered = {f"{tag}-{i}" for i, answer in enumerate(answers) if not answer.error}
        if lost := answered - known:
            raise AiodisaggError(f"the language peer has forgotten {len(lost)} of {len(answers)} requests: ask fewer")
        if short := [trace for trace in found if len(trace["items"]) < trace["item_count"]]:
            raise AiodisaggError(f"the traces of {len(short)} requests lack items: ask for fewer images in each")
        return found

    async def disturbed(self, number: int) -> Round:
        made = self._system
        fault_s = self._draw.uniform(0.05, 0.9) * self._busy_s
        received = await self._received()
        resent = {m.facts["incarnation"]: await self._resent(m) for m in made.encoders}
        over = asyncio.Event()
        load = asyncio.ensure_future(self._load(over))
        await asyncio.sleep(fault_s)
        peers = await made.debug("peers")
        victim = max(peers, key=lambda peer: int(peer["items"]))
        await self._fault(victim["name"])
        over.set()
        answers, traces = await load
        await self._repair(victim["name"])
        items = [item for trace in traces for item in trace["items"]]
        needed = sum(item["rows"] for item in items)
        added = sorted(
            1000 * (answer.seconds - statistics.median(self._calm[i % len(self._calm)]))
            for i, answer in enumerate(answers)
            if not answer.error
        )
        self._added += added
        truth = self._truth * (len(answers) // len(self._truth))
        found = Round(
            number=number,
            fault_s=round(fault_s, 3),
            requests=len(answers),
            failed=sum(1 for answer in answers if answer.error),
            wrong=sum(1 for a, b in zip(answers, truth, strict=True) if not a.error and a.said != b.said),
            items_open=sum(int(peer["items"]) for peer in peers),
            items_of_victim=int(victim["items"]),
            moved=int(sum(item["moves"] for item in items)),
            rows_kept=int(sum(item["rows_kept"] for item in items)),
            rows_needed=int(needed),
            received_twice_bytes=int(await self._received() - received - needed * self._row_bytes(items)),
            resent_bytes=int(
                sum([await self._resent(m) - resent.get(m.facts["incarnation"], 0.0) for m in made.encoders])
            ),
            added_p50_ms=_at(added, 50),
            added_p99_ms=_at(added, 99),
            calm_s=self._calm_s,
            seconds=max(answer.seconds for answer in answers),
            errors=sorted({answer.error for answer in answers if answer.error}),
        )
        self._rounds.append(found)
        return found

    async def _load(self, over: asyncio.Event) -> tuple[list[Answer], list[dict[str, Any]]]:
        """Rounds of all requests, at least one, until the fault is over."""
        answers: list[Answer] = []
        traces: list[dict[str, Any]] = []
        while not answers or not over.is_set():
            tag, said = await self._system.wave()
            answers += said
            traces += await self._traces(tag, said)
        return answers, traces

    async def _received(self) -> float:
        return await self._system.row_bytes(self._system.language, "received")

    async def _resent(self, member: Member) -> float:
        return await self._system.row_bytes(member, "resent")

    @staticmethod
    def _row_bytes(items: list[dict[str, Any]]) -> int:
        whole = [item for item in items if item["rows_arrived"] == item["rows"]]
        return int(whole[0]["bytes_arrived"] / whole[0]["rows"]) if whole else 0

    # -- the faults ----------------------------------------------------------------------------------------------

    async def _fault(self, victim: str) -> None:
        made, cluster = self._system, self._system.cluster
        match self._options.scenario:
            case "kill":
                cluster.kill(victim)
            case "stop":
                cluster.signal(victim, signal.SIGSTOP)
                await asyncio.sleep(AWAY_S["stop"])
                cluster.signal(victim, signal.SIGCONT)
            case "bootstrap":
                cluster.kill("bootstrap")
                await asyncio.sleep(AWAY_S["bootstrap"])
                await made.restart_bootstrap()
            case "netcut":
                assert made.network is not None
                await made.network.cut()
                await asyncio.sleep(AWAY_S["netcut"])
                await made.network.mend()

    async def _repair(self, victim: str) -> None:
        """Everybody is there again, and known to be."""
        made = self._system
        if self._options.scenario == "kill":
            await made.start_encoder(victim)
        await made.linked(2)
        await made.registered(3)

    def report(self, images: int) -> FaultReport:
        calm = sorted(1000 * seconds for times in self._calm for seconds in times)
        rounds, added = self._rounds, sorted(self._added)
        return FaultReport(
            scenario=self._options.scenario,
            transports=self._options.transports,
            requests=self._options.requests,
            images=images,
            seed=self._options.seed,
            rounds=rounds,
            failed=sum(one.failed for one in rounds),
            wrong=sum(one.wrong for one in rounds),
            moved=sum(one.moved for one in rounds),
            rows_kept=sum(one.rows_kept for one in rounds),
            received_twice_bytes=sum(one.received_twice_bytes for one in rounds),
            resent_bytes=sum(one.resent_bytes for one in rounds),
            added_p50_ms=_at(added, 50),
            added_p99_ms=_at(added, 99),
            calm_p50_ms=_at(calm, 50),
            calm_p99_ms=_at(calm, 99),
        )


def _at(ordered: list[float], percent: float) -> float:
    """A percentile of values in rising order; 0 of nothing."""
    return round(percentile(ordered, percent), 3) if ordered else 0.0
