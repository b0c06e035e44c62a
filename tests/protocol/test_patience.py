"""How often an item is refused before it is given up."""

from __future__ import annotations

from aiodisagg.protocol.patience import Patience, ReceiverConfig


def test_refusals_end_an_item_when_nobody_is_left_to_ask() -> None:
    """Four broken peers ended an item, however many good ones there were."""
    patience = Patience(ReceiverConfig(max_attempts=4))
    assert [patience.refused(peer) for peer in "abcdef"] == [False] * 6
    assert patience.refused("a")


def test_one_peer_alone_is_asked_several_times() -> None:
    patience = Patience(ReceiverConfig(max_attempts=4))
    assert [patience.refused("a") for _ in range(4)] == [False, False, False, True]
