"""Every state x every event of both machines: what the table says happens, and what it does not say changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from aiodisagg.errors import InvalidTransition
from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms
from aiodisagg.protocol.blocks import BlockPool
from aiodisagg.protocol.events import State
from aiodisagg.protocol.incoming import IncomingItem
from aiodisagg.protocol.outgoing import OutgoingItem, RoomWanted

from . import truth
from .lists import KEY, SIX, Receiving, Sending, only, want
from .states import document, events

CHUNK = ms.Chunk(BlockPool(1, 2, 1).lend(KEY, "A", 1, 0, 2).lend.lease, 0, 2, 7)
EVENTS: dict[type, Any] = {
    ev.Placed: ev.Placed(KEY, "A"),
    ms.Offer: ms.Offer(KEY, 1, 6, truth.MODEL, False, 6, ()),
    ms.Progress: ms.Progress(KEY, 1, "encoding", 0.1, 3),
    ms.Commit: ms.Commit(KEY, 1, CHUNK, None),
    ms.Fenced: ms.Fenced(KEY, 1),
    ms.Refuse: ms.Refuse(KEY, 1, "oom", "no memory", True),
    ev.RowsTaken: ev.RowsTaken(KEY, CHUNK),
    ev.RowsRefused: ev.RowsRefused(KEY, CHUNK),
    ev.LinkLost: ev.LinkLost("A"),
    ev.LinkUp: ev.LinkUp("A"),
    ev.TimerFired: ev.TimerFired(),
    ev.ItemCancelled: ev.ItemCancelled(KEY),
    ev.ItemHurried: ev.ItemHurried(KEY, ms.Urgency(1.0)),
    ms.Want: want(epoch=2),
    ms.Grant: ms.Grant(KEY, 1, (ms.Lend(9, 0, 4, 6),), ()),
    ms.Release: ms.Release(KEY, 1),
    ms.Cancel: ms.Cancel(KEY, 1),
    ev.RowsReady: ev.RowsReady(truth.digest_of(SIX), 6),
    ev.StageEntered: ev.StageEntered(truth.digest_of(SIX), "encoding", 0.1),
    ev.EncodeStopped: ev.EncodeStopped(truth.digest_of(SIX), "oom", "", True),
    ev.ChunkWritten: ev.ChunkWritten("L", KEY, 1, ms.Chunk(100, 0, 2, 7)),
    ev.WriteFailed: ev.WriteFailed("L", KEY, 1, "broken"),
    ev.WritesFenced: ev.WritesFenced("L", KEY),
    RoomWanted: RoomWanted(),
}


def incoming(state: State) -> IncomingItem:
    """An item in this state, with blocks lent and a chunk being taken wherever the state allows."""
    r = Receiving(blocks=4, rows_per_block=2)
    r.request()
    item = r.machine.items[KEY]
    if state is State.BOOTSTRAPPING:
        return item
    r.place()
    if state is State.FAILED:
        r.do(ev.ItemCancelled(KEY))
        return item
    r.offer(ready=0)
    if state is State.WAITING_FOR_INPUT:
        return item
    r.says(ms.Progress(KEY, 1, "encoded", 0.0, 6))
    blocks = [block.lend for block in r.pool.lent_to("A")]
    take = only(r.commit(blocks[0]), ev.Take)
    assert take.chunk == CHUNK
    if state is State.SUCCESS:
        r.do(ev.RowsTaken(KEY, take.chunk))
        for lend in blocks[1:]:
            r.arrive(lend)
    return item


def outgoing(state: State) -> OutgoingItem:
    s = Sending()
    s.want()
    item = s.machine.items["L", KEY]
    if state is State.WAITING_FOR_INPUT:
        return item
    s.ready()
    write = only(s.grant((0, 2), (2, 4)), ev.Write)
    assert write.lease == 100
    if state is State.BOOTSTRAPPING:
        s.do(ev.LinkLost("L"))
    elif state is State.SUCCESS:
        s.says(ms.Release(KEY, 1))
    elif state is State.FAILED:
        s.says(ms.Cancel(KEY, 1))
    return item


def snapshot(item: Any) -> dict[str, Any]:
    """Everything the item consists of, to any depth."""
    flat: dict[str, Any] = {}
    names = vars(item).keys()
    for name in names:
        value = getattr(item, name)
        if name == "_pool":
            value = (value._free, value._lends, value._lent)
        elif name == "_counters":
            value = sorted(value.items())
        elif callable(value):
            continue
        flat[name] = copy.deepcopy(value)
    return flat


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
@pytest.mark.parametrize("build", [incoming, outgoing], ids=lambda build: build.__name__)
def test_every_state_and_event(build: Any, state: State, event: type) -> None:
    """Legal where the table has an entry; InvalidTransition with nothing changed where it has none."""
    item = build(state)
    assert item.state is state
    before = snapshot(item)
    if (state, event) in item.TABLE:
        try:
            item.handle(EVENTS[event], 1.0)
        except InvalidTransition:
            assert snapshot(item) == before  # legal in the state, but nothing was asked that this answers
        if item.TABLE[state, event].__name__ == "_ignore":
            assert snapshot(item) == before
        return
    with pytest.raises(InvalidTransition) as raised:
        item.handle(EVENTS[event], 1.0)
    assert (raised.value.state, raised.value.event) == (state.value, event.__name__)
    assert snapshot(item) == before


def test_the_samples_know_every_event() -> None:
    assert set(EVENTS) == {*events(IncomingItem), *events(OutgoingItem)}


@pytest.mark.parametrize(
    ("build", "state", "event", "after"),
    [
        (incoming, State.BOOTSTRAPPING, ev.Placed, State.BOOTSTRAPPING),
        (incoming, State.WAITING_FOR_INPUT, ev.LinkLost, State.BOOTSTRAPPING),
        (incoming, State.WAITING_FOR_INPUT, ms.Commit, State.TRANSFERRING),
        (incoming, State.TRANSFERRING, ms.Refuse, State.BOOTSTRAPPING),
        (incoming, State.TRANSFERRING, ev.ItemCancelled, State.FAILED),
        (outgoing, State.WAITING_FOR_INPUT, ms.Want, State.WAITING_FOR_INPUT),
        (outgoing, State.TRANSFERRING, ev.WriteFailed, State.BOOTSTRAPPING),
        (outgoing, State.TRANSFERRING, ms.Release, State.SUCCESS),
        (outgoing, State.TRANSFERRING, ev.EncodeStopped, State.FAILED),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_where_events_lead(build: Any, state: State, event: type, after: State) -> None:
    """A few entries spelled out, so that the table is not only compared with itself."""
    item = build(state)
    item.handle(EVENTS[event], 1.0)
    assert item.state is after


def test_answers_to_nothing_change_nothing() -> None:
    """The second answer to a write, a fence without a question, a second place: refused, state unchanged."""
    for item, event in (
        (outgoing(State.WAITING_FOR_INPUT), ev.ChunkWritten),
        (outgoing(State.WAITING_FOR_INPUT), ev.WriteFailed),
        (outgoing(State.TRANSFERRING), ev.WritesFenced),
    ):
        before = snapshot(item)
        with pytest.raises(InvalidTransition):
            item.handle(EVENTS[event], 1.0)
        assert snapshot(item) == before
    item = incoming(State.BOOTSTRAPPING)
    item.handle(EVENTS[ev.Placed], 0.0)
    before = snapshot(item)
    with pytest.raises(InvalidTransition):
        item.handle(EVENTS[ev.Placed], 0.0)
    assert snapshot(item) == before


def test_the_document_is_the_table() -> None:
    """docs/states.md says what the code does; if this fails, generate it again."""
    path = Path(__file__).parents[2] / "docs" / "states.md"
    assert path.read_text() == document()
