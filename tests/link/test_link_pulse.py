"""When a link pings and when it gives its peer up, tick by tick."""

from __future__ import annotations

import pytest

from aiodisagg.errors import ConfigError
from aiodisagg.link import LinkConfig
from aiodisagg.link.pulse import Beat, Pulse


def test_talk_both_ways_needs_no_ping() -> None:
    pulse = Pulse(1.0, 5.0)
    assert {pulse.tick(heard=True, said=True, reading=True) for _ in range(100)} == {Beat.QUIET}


@pytest.mark.parametrize(("heard", "said"), [(True, False), (False, True), (False, False)])
def test_silence_of_either_side_pings(heard: bool, said: bool) -> None:
    assert Pulse(1.0, 5.0).tick(heard=heard, said=said, reading=True) is Beat.PING


def test_lost_after_the_timeout_and_not_before() -> None:
    pulse = Pulse(1.0, 5.0)
    beats = [pulse.tick(heard=False, said=True, reading=True) for _ in range(5)]
    assert beats == [Beat.PING] * 4 + [Beat.LOST]


def test_one_byte_starts_the_count_again() -> None:
    pulse = Pulse(1.0, 3.0)
    heard = [False, False, True, False, False, False]
    beats = [pulse.tick(heard=h, said=True, reading=True) for h in heard]
    assert beats[-2:] == [Beat.PING, Beat.LOST]


def test_silence_does_not_count_while_this_side_does_not_read() -> None:
    pulse = Pulse(1.0, 2.0)
    assert {pulse.tick(heard=False, said=True, reading=False) for _ in range(50)} == {Beat.PING}


def test_a_timeout_that_is_no_multiple_of_the_heartbeat_is_rounded_up() -> None:
    pulse = Pulse(1.0, 2.5)
    assert [pulse.tick(heard=False, said=False, reading=True) for _ in range(3)][-2:] == [Beat.PING, Beat.LOST]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("heartbeat_s", 0.0),
        ("heartbeat_s", float("nan")),
        ("timeout_s", 1.5),
        ("max_frame_bytes", -1),
        ("max_frame_bytes", 2**32),
    ],
)
def test_settings_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        LinkConfig(**{key: value})  # type: ignore[arg-type]
    assert caught.value.key == f"link.{key}"
