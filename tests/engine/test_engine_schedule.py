"""The schedule as tables."""

from __future__ import annotations

from math import inf

import pytest

from aiodisagg.engine.schedule import Scheduler, Segment, Step
from aiodisagg.scheduler.order import Order


def make(
    *, num_pages: int = 8, page_size: int = 4, token_budget: int = 16, max_running: int = 8,
    order: Order = Order.SHORT_FIRST,
) -> Scheduler:  # fmt: skip
    return Scheduler(
        num_pages=num_pages, page_size=page_size, token_budget=token_budget, max_running=max_running, order=order
    )


def ranges(step: Step) -> list[tuple[str, int, int]]:
    return [(s.request_id, s.start, s.stop) for s in step.segments]


def run(scheduler: Scheduler, now: float = 0.0) -> Step:
    """One step, everything computed, every sampled token wanted."""
    step = scheduler.plan_step(now)
    for segment in step.segments:
        scheduler.advance(segment, sampled=segment.samples)
    return step


def test_decodes_go_first_and_the_prompt_is_cut_to_the_budget() -> None:
    s = make()
    s.add("a", 4, 4, front=4)
    assert ranges(run(s)) == [("a", 0, 4)]
    s.add("b", 20, 4, front=20)
    assert ranges(run(s)) == [("a", 4, 5), ("b", 0, 15)]
    second = run(s)
    assert second.segments == (Segment("a", 5, 6, True), Segment("b", 15, 20, True))


@pytest.mark.parametrize(
    ("prompt", "steps"), [(18, [18]), (19, [16, 3]), (34, [16, 18]), (35, [16, 16, 3])]
)  # fmt: skip
def test_the_end_of_a_prompt_is_no_step_of_its_own(prompt: int, steps: list[int]) -> None:
    s = make(num_pages=64, token_budget=16)
    s.add("a", prompt, 1, front=prompt)
    found = []
    while (step := run(s)).segments and len(found) < 9:
        found.append(step.segments[0].tokens)
    assert found[: len(steps)] == steps
    s = make(num_pages=64, token_budget=16)
    s.add("a", 18, 1, front=17)
    assert ranges(run(s)) == [("a", 0, 16)], "what has not come yet is no end"


def test_what_goes_along_ends_in_the_same_step_if_it_is_near() -> None:
    s = make(num_pages=64, token_budget=32, order=Order.FIRST_COME)
    for name, tokens in (("a", 16), ("b", 18), ("c", 9)):
        s.add(name, tokens, 1, front=tokens)
    assert ranges(s.plan_step(0.0)) == [("a", 0, 16), ("b", 0, 18)], "and nobody behind it"


def test_prefill_stops_at_the_first_missing_row_and_goes_on_when_it_comes() -> None:
    s = make()
    s.add("a", 12, 1, front=5)
    assert ranges(run(s)) == [("a", 0, 5)]
    assert ranges(run(s)) == []
    s.set_front("a", 9)
    s.set_front("a", 7)  # an older report changes nothing
    step = run(s)
    assert step.segments == (Segment("a", 5, 9, False),)
    s.set_front("a", 12)
    assert run(s).segments == (Segment("a", 9, 12, True),)


def test_whole_prompts_wait_for_all_of_their_rows_and_say_whether_there_is_prefill_to_do() -> None:
    s = make()
    s.add("a", 4, 4, front=4)
    s.add("b", 12, 1, front=5)
    step = s.plan_step(0.0, whole=True)
    assert ranges(step) == [("a", 0, 4)] and step.prefills
    s.advance(step.segments[0], sampled=True)
    step = s.plan_step(0.0, whole=True)
    assert ranges(step) == [("a", 4, 5)] and not step.prefills
    assert ranges(s.plan_step(0.0)) == [("a", 4, 5), ("b", 0, 5)], "nothing was lost"
    s.set_front("b", 12)
    assert ranges(s.plan_step(0.0, whole=True)) == [("a", 4, 5), ("b", 0, 12)]


def test_pages_are_reserved_before_any_row_is_there() -> None:
    s = make()
    s.add("a", 17, 1, front=0)
    step = s.plan_step(0.0)
    assert step.admitted == ("a",) and step.segments == ()
    assert len(s.pages_of("a")) == 5 and s.pages.free == 3


