"""What happens to a world: who asks for what, and which faults strike when. Drawn from any ``random.Random``."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from aiodisagg.protocol.rows import Region

from .truth import GRIDS

FAULTS = ("cut", "crash", "freeze", "corrupt", "write_fails", "encode_fails", "cancel", "crash_receiver")
STRICT = ("drop", "repeat", "late")
"""Faults that no honest link has: single messages lost, repeated, or delivered on a later connection."""

FAULT_TIME_S = 20.0
PATIENT_S = 600.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One item of a plan. ``timeout_s`` below PATIENT_S: the item may miss its deadline."""

    at: float
    number: int
    timeout_s: float
    meta: frozenset[Region]


@dataclass(frozen=True, slots=True)
class Fault:
    at: float
    kind: str
    who: int
    lasts_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole world but for its latencies, which come from ``seed``."""

    seed: int
    senders: int
    one_sided: bool
    blocks: int
    rows_per_block: int
    window_blocks: int
    capacity_rows: int
    encode_row_s: float
    slow: float
    """Share of writes that take seconds, so that the receiver loses patience."""
    asked: tuple[Asked, ...]
    faults: tuple[Fault, ...]


def draw(random: Random, *, strict: bool | None = None) -> Plan:
    """A plan; small worlds are as likely as crowded ones."""
    span = random.choice((0.05, 1.0, 8.0))
    asked = tuple(
        Asked(
            at=random.uniform(0.0, span),
            number=random.randrange(len(GRIDS)),
            timeout_s=random.choice((PATIENT_S,) * 5 + (0.5, 3.0, 15.0)),
            meta=frozenset(r for r in (Region.FILL_IDS, Region.MROPE, Region.AUX) if random.randrange(4)),
        )
        for _ in range(random.choice((1, 2, 3, 5)))
    )
    strict = random.randrange(3) == 0 if strict is None else strict
    kinds = FAULTS + STRICT * 3 if strict else FAULTS
    horizon = random.choice((0.1, 1.0, FAULT_TIME_S))
    faults: tuple[Fault, ...] = tuple(
        Fault(
            at=random.uniform(0.0, horizon),
            kind=random.choice((*kinds, "cut", "cut", "crash")),
            who=random.randrange(6),
            lasts_s=random.choice((0.0, 0.02, 0.5, 3.0, 9.0)),
        )
        for _ in range(random.choice((0, 1, 2, 4, 8)))
    )
    # a repeated or late message does most harm right after the connection it belonged to
    faults += tuple(
        Fault(fault.at + random.uniform(0.0, 0.2), "cut", fault.who, 0.02)
        for fault in faults
        if fault.kind in STRICT and random.randrange(2)
    )
    return Plan(
        seed=random.randrange(2**31),
        senders=random.choice((1, 2, 3)),
        one_sided=bool(random.randrange(3)),
        blocks=random.choice((1, 2, 3, 6)),
        rows_per_block=random.choice((1, 3, 4, 8)),
        window_blocks=random.choice((1, 2, 4)),
        capacity_rows=random.choice((24, 40, 1000)),
        encode_row_s=random.choice((0.0, 0.001, 0.05, 0.6)),
        slow=random.choice((0.0, 0.04, 0.3)),
        asked=asked,
        faults=faults,
    )
