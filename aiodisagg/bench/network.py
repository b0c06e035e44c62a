"""A second network on this host: a namespace behind a veth pair that can be cut. Needs root and iproute2."""

from __future__ import annotations

import asyncio
import os
import shutil
from types import TracebackType

from aiodisagg.errors import AiodisaggError


class NetworkUnavailable(AiodisaggError):
    """Namespaces cannot be made here."""


class Namespace:
    """An async context manager. ``here`` and ``there`` are the two ends' addresses; ``exec`` runs a command there."""

    def __init__(self, number: int = 0) -> None:
        tag = f"{os.getpid() % 100000}{number}"
        self.name, self._ends = f"aiodisagg{tag}", (f"ad{tag}h", f"ad{tag}p")
        net = f"10.{203 + number}.{os.getpid() % 250}"
        self.here, self.there = f"{net}.1", f"{net}.2"

    @property
    def exec(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)

    async def __aenter__(self) -> Namespace:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise NetworkUnavailable("network namespaces need root and iproute2 (apt-get install iproute2)")
        here, there = self._ends
        await _ip("netns", "add", self.name)
        try:
            await _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", self.name)
            await _ip("addr", "add", f"{self.here}/24", "dev", here)
            await _ip("-n", self.name, "addr", "add", f"{self.there}/24", "dev", there)
            await _ip("-n", self.name, "link", "set", "lo", "up")
            await _ip("link", "set", here, "up")
            await self.mend()
        except BaseException:
            await self._remove()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._remove()

    async def _remove(self) -> None:
        await _ip("netns", "del", self.name)  # its end of the pair, and so the pair, goes with it

    async def cut(self) -> None:
        """Nothing passes any more; connections stay as they are."""
        await _ip("-n", self.name, "link", "set", self._ends[1], "down")

    async def mend(self) -> None:
        await _ip("-n", self.name, "link", "set", self._ends[1], "up")


async def _ip(*arguments: str) -> None:
    process = await asyncio.create_subprocess_exec("ip", *arguments, stderr=asyncio.subprocess.PIPE)
    _, said = await process.communicate()
    if process.returncode:
        raise NetworkUnavailable(f"ip {' '.join(arguments)}: {said.decode().strip()}")
