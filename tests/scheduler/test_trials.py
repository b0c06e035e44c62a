"""Who is tried though others are predicted to be faster, and for how long."""

from __future__ import annotations

from collections import Counter

from aiodisagg.scheduler.cost import PeerCosts, Rates, Size
from aiodisagg.scheduler.placement import PeerView, Wanted, place
from aiodisagg.scheduler.trials import BETWEEN, EVERY, Trials

SIZE = Size.of((1, 64, 64), 1 << 24)
WANTED = Wanted("0" * 32, SIZE)
SLOW = Rates(tower_s=0.1)


def _asked(trials: Trials, views: list[PeerView]) -> tuple[str, bool]:
    """Who gets the next item, and whether that is a trial."""
    tried, placed = trials.place(WANTED, views), place(WANTED, views)
    assert placed is not None
    peer = (tried or placed).peer
    trials.asked(peer, trial=tried is not None)
    return peer, tried is not None


def test_one_item_is_enough_for_a_peer_that_is_as_slow_as_believed() -> None:
    """It got eight each time."""
    trials, views = Trials(), [PeerView("fast", PeerCosts()), PeerView("slow", PeerCosts(SLOW))]
    got = [number for number in range(EVERY * 8) if _asked(trials, views)[0] == "slow"]
    assert got == [EVERY, EVERY * 3 + 1, EVERY * 7 + 2], "after twice as many items each time"


def test_a_peer_that_turns_out_to_be_faster_is_tried_on_until_it_is_chosen() -> None:
    costs, trials = PeerCosts(SLOW), Trials()
    views = [PeerView("fast", PeerCosts(Rates(tower_s=2e-3))), PeerView("slow", costs)]
    chosen = 0
    for _ in range(2 * EVERY):
        peer, trial = _asked(trials, views)
        if peer == "slow":
            costs.encoded([SIZE], 0.011)
            chosen += not trial
    assert chosen > EVERY / 4


def test_of_many_slow_peers_few_items_are_tried_and_all_have_their_turn() -> None:
    slow = [PeerView(f"slow{i:02}", PeerCosts(SLOW)) for i in range(48)]
    trials, views = Trials(), [PeerView("fast", PeerCosts()), *slow]
    given = [_asked(trials, views) for _ in range(50 * BETWEEN)]
    for begin in range(0, len(given), EVERY):
        assert sum(trial for _, trial in given[begin : begin + EVERY]) <= EVERY // BETWEEN
    assert len(Counter(peer for peer, _ in given)) == 49


def test_who_got_an_item_by_itself_is_tried_again_as_soon_as_at_first() -> None:
    trials, views = Trials(), [PeerView("fast", PeerCosts()), PeerView("slow", PeerCosts(SLOW))]
    assert sum(_asked(trials, views)[1] for _ in range(EVERY * 4)) == 2, "in vain"
    trials.asked("slow", trial=False)
    got = [number for number in range(EVERY * 2) if _asked(trials, views)[0] == "slow"]
    assert got == [EVERY]
