"""Processes of one system on this host: started together, ended together, whatever happens to any of them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType

from aiodisagg.errors import AiodisaggError, own_error

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 15.0
KEPT_BYTES = 4096
"""Of what a process says on stderr, for the error that tells why it ended."""


class ProcessEnded(AiodisaggError):
    """A process of the cluster ended before it was asked to."""

    def __init__(self, name: str, code: int, said: str) -> None:
        self.name, self.code = name, code
        super().__init__(f"{name} ended with code {code}" + (f": {said}" if said else ""))


class Member:
    """One process; ``facts`` is what it announced when it was ready. The end of its stderr is kept, and read all the
    time: a child that warns a lot would block on the pipe."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name, self.process, self._said = name, process, b""
        self.facts: Mapping[str, str] = {}
        self._reading = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        stderr = self.process.stderr
        while stderr is not None and (piece := await stderr.read(KEPT_BYTES)):
            self._said = (self._said + piece)[-KEPT_BYTES:]

    async def wait(self) -> tuple[int, str]:
        """Its exit code and what it said last."""
        code = await self.process.wait()
        await asyncio.shield(self._reading)
        return code, self._said.decode(errors="replace").strip()[-2000:]


class Cluster:
    """An async context manager: what was started in it is gone when it is left.

    Every process asks the kernel for SIGTERM when this one ends, so a killed parent leaves nothing behind either.
    ``quiet``: what processes log is shown only of one that ends.
    """

    def __init__(self, *, verbose: int = 0, quiet: bool = True) -> None:
        self.members: dict[str, Member] = {}
        self._quiet = quiet and not verbose
        self._started: list[Member] = []
        self._verbose = verbose

    async def __aenter__(self) -> Cluster:
        return self

    async def start(
        self, name: str, *arguments: str, prefix: Sequence[str] = (), pass_fds: Sequence[int] = ()
    ) -> Member:
        """Runs ``aiodisagg ARGUMENTS`` and waits until it is ready, for as long as it loads. Raises ProcessEnded if it
        ends before.

        ``prefix``: a command that runs another in its own process, such as ``ip netns exec NAME``. ``pass_fds``: of
        this process, to be inherited under the same numbers.
        """
        read, write = os.pipe()
        command = [*prefix, sys.executable, "-m", "aiodisagg", *arguments, "--ready-fd", str(write)]
        command += ["--parent", str(os.getpid())]
        command += ["-v"] * self._verbose
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        environment.pop("AIODISAGG_API_KEY", None)  # of an API for others; who starts these has to be let in
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                env=environment,
                pass_fds=(write, *pass_fds),
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE if self._quiet else None,
                start_new_session=True,
            )
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        self._started.append(member := Member(name, process))
        await self._wait_ready(member, read)
        self.members[name] = member
        return member

    async def _wait_ready(self, member: Member, read: int) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read, "rb"))
        try:
            said = await reader.read()
        finally:
            pipe.close()
        if not said:
            raise ProcessEnded(member.name, *await member.wait())
        member.facts = json.loads(said)

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
                    raise ProcessEnded(member.name, *await member.wait())

    def kill(self, name: str) -> Member:
        """kill -9. The member is expected to be gone from then on."""
        member = self.members.pop(name)
        member.process.kill()
        return member

    def signal(self, name: str, number: signal.Signals) -> None:
        """Sends a signal that does not end the member, such as SIGSTOP."""
        self.members[name].process.send_signal(number)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.shield(self._stop_all())

    async def _stop_all(self) -> None:
        for child in self._started:
            if child.process.returncode is None:
                child.process.terminate()
                child.process.send_signal(signal.SIGCONT)  # a stopped one would not hear of its end
        await asyncio.gather(*(self._stop(child) for child in self._started))

    async def _stop(self, child: Member) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await child.wait()
        except TimeoutError:
            logger.warning("process %d did not stop in %g s and is killed", child.process.pid, STOP_TIMEOUT_S)
            child.process.kill()
            await child.wait()


async def start_system(
    cluster: Cluster,
    model: str,
    *,
    encoders: int,
    transports: str,
    device: str = "cpu",
    encode_options: Sequence[str] = (),
    language_options: Sequence[str] = (),
) -> str:
    """A bootstrap server, encode peers and one language peer; returns the URL of the HTTP API."""
    bootstrap = await cluster.start("bootstrap", "bootstrap", "--port", "0")
    common = ("--model", model, "--bootstrap", bootstrap.facts["url"], "--transports", transports, "--device", device)
    commands = [
        (f"encode-{i + 1}", "encode", *common, "--name", f"encode-{i + 1}", *encode_options) for i in range(encoders)
    ]
    commands.append(("language-1", "language", *common, "--name", "language-1", "--port", "0", *language_options))
    try:
        async with asyncio.TaskGroup() as group:  # one that fails ends the starting of the others
            starts = [group.create_task(cluster.start(*command)) for command in commands]
    except ExceptionGroup as failed:
        raise own_error(failed) from None
    return starts[-1].result().facts["url"]
