"""Prediction against measurement: what ``bench system`` wrote, and the same cells simulated."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

import msgspec

from aiodisagg.bench.workload import Mix
from aiodisagg.errors import ConfigError
from aiodisagg.simulate.cluster import System
from aiodisagg.simulate.runs import Offered, run
from aiodisagg.simulate.times import ServiceTimes

SHAPES: Mapping[str, System] = {
    # two processes a place: the tower gets its half of the core, and nothing bounds it
    "dp2": System("dp2", both=2, links=1, turns=False, inter_token_ms=0.0),
    "dp2-waits": System("dp2-waits", both=2, links=1, turns=False, inter_token_ms=0.0, overlap=False),
    "1+1": System("1+1", encode=1, language=1),
    "1+1-waits": System("1+1-waits", encode=1, language=1, overlap=False),
    "dp2-both": System("dp2-both", both=2, links=1, turns=False),
    "2both": System("2both", both=2, turns=False),
}
"""What the shapes of ``bench system`` are here. The balancer of its clients is the router."""


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
    measured: MeasuredSpread
    predicted: MeasuredSpread

    @property
    def mean_error(self) -> float:
        return self.predicted.mean / self.measured.mean - 1

    @property
    def p99_error(self) -> float:
        return self.predicted.p99 / self.measured.p99 - 1


def read_measured(file: Path) -> Measured:
    """Raises ConfigError for a file without cells in this form."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Measured)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError("compare", f"{file}: {error}") from error


def compare(
    measured: Measured, times: ServiceTimes, mixes: Mapping[str, Mix], *, shapes: Mapping[str, System] = SHAPES
) -> list[Compared]:
    """The cells of known shapes and mixes, with the same requests as were sent. Raises ConfigError if none is known."""
    found = []
    for cell in measured.cells:
        system, mix, seen = shapes.get(cell.shape), mixes.get(cell.mix), cell.all.ttft_ms
        if system is None or mix is None or seen is None:
            continue
        seeds = [one.seed for one in cell.runs] or [0]
        offered = Offered(mix, max(cell.all.requests // len(seeds), 1))
        runs = [run(system, times, offered.at(cell.rate_per_s, seed), seed=seed).ttft for seed in seeds]
        predicted = MeasuredSpread(
            statistics.fmean(one.mean for one in runs), statistics.fmean(one.p99 for one in runs)
        )
        found.append(Compared(cell.shape, cell.mix, cell.load, seen, predicted))
    if not found:
        raise ConfigError("compare", f"no cell of a known shape ({', '.join(shapes)}) and mix ({', '.join(mixes)})")
    return found
