"""How what lives once is entered and left."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self


class EnteredOnce(ABC):
    """An async context manager for one life, on one event loop; what ``_open`` has put on ``_stack`` is undone when it
    is left, and if it fails."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opened = self._is_open = False
        """Whether it was open once, and whether it is: who embeds a service may ask it before, meanwhile and after."""

    @abstractmethod
    async def _open(self) -> None: ...

    def _leave(self) -> None:  # noqa: B027  # some have nothing to do then
        """What has to happen first when it is left."""

    async def __aenter__(self) -> Self:
        if self._loop is not None:
            raise RuntimeError(f"{type(self).__name__} is entered once: make a new one")
        self._loop = asyncio.get_running_loop()
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        self._opened = self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_open = False
        self._leave()
        await self._stack.aclose()

    @property
    def _why_not(self) -> str:
        """Why it does nothing now, or empty. Raises RuntimeError on another event loop than that on which it was
        entered: what is waited for there would never come."""
        if self._loop is not None and self._loop is not asyncio.get_running_loop():
            raise RuntimeError(f"{type(self).__name__} belongs to another event loop: use it where it was entered")
        return "" if self._is_open else "closed" if self._opened else "not open"