def test_admission_is_in_order_and_leaves_a_page_for_who_runs() -> None:
    s = make(num_pages=8)
    s.add("a", 16, 8, front=16)
    s.add("b", 16, 1, front=16)  # 4 pages are free, but then none for a's next token
    s.add("c", 4, 1, front=4)  # would fit, but b was first
    assert s.plan_step(0.0).admitted == ("a",)
    assert s.waiting == ("b", "c")
    s.remove("a")
    assert s.plan_step(0.0).admitted == ("b", "c")


def test_the_newest_gives_its_pages_to_the_oldest_and_comes_back_with_all_it_had() -> None:
    s = make(num_pages=4)
    s.add("old", 4, 8, front=4)
    s.add("new", 4, 8, front=4)
    run(s)
    for _ in range(4):
        step = run(s)  # both take their second page, 4 of 4 pages used
    assert s.pages.free == 0 and step.preempted == ()
    step = run(s)
    assert step.preempted == ("new",) and ranges(step) == [("old", 8, 9)]
    assert s.running == ("old",) and s.waiting == ("new",)
    assert run(s).admitted == ()
    s.remove("old")
    step = run(s)
    assert step.admitted == ("new",) and step.segments == (Segment("new", 0, 9, True),)


def test_the_only_one_that_needs_a_page_can_be_its_own_victim() -> None:
    s = make(num_pages=4, token_budget=8)
    s.add("slow", 8, 1, front=0)  # holds two pages and waits for rows
    s.add("new", 4, 8, front=4)
    for _ in range(5):
        run(s)
    step = run(s)
    assert step.preempted == ("new",) and s.running == ("slow",)
    s.set_front("slow", 8)
    assert ranges(run(s)) == [("slow", 0, 8)]


def test_victims_wait_in_their_old_order_before_newcomers() -> None:
    s = make(num_pages=6, page_size=2)
    for name in ("a", "b", "c"):
        s.add(name, 1, 10, front=1)
    s.add("new", 8, 1, front=8)
    while s.running != ("a", "b"):
        run(s)
    assert s.waiting == ("c", "new")
    while s.running != ("a",):
        run(s)
    assert s.waiting == ("b", "c", "new")


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([40, 4], [("r1", 0, 4), ("r0", 0, 4)]),  # a short prompt passes, and its step takes twice as long at most
        ([40, 20], [("r1", 0, 16)]),
        ([40, 4, 4, 4], [("r1", 0, 4), ("r2", 0, 4), ("r3", 0, 4), ("r0", 0, 4)]),
        ([30, 20], [("r0", 0, 16)]),  # what is nearly equal goes by arrival
    ],
)
def test_who_needs_least_gets_the_budget_first(prompts: list[int], expected: list[tuple[str, int, int]]) -> None:
    s = make(num_pages=64, token_budget=16)
    for i, prompt in enumerate(prompts):
        s.add(f"r{i}", prompt, 1, front=prompt, due=inf)
    assert ranges(s.plan_step(0.0)) == expected


def test_rows_that_are_not_here_count_once_more() -> None:
    s = make(num_pages=64, token_budget=8)
    s.add("image", 30, 1, front=12, due=inf)
    s.add("text", 40, 1, front=40, due=inf)
    assert ranges(s.plan_step(0.0)) == [("image", 0, 8)]
    s = make(num_pages=64, token_budget=8)
    s.add("image", 30, 1, front=4, due=inf)
    s.add("text", 20, 1, front=20, due=inf)
    assert ranges(s.plan_step(0.0)) == [("text", 0, 8)]


def test_who_is_due_goes_first_and_by_arrival() -> None:
    s = make(num_pages=64, token_budget=16)
    s.add("long", 40, 1, front=40, due=5.0)
    s.add("short", 6, 1, front=6, due=inf)
    s.add("also long", 20, 1, front=20, due=4.0, priority=-1)
    assert ranges(s.plan_step(3.9))[0] == ("also long", 0, 16)
    assert ranges(s.plan_step(4.9))[0] == ("also long", 0, 16)
    assert ranges(s.plan_step(5.0)) == [("long", 0, 16)]


