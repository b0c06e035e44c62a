"""How many peers of which role a load needs: the least of each kind of cluster that meets an SLO, and how sure that is.

For each kind the number of devices is doubled and then bisected, each candidate judged over several seeds. Splits are
tried with the halves that the work asks for, one encode peer fewer and one more. A candidate meets the goal if the
mean share of requests within the SLO does. How sure: the answer is run again with the seeds of the search and as many
new ones, and the shares are given with their 95 % interval, beside those of one device less. If the interval reaches
below the goal, or one device less reaches above it, the answer is within the noise of the workload, and says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import msgspec

from aiodisagg.errors import ConfigError
from aiodisagg.simulate.cluster import System
from aiodisagg.simulate.record import Report
from aiodisagg.simulate.runs import Mean, Offered, Work, mean_of, run, work
from aiodisagg.simulate.systems import flexible, replicas, split_overlap, split_waits
from aiodisagg.simulate.times import ServiceTimes

Say = Callable[[str], None]
MOST_DEVICES = 4096


class PlanGoal(msgspec.Struct, frozen=True):
    """``share`` of all requests within ``slo`` times the unloaded latency, at ``rate_per_s``."""

    rate_per_s: float
    slo: float = 5.0
    share: float = 0.9
    seeds: int = 3


class Candidate(msgspec.Struct, frozen=True):
    """One size of one kind of cluster, over all its seeds."""

    kind: str
    devices: int
    encode: int
    language: int
    attained: Mean
    ttft_mean_ms: Mean
    ttft_p99_ms: Mean
    itl_p99_ms: Mean
    busy: dict[str, float]
    """By role."""


class Answer(msgspec.Struct, frozen=True):
    """The least devices of a kind; ``chosen`` None: none up to ``MOST_DEVICES``. ``tried`` in the order of devices."""

    kind: str
    chosen: Candidate | None
    below: Candidate | None
    """The best with one device less."""
    sure: bool
    why: str
    tried: tuple[Candidate, ...]


class Plan(msgspec.Struct, frozen=True):
    times: str
    goal: PlanGoal
    requests: int
    work: Work
    answers: tuple[Answer, ...]


def plan(times: ServiceTimes, offered: Offered, goal: PlanGoal, *, say: Say = lambda text: None) -> Plan:
    """Raises ConfigError, which names the option, for a goal that is none."""
    for key, value, is_one, wanted in (
        ("load", goal.rate_per_s, goal.rate_per_s > 0, "above 0"),
        ("slo", goal.slo, goal.slo >= 1, "at least 1"),
        ("share", goal.share, 0 < goal.share < 1, "between 0 and 1"),
        ("seeds", goal.seeds, goal.seeds >= 1, "at least 1"),
    ):
        if not is_one:
            raise ConfigError(key, f"must be {wanted}, not {value:g}")
    spent = work(times, offered.at(goal.rate_per_s, 0))
    answers = tuple(_Search(kind, times, offered, goal, spent, say).answer() for kind in KINDS)
    return Plan(times.name, goal, offered.requests, spent, answers)


KINDS = ("replicas", "split-waits", "split-overlap", "flexible")


class _Search:
    def __init__(
        self, kind: str, times: ServiceTimes, offered: Offered, goal: PlanGoal, spent: Work, say: Say
    ) -> None:  # fmt: skip
        self._kind, self._times, self._offered, self._goal, self._say = kind, times, offered, goal, say
        self._share = spent.tower_s / spent.total_s
        self._least = 1 if kind in ("replicas", "flexible") else 2
        self._tried: dict[int, Candidate] = {}

    def answer(self) -> Answer:
        low, high = self._least - 1, self._first()
        while not self._works(high):
            low, high = high, 2 * high
            if high > MOST_DEVICES:
                why = f"{low} devices are not enough"
                return Answer(self._kind, None, self._tried[low], False, why, self._all())
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._works(middle) else (middle, high)
        seeds = range(2 * self._goal.seeds)
        chosen = self._best(high, seeds)
        below = self._best(high - 1, seeds) if high > self._least else None
        return Answer(self._kind, chosen, below, *self._judge(chosen, below), self._all())

    def _first(self) -> int:
        """A size near which to begin: four tenths of it at work."""
        spent = work(self._times, self._offered.at(self._goal.rate_per_s, 0))
        return max(self._least, round(self._goal.rate_per_s * spent.total_s / 2.5))

    def _works(self, devices: int) -> bool:
        if devices < self._least:
            return False
        found = self._best(devices, range(self._goal.seeds))
        self._tried[devices] = found
        self._say(f"{self._kind}, {devices} devices: {found.attained.mean:.1%} of requests within the SLO")
        return found.attained.mean >= self._goal.share

    def _best(self, devices: int, seeds: Sequence[int]) -> Candidate:
        return max((self._run(system, seeds) for system in self._systems(devices)), key=lambda c: c.attained.mean)

    def _systems(self, devices: int) -> Iterator[System]:
        if self._kind == "replicas":
            yield replicas(devices)
        elif self._kind == "flexible":
            yield flexible(devices)
        else:
            make = split_waits if self._kind == "split-waits" else split_overlap
            middle = round(devices * self._share)
            for encode in sorted({min(max(middle + more, 1), devices - 1) for more in (-1, 0, 1)}):
                yield make(devices, encode)

    def _run(self, system: System, seeds: Sequence[int]) -> Candidate:
        runs: list[Report] = []
        for seed in seeds:
            workload = self._offered.at(self._goal.rate_per_s, seed)
            runs.append(run(system, self._times, workload, seed=seed, slo=self._goal.slo))
        roles = [use.role for use in runs[0].use]
        return Candidate(
            kind=self._kind,
            devices=system.devices,
            encode=system.encode,
            language=system.language,
            attained=mean_of(one.attained for one in runs),
            ttft_mean_ms=mean_of(one.ttft.mean for one in runs),
            ttft_p99_ms=mean_of(one.ttft.p99 for one in runs),
            itl_p99_ms=mean_of(one.itl.p99 for one in runs),
            busy={role: statistics.fmean(u.busy for one in runs for u in one.use if u.role == role) for role in roles},
        )

    def _judge(self, chosen: Candidate, below: Candidate | None) -> tuple[bool, str]:
        goal, got = self._goal.share, chosen.attained
        seeds = f"over {got.seeds} seeds"
        if got.mean < goal:
            return False, f"new seeds say {got.mean:.1%}, below the goal: take one device more"
        if got.mean - got.half < goal:
            return False, f"{got.mean:.1%} +- {got.half:.1%} {seeds} reaches below the goal"
        if below is not None and below.attained.mean + below.attained.half >= goal:
            less = below.attained
            return False, f"one device less may do: {less.mean:.1%} +- {less.half:.1%} {seeds}"
        return True, f"{got.mean:.1%} +- {got.half:.1%} {seeds}, {_less(below)}"

    def _all(self) -> tuple[Candidate, ...]:
        return tuple(self._tried[devices] for devices in sorted(self._tried))


def _less(below: Candidate | None) -> str:
    if below is None:
        return "and there is nothing smaller"
    return f"one device less {below.attained.mean:.1%} +- {below.attained.half:.1%}"
