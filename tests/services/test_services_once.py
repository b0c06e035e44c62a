"""A service has one life: entered again, it loaded everything, was ready, and said to everybody that it was closed."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiodisagg import BothService, LanguageService
from tests.services.system import encode_config, language_config

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


@pytest.mark.parametrize("kind", [LanguageService, BothService])
async def test_it_is_entered_once(kind: type[LanguageService] | type[BothService], moe: Path) -> None:
    halves = (language_config(moe), encode_config(moe))
    service = LanguageService(halves[0]) if kind is LanguageService else BothService(*halves)
    async with service:
        with pytest.raises(RuntimeError, match=f"{kind.__name__} is entered once"):
            await service.__aenter__()
        assert service.name
    with pytest.raises(RuntimeError, match=f"{kind.__name__} is entered once"):
        await service.__aenter__()
