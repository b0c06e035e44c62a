"""The handshake as bytes: only peers with the same secret and version get through, and what they said is untouched."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiodisagg.errors import AuthenticationFailed, ConfigError, RemoteProtocolError
from aiodisagg.link import PeerRole, framing
from aiodisagg.link import hello as hello_module
from aiodisagg.link.framing import FrameReader
from aiodisagg.link.hello import Handshake, Hello, check_secret
from tests.link.helpers import SECRET, hello

_nonces = itertools.count(1)
Tamper = Callable[[int, bytes], bytes]


def side(*, dialling: bool, secret: bytes | None = SECRET) -> Handshake:
    said = hello("dialler", PeerRole.LANGUAGE) if dialling else hello("listener")
    nonce = next(_nonces).to_bytes(32, "big")
    return Handshake(
        dialling=dialling, hello=said, secret=secret, nonce=nonce, peer="listener" if dialling else "dialler"
    )


def give(to: Handshake, data: bytes) -> bytes:
    """Feeds one frame; returns the answer."""
    reader = FrameReader("x", 2**20)
    reader.feed(data)
    frame = reader.next()
    return (to.receive(*frame) if frame else None) or b""


def shake(dialler: Handshake, listener: Handshake, tamper: Tamper = lambda step, data: data) -> list[bytes]:
    """Runs a handshake over wires that may lie; returns what the dialler sent."""
    give(listener, tamper(0, dialler.greeting))
    proof = give(dialler, tamper(1, listener.greeting))
    answer = give(listener, tamper(2, proof))
    give(dialler, tamper(3, answer))
    return [dialler.greeting, proof]


@pytest.mark.parametrize("secret", [SECRET, None])
def test_both_sides_learn_the_other_hello(secret: bytes | None) -> None:
    dialler, listener = side(dialling=True, secret=secret), side(dialling=False, secret=secret)
    shake(dialler, listener)
    assert dialler.remote == listener.local
    assert listener.remote == dialler.local
    assert listener.remote is not None
    assert listener.remote.same_host(listener.local)


@pytest.mark.parametrize("otherwise", [True, False])
def test_a_peer_that_does_not_say_whether_it_checks_is_served_as_the_other_side_is_set(otherwise: bool) -> None:
    """So are those of a release that cannot say; and what a later one says besides is not read."""
    said = msgspec.to_builtins(hello("older", PeerRole.LANGUAGE))
    del said["checksum"]
    older = msgspec.convert(said | {"said_later": 1}, Hello)
    assert older.checks(otherwise) is otherwise
    assert not msgspec.structs.replace(older, checksum=False).checks(otherwise)


@pytest.mark.parametrize(("mine", "theirs"), [(SECRET, b"another secret of 16+"), (SECRET, None), (None, SECRET)])
def test_a_wrong_or_missing_secret_is_refused_by_the_listener(mine: bytes | None, theirs: bytes | None) -> None:
    dialler, listener = side(dialling=True, secret=theirs), side(dialling=False, secret=mine)
    with pytest.raises(AuthenticationFailed):
        shake(dialler, listener)
    assert listener.remote is None


def test_the_listener_says_nothing_about_itself_before_the_dialler_proved_itself() -> None:
    listener = side(dialling=False)
    assert b"listener" not in listener.greeting
    assert give(listener, side(dialling=True).greeting) == b""


@given(st.integers(0, 3), st.integers(0, 2**16), st.integers(1, 255))
def test_no_byte_of_a_handshake_can_be_altered(step: int, position: int, flip: int) -> None:
    def tamper(at: int, data: bytes) -> bytes:
        if at != step or not data:
            return data
        # The payload: a changed header is a framing error or a frame that never completes.
        changed = bytearray(data)
        changed[framing.HEADER_BYTES + position % (len(data) - framing.HEADER_BYTES)] ^= flip
        return bytes(changed)

    dialler, listener = side(dialling=True), side(dialling=False)
    with pytest.raises((AuthenticationFailed, RemoteProtocolError)):
        shake(dialler, listener, tamper)
    assert dialler.remote is None


def test_a_recorded_handshake_cannot_be_replayed() -> None:
    recorded = shake(side(dialling=True), side(dialling=False))
    listener = side(dialling=False)
    give(listener, recorded[0])
    with pytest.raises(AuthenticationFailed):
        give(listener, recorded[1])


def test_a_proof_sent_back_to_its_author_is_refused() -> None:
    dialler = side(dialling=True)
    proof = give(dialler, dialler.greeting)
    with pytest.raises(AuthenticationFailed):
        give(dialler, proof)


def test_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    dialler = side(dialling=True)
    monkeypatch.setattr(hello_module, "PROTOCOL_VERSION", 2)
    listener = side(dialling=False)
    with pytest.raises(RemoteProtocolError, match="speaks link version 1, not 2"):
        shake(dialler, listener)


@given(st.lists(st.tuples(st.integers(1, 6), st.binary(max_size=100)), max_size=6), st.booleans())
def test_garbage_frames_raise_only_typed_errors(frames: list[tuple[int, bytes]], dialling: bool) -> None:
    one = side(dialling=dialling)
    try:
        for kind, payload in frames:
            one.receive(kind, memoryview(payload))
    except (RemoteProtocolError, AuthenticationFailed):
        pass
    assert one.remote is None


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 16 bytes, not 3"):
        check_secret(b"abc")
    check_secret(None)
    check_secret(b"x" * 16)
