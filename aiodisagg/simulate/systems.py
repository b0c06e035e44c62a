"""Named clusters: the ones to compare on equal hardware, and the rungs of the ladder from a static split upwards."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from aiodisagg.errors import ConfigError
from aiodisagg.simulate.cluster import Routing, System
from aiodisagg.simulate.placing import Placing


def replicas(devices: int) -> System:
    """A monolith on each device."""
    return System("replicas", replicas=devices)


def split_waits(devices: int, encode: int) -> System:
    """A fixed split whose language peers wait for all images of a request."""
    return System(f"split {encode}:{devices - encode}, waits", encode=encode, language=devices - encode, overlap=False)


def split_overlap(devices: int, encode: int) -> System:
    """A fixed split that computes rows as they come."""
    return System(f"split {encode}:{devices - encode}, overlap", encode=encode, language=devices - encode)


def flexible(devices: int) -> System:
    """Every peer encodes and computes, as ``BothService`` does on an accelerator."""
    return System("flexible", both=devices, priorities=True, turns=False)


def static_split(devices: int, encode: int) -> System:
    """A fixed split whose parts know nothing of each other's load: all in turn, no overlap."""
    return System(
        f"static split {encode}:{devices - encode}", encode=encode, language=devices - encode, overlap=False,
        placing=Placing.FIXED, routing=Routing.TURN,
    )  # fmt: skip


def ladder(devices: int, encode: int) -> tuple[System, ...]:
    """Replicas, as they come and with a router; then the static split and what is added to it, one thing a rung."""
    static = static_split(devices, encode)
    change = msgspec.structs.replace
    return (
        change(replicas(devices), name="replicas, in turn", routing=Routing.TURN),
        change(replicas(devices), name="replicas, routed"),
        static,
        change(static, name="+ scheduling", placing=Placing.FINISH, overlap=True),
        change(static, name="+ routing", placing=Placing.FINISH, overlap=True, routing=Routing.WORK),
        change(flexible(devices), name="+ flexible roles"),
    )


_NAMED: dict[str, Callable[[int, int], System]] = {
    "replicas": lambda devices, encode: replicas(devices),
    "split-waits": split_waits,
    "split-overlap": split_overlap,
    "flexible": lambda devices, encode: flexible(devices),
    "static": static_split,
}
SYSTEM_NAMES = tuple(_NAMED)


def named_system(name: str, devices: int, encode: int) -> System:
    """``encode``: of the devices, for splits. Raises ConfigError for an unknown name or a split without halves."""
    make = _NAMED.get(name)
    if make is None:
        raise ConfigError("system", f"{name!r} is none of {', '.join(SYSTEM_NAMES)}")
    if devices < 1 or (name.startswith("s") and not 0 < encode < devices):
        raise ConfigError("encode", f"{encode} of {devices} devices is no split")
    system = make(devices, encode)
    system.check()
    return system