def test_classes_go_before_sizes() -> None:
    s = make(num_pages=64, token_budget=16)
    s.add("low", 4, 1, front=4, due=inf, priority=1)
    s.add("high", 40, 1, front=40, due=inf, priority=-1)
    assert ranges(s.plan_step(0.0)) == [("high", 0, 16)]


def test_first_come_first_served_fills_the_step_by_arrival() -> None:
    s = make(num_pages=64, token_budget=16, order=Order.FIRST_COME)
    for name, prompt in (("a", 12), ("b", 40), ("c", 2)):
        s.add(name, prompt, 1, front=prompt, due=inf)
    assert ranges(s.plan_step(0.0)) == [("a", 0, 12), ("b", 0, 4)]


def test_text_passes_images_for_pages_until_they_are_due() -> None:
    s = make(num_pages=6)
    s.add("running", 8, 8, front=8, due=inf)
    run(s)
    s.add("image", 12, 1, front=0, due=5.0)  # three pages: it does not fit
    for n in range(3):
        s.add(f"text {n}", 3, 1, front=3, due=inf)
        assert run(s, 4.0).admitted == (f"text {n}",)
        s.remove(f"text {n}")
    s.add("text", 3, 1, front=3, due=inf)
    assert run(s, 5.0).admitted == ()
    s.remove("running")
    assert run(s, 5.0).admitted[0] == "image"


def test_rows_that_arrive_while_a_request_waits_for_pages_count() -> None:
    s = make(num_pages=4)
    s.add("running", 12, 2, front=12, due=inf)
    run(s)
    s.add("a", 9, 1, front=0, due=inf)
    s.add("b", 10, 1, front=4, due=inf)
    s.set_front("b", 10)
    s.remove("running")
    assert s.plan_step(0.0).admitted == ("b",)


def test_who_has_no_token_yet_gives_way_to_who_has() -> None:
    s = make(num_pages=6, page_size=2, max_running=3)
    s.add("image", 6, 2, front=0, due=inf)  # three pages, while it waits for rows
    s.add("stream", 2, 9, front=2, due=inf)
    preempted: list[str] = []
    while not preempted:
        preempted += run(s).preempted
    assert preempted == ["image"] and s.running == ("stream",)


def test_who_was_preempted_after_its_first_token_comes_back_before_newcomers() -> None:
    s = make(num_pages=4)
    s.add("old", 4, 8, front=4, due=inf)
    s.add("new", 4, 8, front=4, due=inf)
    while "new" in s.running or not s.running:
        run(s)
    s.add("newcomer", 2, 1, front=2, due=inf)
    assert run(s).admitted == ()
    s.remove("old")
    assert run(s).admitted[0] == "new"


def test_a_stream_of_short_prompts_does_not_starve_a_long_one() -> None:
    s = make(num_pages=64, token_budget=8, max_running=16)
    s.add("long", 64, 1, front=64, due=100.0)
    steps, began = 0, inf
    while "long" in (*s.running, *s.waiting):
        s.add(f"short{steps}", 8, 1, front=8, due=steps + 100.0)
        for segment in run(s, float(steps)).segments:
            if segment.request_id == "long":
                began = min(began, steps)
            if segment.samples:
                s.remove(segment.request_id)
        steps += 1
    assert began == 100 and steps == 100 + 64 // 8


def test_what_can_never_fit_is_refused_and_the_largest_fits() -> None:
    s = make(num_pages=2, page_size=4)
    with pytest.raises(ValueError, match="9 are the most"):
        s.add("a", 8, 2, front=8)
    s.add("a", 8, 1, front=8)
    with pytest.raises(ValueError, match="known"):
        s.add("a", 1, 1, front=1)
    assert run(s).segments == (Segment("a", 0, 8, True),)


def keys_of(*letters: str) -> list[bytes]:
    return ["".join(letters[: i + 1]).encode() for i in range(len(letters))]


