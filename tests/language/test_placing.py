"""Which peers are compared, and what membership says of them before they are linked and after they are gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from typing import cast
from unittest.mock import Mock

import pytest

from aiodisagg.bootstrap.registry import Load, PeerEntry, PeerRecord, PeerState
from aiodisagg.language.peers import EncodePeer, EncodePeers
from aiodisagg.language.placing import COMPARED, Placing
from aiodisagg.link.hello import PeerRole
from aiodisagg.peer import metrics
from aiodisagg.protocol.blocks import BlockPool
from aiodisagg.protocol.events import Fail, ItemRequested, ItemSpec, MessageReceived, Place, Placed
from aiodisagg.protocol.messages import ItemKey, Refuse
from aiodisagg.protocol.receiving import Receiver
from aiodisagg.scheduler.book import PeerBook
from aiodisagg.scheduler.cost import PeerCosts, PrefillCosts, Rates
from aiodisagg.scheduler.health import HealthConfig
from aiodisagg.scheduler.placement import Standing
from tests.language.many import Many, item_of
from tests.protocol import truth

RECORD = PeerRecord(name="encode", incarnation="x", role=PeerRole.ENCODE)
LOAD = Load(patches=40_000, digests=("0123456789ab",))
ENTRY = PeerEntry(record=RECORD, state=PeerState.READY, load=LOAD, revision=1)


def test_what_was_said_before_the_link_counts_from_when_it_was_said_until_the_peer_is_gone() -> None:
    peers: dict[str, EncodePeer] = {}
    placing = Placing(Mock(by_incarnation=peers.get), 4, HealthConfig())
    placing.told([ENTRY], [], 10.0)
    early = peers["x"] = EncodePeer("unix:early", "x")
    placing.link_up("x")
    assert early.digests == {"0123456789ab"}
    at_once = early.book.backlog(10.0).tower_s
    assert at_once > 0.1 and early.book.backlog(10.1).tower_s == pytest.approx(at_once - 0.1)

    placing.told([], ["x"], 20.0)
    late = peers["x"] = EncodePeer("unix:late", "x")
    placing.link_up("x")
    assert not late.digests and late.book.backlog(20.0).tower_s == 0.0


def _place(placing: Placing, key: ItemKey, spec: ItemSpec, now: float = 0.0) -> str:
    placing.errand(key, spec)
    placing.plan([key], now)
    return _ask(placing, key, frozenset(), now)


def _ask(placing: Placing, key: ItemKey, avoid: frozenset[str], now: float) -> str:
    placing.given_up(key, now)
    placement = placing.choose(key, avoid, now)
    assert placement is not None
    placing.asked(key, placement, now)
    return placement.peer


def _refuse(placing: Placing, peer: str, key: ItemKey, now: float, code: str = "encode_failed") -> None:
    placing.refused(peer, Refuse(key, 1, code, "why", True), now)


def _samples(placing: Placing, name: str) -> dict[tuple[str, ...], float]:
    """By values of labels in the order of their names."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for metric in placing.metrics()
        for sample in metric.samples
        if sample.name == f"aiodisagg_{name}"
    }


def test_of_many_peers_all_get_their_share() -> None:
    peers = Many(50)
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    given = Counter(_place(placing, *item_of(i)) for i in range(150))
    assert len(given) == 50 and max(given.values()) <= 4


def test_who_holds_an_item_is_asked_for_it_wherever_it_stands_in_turn() -> None:
    peers = Many(50)
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    first = _place(placing, *item_of(0, "f" * 32))
    peers.linked[33].digests = frozenset({"a" * 12})
    assert [_place(placing, *item_of(i, "f" * 32)) for i in range(1, 5)] == [first] * 4
    assert [_place(placing, *item_of(i, "a" * 32)) for i in range(5, 9)] == ["33"] * 4


def test_the_own_tower_is_compared_for_every_item() -> None:
    peers = Many(50)
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    placing.own = "37"
    for peer in peers.linked:
        peer.book = PeerBook(PeerCosts(Rates(transfer_byte_s=1e-12 if peer.incarnation == "37" else 1e-3)))
    for i in range(12):
        key, spec = item_of(i)
        assert _place(placing, key, spec) == "37"
        placing.over(key)


