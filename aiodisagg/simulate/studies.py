"""The questions of docs/simulate.md: two devices, the ladder, overload, text beside images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from aiodisagg.bench.distributions import Ranges, exactly
from aiodisagg.bench.mixes import named_mix
from aiodisagg.bench.workload import Mix
from aiodisagg.simulate.cluster import System
from aiodisagg.simulate.doors import Doors
from aiodisagg.simulate.record import Report
from aiodisagg.simulate.runs import Offered, goodput, run, work
from aiodisagg.simulate.systems import flexible, ladder, replicas, split_overlap, split_waits
from aiodisagg.simulate.times import ServiceTimes

Say = Callable[[str], None]
FULL_HD = ((1920, 1080),)


def ttft_mixes() -> dict[str, Mix]:
    """The mixes of the table of two devices: only the time to the first token, pictures of 1080p, at most eight."""
    servegen = "0:0.006,1:0.798,2:0.066,3:0.076,4-8:0.054"
    text = Ranges(((32, 128, 1.0),))
    return {
        "1-8": Mix(Ranges(((1, 8, 1.0),)), FULL_HD, text, exactly(1)),
        "ServeGen-like": Mix(_weighted(servegen), FULL_HD, text, exactly(1)),
    }


def _weighted(text: str) -> Ranges:
    from aiodisagg.bench.distributions import parse_ranges

    return parse_ranges("images", text)


class Cell(msgspec.Struct, frozen=True):
    mix: str
    load: float
    report: Report


def two_devices(times: ServiceTimes, *, requests: int, loads: Sequence[float], say: Say) -> list[Cell]:
    """Two replicas, a split that waits, one with overlap, two flexible peers; loads are of two replicas' capacity
    without batching: the rate times the mean time that a request keeps a replica."""
    cells = []
    for name, mix in ttft_mixes().items():
        offered = Offered(mix, requests)
        spent = work(times, offered.at(1.0, 0)).ttft_s
        for load in loads:
            workload = offered.at(2 * load / spent, 0)
            for system in (replicas(2), split_waits(2, 1), split_overlap(2, 1), flexible(2)):
                cells.append(Cell(name, load, run(system, times, workload)))
            say(f"{name} at load {load:g}")
    return cells


class Rung(msgspec.Struct, frozen=True):
    """``goodput_per_s``: the highest rate at which the share meets the SLO; ``busy`` at that rate, by role."""

    mix: str
    system: str
    goodput_per_s: float
    of_replicas: float
    """Times the goodput of routed replicas."""
    busy: dict[str, float]


def climb(
    times: ServiceTimes, offered: Offered, mix: str, *, devices: int, encode: int, slo: float, share: float,
    seeds: Sequence[int], say: Say,
) -> list[Rung]:  # fmt: skip
    """The ladder, each rung at its own goodput."""
    rungs: list[Rung] = []
    guess = 0.6 * devices / work(times, offered.at(1.0, 0)).total_s
    reference = 0.0
    for system in ladder(devices, encode):
        rate = goodput(system, times, offered, slo=slo, share=share, seeds=seeds, guess=guess)
        busy: dict[str, float] = {}
        if rate:
            guess = rate
            found = run(system, times, offered.at(rate, seeds[0]), seed=seeds[0], slo=slo)
            busy = {use.role: use.busy for use in found.use}
        if system.replicas:
            reference = rate
        rungs.append(Rung(mix, system.name, rate, rate / reference if reference else 0.0, busy))
        say(f"{mix}, {system.name}: {rate:.1f} requests/s")
    return rungs


def overload(
    times: ServiceTimes, offered: Offered, capacity_per_s: float, *, devices: int, slo: float, factors: Sequence[float],
    doors: Doors, say: Say,
) -> list[tuple[float, Report, Report]]:  # fmt: skip
    """(factor, without shedding, with): flexible peers at multiples of what they can do."""
    found = []
    for factor in factors:
        workload = offered.at(factor * capacity_per_s, 0)
        open_system = flexible(devices)
        shedding: System = msgspec.structs.replace(open_system, name="flexible, shedding", doors=doors)
        found.append((factor, run(open_system, times, workload, slo=slo), run(shedding, times, workload, slo=slo)))
        say(f"{factor:g} times the capacity")
    return found


def text_and_images(text_share: float = 0.5) -> Mix:
    """Requests of which half have no image, and half have one to eight of 1080p."""
    images = Ranges(((0, 0, text_share), (1, 8, 1 - text_share)))
    base = named_mix("images-1-8")
    return Mix(images, FULL_HD, base.text_tokens, base.output_tokens)
