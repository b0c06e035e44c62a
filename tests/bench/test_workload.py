"""Workloads are what their descriptions say, the same for equal seeds, and survive a file."""

from __future__ import annotations

import dataclasses
import math
import statistics
from itertools import islice, pairwise
from pathlib import Path
from random import Random

import pytest

from aiodisagg.bench.distributions import Quantiles, Ranges, exactly, parse_ranges, parse_sizes, size_of_tokens
from aiodisagg.bench.mixes import MIX_NAMES, named_mix, servegen_mix
from aiodisagg.bench.workload import (
    Closed,
    Gamma,
    ImageSpec,
    Mix,
    Tenant,
    WorkloadRequest,
    generate,
    parse_tenants,
    read_trace,
    write_trace,
)
from aiodisagg.errors import ConfigError

PINNED, PINNED_ARRIVAL_S = (1, 81, 2, 128), 0.3680229510394577
SMALL = Mix(parse_ranges("images", "1-8"), ((640, 480), (1280, 720)), parse_ranges("text", "32-128"), exactly(16))


# -- distributions ------------------------------------------------------------------------------------------------


def test_quantiles_interpolate_the_logarithm() -> None:
    found = Quantiles(((0.1, 10.0), (0.5, 1000.0), (0.9, 2000.0)))
    assert found.at(0.1) == pytest.approx(10)
    assert found.at(0.3) == pytest.approx(100)
    assert found.at(0.5) == pytest.approx(1000)
    assert found.at(0.7) == pytest.approx(1000 * math.sqrt(2))
    assert found.at(0.0) == pytest.approx(10 / 100**0.25), "the first piece goes on"
    assert found.at(1.0) == pytest.approx(2000 * 2**0.25), "the last piece goes on"


def test_draws_have_the_quantiles_they_were_given() -> None:
    mix, draw = servegen_mix(), Random(1)
    assert isinstance(mix.sizes, Quantiles) and isinstance(mix.text_tokens, Quantiles)
    for field, expected in (
        (mix.sizes, {0.1: 5, 0.5: 416, 0.9: 942, 0.99: 979}),
        (mix.text_tokens, {0.5: 106, 0.9: 1914}),
        (mix.output_tokens, {0.5: 100, 0.99: 587}),
    ):
        values = sorted(field.draw(draw) for _ in range(10_000))
        for share, value in expected.items():
            assert values[int(share * len(values))] == pytest.approx(value, rel=0.08, abs=1)


def test_servegen_images_a_request() -> None:
    draw, images = Random(2), servegen_mix().images
    counts = [images.draw(draw) for _ in range(30_000)]
    for low, high, share in ((0, 0, 0.006), (1, 1, 0.798), (2, 2, 0.066), (3, 3, 0.076), (4, 8, 0.048), (9, 49, 0.006)):
        found = sum(low <= count <= high for count in counts) / len(counts)
        assert found == pytest.approx(share, abs=0.007), (low, high)
    assert max(counts) == 49


def test_ranges_are_written_as_people_do() -> None:
    assert parse_ranges("n", "4") == Ranges(((4, 4, 1.0),))
    assert parse_ranges("n", "1-3,8") == Ranges(((1, 3, 3.0), (8, 8, 1.0)))
    assert parse_ranges("n", "0:0.5, 1-8:0.5") == Ranges(((0, 0, 0.5), (1, 8, 0.5)))
    draw, found = Random(3), parse_ranges("n", "1-3,8")
    drawn = [found.draw(draw) for _ in range(8000)]
    assert {value: round(4 * drawn.count(value) / len(drawn), 1) for value in (1, 2, 3, 8)} == dict.fromkeys(
        (1, 2, 3, 8), pytest.approx(1.0, abs=0.1)
    )
    assert parse_sizes("s", "1280x720, 64x32") == ((1280, 720), (64, 32))
    for text in ("", "a", "3-1", "1:0", "-1", "1-2-3"):
        with pytest.raises(ConfigError, match="images"):
            parse_ranges("images", text)
    for text in ("", "12", "0x3", "1x2x3"):
        with pytest.raises(ConfigError, match="size"):
            parse_sizes("size", text)


