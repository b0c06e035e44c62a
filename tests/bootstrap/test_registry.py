"""The registry: leases, states, matching, and what watchers are told. Pure: time is a number."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiodisagg.bootstrap.registry import HISTORY, Load, PeerRecord, PeerState, Registry, host_name
from aiodisagg.link.hello import PeerRole
from aiodisagg.protocol.rows import ModelFingerprint

MODEL = ModelFingerprint("Qwen3VLMoeForConditionalGeneration", 64, 3, "bfloat16", "w1")
OTHER = ModelFingerprint("Qwen3VLMoeForConditionalGeneration", 64, 3, "bfloat16", "w2")


def record(
    name: str, role: PeerRole = PeerRole.ENCODE, model: ModelFingerprint = MODEL, address: str = ""
) -> PeerRecord:
    addresses = (address or f"unix:@{name}",) if role.encodes else ()
    return PeerRecord(name=name, incarnation=f"{name}-life", role=role, addresses=addresses, model=model)


def states(registry: Registry) -> dict[str, PeerState]:
    return {entry.record.name: entry.state for entry in registry.peers()}


def test_a_lease_that_is_renewed_never_ends() -> None:
    registry = Registry(5.0)
    registry.register(record("e"), 0.0)
    for second in range(1, 60):
        registry.heartbeat("e-life", Load(), None, float(second))
        registry.expire(float(second))
    assert states(registry) == {"e": PeerState.READY}


def test_a_silent_peer_is_suspect_then_gone_and_a_late_heartbeat_saves_a_suspect() -> None:
    registry = Registry(5.0)
    registry.register(record("e"), 0.0)
    registry.expire(4.9)
    assert states(registry) == {"e": PeerState.READY}
    registry.expire(5.0)
    assert states(registry) == {"e": PeerState.SUSPECT}
    assert registry.next_expiry() == 10.0
    entry = registry.heartbeat("e-life", Load(), None, 9.0)
    assert entry is not None and entry.state is PeerState.READY
    registry.expire(14.0)
    registry.expire(19.0)
    assert states(registry) == {}
    assert registry.next_expiry() is None


def test_a_forgotten_peer_is_told_to_register_again() -> None:
    registry = Registry(5.0)
    assert registry.heartbeat("nobody", Load(), None, 0.0) is None
    assert not registry.remove("nobody")


def test_a_restarted_process_replaces_its_earlier_life_at_the_same_address() -> None:
    registry = Registry(5.0)
    registry.register(record("old", address="tcp:10.0.0.1:7000"), 0.0)
    registry.register(record("new", address="tcp:10.0.0.1:7000"), 1.0)
    assert states(registry) == {"new": PeerState.READY}
    gone = registry.changes_since(1)
    assert gone is not None and [(e.record.name, e.state) for e in gone] == [
        ("old", PeerState.GONE),
        ("new", PeerState.READY),
    ]


def test_the_same_socket_path_on_two_hosts_is_two_peers() -> None:
    registry = Registry(5.0)
    for address in ("unix:/run/encode.sock", "tcp:127.0.0.1:7000"):
        for host in ("here", "there"):
            registry.register(msgspec.structs.replace(record(host, address=address), host=host), 0.0)
        assert states(registry) == {"here": PeerState.READY, "there": PeerState.READY}
    registry.register(msgspec.structs.replace(record("again", address="tcp:127.0.0.1:7000"), host="here"), 0.0)
    assert states(registry) == {"again": PeerState.READY, "there": PeerState.READY}


@pytest.mark.parametrize(
    ("address", "apart", "one"),
    [
        ("unix:/run/encode.sock", ("boot/1/1", "boot/1/2"), ("boot/1/1", "boot/2/1")),
        ("unix:@encode", ("boot/1/1", "boot/2/1"), ("boot/1/1", "boot/1/2")),
        ("tcp:127.0.0.1:7000", ("boot/1/1", "boot/2/1"), ("boot/1/1", "boot/1/2")),
        ("tcp:[::1]:7000", ("boot/1/1", "older"), ("older", "older")),
        ("tcp:10.0.0.1:7000", (), ("boot/1/1", "other/2/2")),
    ],
)
def test_two_containers_of_a_host_are_two_peers(address: str, apart: tuple[str, ...], one: tuple[str, ...]) -> None:
    """They pushed each other out at every heartbeat, and one of them was known at a time."""
    for hosts, together in ((apart, len(apart)), (one, 1)):
        registry = Registry(5.0)
        for number, host in enumerate(hosts):
            registry.register(msgspec.structs.replace(record(f"p{number}", address=address), host=host), 0.0)
        assert len(registry) == together


def test_what_a_host_is_called_fits_the_field_of_every_release() -> None:
    name = host_name("0b4c8d1e-0f5a-4a3c-9d2b-7e6f5a4b3c2d", "net:[4294967295]", "mnt:[4294967294]")
    assert name == "0b4c8d1e-0f5a-4a3c-9d2b-7e6f5a4b3c2d/4294967295/4294967294" and len(name) <= 64


def test_match_gives_ready_peers_of_the_same_model_least_busy_first() -> None:
    registry = Registry(5.0)
    registry.register(record("l", PeerRole.LANGUAGE), 0.0)
    for name in ("busy", "idle", "draining", "late"):
        registry.register(record(name), 0.0)
    registry.register(record("foreign", model=OTHER), 0.0)
    registry.register(record("both", PeerRole.BOTH), 0.0)
    registry.heartbeat("busy-life", Load(queued=5, active=1), None, 1.0)
    registry.heartbeat("both-life", Load(active=1), None, 1.0)
    registry.heartbeat("draining-life", Load(), PeerState.DRAINING, 1.0)
    for name in ("l", "idle"):
        registry.heartbeat(f"{name}-life", Load(), None, 4.0)
    registry.expire(5.5)
    found = registry.match("l-life")
    assert found is not None and [entry.record.name for entry in found] == ["idle", "both", "busy"]
    found = registry.match("both-life")
    assert found is not None and [entry.record.name for entry in found] == ["idle", "busy"], "it knows itself"
    assert registry.match("nobody") is None


def test_a_watcher_gets_what_changed_or_everything() -> None:
    registry = Registry(5.0)
    registry.register(record("a"), 0.0)
    seen = registry.revision
    assert registry.changes_since(seen) == []
    registry.register(record("a"), 1.0)
    assert registry.changes_since(seen) == [], "the same registration again is no news"
    registry.register(record("b"), 1.0)
    changes = registry.changes_since(seen)
    assert changes is not None and [entry.record.name for entry in changes] == ["b"]
    assert registry.changes_since(seen + 100) is None, "a revision of another life"
    for beat in range(2 * HISTORY):
        registry.heartbeat("a-life", Load(queued=1 + beat % 2), None, 1.0)
    changes = registry.changes_since(seen)
    assert changes is not None and [entry.record.name for entry in changes] == ["b", "a"], "each once, as it is now"
    for _ in range(HISTORY + 1):
        registry.register(record("guest"), 1.0)
        registry.remove("guest-life")
    assert registry.changes_since(seen) is None, "too far behind to be told who went"


def test_a_watcher_of_one_role_is_told_of_no_others() -> None:
    registry = Registry(5.0)
    for role in PeerRole:
        registry.register(record(role.value, role), 0.0)
    registry.remove("language-life")
    registry.remove("encode-life")
    for role, names in ((PeerRole.ENCODE, ["both", "encode"]), (PeerRole.LANGUAGE, ["both", "language"])):
        changes = registry.changes_since(0, role)
        assert changes is not None and [entry.record.name for entry in changes] == names


@given(st.lists(st.tuples(st.sampled_from(["reg", "beat", "leave", "wait"]), st.integers(0, 3), st.floats(0, 4))))
def test_a_watcher_that_follows_changes_knows_what_a_snapshot_says(steps: list[tuple[str, int, float]]) -> None:
    registry, now, seen = Registry(3.0), 0.0, 0
    mirror: dict[str, PeerState] = {}
    for what, who, seconds in steps:
        now += seconds
        registry.expire(now)
        if what == "reg":
            registry.register(record(f"p{who}"), now)
        elif what == "beat":
            registry.heartbeat(f"p{who}-life", Load(active=who), None, now)
        elif what == "leave":
            registry.remove(f"p{who}-life")
        for entry in registry.changes_since(seen) or []:
            if entry.state is PeerState.GONE:
                mirror.pop(entry.record.name, None)
            else:
                mirror[entry.record.name] = entry.state
        seen = registry.revision
        assert mirror == states(registry)