@pytest.mark.parametrize(("count", "fast"), [(64, 16), (200, 4)])
def test_fast_peers_among_many_slow_ones_get_the_items(count: int, fast: int) -> None:
    """The slow ones, linked one after the other as hosts of a kind are, were compared with each other only: they got
    three items of four, and at 0.7 of what all could do items took 3,400 ms instead of 50."""
    peers = Many(count)
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    for number, peer in enumerate(peers.linked):
        peer.book = PeerBook(PeerCosts(Rates(tower_s=1e-3 if number < fast else 1.0)))
    given = Counter[bool]()
    for number in range(400):
        key, spec = item_of(number)
        given[int(_place(placing, key, spec)) < fast] += number >= 40
        placing.over(key)
    assert given[True] > 0.98 * given.total()


def test_an_item_that_is_placed_again_is_compared_with_few_of_many_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All were looked at for each: a peer that died with a hundred items held the loop up for a tenth of a second."""
    peers = Many(200)
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    keys = [item_of(number) for number in range(50)]
    for key, spec in keys:
        _place(placing, key, spec)
    looked = Mock(side_effect=PeerBook.backlog, autospec=True)
    monkeypatch.setattr(PeerBook, "backlog", lambda book, now: looked(book, now))
    placing.poison.cut("00", [keys[0][1].digest], 0.0)
    again = Counter(_ask(placing, key, frozenset({"00"}), 0.0) for key, _ in keys)
    assert looked.call_count <= 2 * COMPARED * len(keys)
    assert "00" not in again and max(again.values()) <= 2


@pytest.mark.parametrize("standing", Standing)
def test_one_peer_that_an_item_need_not_avoid_is_found_among_many(standing: Standing) -> None:
    """However it stands: it is asked before one that would have to do it again."""
    peers = Many(50)
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    placing.standings.told("49", standing)
    for number in range(8):
        key, spec = item_of(number)
        _place(placing, key, spec)
        assert _ask(placing, key, frozenset(peer.incarnation for peer in peers.linked[:-1]), 0.0) == "49"
    assert _ask(placing, key, frozenset(peer.incarnation for peer in peers.linked), 0.0), "better than none"


@pytest.mark.parametrize(("step_s", "token_s", "own"), [(1e-3, 1.0, 1), (1.0, 1e-3, 2)])
def test_the_own_tower_gets_less_than_its_share_where_prefill_takes_long(
    step_s: float, token_s: float, own: int
) -> None:
    """Its device has the prompt to compute as well. How long that takes is learned."""
    given = []
    for name in ("", "00"):
        placing = Placing(cast(EncodePeers, Many(2)), 4, HealthConfig())
        placing.own = name
        placing.prefill = PrefillCosts(step_s, token_s)
        keys = [ItemKey(1, index) for index in range(4)]
        for key in keys:
            placing.errand(key, item_of(key.index)[1])
        placing.plan(keys, 0.0)
        places = [placing.choose(key, frozenset(), 0.0) for key in keys]
        given.append(Counter(place.peer for place in places if place is not None)["00"])
    assert given == [2, own], "one step for all is computed when the last is there, wherever it was encoded"


def test_a_peer_that_gets_nothing_is_tried_with_an_item_now_and_then() -> None:
    """What is believed of it may be wrong."""
    peers = Many(4)
    peers.linked[0].book = PeerBook(PeerCosts(Rates(tower_s=1.0)))
    placing, tried = Placing(cast(EncodePeers, peers), 4, HealthConfig()), []
    for number in range(800):
        key, spec = item_of(number)
        if _place(placing, key, spec) == "00":
            tried.append(number)
        placing.over(key)
    assert tried == [256, 769]


def test_peers_that_drain_are_asked_only_if_all_do() -> None:
    peers = Many(50)
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    for peer in peers.linked[:-1]:
        placing.standings.told(peer.incarnation, Standing.DRAINING)
    assert {_place(placing, *item_of(i)) for i in range(8)} == {"49"}


# -- who fails --------------------------------------------------------------------------------------------------------


def test_a_peer_that_refuses_everything_at_once_does_not_attract_items() -> None:
    """It had never anything to do and was predicted to be the fastest: 189 of 200 items were asked of it first."""
    peers, now, first = Many(4), 0.0, Counter[str]()
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    under_way: list[ItemKey] = []
    for number in range(400):
        now += 0.2
        key, spec = item_of(number)
        peer = _place(placing, key, spec, now)
        first[peer] += 1
        if peer == "00":
            _refuse(placing, peer, key, now)
            assert _ask(placing, key, frozenset({peer}), now) != "00"
        under_way.append(key)
        if len(under_way) > 9:
            placing.over(under_way.pop(0), complete=True)
    assert 3 <= first["00"] <= 6 and min(first[peer] for peer in ("01", "02", "03")) > 100  # at 10, 30, 70 s again
    assert _samples(placing, "item_refusals_total") == {("encode_failed", ""): first["00"]}
    assert placing.moves == first["00"]


def test_what_a_peer_refused_before_it_delivered_is_not_held_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had no memory for a moment, and got nothing new until others had delivered that, nor for ten seconds after."""
    monkeypatch.setattr(PeerBook, "doubt", 0.0)  # of equal ones the first by name is asked
    placing = Placing(cast(EncodePeers, Many(2)), 4, HealthConfig())
    keys = [item_of(number)[0] for number in range(5)]
    for key in keys:
        placing.errand(key, item_of(key.room)[1])
    *refused, delivered = keys[:3]
    for key in keys[:3]:
        assert _ask(placing, key, frozenset({"01"}), 0.0) == "00"
    for key in refused:
        _refuse(placing, "00", key, 0.0)
        assert _ask(placing, key, frozenset({"00"}), 0.0) == "01"
    assert _ask(placing, keys[3], frozenset(), 0.0) == "01", "perhaps it refuses everything"
    placing.over(delivered, complete=True)
    assert _ask(placing, keys[4], frozenset(), 1.0) == "00"
    for key in refused:
        placing.over(key, complete=True)
    assert placing.judged("00", 1.0)["standing"] == "ready"


