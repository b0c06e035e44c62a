"""The questions of docs/simulate.md: two devices, the ladder, overload, text beside images."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from aiodisagg.bench.distributions import Ranges, exactly, parse_ranges
from aiodisagg.bench.mixes import FULL_HD, named_mix
from aiodisagg.bench.workload import Mix
from aiodisagg.scheduler.order import Order
from aiodisagg.simulate.cluster import Cluster, System
from aiodisagg.simulate.doors import Doors, Line
from aiodisagg.simulate.record import Report, report
from aiodisagg.simulate.runs import Offered, Say, goodput, run, work
from aiodisagg.simulate.systems import flexible, ladder, replicas, split_overlap, split_waits
from aiodisagg.simulate.times import ServiceTimes


def ttft_mixes() -> dict[str, Mix]:
    """The mixes of the table of two devices: only the time to the first token, pictures of 1080p, at most eight."""
    servegen = "0:0.006,1:0.798,2:0.066,3:0.076,4-8:0.054"
    text = Ranges(((32, 128, 1.0),))
    return {
        "1-8": Mix(Ranges(((1, 8, 1.0),)), FULL_HD, text, exactly(1)),
        "ServeGen-like": Mix(parse_ranges("images", servegen), FULL_HD, text, exactly(1)),
    }


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


class Overload(msgspec.Struct, frozen=True):
    """``factor``: of the goodput that the open door has at most; ``inside``: requests that the other door lets in."""

    factor: float
    inside: int
    open_door: Report
    shedding: Report


def overload(
    times: ServiceTimes, offered: Offered, *, devices: int, slo: float, factors: Sequence[float], say: Say
) -> list[Overload]:
    """Flexible peers at multiples of what they can do, with everybody let in and with shedding.

    Shedding is by the admission queue: late requests are refused, and each peer has as many inside as it has on average
    at its best, because more of them would all be slow.
    """
    open_door = flexible(devices)
    guess = 0.6 * devices / work(times, offered.at(1.0, 0)).total_s
    most = goodput(open_door, times, offered, slo=slo, share=0.9, seeds=(0,), guess=guess)
    best = run(open_door, times, offered.at(most, 0), slo=slo)
    inside = max(1, round(most * best.e2e.mean / 1e3 / devices))
    doors = Doors(line=Line.ADMISSION, inside=inside, shed_at=slo)
    shedding: System = msgspec.structs.replace(open_door, doors=doors)
    found = []
    for factor in factors:
        workload = offered.at(factor * most, 0)
        both = [run(system, times, workload, slo=slo) for system in (open_door, shedding)]
        found.append(Overload(factor, inside, both[0], both[1]))
        say(f"{factor:g} times {most:.1f} requests/s")
    return found


class TextBeside(msgspec.Struct, frozen=True):
    load: float
    cv: float
    order: str
    report: Report
    longest_wait_s: float
    """Of a request with images, from its arrival until the first of its images or tokens was begun."""
    bound_s: float
    """What it should have waited at most."""


def text_beside_images(
    times: ServiceTimes, *, requests: int, loads: Sequence[float], cvs: Sequence[float], say: Say
) -> list[TextBeside]:
    """Requests of text alone among those with images on two devices, replicas and flexible peers: first come, first
    served from the line to the last step, and short first; loads are of the device time that the requests take."""
    found = []
    for cv in cvs:
        offered = Offered(named_mix("mixed"), requests, cv)
        spent = work(times, offered.at(1.0, 0)).total_s
        for load in loads:
            workload = offered.at(2 * load / spent, 0)
            for base in (replicas(2), flexible(2)):
                for order in (Order.FIRST_COME, Order.SHORT_FIRST):
                    doors = Doors(line=Line.ADMISSION, order=order)
                    cluster = Cluster(msgspec.structs.replace(base, doors=doors), times)
                    cluster.run(workload)
                    longest = max(r.served_s - r.source.arrival_s for r in cluster.requests if r.items)
                    said = report(cluster, seed=0)
                    found.append(TextBeside(load, cv, order.value, said, longest, doors.max_wait_s))
            say(f"text beside images at load {load:g}, cv {cv:g}")
    return found
