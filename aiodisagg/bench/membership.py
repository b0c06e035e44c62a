"""What membership costs a bootstrap server: its CPU time, and the bytes of all membership streams.

    python -m aiodisagg.bench.membership --encode 200 --language 200

Every encode peer says 256 digests with each heartbeat, of which a few are new; every language peer follows who encodes.
Peers are sockets of this process, the server is another. The work is fixed, so a server that is too slow takes longer.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import secrets
import sys
from pathlib import Path

import aiohttp
import click
import msgspec

from aiodisagg.bootstrap.registry import Load, PeerRecord
from aiodisagg.bootstrap.server import BootstrapConfig, BootstrapServer
from aiodisagg.bootstrap.wire import Heartbeat
from aiodisagg.link.hello import PeerRole
from aiodisagg.scheduler.advertise import ADVERTISED, PREFIX

LEASE_S = 5.0
LAST = "the-last-one"


async def serve() -> None:
    """The server's process: says its URL, and what it took once its stdin ends."""
    async with BootstrapServer(port=0, config=BootstrapConfig(lease_s=LEASE_S)) as server:
        print(server.url, flush=True)
        before = resource.getrusage(resource.RUSAGE_SELF)
        await asyncio.to_thread(sys.stdin.read)
        after = resource.getrusage(resource.RUSAGE_SELF)
        print(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, flush=True)


class Crowd:
    def __init__(self, session: aiohttp.ClientSession, url: str, beats: int) -> None:
        self._session, self._url, self._beats = session, url, beats
        self.lines = self.bytes = 0

    async def watch(self, opened: asyncio.Event) -> None:
        """Until the last one has joined."""
        async with self._session.get(f"{self._url}/v1/watch?role=encode") as stream:
            opened.set()
            before = b""
            async for data in stream.content.iter_any():
                self.bytes += len(data)
                self.lines += data.count(b"\n")
                if LAST.encode() in before + data:
                    return
                before = data[-len(LAST) :]

    async def join(self, name: str, role: PeerRole) -> None:
        addresses = (f"unix:@{name}",) if role.encodes else ()
        record = PeerRecord(name=name, incarnation=name, role=role, addresses=addresses, host=name)
        await self._ask("PUT", name, record)

    async def live(self, name: str, role: PeerRole) -> None:
        digests = [secrets.token_hex(PREFIX // 2) for _ in range(ADVERTISED)] if role.encodes else []
        await asyncio.sleep(random.uniform(0, LEASE_S / 3))
        for _ in range(self._beats):
            if digests:
                digests = [*(secrets.token_hex(PREFIX // 2) for _ in range(4)), *digests[:-4]]
            load = Load(random.randrange(99), random.randrange(99), random.randrange(10**6), tuple(digests))
            await self._ask("POST", f"{name}/heartbeat", Heartbeat(load))
            await asyncio.sleep(LEASE_S / 3)

    async def _ask(self, method: str, path: str, body: PeerRecord | Heartbeat) -> None:
        url = f"{self._url}/v1/peers/{path}"
        async with self._session.request(method, url, data=msgspec.json.encode(body)) as response:
            response.raise_for_status()


async def measure(encode: int, language: int, beats: int) -> dict[str, float]:
    command = (sys.executable, "-m", "aiodisagg.bench.membership", "--serve")
    server = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert server.stdin is not None and server.stdout is not None
    url = (await server.stdout.readline()).decode().strip()
    peers = [(f"e{n}", PeerRole.ENCODE) for n in range(encode)]
    peers += [(f"l{n}", PeerRole.LANGUAGE) for n in range(language)]
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        crowd = Crowd(session, url, beats)
        await asyncio.gather(*(crowd.join(*peer) for peer in peers))
        async with asyncio.TaskGroup() as group:
            opened = [asyncio.Event() for _ in range(language)]
            for event in opened:
                group.create_task(crowd.watch(event))
            for event in opened:
                await event.wait()
            began = loop.time()
            await asyncio.gather(*(crowd.live(*peer) for peer in peers))
            await crowd.join(LAST, PeerRole.ENCODE)
        wall_s = loop.time() - began
    server.stdin.close()
    cpu_s = float(await server.stdout.readline())
    await server.wait()
    return {"cpu_s": round(cpu_s, 2), "wall_s": round(wall_s, 1), "mb": round(crowd.bytes / 1e6), "lines": crowd.lines}


@click.command()
@click.option("--encode", default=200, help="Encode peers.")
@click.option("--language", default=200, help="Language peers.")
@click.option("--beats", default=6, help="Heartbeats of each, a third of a lease apart.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--serve", "serves", is_flag=True, hidden=True)
def main(encode: int, language: int, beats: int, json_file: Path | None, serves: bool) -> None:
    if serves:
        return asyncio.run(serve())
    found = asyncio.run(measure(encode, language, beats))
    click.echo(json.dumps(found))
    if json_file is not None:
        json_file.write_text(json.dumps(found) + "\n")
    return None


if __name__ == "__main__":
    main()