def test_of_a_request_only_one_item_is_the_trial_of_a_suspect() -> None:
    peers = Many(2)
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig(suspect_s=10.0))
    for _ in range(2):
        placing.standings.failed("00", 0.0)
    keys = [ItemKey(1, index) for index in range(6)]
    for key in keys:
        placing.errand(key, item_of(key.index)[1])
    placing.plan(keys, 10.0)
    assert Counter(_ask(placing, key, frozenset(), 10.0) for key in keys) == {"00": 1, "01": 5}


@pytest.mark.parametrize(
    ("code", "standing"),
    [
        ("encode_failed", Standing.SUSPECT),
        ("anything", Standing.SUSPECT),
        ("draining", Standing.DRAINING),
        ("invalid_media", Standing.READY),
        ("too_large", Standing.READY),
    ],
)
def test_only_what_another_peer_may_do_better_is_held_against_a_peer(code: str, standing: Standing) -> None:
    placing = Placing(cast(EncodePeers, Many(2)), 4, HealthConfig())
    for number in range(3):
        key, spec = item_of(number)
        placing.errand(key, spec)
        assert _ask(placing, key, frozenset({"01"}), 0.0) == "00"
        _refuse(placing, "00", key, 0.0, code)
        _refuse(placing, "who is not asked", key, 0.0, code)
        assert _ask(placing, key, frozenset({"00"}), 0.0) == "01"
        placing.over(key, complete=True)
    assert placing.standings.of("00", 0.0) is standing
    counted = {(code if code != "anything" else "other", ""): 3.0}
    assert _samples(placing, "item_refusals_total") == counted, "a peer cannot make series at will"


