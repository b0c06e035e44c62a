"""Whole clusters in virtual time: what must hold for every one of them."""

from __future__ import annotations

import msgspec
import pytest

from aiodisagg.bench.distributions import Ranges, exactly
from aiodisagg.bench.workload import Gamma, ImageSpec, Mix, WorkloadRequest, generate
from aiodisagg.errors import ConfigError
from aiodisagg.scheduler.admission import Arrived
from aiodisagg.scheduler.order import Order
from aiodisagg.scheduler.trials import Trials
from aiodisagg.simulate.cluster import Cluster, Routing, System
from aiodisagg.simulate.doors import Doors, Line, QueueDoor
from aiodisagg.simulate.known import BEAT_S, Known
from aiodisagg.simulate.machines import MachineWires
from aiodisagg.simulate.placing import Placing, first_finish
from aiodisagg.simulate.record import report
from aiodisagg.simulate.runs import run, work
from aiodisagg.simulate.systems import flexible, ladder, replicas, split_overlap, split_waits
from aiodisagg.simulate.times import Costs, ServiceTimes, read_times

TIMES = read_times("h200-modelled")
FULL_HD = ((1920, 1080),)
IMAGES = Mix(Ranges(((0, 0, 1.0), (1, 8, 3.0))), FULL_HD, Ranges(((32, 128, 1.0),)), Ranges(((1, 40, 1.0),)))
FIRST_TOKEN = Mix(Ranges(((1, 8, 1.0),)), FULL_HD, Ranges(((32, 128, 1.0),)), exactly(1))
SYSTEMS = (
    replicas(2),
    split_waits(2, 1),
    split_overlap(3, 1),
    flexible(2),
    System("all", replicas=1, encode=1, language=1, both=1, placing=Placing.FIXED),
    System("at once", both=2, turns=False, inter_token_ms=0.0),
    System("no slack", both=2, inter_token_ms=0.0),
    msgspec.structs.replace(flexible(2), name="admission", doors=Doors(line=Line.ADMISSION, inside=4)),
)


def requests(mix: Mix, rate: float, count: int, seed: int = 1) -> tuple[WorkloadRequest, ...]:
    return generate(mix, Gamma(rate), count, seed)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
@pytest.mark.parametrize("protocol", [False, True], ids=["timed", "protocol"])
def test_every_request_ends_once_with_all_its_tokens(system: System, protocol: bool) -> None:
    workload = requests(IMAGES, 4.0, 60)
    cluster = Cluster(system, TIMES, protocol=protocol)
    cluster.run(workload)
    for request, source in zip(cluster.requests, workload, strict=True):
        assert request.outcome == "ok" and request.generated == source.output_tokens
        assert source.arrival_s < request.first_s <= request.end_s
        assert all(item.arrived == item.rows for item in request.items)
    for peer in cluster.peers:
        assert peer.owed_s == pytest.approx(0.0, abs=1e-9)
        assert peer.door is None or peer.door.waiting_s == pytest.approx(0.0, abs=1e-9)
        if peer.engine is not None:
            assert peer.engine.active == 0
            assert peer.engine.scheduler.pages.free == peer.engine.scheduler.pages.count
        assert peer.device.busy_s <= cluster.clock.now + 1e-9
    said = report(cluster, seed=1)
    assert said.ok == 60 and said.itl.count == sum(source.output_tokens - 1 for source in workload)