def test_a_prompt_begins_behind_the_pages_that_another_left() -> None:
    s = make()
    s.add("a", 9, 4, front=9, keys=keys_of("x", "y"))
    run(s)
    s.add("b", 12, 4, front=0, keys=keys_of("x", "y", "z"))  # while "a" still runs
    step = run(s)
    assert step.admitted == ("b",) and s.reused("b") == 8
    assert s.pages_of("b")[:2] == s.pages_of("a")[:2] and s.pages.free == 8 - 4
    assert ranges(step) == [("a", 9, 10)], "where the front of b is now, nobody has said yet"
    s.set_front("b", 12)
    assert ranges(run(s)) == [("a", 10, 11), ("b", 8, 12)]
    s.remove("a")
    s.remove("b")
    assert (s.hits, s.tokens_reused, s.pages.free, s.pages.idle) == (1, 8, 8, 3)


def test_the_last_token_is_always_computed_and_a_page_is_shared_when_it_is_full_and_computed() -> None:
    s = make(token_budget=6)
    s.add("a", 8, 1, front=8, keys=keys_of("x", "y"))
    run(s)  # six of eight tokens
    s.add("b", 10, 1, front=10, keys=keys_of("x", "y"))
    assert run(s).segments == (Segment("a", 6, 8, True), Segment("b", 4, 6, False))
    s.remove("a")
    s.remove("b")
    s.add("c", 8, 1, front=8, keys=keys_of("x", "y"))
    assert run(s).segments == (Segment("c", 4, 8, True),), "two pages are there, one token needs to be computed"


def test_the_pages_of_an_answer_are_shared_too() -> None:
    s = make()
    keys = keys_of("x")
    s.add("a", 4, 6, front=4, keys=keys)
    for _ in range(4):
        run(s)
    keys += keys_of("x", "answer")[1:]
    run(s)
    s.remove("a")
    s.add("next turn", 12, 1, front=12, keys=keys_of("x", "answer", "question"))
    assert run(s).segments == (Segment("next turn", 8, 12, True),)


def test_who_comes_back_and_finds_less_waits_for_its_rows_again() -> None:
    s = make(num_pages=4)
    s.add("gone", 4, 1, front=4, keys=keys_of("image"))
    run(s)
    s.remove("gone")
    s.add("old", 3, 12, front=3)
    run(s)
    s.add("new", 5, 3, front=0, keys=keys_of("image"))  # its image is in a page: its rows are never asked for
    assert run(s).admitted == ("new",) and s.reused("new") == 4
    s.set_front("new", 5)
    while "new" in s.running:
        step = run(s)
    assert step.preempted == ("new",)
    s.set_front("new", 0)  # what has come of its rows: none
    for _ in range(6):
        run(s)
    assert s.pages.find(keys_of("image")) == [], "the image's page went to the older request"
    s.remove("old")
    step = run(s)
    assert step.admitted == ("new",) and s.reused("new") == 0
    assert step.segments == () == run(s).segments
    s.set_front("new", 5)
    assert ranges(run(s))[0][:2] == ("new", 0)


def test_spoilt_pages_are_not_found() -> None:
    s = make()
    s.add("a", 8, 2, front=8, keys=keys_of("x", "y"))
    run(s)
    s.remove("a", spoilt=True)
    s.add("b", 8, 1, front=8, keys=keys_of("x", "y"))
    assert run(s).segments == (Segment("b", 0, 8, True),) and s.hits == 0


def test_who_comes_back_and_finds_all_but_its_last_token_in_pages_is_not_passed() -> None:
    s = make(num_pages=5)
    s.add("old", 8, 9, front=8)
    s.add("young", 7, 9, front=7, keys=(keys := keys_of("first", "second")))
    run(s)
    while not (step := run(s)).preempted:
        pass
    assert step.preempted == ("young",)
    s.add("last", 1, 4, front=1)
    s.remove("old")
    s.set_front("young", 7)
    step = run(s)
    assert step.admitted == ("young", "last") and s.reused("young") == 8 == 4 * len(keys)
    assert ranges(step) == [("young", 8, 9), ("last", 0, 1)]


def test_removing_what_is_gone_is_no_error() -> None:
    s = make()
    s.add("a", 4, 1, front=4)
    s.remove("a")
    s.remove("a")
    assert s.pages.free == 8 and s.plan_step(0.0) == Step((), (), ())