def _fetch(placing: Placing, number: int, refuses: Container[str], now: float) -> tuple[list[str], str]:
    """An item from the peers' refusals to its end: who was asked, and the code of its failure, if it failed."""
    pool, asked = BlockPool(64, 64, truth.ROW_BYTES), list[str]()
    receiver, (key, spec) = Receiver(truth.MODEL, pool), item_of(number)
    placing.errand(key, spec)
    actions = receiver.handle(ItemRequested(key, spec, 60.0), now)
    while True:
        for action in actions:
            if isinstance(action, Fail):
                placing.over(key)
                return asked, action.code
        (place,) = (action for action in actions if isinstance(action, Place))
        asked.append(_ask(placing, key, place.avoid, now))
        receiver.handle(Placed(key, asked[-1]), now)
        if asked[-1] not in refuses:
            placing.over(key, complete=True)
            return asked, ""
        refusal = Refuse(key, receiver.items[key].epoch, "prepare_failed", "why", True)
        placing.refused(asked[-1], refusal, now)
        actions = receiver.handle(MessageReceived(asked[-1], refusal), now)


def test_items_that_nobody_can_encode_are_not_taken_to_everybody_and_make_no_suspects() -> None:
    """A file that every peer refused was sent to all two hundred of them; a second one made all of them suspects."""
    peers = Many(200)
    names = [peer.incarnation for peer in peers.linked]
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    for number in range(2):
        asked, code = _fetch(placing, number, names, 0.0)
        assert len(set(asked)) == len(asked) == 8 and code == "prepare_failed"
        assert {placing.standings.of(name, 0.0) for name in names} == {Standing.READY}


def test_as_many_broken_peers_as_end_an_item_end_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the fastest, since they have nothing to do: items that they refuse are taken to others."""
    monkeypatch.setattr(PeerBook, "doubt", 0.0)  # of equal ones the first by name is asked
    peers = Many(12)
    broken = [peer.incarnation for peer in peers.linked[:9]]
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    assert _fetch(placing, 0, broken, 0.0)[1] == "prepare_failed"
    ends = [_fetch(placing, number, broken, 0.0) for number in range(1, 41)]
    assert not any(code for _, code in ends) and [len(asked) for asked, _ in ends[-4:]] == [1] * 4
    assert {placing.standings.of(name, 0.0) for name in broken} == {Standing.SUSPECT}


@pytest.mark.parametrize("linked", [True, False])
def test_a_peer_that_items_are_taken_from_is_a_suspect_unless_its_link_was_lost(linked: bool) -> None:
    peers = Many(2)
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    keys = [item_of(number, "f" * 32) for number in range(2)]
    (first,) = {_place(placing, *one) for one in keys}
    if not linked:
        del peers.linked[int(first)]
    for key, _ in keys:
        assert _ask(placing, key, frozenset({first}), 1.0) != first
    assert placing.standings.of(first, 1.0) is (Standing.SUSPECT if linked else Standing.READY)
    assert placing.moves == 2


# -- what they are called ---------------------------------------------------------------------------------------------


def test_two_peers_of_one_name_are_two_series_and_who_is_gone_is_none() -> None:
    """A scrape with a series twice is thrown away as a whole."""
    peers = Many(2)
    placing = Placing(cast(EncodePeers, peers), 4, HealthConfig())
    for peer in peers.linked:
        peer.name = "encode"
        placing.link_up(peer.incarnation)
    text = metrics.render(placing.metrics())
    series = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(set(series)) == len(series)
    assert 'aiodisagg_prediction_error{peer="encode/01",stage="tower"}' in series
    key, spec = item_of(1)
    peer = _place(placing, key, spec)
    _refuse(placing, peer, key, 0.0)
    label = "encode" if peer == "00" else "encode/01"
    assert _samples(placing, "item_refusals_total") == {("encode_failed", label): 1.0}
    placing.link_lost(peer, 0.0)
    placing.link_lost(peer, 0.0, gone=True)
    assert _samples(placing, "item_refusals_total") == {("encode_failed", ""): 1.0}
    assert not any(who for who, _ in placing._complaints._refusals), "a crash loop would leave one for each life"
