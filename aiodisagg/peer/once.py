"""How what lives once is entered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from typing import Self


class EnteredOnce(ABC):
    """An async context manager for one life; what ``_open`` has put on ``_stack`` is undone if it fails."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._entered = False

    @abstractmethod
    async def _open(self) -> None: ...

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError(f"{type(self).__name__} is entered once: make a new one")
        self._entered = True
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self
