"""With each stage of an item an encode peer says how much it has not encoded yet, whoever wants that."""

from __future__ import annotations

from math import prod

import msgspec

from aiodisagg.protocol import events as ev
from aiodisagg.protocol import messages as ms

from . import truth
from .lists import KEY, OTHER, SIX, Sending, every, only

PATCHES, MORE = (prod(truth.GRIDS[number]) for number in (SIX, 7))


def test_progress_says_what_waits_of_all_items() -> None:
    sending = Sending()
    sending.want()
    sending.want(OTHER, number=7, peer="another")
    entered = only(sending.do(ev.StageEntered(truth.digest_of(SIX), "encoding", 0.1)), ms.Progress)
    assert entered.waiting_patches == PATCHES + MORE
    assert only(sending.ready(), ms.Progress).waiting_patches == MORE
    (last,) = every(sending.ready(7), ms.Progress)
    assert last.waiting_patches == 0


def test_an_older_peer_neither_says_nor_reads_it() -> None:
    progress = ms.Progress(KEY, 1, "encoding", 0.25, 3, 4096)
    said = msgspec.msgpack.decode(ms.encode(progress))
    older = ms.decode(msgspec.msgpack.encode(said[:-1]), "peer")
    assert older == msgspec.structs.replace(progress, waiting_patches=None)
    later = ms.decode(msgspec.msgpack.encode([*said, "of a later release"]), "peer")
    assert later == progress