def test_equal_seeds_give_equal_reports_and_others_do_not() -> None:
    system = msgspec.structs.replace(flexible(40), links=4)
    workload = requests(IMAGES, 60.0, 150)
    one, same, other = (run(system, TIMES, workload, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.ttft != other.ttft  # the router looks at other peers


def test_a_lone_request_takes_what_the_service_times_say() -> None:
    costs = Costs(TIMES)
    workload = [WorkloadRequest(0.0, tuple(ImageSpec(i, 1920, 1080) for i in range(4)), 64, 1)]
    cluster = Cluster(replicas(1), TIMES)
    cluster.run(workload)
    tokens = workload[0].images[0].visual_tokens
    expected = costs.tower_s([4 * tokens] * 4) + costs.prefill_s(4 * tokens + 64)
    assert cluster.requests[0].first_s == pytest.approx(expected)
    assert cluster.requests[0].unloaded_s == pytest.approx(expected)


@pytest.mark.parametrize(
    ("system", "protocol"),
    [(replicas(1), False), (flexible(1), False), (flexible(1), True)],
    ids=["replica", "both", "both, protocol"],
)
def test_a_lone_request_takes_what_is_beside_the_device_too(system: System, protocol: bool) -> None:
    """Planning it, and moving the rows of its picture."""
    request = WorkloadRequest(0.0, (ImageSpec(0, 1920, 1080),), 64, 1)
    rate = 10.0 * TIMES.row_bytes * request.images[0].visual_tokens  # a tenth of a second for the picture
    firsts = []
    for times in (TIMES, msgspec.structs.replace(TIMES, request_ms=7.0, image_ms=2.0, local_bytes_per_s=rate)):
        cluster = Cluster(system, times, protocol=protocol)
        cluster.run([request])
        firsts.append(cluster.requests[0].first_s)
    assert firsts[1] - firsts[0] == pytest.approx(0.007 + 0.002 + 0.1)
    assert cluster.requests[0].unloaded_s == pytest.approx(firsts[1])


def test_rows_of_the_own_tower_are_no_nearer_than_they_are() -> None:
    rate = 1e9
    costs = Costs(msgspec.structs.replace(TIMES, local_bytes_per_s=rate, link_bytes_per_s=rate, link_rtt_ms=0.0))
    request = Cluster(flexible(2), TIMES)._request(0, WorkloadRequest(0.0, (ImageSpec(0, 1920, 1080),), 64, 1))
    own, other = (Known(name, costs, local=name == "own") for name in ("own", "other"))
    for known in (own, other):
        known.book.costs.finished(1.0, 1.0)  # nothing is in doubt
    own.heard(4096, frozenset(), 0.0)
    views = [known.view([0], 0.0) for known in (own, other)]
    assert first_finish(request.items, views, "own", costs, Trials())[0].peer == "other"


def test_what_is_encoded_lies_before_nobody_though_its_rows_are_still_on_their_way() -> None:
    costs = Costs(TIMES)
    (item,) = Cluster(flexible(2), TIMES)._request(0, WorkloadRequest(0.0, (ImageSpec(0, 1920, 1080),), 64, 1)).items
    known = Known("other", costs, local=False)
    (placement,) = first_finish([item], [known.view([0], 0.0)], "", costs, Trials())
    known.asked(item, placement, 0.0)
    assert known.view([], 0.0).backlog.tower_s > 0.0
    for number, stage in enumerate(("prepared", "encoding", "encoded"), 1):
        known.entered(item, stage, 0.1, 0, 0.1 * number)
    assert known.view([], 0.3).backlog.tower_s == 0.0


def test_who_is_judged_from_its_arrival_has_its_deadline_from_there() -> None:
    times = msgspec.structs.replace(TIMES, request_ms=1000.0)
    system = msgspec.structs.replace(flexible(1), doors=Doors(line=Line.ADMISSION, shed_at=1.2))
    cluster = Cluster(system, times)
    door = cluster.peers[0].door
    assert isinstance(door, QueueDoor)
    heard = list[Arrived]()
    handle = door._queue.handle
    door._queue.handle = lambda event, now: heard.append(event) or handle(event, now)  # type: ignore[func-returns-value,method-assign,assignment]
    cluster.run([WorkloadRequest(5.0, (), 64, 1)])
    assert heard[0].deadline == pytest.approx(5.0 + 1.2 * cluster.requests[0].unloaded_s)


def test_decodes_beside_a_prompt_take_what_was_measured() -> None:
    times = msgspec.structs.replace(TIMES, beside=((1.0, 3.0), (9.0, 11.0)), decode_context_us=0.0)
    plain, beside = Costs(msgspec.structs.replace(TIMES, decode_context_us=0.0)), Costs(times)
    alone = plain.mixed_s([(0, 2000)], 0, 0)
    assert beside.mixed_s([(0, 2000)], 0, 0) == alone
    assert beside.mixed_s([(0, 2000)], 5, 0) == pytest.approx(alone + 0.007)


def test_engines_know_what_reading_experts_takes() -> None:
    times = msgspec.structs.replace(TIMES, reads_ms=14.0, reads_part=0.0625)
    engine = Cluster(flexible(1), times).peers[0].engine
    assert engine is not None and engine._pace is not None
    assert engine._pace.reads.all_s == 0.014 and engine._pace.reads.of_token == 0.0625


def test_a_queue_of_equal_prompts_waits_as_long_as_theory_says() -> None:
    """M/D/1: the mean wait is load / (2 (1 - load)) service times."""
    times = msgspec.structs.replace(TIMES, max_running=1)
    text = Mix(exactly(0), FULL_HD, exactly(1000), exactly(1))
    service = Costs(times).prefill_s(1000)
    for load in (0.3, 0.7):
        waits = []
        for seed in range(4):
            said = run(replicas(1), times, requests(text, load / service, 4000, seed))
            waits.append(said.ttft.mean / 1e3 - service)
        expected = load / (2 * (1 - load)) * service
        assert sum(waits) / len(waits) == pytest.approx(expected, rel=0.08)


def test_overlap_is_never_later_than_waiting_on_average() -> None:
    spent = work(TIMES, requests(FIRST_TOKEN, 1.0, 200)).ttft_s
    for load in (0.2, 0.5):
        workload = requests(FIRST_TOKEN, 2 * load / spent, 300)
        waits, overlap = (run(make(2, 1), TIMES, workload).ttft.mean for make in (split_waits, split_overlap))
        assert overlap < 0.95 * waits


def test_priorities_keep_flexible_peers_near_replicas_where_sharing_does_not() -> None:
    spent = work(TIMES, requests(FIRST_TOKEN, 1.0, 200)).ttft_s
    workload = requests(FIRST_TOKEN, 2 * 0.5 / spent, 400)
    monoliths = run(replicas(2), TIMES, workload).ttft.mean
    assert run(flexible(2), TIMES, workload).ttft.mean < 1.08 * monoliths
    assert run(System("at once", both=2, turns=False), TIMES, workload).ttft.mean > 1.1 * monoliths


def test_the_machines_move_every_row_once_and_take_about_as_long_as_the_times_of_a_link() -> None:
    workload = requests(IMAGES, 3.0, 40)
    timed = run(split_overlap(2, 1), TIMES, workload)
    cluster = Cluster(split_overlap(2, 1), TIMES, protocol=True)
    cluster.run(workload)
    assert report(cluster, seed=0).ttft.mean == pytest.approx(timed.ttft.mean, rel=0.05)
    wires = cluster.wires
    assert isinstance(wires, MachineWires)
    row_bytes = TIMES.row_bytes
    moved = sum(source.visual_tokens for source in workload) * row_bytes
    assert wires.receivers["language0"].machine.counters.total("received") == moved
    assert not wires.receivers["language0"].machine.items and not wires.senders["encode0"].machine.items


@pytest.mark.parametrize("protocol", [False, True], ids=["timed", "protocol"])
def test_a_picture_that_many_ask_for_is_hardly_encoded_twice(protocol: bool) -> None:
    """It is where another peer asks before a heartbeat has told of it."""
    mix = Mix(exactly(2), FULL_HD, exactly(50), exactly(4), pool=5, reuse=1.0)
    workload = requests(mix, 20.0, 60)
    cluster = Cluster(flexible(2), TIMES, protocol=protocol)
    cluster.run(workload)
    said = report(cluster, seed=0)
    assert said.ok == 60
    pictures = len({image.identity for source in workload for image in source.images})
    assert pictures <= said.items_encoded <= pictures + 2


def test_what_others_asked_of_an_encode_peer_is_known_with_its_next_heartbeat() -> None:
    cluster = Cluster(System("one tower", encode=1, language=2), TIMES)
    asks, other = cluster.fronts
    ahead_s: dict[str, list[float]] = {asks.name: [], other.name: []}

    def look() -> None:
        for peer in (asks, other):
            ahead_s[peer.name].append(peer.known["encode0"].view([], cluster.clock.now).backlog.tower_s)

    for when in (0.1, BEAT_S + 0.01):
        cluster.clock.at(when, look)
    cluster.run([WorkloadRequest(0.0, tuple(ImageSpec(i, 1920, 1080) for i in range(80)), 64, 1)])
    assert cluster.requests[0].peer == asks.name
    assert min(ahead_s[asks.name]) > 0.5
    assert ahead_s[other.name][0] == 0.0 and ahead_s[other.name][1] > 0.5


def test_with_little_memory_answers_are_thrown_out_and_still_come() -> None:
    times = msgspec.structs.replace(TIMES, kv_tokens=4096)
    text = Mix(exactly(0), FULL_HD, exactly(500), exactly(400))
    said = run(replicas(1), times, requests(text, 20.0, 40))
    assert said.ok == 40 and said.preemptions > 0
    large = run(replicas(1), times, [WorkloadRequest(0.0, (), 5000, 1), WorkloadRequest(0.1, (), 50, 1)])
    assert (large.ok, large.refused) == (1, 1)


def test_shedding_keeps_goodput_where_without_it_falls() -> None:
    spent = work(TIMES, requests(FIRST_TOKEN, 1.0, 200)).ttft_s
    workload = requests(FIRST_TOKEN, 2 * 1.6 / spent, 500)
    system = flexible(2)
    shedding = msgspec.structs.replace(system, doors=Doors(line=Line.ADMISSION, shed_at=5.0))
    without, with_it = run(system, TIMES, workload), run(shedding, TIMES, workload)
    assert without.shed == 0 and with_it.shed > 50
    assert with_it.ok + with_it.shed == 500
    assert with_it.goodput_per_s > 1.5 * without.goodput_per_s


def test_a_full_house_is_a_line() -> None:
    """Never more than so many inside; the rest in the order of their arrival."""
    one = msgspec.structs.replace(replicas(1), doors=Doors(inside=1))
    text = Mix(exactly(0), FULL_HD, exactly(400), exactly(10))
    cluster = Cluster(one, TIMES)
    cluster.run(requests(text, 50.0, 30))
    ends = [request.end_s for request in cluster.requests]
    assert ends == sorted(ends)
    assert all(
        before.end_s <= after.first_s for before, after in zip(cluster.requests, cluster.requests[1:], strict=False)
    )


def test_each_rung_of_the_ladder_serves() -> None:
    workload = requests(IMAGES, 10.0, 80)
    said = [run(system, TIMES, workload) for system in ladder(8, 2)]
    assert [one.ok for one in said] == [80] * 6
    static, scheduled = said[2].ttft.mean, said[3].ttft.mean
    assert scheduled < static


@pytest.mark.parametrize(
    ("system", "what"),
    [
        (System("none", encode=2), "nobody computes"),
        (System("none", language=2), "nobody encodes"),
        (System("none", both=1, tower_share=1.0), "tower_share"),
        (System("none", both=1, doors=Doors(shed_at=5.0)), "shed_at needs the admission queue"),
    ],
)
def test_clusters_that_cannot_serve_are_refused(system: System, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Cluster(system, TIMES)


def test_times_are_checked() -> None:
    bad: list[ServiceTimes] = [
        msgspec.structs.replace(TIMES, tower=()),
        msgspec.structs.replace(TIMES, kv_tokens=0),
        msgspec.structs.replace(TIMES, prefill=((10, 1.0), (5, 2.0))),
    ]
    for times in bad:
        with pytest.raises(ConfigError):
            Costs(times)
    with pytest.raises(ConfigError, match="cpu-115m"):
        read_times("no-such-profile")


def test_a_balancer_that_counts_requests_sends_each_where_fewest_are_open() -> None:
    """Two long requests at once go to two peers; whoever ended first gets the next, whatever it has done."""
    system = System("balanced", replicas=2, routing=Routing.OUTSTANDING)
    workload = [
        WorkloadRequest(0.0, (), 4000, 400),
        WorkloadRequest(0.1, (), 10, 2),
        WorkloadRequest(5.0, (), 10, 2),
        WorkloadRequest(5.0, (), 10, 2),
    ]
    cluster = Cluster(system, TIMES)
    cluster.run(workload)
    first, second, third, fourth = (request.peer for request in cluster.requests)
    assert {first, second} == {"replica0", "replica1"}
    assert {third, fourth} == {"replica0", "replica1"}


def test_a_template_and_small_pictures_make_prompts_longer() -> None:
    plain = Costs(TIMES)
    around = Costs(msgspec.structs.replace(TIMES, prompt_tokens=9, image_tokens=2, least_rows=4))
    assert plain.prompt([4, 7], 10) == 21
    assert around.prompt([around.rows(1), around.rows(7)], 10) == 9 + (2 + 4) + (2 + 7) + 10


@pytest.mark.parametrize("order", Order)
def test_one_picture_is_prepared_before_those_of_another_request_that_wait(order: Order) -> None:
    """One thread, which takes longer for a picture than the tower."""
    many = WorkloadRequest(0.0, tuple(ImageSpec(i, 1280, 720) for i in range(8)), 32, 2)
    one = WorkloadRequest(0.03, (ImageSpec(9, 1280, 720),), 32, 2)
    system = msgspec.structs.replace(split_overlap(2, 1), doors=Doors(order=order))
    times = msgspec.structs.replace(TIMES, prepare=((1.0, 100.0), (3520.0, 100.0)), prepare_threads=1)
    cluster = Cluster(system, times)
    cluster.run([many, one])
    waited_s = cluster.requests[1].first_s - 0.03 - cluster.requests[1].unloaded_s
    assert waited_s < 0.15 if order is Order.SHORT_FIRST else waited_s > 0.5
