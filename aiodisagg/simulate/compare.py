"""Prediction against measurement: what ``bench system`` wrote, and the same cells simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from aiodisagg.bench.serve_metrics import Spread
from aiodisagg.bench.workload import Mix
from aiodisagg.errors import ConfigError
from aiodisagg.simulate.cluster import Routing, System
from aiodisagg.simulate.doors import Doors, Line
from aiodisagg.simulate.runs import Offered, first_tokens
from aiodisagg.simulate.times import ServiceTimes

PACE_MS, SLACK_MS, COALESCE = 100.0, 50.0, 64
"""What peers are started with: ``--itl-budget-ms``, ``--inter-token-ms``, and an engine's ``coalesce_tokens``."""


_STARTED = System(
    "", both=2, pace_ms=PACE_MS, inter_token_ms=SLACK_MS, coalesce_tokens=COALESCE, turns=False,
    doors=Doors(line=Line.ADMISSION), routing=Routing.OUTSTANDING,
)  # fmt: skip
"""As ``bench system`` starts peers: with an admission queue, and a balancer in the client."""


_CORE: Mapping[str, Any] = {"turns": True, "tower_share": 0.7, "inter_token_ms": 0.0}
"""A peer whose halves share a core, see :mod:`aiodisagg.encode.core`."""


def _shape(name: str, **what: Any) -> System:  # fields of a System
    return msgspec.structs.replace(_STARTED, name=name, **what)


SHAPES: Mapping[str, System] = {
    one.name: one
    for one in (
        _shape("dp2-inline", replicas=2, both=0, overlap=False, inline_patches=16384),
        # two processes a place: the tower gets its half of the core, and nothing bounds it
        _shape("dp2", links=1, inter_token_ms=0.0),
        _shape("dp2-waits", links=1, inter_token_ms=0.0, overlap=False),
        _shape("1+1", both=0, encode=1, language=1),
        _shape("1+1-waits", both=0, encode=1, language=1, overlap=False),
        _shape("dp2-both", links=1, **_CORE),
        _shape("2both", **_CORE),
        _shape("gpu-dp2", replicas=2, both=0, overlap=False, routing=Routing.TURN),
        _shape("gpu-flexible", pace_ms=50.0, priorities=True, routing=Routing.TURN),
        _shape("gpu-1+1", both=0, encode=1, language=1, pace_ms=50.0),
        _shape("gpu-1+1-waits", both=0, encode=1, language=1, pace_ms=50.0, overlap=False),
    )
}
"""What the shapes of ``bench system`` are here, and those of ``examples/gpu_cells.py``: of their peers each answers
every other request."""
NEAR = 0.15
"""A prediction that is off by less is a good one."""


class MeasuredSpread(msgspec.Struct, frozen=True):
    """Milliseconds."""

    mean: float
    p99: float


class _Run(msgspec.Struct, frozen=True):
    seed: int = 0


class _Summary(msgspec.Struct, frozen=True):
    ttft_ms: MeasuredSpread | None
    requests: int = 0


class MeasuredCell(msgspec.Struct, frozen=True):
    """The fields of a measured cell that are compared; a file may hold more."""

    shape: str
    mix: str
    load: float
    rate_per_s: float
    all: _Summary
    runs: list[_Run] = []


class Measured(msgspec.Struct, frozen=True):
    cells: list[MeasuredCell]


class Compared(msgspec.Struct, frozen=True):
    """One cell. Milliseconds; errors are (predicted - measured) / measured."""

    shape: str
    mix: str
    load: float
    rate_per_s: float
    measured: MeasuredSpread
    predicted: MeasuredSpread

    @property
    def mean_ratio(self) -> float:
        return self.predicted.mean / self.measured.mean

    @property
    def p99_ratio(self) -> float:
        return self.predicted.p99 / self.measured.p99

    @property
    def mean_error(self) -> float:
        return self.mean_ratio - 1

    @property
    def p99_error(self) -> float:
        return self.p99_ratio - 1


def read_measured(file: Path) -> Measured:
    """Raises ConfigError for a file without cells in this form."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Measured)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError("compare", f"{file}: {error}") from error


def compare(measured: Measured, times: ServiceTimes, mixes: Mapping[str, Mix]) -> list[Compared]:
    """The cells of known shapes and mixes, with the same requests as were sent, those of all seeds
    together. Raises ConfigError if none is known."""
    found = []
    for cell in measured.cells:
        system, mix, seen = SHAPES.get(cell.shape), mixes.get(cell.mix), cell.all.ttft_ms
        if system is None or mix is None or seen is None:
            continue
        seeds = [one.seed for one in cell.runs] or [0]
        offered = Offered(mix, max(cell.all.requests // len(seeds), 1))
        firsts = (first_tokens(system, times, offered.at(cell.rate_per_s, seed), seed) for seed in seeds)
        together = Spread.of(chain.from_iterable(firsts))
        if together is not None:
            predicted = MeasuredSpread(together.mean, together.p99)
            found.append(Compared(cell.shape, cell.mix, cell.load, cell.rate_per_s, seen, predicted))
    if not found:
        raise ConfigError("compare", f"no cell of a known shape ({', '.join(SHAPES)}) and mix ({', '.join(mixes)})")
    return found


def verdict(cells: Sequence[Compared]) -> str:
    """How many cells were predicted well."""
    means = sum(abs(one.mean_error) <= NEAR for one in cells)
    p99s = sum(abs(one.p99_error) <= NEAR for one in cells)
    return f"within {NEAR:.0%}: {means} of {len(cells)} (mean), {p99s} of {len(cells)} (p99)".replace("%", " %")