@pytest.mark.parametrize(
    "points",
    [((0.5, 1.0),), ((0.5, 1.0), (0.4, 2.0)), ((0.1, 2.0), (0.9, 1.0)), ((0.1, 0.0), (0.9, 1.0)), ((0, 1), (1.5, 2))],
)
def test_quantiles_that_are_none(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ConfigError):
        Quantiles(points)


def test_a_picture_has_about_the_tokens_asked_for() -> None:
    for tokens in range(1, 3000):
        width, height = size_of_tokens(tokens)
        found = ImageSpec(0, width, height).visual_tokens
        assert abs(found - tokens) <= max(2, 0.03 * tokens), tokens
        assert height <= width <= 2 * height
    assert ImageSpec(0, 1280, 720).visual_tokens == 880
    assert ImageSpec(0, 1920, 1080).visual_tokens == 2040


# -- arrivals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_spread_asked_for(cv: float) -> None:
    times = [0.0, *islice(Gamma(20.0, cv).arrivals(Random(0)), 10_000)]
    found = [after - before for before, after in pairwise(times)]
    mean = statistics.fmean(found)
    assert mean == pytest.approx(0.05, rel=0.05)
    assert statistics.pstdev(found) / mean == pytest.approx(cv, rel=0.08, abs=1e-9)


def test_another_rate_stretches_the_same_arrivals_and_changes_nothing_else() -> None:
    slow, fast = generate(SMALL, Gamma(2.0, 2.0), 50, seed=4), generate(SMALL, Gamma(8.0, 2.0), 50, seed=4)
    for a, b in zip(slow, fast, strict=True):
        assert a.arrival_s == pytest.approx(4 * b.arrival_s)
        assert dataclasses.replace(a, arrival_s=0.0) == dataclasses.replace(b, arrival_s=0.0)


def test_a_closed_loop_has_all_its_requests_from_the_start() -> None:
    assert {request.arrival_s for request in generate(SMALL, Closed(4), 9)} == {0.0}


@pytest.mark.parametrize(
    "make", [lambda: Closed(0), lambda: Gamma(0.0), lambda: Gamma(1.0, -1.0), lambda: Gamma(math.inf)]
)
def test_arrivals_that_are_none(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]


# -- requests -----------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_requests_and_others_do_not() -> None:
    for name in MIX_NAMES:
        assert generate(named_mix(name), Gamma(5.0), 20, seed=7) == generate(named_mix(name), Gamma(5.0), 20, seed=7)
        assert generate(named_mix(name), Gamma(5.0), 20, seed=7) != generate(named_mix(name), Gamma(5.0), 20, seed=8)


def test_the_draw_is_the_same_on_every_machine() -> None:
    first, second = generate(SMALL, Gamma(5.0), 2, seed=0)
    assert (len(first.images), first.text_tokens, len(second.images), second.text_tokens) == PINNED
    assert first.arrival_s == pytest.approx(PINNED_ARRIVAL_S, rel=1e-12)


def test_fields_are_drawn_independently() -> None:
    longer = dataclasses.replace(SMALL, text_tokens=exactly(999))
    for a, b in zip(generate(SMALL, Gamma(5.0), 30), generate(longer, Gamma(5.0), 30), strict=True):
        assert (a.arrival_s, a.images, a.output_tokens) == (b.arrival_s, b.images, b.output_tokens)
        assert b.text_tokens == 999


def test_pictures_are_unique_unless_reused() -> None:
    images = [image for request in generate(SMALL, Closed(1), 100) for image in request.images]
    assert len({image.identity for image in images}) == len(images)
    mix = dataclasses.replace(SMALL, pool=10, reuse=0.8)
    images = [image for request in generate(mix, Closed(1), 400) for image in request.images]
    pooled = [image for image in images if image.identity < 10]
    assert len(pooled) / len(images) == pytest.approx(0.8, abs=0.03)
    assert len(set(pooled)) == 10, "one size for each picture of the pool"
    rest = [image.identity for image in images if image.identity >= 10]
    assert len(set(rest)) == len(rest)


