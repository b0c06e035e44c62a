"""What engine and towers are told of a request's place, end to end."""

from __future__ import annotations

import math
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from aiodisagg import SamplingParams
from aiodisagg.engine.engine import EngineRequest
from aiodisagg.models.base import ChatMessage, ImagePart
from aiodisagg.protocol.events import ItemSpec
from aiodisagg.scheduler.shares import Tenant
from tests.models.halves import chat, png
from tests.services.system import System, system

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

PICTURES = [ImagePart(png(128, 96, 700 + seed)) for seed in range(3)]


class Told:
    """What was asked of towers and of the engine."""

    def __init__(self, made: System, monkeypatch: pytest.MonkeyPatch) -> None:
        self.items: list[ItemSpec] = []
        self.requests: list[EngineRequest] = []
        rows, engine = made.language.rows, made.language.engine
        request, submit = rows.request, engine.submit

        def asked(items: Any, timeout_s: float) -> None:
            self.items = [spec for _, spec in items]
            request(items, timeout_s)

        def submitted(one: EngineRequest) -> Any:
            self.requests.append(one)
            return submit(one)

        monkeypatch.setattr(rows, "request", asked)
        monkeypatch.setattr(engine, "submit", submitted)


async def test_a_request_counts_what_has_to_be_encoded_for_it(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what is here already, and what it has twice once."""
    async with system(moe) as made:
        told = Told(made, monkeypatch)
        await made.ask(chat(PICTURES[0], "What?"), 2)
        (spec,) = told.items
        patches = math.prod(spec.grid_thw)
        assert spec.urgency.work == patches and 0 < spec.urgency.due_s <= 10.0
        await made.ask(chat("Look here:", PICTURES[0], PICTURES[1], PICTURES[1], "What?"), 2)
        assert [one.urgency.work for one in told.items] == [patches] * 3
        await made.ask(chat("And here:", PICTURES[0], PICTURES[2], "What?"), 2, timeout_s=5.0)
        assert {one.urgency.due_s <= 5.0 for one in told.items} == {True}


@pytest.mark.parametrize(("tenant", "behind"), [(None, -5), (Tenant("a"), 0)])
async def test_the_class_of_a_named_tenants_request_counts_among_its_own_only(
    tenant: Tenant | None, behind: int, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passed all other tenants' requests in the engine and before towers."""
    named: dict[str, Any] = {} if tenant is None else {"tenant": tenant}
    async with system(moe) as made:
        told = Told(made, monkeypatch)
        taken: list[int] = []
        take = made.language.admission.take

        async def takes(turn: Any) -> None:
            taken.append(turn.priority)
            await take(turn)

        monkeypatch.setattr(made.language.admission, "take", takes)
        messages: list[ChatMessage] = chat(PICTURES[0], "What?")
        generated = made.language.generate(messages, SamplingParams(max_tokens=2), priority=-5, **named)
        async with aclosing(generated) as deltas:
            async for _ in deltas:
                pass
        assert taken == [-5]
        assert (told.items[0].urgency.priority, told.requests[0].priority) == (behind, behind)
