"""Processes of one system on this host: started together, ended together, whatever happens to any of them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from aiodisagg.errors import AiodisaggError

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0


class ProcessEnded(AiodisaggError):
    """A process of the cluster ended before it was asked to."""

    def __init__(self, name: str, code: int | None, said: str) -> None:
        self.name, self.code = name, code
        super().__init__(f"{name} ended with code {code}" + (f": {said}" if said else ""))


@dataclass(slots=True)
class Member:
    """One process; ``facts`` is what it announced when it was ready."""

    name: str
    process: asyncio.subprocess.Process
    facts: Mapping[str, str]


class Cluster:
    """An async context manager: what was started in it is gone when it is left.

    Every process asks the kernel for SIGTERM when this one ends, so a killed parent leaves nothing behind either.
    """

    def __init__(self, *, verbose: int = 0) -> None:
        self.members: dict[str, Member] = {}
        self._starting: list[asyncio.subprocess.Process] = []
        self._verbose = verbose

    async def __aenter__(self) -> Cluster:
        return self

    async def start(self, name: str, *arguments: str) -> Member:
        """Runs ``aiodisagg ARGUMENTS`` and waits until it is ready. Raises ProcessEnded if it does not get there."""
        read, write = os.pipe()
        command = [sys.executable, "-m", "aiodisagg", *arguments, "--with-parent", "--ready-fd", str(write)]
        command += ["-v"] * self._verbose
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                env=environment,
                pass_fds=(write,),
                stdin=asyncio.subprocess.DEVNULL,
                stderr=None if self._verbose else asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        self._starting.append(process)
        facts = await self._wait_ready(name, process, read)
        member = self.members[name] = Member(name, process, facts)
        return member

    async def _wait_ready(self, name: str, process: asyncio.subprocess.Process, read: int) -> Mapping[str, str]:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read, "rb"))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                said = await reader.read()
        except TimeoutError:
            raise ProcessEnded(name, None, f"not ready after {START_TIMEOUT_S:g} s") from None
        finally:
            pipe.close()
        if not said:
            raise await self._why(name, process)
        facts: Mapping[str, str] = json.loads(said)
        return facts

    async def _why(self, name: str, process: asyncio.subprocess.Process) -> ProcessEnded:
        said = b""
        if process.stderr is not None:
            said = await process.stderr.read()
        code = await process.wait()
        return ProcessEnded(name, code, said.decode(errors="replace").strip()[-2000:])

    async def watch(self) -> None:
        """Raises ProcessEnded as soon as a member ends; returns never. Members removed on purpose do not count."""
        while True:
            waits = {asyncio.ensure_future(m.process.wait()): m for m in self.members.values()}
            try:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            for wait in done:
                member = waits[wait]
                if self.members.get(member.name) is member:
                    raise await self._why(member.name, member.process)

    def kill(self, name: str) -> Member:
        """kill -9. The member is expected to be gone from then on."""
        member = self.members.pop(name)
        member.process.kill()
        return member

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.shield(self._stop_all())

    async def _stop_all(self) -> None:
        running = [process for process in self._starting if process.returncode is None]
        for process in running:
            process.terminate()
        await asyncio.gather(*(self._stop(process) for process in running))

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.communicate()
        except TimeoutError:
            logger.warning("process %d did not stop in %g s and is killed", process.pid, STOP_TIMEOUT_S)
            process.kill()
            await process.communicate()


async def start_system(
    cluster: Cluster,
    model: str,
    *,
    encoders: int,
    transports: str,
    encode_options: Sequence[str] = (),
    language_options: Sequence[str] = (),
) -> str:
    """A bootstrap server, encode peers and one language peer; returns the URL of the HTTP API."""
    bootstrap = await cluster.start("bootstrap", "bootstrap", "--port", "0")
    common = ("--model", model, "--bootstrap", bootstrap.facts["url"], "--transports", transports)
    starts = [
        cluster.start(f"encode-{i + 1}", "encode", *common, "--name", f"encode-{i + 1}", *encode_options)
        for i in range(encoders)
    ]
    starts.append(
        cluster.start("language-1", "language", *common, "--name", "language-1", "--port", "0", *language_options)
    )
    members = await asyncio.gather(*starts)
    return members[-1].facts["url"]
