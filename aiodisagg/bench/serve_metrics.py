"""What a client saw of its requests, and the usual numbers of it. Pure.

- **TTFT** runs from the moment a request was due to the first piece of text. In an open loop that is its arrival, also
  if the client was late in sending it; a client that waits for a slow server would otherwise measure only what it was
  ready for.
- **ITL** is the gap between two pieces of text of one answer; a piece may hold several tokens.
- **TPOT** is (E2E - TTFT) / (n - 1) of an answer of n > 1 tokens, as the server counts them.
- **E2E** runs to the end of the answer.
- **Percentiles** lie between neighbours in the sorted values, linearly (numpy's default).
- **Goodput** counts the requests a second whose TTFT and TPOT are within a multiple of what requests of their group
  take on an unloaded server.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from aiodisagg.bench.workload import WorkloadRequest


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request; seconds since the run began. ``text_s``: when each piece of text came."""

    number: int
    group: str
    due_s: float
    sent_s: float
    ended_s: float
    text_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    url: str = ""
    error: str = ""
    """Its kind; empty for an answer that came to its end."""
    said: str = ""
    """What was said of the error."""

    @property
    def ttft_s(self) -> float:
        """An answer without any text has its end for its first piece."""
        return (self.text_s[0] if self.text_s else self.ended_s) - self.due_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of one token."""
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in pairwise(self.text_s)]


def group_of(request: WorkloadRequest) -> str:
    """Requests are compared within groups of about equal work: by their number of pictures, each tenant's apart."""
    sizes = ((0, "text"), (1, "1 image"), (3, "2-3 images"), (8, "4-8 images"))
    name = next((name for most, name in sizes if len(request.images) <= most), "9+ images")
    return f"{request.tenant}: {name}" if request.tenant else name


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in rising order, at least one."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Spread(msgspec.Struct, frozen=True):
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Spread | None:
        """None of nothing."""
        ordered = sorted(1000 * value for value in seconds)
        if not ordered:
            return None
        return cls(statistics.fmean(ordered), *(percentile(ordered, p) for p in (50, 90, 99)))


class Unloaded(msgspec.Struct, frozen=True):
    """Medians of requests that had the server to themselves; ``tpot_ms`` is 0 where no answer had a second token."""

    ttft_ms: float
    tpot_ms: float
    e2e_ms: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Unloaded | None:
        """None if none of them was answered."""
        fine = [one for one in outcomes if not one.error]
        if not fine:
            return None
        tpots = [1000 * one.tpot_s for one in fine if one.tpot_s is not None]
        return cls(
            statistics.median(1000 * one.ttft_s for one in fine),
            statistics.median(tpots) if tpots else 0.0,
            statistics.median(1000 * one.e2e_s for one in fine),
        )

    def is_met(self, outcome: Outcome, multiple: float) -> bool:
        """Whether an answer took at most ``multiple`` times as long as this, to its first token and for each other."""
        if outcome.error or 1000 * outcome.ttft_s > multiple * self.ttft_ms:
            return False
        return outcome.tpot_s is None or not self.tpot_ms or 1000 * outcome.tpot_s <= multiple * self.tpot_ms


class Goodput(msgspec.Struct, frozen=True):
    """``multiple`` of the unloaded latency; ``share`` of all requests, errors included."""

    multiple: float
    requests_per_s: float
    share: float


class Summary(msgspec.Struct, frozen=True):
    """Some requests together. Rates are over ``seconds``: from the first that was due to the end of the last."""

    requests: int
    completed: int
    errors: dict[str, int]
    seconds: float
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens: float
    output_tokens: float
    """Means of what was answered."""
    ttft_ms: Spread | None
    itl_ms: Spread | None
    tpot_ms: Spread | None
    e2e_ms: Spread | None
    goodput: list[Goodput] = []
    examples: dict[str, str] = {}
    """What was said of the first error of each kind, if anything."""


def summarize(
    outcomes: Sequence[Outcome],
    unloaded: Mapping[str, Unloaded] | None = None,
    multiples: Sequence[float] = (),
    seconds: float | None = None,
) -> Summary:
    """``unloaded``: by group; a request of a group that is not there meets no objective, and without any there is no
    goodput. ``seconds``: if these are a part of a longer run."""
    fine = [one for one in outcomes if not one.error]
    if seconds is None:
        seconds = max((one.ended_s for one in outcomes), default=0.0) - min((one.due_s for one in outcomes), default=0)
    per_s = 1 / seconds if seconds > 0 else 0.0
    good = []
    for multiple in multiples if unloaded else ():
        known = [(one, unloaded.get(one.group)) for one in outcomes] if unloaded else []
        met = sum(1 for one, alone in known if alone is not None and alone.is_met(one, multiple))
        good.append(Goodput(multiple, met * per_s, met / len(outcomes) if outcomes else 0.0))
    tokens = sum(one.output_tokens for one in fine)
    return Summary(
        requests=len(outcomes),
        completed=len(fine),
        errors=dict(sorted(Counter(one.error for one in outcomes if one.error).items())),
        seconds=seconds,
        requests_per_s=len(fine) * per_s,
        output_tokens_per_s=tokens * per_s,
        prompt_tokens=statistics.fmean(one.prompt_tokens for one in fine) if fine else 0.0,
        output_tokens=tokens / len(fine) if fine else 0.0,
        ttft_ms=Spread.of(one.ttft_s for one in fine),
        itl_ms=Spread.of(gap for one in fine for gap in one.gaps_s),
        tpot_ms=Spread.of(one.tpot_s for one in fine if one.tpot_s is not None),
        e2e_ms=Spread.of(one.e2e_s for one in fine),
        goodput=good,
        examples={one.error: one.said for one in reversed(outcomes) if one.error and one.said},
    )


def by_group(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """In the order of their names."""
    found: dict[str, list[Outcome]] = {}
    for one in sorted(outcomes, key=lambda one: one.group):
        found.setdefault(one.group, []).append(one)
    return found