def test_tenants_share_as_told() -> None:
    mix = dataclasses.replace(SMALL, tenants=(Tenant("big", 3.0), Tenant("vip", 1.0, priority=5)))
    made = generate(mix, Closed(1), 4000)
    assert {(request.tenant, request.priority) for request in made} == {("big", 0), ("vip", 5)}
    assert sum(request.tenant == "big" for request in made) / len(made) == pytest.approx(0.75, abs=0.03)


def test_tenants_are_written_as_people_do() -> None:
    assert parse_tenants("t", "big:3, a,urgent:0.5:-1") == (Tenant("big", 3.0), Tenant("a"), Tenant("urgent", 0.5, -1))
    for text in ("", ":1", "a:x", "a:1:x", "a:1:2:3", "a:0"):
        with pytest.raises(ConfigError, match="tenants"):
            parse_tenants("tenants", text)


def test_a_scaled_mix_is_smaller_in_every_field_asked_for() -> None:
    small = servegen_mix().scaled(visual=0.125, text=0.5, output=0.25)
    assert isinstance(small.sizes, Quantiles) and isinstance(small.text_tokens, Quantiles)
    assert (small.sizes.at(0.5), small.text_tokens.at(0.5)) == (pytest.approx(52), pytest.approx(53))
    assert isinstance(small.output_tokens, Quantiles) and small.output_tokens.at(0.5) == pytest.approx(25)
    assert small.images == servegen_mix().images
    assert parse_ranges("text", "0,8").scaled(0.5) == parse_ranges("text", "0,4"), "what has none gets none"
    half = named_mix("images-1-8").scaled(visual=0.25, output=0.25)
    assert half.sizes == ((640, 360),) and half.output_tokens == exactly(32)


@pytest.mark.parametrize("change", [{"sizes": ()}, {"reuse": 1.5, "pool": 3}, {"reuse": 0.5}, {"pool": -1}])
def test_mixes_that_are_none(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="none of images-1-8"):
        named_mix("nothing")


# -- traces -------------------------------------------------------------------------------------------------------


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    mix = dataclasses.replace(servegen_mix(), pool=5, reuse=0.5, tenants=(Tenant("a"), Tenant("b", priority=2)))
    made = generate(mix, Gamma(9.5, 4.9), 200, seed=3)
    write_trace(tmp_path / "t.jsonl", made)
    assert read_trace(tmp_path / "t.jsonl") == made
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 200


def test_a_trace_written_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(
        '{"arrival_s": 2, "images": [], "text_tokens": 5, "output_tokens": 6}\n\n'
        '{"arrival_s": 1.5, "images": [{"identity": 0, "width": 64, "height": 32}], "text_tokens": 3,'
        ' "output_tokens": 4, "tenant": "a", "note": "other keys are for people"}\n'
    )
    assert read_trace(file) == (
        WorkloadRequest(1.5, (ImageSpec(0, 64, 32),), 3, 4, "a"),
        WorkloadRequest(2.0, (), 5, 6),
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2"),
        ('{"arrival_s": 0}', "line 2"),
        ('{"arrival_s": -1, "images": [], "text_tokens": 5, "output_tokens": 6}', "line 2"),
        ('{"arrival_s": 0, "images": [], "text_tokens": 5, "output_tokens": 0}', "line 2"),
        (
            '{"arrival_s": 0, "images": [{"identity": 0, "width": 0, "height": 2}], "text_tokens": 5,'
            ' "output_tokens": 1}',
            "no pixels",
        ),
    ],
)
def test_a_broken_trace_names_its_line(tmp_path: Path, line: str, said: str) -> None:
    good = '{"arrival_s": 0, "images": [], "text_tokens": 5, "output_tokens": 6}\n'
    (tmp_path / "t.jsonl").write_text(good + line)
    with pytest.raises(ConfigError, match=said):
        read_trace(tmp_path / "t.jsonl")


def test_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trace"):
        read_trace(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="holds no request"):
        read_trace(tmp_path / "empty.jsonl")
