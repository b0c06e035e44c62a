"""The bench of faults says nothing of bytes that it could not count."""

from __future__ import annotations

from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from aiodisagg.bench.faults import FaultOptions, _Bench
from aiodisagg.bench.system import Answer
from aiodisagg.errors import AiodisaggError, ConfigError
from aiodisagg.language.trace import MAX_FINISHED

GOOD, BAD = Answer("one", 1, "", 0.1), Answer("", 0, "429: too much", 0.1)


def bench(*traces: dict[str, Any]) -> _Bench:
    return _Bench(FaultOptions(requests=3), Mock(debug=AsyncMock(return_value=list(traces))))


def trace(name: str, items: int = 3, count: int = 3) -> dict[str, Any]:
    return {"request_id": name, "items": [{"rows": 4}] * items, "item_count": count}


def test_no_more_requests_than_are_remembered() -> None:
    assert FaultOptions(requests=MAX_FINISHED).requests == MAX_FINISHED
    with pytest.raises(ConfigError, match=f"requests: must be at most {MAX_FINISHED}, not {MAX_FINISHED + 1}"):
        FaultOptions(requests=MAX_FINISHED + 1)


@pytest.mark.anyio
async def test_traces_match_the_answers() -> None:
    wave = [trace("round2-0"), trace("round2-1")]
    found = await bench(trace("round1-0", 1), *wave, trace("round22-0"))._traces("round2", [GOOD, GOOD])
    assert found == wave
    assert await bench(*wave)._traces("round2", [GOOD, GOOD, BAD]) == wave, "who was refused may have none"


@pytest.mark.anyio
async def test_what_is_missing_is_an_error() -> None:
    with pytest.raises(AiodisaggError, match="has forgotten 1 of 3 requests"):
        await bench(trace("round2-1"), trace("round2-2"))._traces("round2", [GOOD] * 3)
    with pytest.raises(AiodisaggError, match="the traces of 1 requests lack items"):
        await bench(trace("round2-0"), trace("round2-1", 32, 33))._traces("round2", [GOOD] * 2)
