"""How often an item is refused before it is given up."""

from __future__ import annotations

from itertools import cycle

import pytest

from aiodisagg.protocol.patience import Patience, ReceiverConfig


def refusals(peers: str, *codes: str) -> list[bool]:
    patience = Patience(ReceiverConfig(max_attempts=4))
    return [patience.refused(peer, code) for peer, code in zip(peers, cycle(codes), strict=False)]


def test_refusals_end_an_item_when_nobody_is_left_to_ask() -> None:
    """Four broken peers ended an item, however many good ones there were."""
    assert refusals("abcdefa", "encode_failed") == [False] * 6 + [True]


def test_one_peer_alone_is_asked_several_times() -> None:
    assert refusals("aaaa", "encode_failed", "prepare_failed") == [False, False, False, True]


def test_what_eight_peers_say_of_an_item_the_ninth_is_not_asked() -> None:
    """An item that nobody can encode was taken to every encode peer, two hundred of them."""
    assert refusals("abcdefgh", "prepare_failed") == [False] * 7 + [True]


@pytest.mark.parametrize("codes", [("draining",), ("cancelled",), ("encode_failed", "prepare_failed", "anything")])
def test_of_an_item_that_peers_refuse_for_other_reasons_every_peer_is_asked(codes: tuple[str, ...]) -> None:
    assert not any(refusals("abcdefghijklmnopqrst", *codes))


def test_values_that_are_not_finite_at_two_peers_end_the_item() -> None:
    assert refusals("ab", "not_finite") == [False, True]
