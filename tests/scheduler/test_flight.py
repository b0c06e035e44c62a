"""One fetch for all who want a digest; a cache bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aiodisagg.scheduler.flight import Flights, Landing, RowCache


def test_the_first_fetches_and_all_are_told() -> None:
    flights: Flights[str] = Flights()
    assert flights.join("x", "a", 10.0)
    assert not flights.join("x", "b", 10.0)
    assert flights.join("y", "c", 10.0)
    assert flights.shared == 1
    assert flights.landed("a") == Landing("x", ("a", "b"), ())
    assert flights.landed("a") is None and len(flights) == 1
    assert flights.join("x", "d", 10.0), "that one is over"


def test_a_fetch_outlives_who_started_it_and_ends_with_the_last() -> None:
    flights: Flights[str] = Flights()
    flights.join("x", "a", 10.0)
    flights.join("x", "b", 10.0)
    assert flights.leave("a") == ()
    assert flights.leave("a") == ()
    assert flights.leave("b") == ("a",)
    assert flights.landed("a") is None and not len(flights)


def test_the_first_of_two_legs_wins() -> None:
    flights: Flights[str] = Flights()
    flights.join("x", "a", 10.0)
    flights.hedge("x", "a2")
    assert flights.landed("a2") == Landing("x", ("a",), ("a",))
    flights.join("x", "b", 10.0)
    flights.hedge("x", "b2")
    assert flights.failed("b") is None, "the other is under way"
    assert flights.failed("b2") == Landing("x", ("b",), ())


def test_what_is_the_digests_own_fault_ends_its_other_leg_too() -> None:
    flights: Flights[str] = Flights()
    flights.join("x", "a", 10.0)
    flights.hedge("x", "a2")
    assert flights.failed("a", for_good=True) == Landing("x", ("a",), ("a2",))
    assert flights.landed("a2") is None and not len(flights)


def test_a_failure_is_everybodys() -> None:
    flights: Flights[str] = Flights()
    flights.join("x", "a", 10.0)
    flights.join("x", "b", 10.0)
    assert flights.failed("a") == Landing("x", ("a", "b"), ())


def test_a_deadline_is_not() -> None:
    flights: Flights[str] = Flights()
    flights.join("x", "a", 10.0)
    flights.join("x", "b", 20.0)
    flights.join("x", "c", 9.0)
    assert flights.expired("a", 10.0) == (Landing("x", ("a", "c"), ()), "b")
    assert flights.landed("b") == Landing("x", ("b",), ()), "the next leg bears the name of the first with time left"
    flights.join("x", "d", 10.0)
    assert flights.expired("d", 10.0) == (Landing("x", ("d",), ()), None)


class Sharing(RuleBasedStateMachine):
    """Whatever happens: a digest has at most one flight, who waits has one, and each is told exactly once."""

    def __init__(self) -> None:
        super().__init__()
        self.flights: Flights[int] = Flights()
        self.count = 0
        self.waiting: dict[int, str] = {}
        self.legs: dict[int, str] = {}

    def told(self, landing: Landing[int] | None) -> None:
        for key in landing.sharers if landing is not None else ():
            del self.waiting[key]
        for leg in landing.cancel if landing is not None else ():
            del self.legs[leg]

    @rule(digest=st.sampled_from("xyz"), deadline=st.integers(1, 9))
    def join(self, digest: str, deadline: int) -> None:
        self.count += 1
        started = self.flights.join(digest, self.count, deadline)
        assert started == (digest not in self.waiting.values())
        self.waiting[self.count] = digest
        if started:
            self.legs[self.count] = digest

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.waiting:
            key = data.draw(st.sampled_from(sorted(self.waiting)))
            del self.waiting[key]
            for leg in self.flights.leave(key):
                del self.legs[leg]

    @rule(data=st.data())
    def hedge(self, data: st.DataObject) -> None:
        if self.legs:
            digest = self.legs[data.draw(st.sampled_from(sorted(self.legs)))]
            self.count += 1
            self.flights.hedge(digest, self.count)
            self.legs[self.count] = digest

    @rule(data=st.data(), how=st.sampled_from(["landed", "failed", "expired"]), now=st.integers(1, 9))
    def end(self, data: st.DataObject, how: str, now: int) -> None:
        if not self.legs:
            return
        leg = data.draw(st.sampled_from(sorted(self.legs)))
        del self.legs[leg]
        if how == "expired":
            landing, heir = self.flights.expired(leg, now)
            self.told(landing)
            if heir is not None:
                self.legs[heir] = self.waiting[heir]
        else:
            self.told(self.flights.landed(leg) if how == "landed" else self.flights.failed(leg))

    @invariant()
    def everybody_who_waits_has_a_fetch(self) -> None:
        assert set(self.waiting.values()) == set(self.legs.values())
        assert len(self.flights) == len(set(self.waiting.values()))


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=40, stateful_step_count=20)


def test_least_recently_used_first() -> None:
    cache: RowCache[str] = RowCache(10)
    assert cache.put("x", "X", 4) == () and cache.put("y", "Y", 4) == ()
    assert cache.get("x") == "X" and cache.get("z") is None
    assert cache.put("z", "Z", 4) == ("y",)
    assert (cache.hits, cache.misses, cache.saved_bytes, cache.evicted, cache.used_bytes) == (1, 1, 4, 1, 8)
    assert cache.put("huge", "H", 11) == () and "huge" not in cache and "x" in cache


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("uvwxyz"), st.integers(0, 7), st.booleans()), max_size=40))
def test_the_bound_holds_and_the_latest_are_kept(steps: list[tuple[str, int, bool]]) -> None:
    cache: RowCache[int] = RowCache(10)
    model: OrderedDict[str, int] = OrderedDict()
    for digest, size, put in steps:
        if put:
            cache.put(digest, size, size)
            model.pop(digest, None)
            model[digest] = size
            while sum(model.values()) > 10:
                model.popitem(last=False)
        elif cache.get(digest) is not None:
            model.move_to_end(digest)
        assert cache.used_bytes == sum(model.values()) <= 10
        assert {d for d in "uvwxyz" if d in cache} == set(model)
