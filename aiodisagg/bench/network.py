"""Other networks on this host: a namespace behind a veth pair that can be cut or spoilt, and one all alone. Needs root
and iproute2."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Sequence
from types import TracebackType

from aiodisagg.errors import AiodisaggError

CONGESTION = "/proc/sys/net/ipv4/tcp_congestion_control"


class NetworkUnavailable(AiodisaggError):
    """Namespaces cannot be made here."""


class Namespace:
    """An async context manager. ``here`` and ``there`` are the two ends' addresses; ``exec`` runs a command there.

    ``congestion``: TCP's congestion control there; None: the kernel's default.
    """

    def __init__(self, number: int = 0, congestion: str | None = None) -> None:
        self._congestion = congestion
        tag = f"{os.getpid() % 100000}{number}"
        self.name, self._ends = f"aiodisagg{tag}", (f"ad{tag}h", f"ad{tag}p")
        net = f"10.{203 + number}.{os.getpid() % 250}"
        self.here, self.there = f"{net}.1", f"{net}.2"

    @property
    def exec(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)

    async def __aenter__(self) -> Namespace:
        _check()
        here, there = self._ends
        await _ip("netns", "add", self.name)
        try:
            await _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", self.name)
            await _ip("addr", "add", f"{self.here}/24", "dev", here)
            await _ip("-n", self.name, "addr", "add", f"{self.there}/24", "dev", there)
            await _ip("-n", self.name, "link", "set", "lo", "up")
            await _ip("link", "set", here, "up")
            if self._congestion is not None:
                await _run(*self.exec, "sh", "-c", f"echo {self._congestion} >{CONGESTION}")
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

    async def spoil(self, delay_ms: int, loss_percent: int) -> None:
        """Every packet of either way is late, and some are lost. Needs the kernel's netem."""
        netem = ("root", "netem", "delay", f"{delay_ms}ms", "loss", f"{loss_percent}%")
        here, there = self._ends
        await _run("tc", "qdisc", "add", "dev", here, *netem)
        await _run(*self.exec, "tc", "qdisc", "add", "dev", there, *netem)


async def in_namespace(congestion: str, command: Sequence[str]) -> int:
    """Runs a command in a fresh network namespace in which there is nothing but loopback; its exit code."""
    _check()
    name = f"aiodisagg{os.getpid() % 100000}"
    await _ip("netns", "add", name)
    try:
        await _ip("-n", name, "link", "set", "lo", "up")
        set_and_run = f'echo {congestion} >{CONGESTION} && exec "$@"'
        process = await asyncio.create_subprocess_exec(
            "ip", "netns", "exec", name, "sh", "-c", set_and_run, "", *command
        )
        return await process.wait()
    finally:
        await _ip("netns", "del", name)


def _check() -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise NetworkUnavailable("network namespaces need root and iproute2 (apt-get install iproute2)")


async def _ip(*arguments: str) -> None:
    await _run("ip", *arguments)


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, said = await process.communicate()
    if process.returncode:
        raise NetworkUnavailable(f"{' '.join(command)}: {said.decode().strip()}")
