"""Links promise to work on every loop, over unix sockets and TCP."""

from __future__ import annotations

import pytest

from tests.conftest import LOOPS


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=["unix:", "tcp:127.0.0.1:0"], ids=["unix", "tcp"])
def address(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]
