"""How many peers of which role a load needs: the least of each kind of cluster that meets an SLO, and how sure that is.

A load builds up for as long as answers take, so each run lasts a minute at least and four times what the longest
answers may take (:func:`~aiodisagg.simulate.runs.longest_s`), and the first and the last of these four count for
nothing. For each kind the size is bracketed from a guess and then bisected, by the requests of one seed; a run that
can no longer meet the goal is left there. For a split each size is tried with several numbers of encode peers, uphill
from the one that did best before: what they have to do depends on the load and not on the size, and so the first guess
is as many as would be busy half of the time. What the search found is then judged by other seeds, and moved by a step
or two if these disagree. Their mean is given with its 95 % interval, beside that of the next size below; what none of
the judged requests did may still be done by three in as many. If the interval reaches below the goal, or that of the
smaller one above it, as many seeds more are heard; if it still does, the answer is within the noise of the workload,
and says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import msgspec

from aiodisagg.bench.workload import WorkloadRequest
from aiodisagg.errors import ConfigError
from aiodisagg.simulate.cluster import Cluster, System
from aiodisagg.simulate.record import Report
from aiodisagg.simulate.runs import UNSEEN, Mean, Offered, Say, Work, alone, longest_s, mean_of, run, work
from aiodisagg.simulate.systems import flexible, replicas, split_overlap, split_waits
from aiodisagg.simulate.times import ServiceTimes

MOST_DEVICES = 4096
GRAIN = 20
"""Sizes are told apart to this part of themselves, and to a device below that: seeds differ by as much."""
GUESS = 1.6
"""How many times as much a device does as it would with ``CAPACITY_BATCH`` streams: where the first search begins."""
ALONE = 200
"""Requests that are tried with a cluster of their own, before the search: what these cannot, no size can."""
IDLE = 0.1
"""Devices that are busy for less of the time are enough: more would not help."""


class PlanGoal(msgspec.Struct, frozen=True):
    """``share`` of all requests within ``slo`` times the unloaded latency, at ``rate_per_s``; judged by ``seeds``, or
    twice as many."""

    rate_per_s: float
    slo: float = 5.0
    share: float = 0.9
    seeds: int = 3

    def check(self) -> None:
        """Raises ConfigError, which names the option."""
        for key, value, is_one, wanted in (
            ("load", self.rate_per_s, self.rate_per_s > 0, "above 0"),
            ("slo", self.slo, self.slo >= 1, "at least 1"),
            ("share", self.share, 0 < self.share < 1, "between 0 and 1"),
            ("seeds", self.seeds, self.seeds >= 1, "at least 1"),
        ):
            if not is_one:
                raise ConfigError(key, f"must be {wanted}, not {value:g}")


class Candidate(msgspec.Struct, frozen=True):
    """One size of one kind of cluster, over its seeds; of the search, where it fails, only as far as it ran."""

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
    """The least devices of a kind; ``chosen`` None: none up to ``MOST_DEVICES``. ``tried`` in the order of devices,
    those that were judged as they were judged; none if requests miss the goal even when they are alone."""

    kind: str
    chosen: Candidate | None
    below: Candidate | None
    """The next size below."""
    sure: bool
    why: str
    tried: tuple[Candidate, ...]


class Plan(msgspec.Struct, frozen=True):
    """``requests`` of each run, and the seconds at its beginning and at its end that count for nothing."""

    times: str
    goal: PlanGoal
    requests: int
    settle_s: float
    work: Work
    answers: tuple[Answer, ...]


def plan(times: ServiceTimes, offered: Offered, goal: PlanGoal, *, say: Say = lambda text: None) -> Plan:
    """Raises ConfigError, which names the option, for a goal that is none or that no number of devices can meet."""
    goal.check()
    sample = offered.at(goal.rate_per_s, 0)
    _fit(times, goal, sample)
    settle_s = longest_s(times, sample, goal.slo)
    offered = offered.lasting(goal.rate_per_s, settle_s)
    spent = work(times, sample)
    say(f"{offered.requests:,} requests a run; those of the first and the last {settle_s:.0f} s are not judged")
    trial = Trial(times, offered, goal, settle_s)
    guess, encode = round(goal.rate_per_s * spent.total_s / GUESS), round(2 * goal.rate_per_s * spent.tower_s)
    answers: dict[str, Answer] = {}
    for kind, like in KINDS.items():
        if why := _impossible(kind, times, goal, sample[:ALONE]):
            say(f"{kind}: {why}")
            answers[kind] = Answer(kind, None, None, False, why, ())
            continue
        known = answers[like].chosen if like else None
        if known is not None and known.encode:
            encode = known.encode
        answers[kind] = _Search(kind, trial, known.devices if known else guess, encode, say).answer()
    return Plan(times.name, goal, offered.requests, settle_s, spent, tuple(answers.values()))


def _impossible(kind: str, times: ServiceTimes, goal: PlanGoal, sample: Sequence[WorkloadRequest]) -> str:
    """Why no number of devices does, or empty. With an encode peer for each picture more are no help to one request."""
    pictures = max(1, max(len(one.images) for one in sample))
    system = _SPLITS[kind](pictures + 1, pictures) if kind in _SPLITS else _WHOLE[kind](pictures + 1)
    best = alone(system, times, sample, goal.slo)
    if best.mean + best.half >= goal.share:
        return ""
    return f"of requests that are alone, {best.mean:.1%} are within the SLO: no number of devices is enough"


def _fit(times: ServiceTimes, goal: PlanGoal, sample: Sequence[WorkloadRequest]) -> None:
    misfits = Cluster(replicas(1), times).misfits(sample)
    if len(misfits) > (1 - goal.share) * len(sample):
        longest = max(misfits, key=lambda one: one.prompt + one.output)
        raise ConfigError(
            "times",
            f"{times.name}: {len(misfits) / len(sample):.0%} of the requests fit into no device: the longest prompt "
            f"and its answer have {longest.prompt} + {longest.output} tokens, kv_tokens is {times.kv_tokens}",
        )


class Trial:
    """Runs candidates."""

    def __init__(self, times: ServiceTimes, offered: Offered, goal: PlanGoal, settle_s: float) -> None:
        self.goal = goal
        self._times, self._offered, self._settle_s = times, offered, settle_s
        self._workloads: dict[int, tuple[WorkloadRequest, ...]] = {}

    def run(self, system: System, seed: int, *, share: float = 0.0) -> Report:
        """To its end, or until fewer than ``share`` can be within the SLO."""
        if seed not in self._workloads:
            self._workloads[seed] = self._offered.at(self.goal.rate_per_s, seed)
        workload, slo = self._workloads[seed], self.goal.slo
        return run(system, self._times, workload, seed=seed, slo=slo, settle_s=self._settle_s, goal=share)

    def candidate(self, kind: str, system: System, runs: Sequence[Report]) -> Candidate:
        roles = [use.role for use in runs[0].use]
        attained = mean_of(one.attained for one in runs)
        if len(runs) > 1:
            least = UNSEEN / max(1, sum(one.judged for one in runs))
            attained = msgspec.structs.replace(attained, half=max(attained.half, least))
        return Candidate(
            kind=kind,
            devices=system.devices,
            encode=system.encode,
            language=system.language,
            attained=attained,
            ttft_mean_ms=mean_of(one.ttft.mean for one in runs),
            ttft_p99_ms=mean_of(one.ttft.p99 for one in runs),
            itl_p99_ms=mean_of(one.itl.p99 for one in runs),
            busy={role: statistics.fmean(u.busy for one in runs for u in one.use if u.role == role) for role in roles},
        )

    def meets(self, candidate: Candidate) -> bool:
        return candidate.attained.mean >= self.goal.share


_SPLITS: dict[str, Callable[[int, int], System]] = {"split-waits": split_waits, "split-overlap": split_overlap}
_WHOLE: dict[str, Callable[[int], System]] = {"replicas": replicas, "flexible": flexible}
KINDS = {"replicas": "", "split-waits": "replicas", "split-overlap": "split-waits", "flexible": "replicas"}
"""And the kind whose answer is where the search begins."""


class _Search:
    """For one kind. ``guess``: a size to begin with, and ``encode`` peers of a split."""

    def __init__(self, kind: str, trial: Trial, guess: int, encode: int, say: Say) -> None:
        self._kind, self._trial, self._say = kind, trial, say
        self._least = 1 if kind in _WHOLE else 2
        self._guess, self._encode = min(max(guess, self._least), MOST_DEVICES), encode
        self._ran: dict[tuple[int, int], Candidate] = {}
        self._tried: dict[int, Candidate] = {}
        self._judged: dict[int, tuple[System, list[Report]]] = {}

    def answer(self) -> Answer:
        size = self._search()
        for times in (1, 2):
            size = size and self._step(size, times)
            if size is None:
                most = self._tried[max(self._tried)]
                busy, share = max(most.busy.values()), most.attained.mean
                why = f"{most.devices} devices, {busy:.0%} busy, are not enough: {share:.1%} within the SLO"
                return Answer(self._kind, None, most, False, why, self._all())
            less = size - _grain(size)
            chosen, below = self._judge(size, times), self._judge(less, times) if less >= self._least else None
            sure, why = _sure(self._trial.goal, chosen, below)
            if sure:
                break
        return Answer(self._kind, chosen, below, sure, why, self._all())

    def _step(self, devices: int, times: int) -> int | None:
        """From a size to the least near it that meets the goal by the seeds that judge."""
        size: int | None = devices
        while size is not None and not self._trial.meets(self._judge(size, times)):
            size = self._more(size, _grain(size))
        while size is not None and (less := size - _grain(size)) >= self._least:
            if not self._trial.meets(self._judge(less, times)):
                break
            size = less
        return size

    # -- sizes ---------------------------------------------------------------------------------------------------

    def _search(self) -> int | None:
        """The least size that meets the goal by the first seed."""
        step = max(1, self._guess // 5)
        low, high = self._least - 1, self._guess
        if self._works(high):
            while high - step > low and self._works(high - step):
                high, step = high - step, 2 * step
            low = max(low, high - step)
        else:
            works = False
            while not works:
                more = self._more(high, step)
                if more is None:
                    return None
                low, high, step, works = high, more, 2 * step, self._works(more)
        while high - low > _grain(high):
            middle = (low + high) // 2
            low, high = (low, middle) if self._works(middle) else (middle, high)
        return high

    def _more(self, devices: int, step: int) -> int | None:
        """A larger size; None: that would be too large, or is no help."""
        too_large = devices + step > MOST_DEVICES
        return None if too_large or max(self._best(devices, enough=True).busy.values()) < IDLE else devices + step

    def _works(self, devices: int) -> bool:
        found = self._tried[devices] = self._best(devices, enough=True)
        split = f" ({found.encode}:{found.language})" if found.encode else ""
        self._say(f"{self._kind}, {devices} devices{split}: {found.attained.mean:.1%} of requests within the SLO")
        return self._trial.meets(found)

    def _judge(self, devices: int, times: int) -> Candidate:
        """By ``times`` as many seeds as the goal says."""
        if devices not in self._judged:
            self._judged[devices] = self._system(devices, self._best(devices, enough=False).encode), []
        system, runs = self._judged[devices]
        while len(runs) < times * self._trial.goal.seeds:
            runs.append(self._trial.run(system, 1 + len(runs)))
        return self._trial.candidate(self._kind, system, runs)

    # -- encode peers --------------------------------------------------------------------------------------------

    def _best(self, devices: int, *, enough: bool) -> Candidate:
        """With as many encode peers as do best; ``enough``: or with the first number that does."""
        if self._least == 1:
            return self._run(devices, 0)
        place = self._inside(devices, self._encode)
        best, step = self._run(devices, place), max(1, place // 4)
        while not (enough and self._trial.meets(best)):
            for encode in (best.encode + step, best.encode - step):
                other = self._run(devices, self._inside(devices, encode))
                if other.attained.mean > best.attained.mean:
                    best, step = other, 2 * step
                    break
            else:
                if step == 1:
                    break
                step //= 2
        if best.attained.mean > self._trial.goal.share / 2:  # else it is too small, whoever encodes
            self._encode = best.encode
        return best

    def _inside(self, devices: int, encode: int) -> int:
        return min(max(encode, 1), devices - 1)

    def _run(self, devices: int, encode: int) -> Candidate:
        if (devices, encode) not in self._ran:
            system = self._system(devices, encode)
            runs = [self._trial.run(system, 0, share=self._trial.goal.share)]
            self._ran[devices, encode] = self._trial.candidate(self._kind, system, runs)
        return self._ran[devices, encode]

    def _system(self, devices: int, encode: int) -> System:
        return _SPLITS[self._kind](devices, encode) if encode else _WHOLE[self._kind](devices)

    def _all(self) -> tuple[Candidate, ...]:
        found = self._tried | {devices: self._judge(devices, 1) for devices in self._judged}
        return tuple(found[devices] for devices in sorted(found))


def _grain(devices: int) -> int:
    return max(1, devices // GRAIN)


def _sure(goal: PlanGoal, chosen: Candidate, below: Candidate | None) -> tuple[bool, str]:
    got, seeds = chosen.attained, f"over {chosen.attained.seeds} seeds"
    said = f"{got.mean:.1%} +- {got.half:.1%} {seeds}"
    if got.seeds < 2:
        return False, f"{got.mean:.1%} of one seed: nothing says how far another would be from it"
    if got.mean - got.half < goal.share:
        return False, f"{said} reaches below the goal"
    if below is None:
        return True, f"{said}, and there is nothing smaller"
    less = f"{below.devices}: {below.attained.mean:.1%} +- {below.attained.half:.1%}"
    if below.attained.mean + below.attained.half >= goal.share:
        return False, f"fewer may do, of {less} {seeds}"
    return True, f"{said}, of {less}"
