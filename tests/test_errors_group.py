"""One error of this package out of what a TaskGroup raises, on every Python: ``except*`` wraps it before 3.11.4."""

from __future__ import annotations

import pytest

from aiodisagg.errors import ConfigError, EngineError, own_error


def test_what_a_group_comes_to() -> None:
    first, second, other = ConfigError("a", "b"), EngineError("c", "d"), ValueError()
    assert own_error(ExceptionGroup("", [first, second])) is first
    assert own_error(ExceptionGroup("", [ExceptionGroup("", [second])])) is second
    for errors in ([first, other], [other]):
        mixed = ExceptionGroup("", errors)
        assert own_error(mixed) is mixed


def test_it_is_raised_as_it_is() -> None:
    with pytest.raises(ConfigError):
        try:
            raise ExceptionGroup("", [ConfigError("a", "b")])
        except ExceptionGroup as failed:
            raise own_error(failed) from None
