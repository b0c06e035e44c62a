"""Language peers that place pictures of 720p on encode peers of equal speed, in virtual time: the real books and the
real placement, modelled peers. ``python -m tests.scheduler.herd`` prints the table of docs/scheduling.md."""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from aiodisagg.scheduler.book import PeerBook
from aiodisagg.scheduler.cost import PeerCosts, ServiceTimes, Size, Timing
from aiodisagg.scheduler.placement import PeerView, Wanted, place
from aiodisagg.scheduler.trials import Trials

SIZE = Size.of((1, 45, 80), 880 * 16384)
PREPARE_S, TOWER_S, TRANSFER_S = 0.014, 0.0113, 0.004
THREADS, BEAT_S = 8, 5 / 3
NOISE, JITTER = 0.03, 0.05
"""Of self-tests, and of the tower."""
GRIDS = ((1, 14, 14), (1, 32, 32), (1, 68, 120))


class Choice(Enum):
    FIRST = "the first"
    """Whoever is predicted to be the first, by heartbeats alone."""
    PLACED = "now"
    RANDOM = "random"
    PERFECT = "perfect"
    """By one who sees everything."""


@dataclass
class Tower:
    """``believed``: its self-test says so many times the truth."""

    name: str
    believed: float
    speed: float = 1.0
    threads: list[float] = field(default_factory=lambda: [0.0] * THREADS)
    free: float = 0.0
    waiting: int = 0
    items: int = 0

    def costs(self) -> PeerCosts:
        costs = PeerCosts()
        prepare = tuple(Timing.of(grid, 1e-3 + 3.6e-6 * grid[1] * grid[2]) for grid in GRIDS)
        scale = self.believed * self.speed
        tower = tuple(Timing.of(grid, scale * (1e-3 + 2.86e-6 * grid[1] * grid[2])) for grid in GRIDS)
        costs.believe(ServiceTimes(prepare, tower, THREADS))
        return costs


@dataclass
class Herd:
    """``waits_s``: from asked for to complete, of each item in order."""

    languages: int
    towers: list[Tower]
    choice: Choice
    rng: random.Random
    books: list[list[PeerBook[int]]] = field(default_factory=list)
    trials: list[Trials] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    ways: dict[tuple[int, str], float] = field(default_factory=dict)
    _agenda: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    def of(cls, languages: int, encoders: int, choice: Choice, seed: int = 1) -> Herd:
        rng = random.Random(seed)
        towers = [Tower(f"{i:03}", 1 + rng.uniform(-NOISE, NOISE)) for i in range(encoders)]
        return cls(languages, towers, choice, rng)

    def at(self, when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self._agenda, (when, next(self._order), what))

    def run(self, load: float, seconds: float) -> None:
        self.trials = [Trials() for _ in range(self.languages)]
        self.books = [[PeerBook(tower.costs()) for tower in self.towers] for _ in range(self.languages)]
        rate = load * sum(1 / tower.speed for tower in self.towers) / TOWER_S
        for number, tower in enumerate(self.towers):
            when = self.rng.random() * BEAT_S
            while when < seconds:
                self.at(when, lambda now, number=number, tower=tower: self.beat(number, tower, now))  # type: ignore[misc]
                when += BEAT_S
        when, key = 0.0, 0
        while when < seconds:
            self.at(when, lambda now, key=key: self.arrive(key, now))  # type: ignore[misc]
            when, key = when + self.rng.expovariate(rate), key + 1
        while self._agenda:
            when, _, what = heapq.heappop(self._agenda)
            what(when)

    def beat(self, number: int, tower: Tower, now: float) -> None:
        for books in self.books:
            books[number].heard(tower.waiting * SIZE.patches, now)

    def choose(self, language: int, key: int, now: float) -> int:
        books, towers = self.books[language], self.towers
        match self.choice:
            case Choice.RANDOM:
                return self.rng.randrange(len(towers))
            case Choice.PERFECT:
                ends = [max(tower.free, now + PREPARE_S) + TOWER_S * tower.speed for tower in towers]
                return min(range(len(towers)), key=lambda i: (ends[i], self.rng.random()))
        doubted = self.choice is Choice.PLACED
        views = [
            PeerView(tower.name, book.costs, book.backlog(now), doubt=book.doubt if doubted else 0.0)
            for tower, book in zip(towers, books, strict=True)
        ]
        wanted, trials = Wanted(f"{key:032x}", SIZE), self.trials[language]
        tried = trials.place(wanted, views) if doubted else None
        placed = tried or place(wanted, views)
        assert placed is not None
        trials.asked(placed.peer, trial=tried is not None)
        number = int(placed.peer)
        books[number].asked(key, f"{key:032x}", SIZE, placed, now)
        return number

    def arrive(self, key: int, now: float) -> None:
        language = self.rng.randrange(self.languages)
        number = self.choose(language, key, now)
        tower, book = self.towers[number], self.books[language][number]
        tower.items += 1
        tower.waiting += 1
        begins = max(now, min(tower.threads))
        tower.threads[tower.threads.index(min(tower.threads))] = prepared = begins + PREPARE_S
        enters = max(prepared, tower.free)
        tower.free = leaves = enters + TOWER_S * tower.speed * (1 + self.rng.uniform(-JITTER, JITTER))
        way = (language, tower.name)
        self.ways[way] = there = max(leaves, self.ways.get(way, 0.0)) + TRANSFER_S

        def told(stage: str, elapsed_s: float, when: float) -> None:
            book.entered(key, stage, elapsed_s, when)
            if self.choice is Choice.PLACED:
                book.told(tower.waiting * SIZE.patches, when)

        def encoded(when: float) -> None:
            tower.waiting -= 1
            book.ready(key, when)
            told("encoded", leaves - enters, when)

        def complete(when: float) -> None:
            self.waits_s.append(when - now)
            book.arrived(key, SIZE.size_bytes, when)
            book.left(key)

        self.at(prepared, lambda when: told("prepared", PREPARE_S, when))
        self.at(enters, lambda when: told("encoding", max(enters - prepared, 1e-6), when))
        self.at(leaves, encoded)
        self.at(there, complete)

    def later_s(self) -> list[float]:
        """Waits of all but the first fifth."""
        return self.waits_s[len(self.waits_s) // 5 :]


def main() -> None:
    print("| language, encode peers, load |", " | ".join(choice.value for choice in Choice), "|")
    print("| --- | --- | --- | --- | --- |")
    cases = ((1, 8, 0.5), (4, 8, 0.5), (8, 8, 0.5), (32, 8, 0.5), (4, 8, 0.8), (32, 8, 0.8), (64, 32, 0.5))
    for languages, encoders, load in cases:
        cells = []
        for choice in Choice:
            herd = Herd.of(languages, encoders, choice)
            herd.run(load, 12.0 if encoders > 8 else 40.0)
            waits_s = sorted(herd.later_s())
            mean_s, p99_s = statistics.mean(waits_s), waits_s[int(0.99 * len(waits_s))]
            cells.append(f"{mean_s * 1e3:.0f} / {p99_s * 1e3:.0f}")
        print(f"| {languages}, {encoders}, {load} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
