"""The words on a link: every one survives the wire, and no bytes raise anything but RemoteProtocolError."""

from __future__ import annotations

import contextlib
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiodisagg.errors import RemoteProtocolError
from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms

from . import truth
from .lists import KEY, OTHER, Receiving, Sending, only, want

META = ms.Meta(0, 2, b"12345678", None, b"\0" * 64)
EVERY: tuple[ms.Message, ...] = (
    want(epoch=3, held=((0, 2), (4, 6)), meta=(1, 2, 3)),
    want(media=None, urgency=ms.Urgency(2.5, -8, 1 << 40), alone=True),
    ms.Grant(KEY, 1, (ms.Lend(5, 0, 0, 4), ms.Lend(6, 48, 4, 6)), ((0, 2),)),
    ms.Release(KEY, 2),
    ms.Cancel(KEY, 2),
    ms.Offer(KEY, 1, 6, truth.MODEL, False, 4, ((ms.Chunk(5, 0, 2, 2**64 - 1), META), (ms.Chunk(5, 2, 4, 0), None))),
    ms.Progress(KEY, 1, "encoding", 0.25, 3),
    ms.Commit(KEY, 1, ms.Chunk(5, 0, 2, 9), META),
    ms.Fenced(KEY, 1),
    ms.Refuse(KEY, 1, "oom", "out of memory", True),
)


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_every_word_survives_the_wire(message: ms.Message) -> None:
    data = ms.encode(message)
    for form in (data, bytearray(data), memoryview(data)):
        assert ms.decode(form, "peer") == message


def test_the_samples_hold_every_word() -> None:
    assert {type(message) for message in EVERY} == {
        ms.Want, ms.Grant, ms.Release, ms.Cancel, ms.Offer, ms.Progress, ms.Commit, ms.Fenced, ms.Refuse,
    }  # fmt: skip


@given(st.binary(max_size=200))
def test_noise_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as raised:
        ms.decode(data, "peer")
    assert raised.value.peer == "peer"


def test_deep_nesting_is_a_protocol_error() -> None:
    with pytest.raises(RemoteProtocolError):
        ms.decode(b"\x91" * 100_000, "peer")


@given(st.sampled_from(EVERY), st.randoms(use_true_random=False))
def test_damaged_words_hurt_nobody_else(message: ms.Message, random: Random) -> None:
    """Flipped and cut bytes, decoded or not, given to both machines: RemoteProtocolError at most, others unharmed."""
    data = bytearray(ms.encode(message))
    for _ in range(random.randrange(1, 4)):
        data[random.randrange(len(data))] = random.randrange(256)
    try:
        got = ms.decode(data[: len(data) - random.randrange(2)], "peer")
    except RemoteProtocolError:
        return
    receiving, sending = Receiving(blocks=8), Sending()
    receiving.open()
    (lend, *_) = receiving.open(OTHER, peer="B")
    sending.want()
    sending.want(OTHER, peer="M")
    sending.ready()
    for machine, peer in ((receiving.machine, "A"), (sending.machine, "L"), (sending.machine, "new")):
        with contextlib.suppress(RemoteProtocolError):
            machine.handle(ev.MessageReceived(peer, got), 0.0)
    assert not receiving.arrive(lend, OTHER, peer="B") or len(receiving.machine.items[OTHER].held) == 2
    assert only(sending.grant((0, 2), key=OTHER, peer="M"), ev.Write).stop == 2


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(["want", "grant", "offer", "commit", "progress", "refuse", "nothing"]), st.lists(values))
def test_well_formed_nonsense_is_a_protocol_error(tag: str, fields: list[object]) -> None:
    with pytest.raises(RemoteProtocolError):
        ms.decode(msgspec.msgpack.encode([tag, *fields]), "peer")


def test_each_side_refuses_the_other_sides_words() -> None:
    """A receiver is told nothing by a want, a sender nothing by an offer."""
    receiving, sending = Receiving(), Sending()
    for message in EVERY:
        machine = receiving.machine if isinstance(message, ms.FromReceiver) else sending.machine
        with pytest.raises(RemoteProtocolError, match="word"):
            machine.handle(ev.MessageReceived("P", message), 0.0)
