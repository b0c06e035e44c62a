"""From one process's GPU memory into another's: what the hand-off reaches of what the machine can.

    python examples/gpu_copies.py --json gpu.json --text gpu.txt

Needs a GPU, and uses a second one if there is one. Every round measures the bare limits and our paths one after the
other; the table shows medians over the rounds, and each path as a share of its limit, both of the same round. Rates
are GB/s (1e9 bytes). ``receiver``, ``probe`` and ``variant`` are how the script starts itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import uvloop
import xxhash

from aiodisagg.device.copies import Accelerator, DeviceBytes, SideStream
from aiodisagg.device.cudart import Cudart
from aiodisagg.device.pool import NAME, RemotePool
from aiodisagg.encode.handoff import HandOff
from aiodisagg.errors import DeviceError
from aiodisagg.language.memory import RowMemory
from aiodisagg.link.hello import Hello, PeerRole
from aiodisagg.peer.planes import Plane
from aiodisagg.transport.arena import Arena
from aiodisagg.transport.ipc import IpcTransport

MiB = 1 << 20
SPAN = 256 * MiB
SIZES = (16 * MiB, 256 * MiB)
PIECES = (4 * MiB, 16 * MiB, 64 * MiB)
"""A block of 256 rows of 16 KiB, four of them, and sixteen."""
STEADY = 4096 * MiB
WINDOW = 8


# -- the receiving process -----------------------------------------------------------------------------------------


async def receive(device: int) -> None:
    """Serves words on stdin: a pool of SPAN bytes, and copies out of it into device memory of its own."""
    accelerator = Accelerator(Cudart.load(), device)
    memory, transport = RowMemory(SPAN, accelerator), IpcTransport()
    await transport.open(memory.arena, lambda *_: True, incarnation="receiver")
    target = accelerator.runtime.malloc(SPAN)
    host, lock = Arena(SPAN), threading.Lock()

    def say(**words: object) -> None:
        with lock:
            print(json.dumps(words), flush=True)

    def take(number: int, offset: int, size: int, at: int, on_device: bool) -> None:
        source = memory.on_device(offset, 0).address if on_device else memory.arena.address + offset
        accelerator.inward.copy(target + at, source, size)
        say(done=number)

    def digest(number: int) -> None:
        accelerator.outward.copy(host.address, target, SPAN)
        found = xxhash.xxh3_64_intdigest(host.view)
        np.frombuffer(host.view, np.uint8)[:] = 0xEE
        accelerator.inward.copy(target, host.address, SPAN)
        say(done=number, digest=found)

    words = {name: data.hex() for name, data in memory.describe().items()}
    say(description=transport.describe().hex(), words=words)
    with ThreadPoolExecutor(4) as pool:
        while line := await asyncio.to_thread(sys.stdin.readline):
            what, *numbers = line.split()
            if what == "free":  # as a receiver that closes while somebody still has its pool open
                accelerator.runtime.free(memory.on_device(0, 0).address)
                say(done=int(numbers[0]))
            else:
                pool.submit({"take": take, "digest": digest}[what], *(int(number) for number in numbers))


class Receiver:
    """The other process, as this one sees it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.hello: dict[str, Any] = {}
        self._waiting: dict[int, asyncio.Future[dict[str, int]]] = {}
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, device: int) -> Receiver:
        command = (sys.executable, __file__, "receiver", str(device))
        made = cls(await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert made.process.stdout is not None
        made.hello = json.loads(await made.process.stdout.readline())
        made._reading = asyncio.create_task(made._read())
        return made

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            words = json.loads(line)
            self._waiting.pop(words["done"]).set_result(words)

    async def ask(self, what: str, *numbers: int) -> dict[str, int]:
        assert self.process.stdin is not None
        number = len(self._waiting) and max(self._waiting) + 1
        done = self._waiting[number] = asyncio.get_running_loop().create_future()
        self.process.stdin.write(f"{what} {number} {' '.join(map(str, numbers))}\n".encode())
        return await done

    async def end(self) -> None:
        self.process.kill()
        await self.process.wait()
        assert self._reading is not None
        await self._reading


# -- the sending process -------------------------------------------------------------------------------------------


class Bench:
    """Sources on device 0, and two hand-offs to the receiver: through the host, and device to device."""

    def __init__(self, accelerator: Accelerator, receiver: Receiver, there: int) -> None:
        self.accelerator, self.receiver, self.there = accelerator, receiver, there
        runtime = self.runtime = accelerator.runtime
        runtime.set_device(0)
        self.source = runtime.malloc(SPAN)
        self.other = runtime.malloc(SPAN)
        self.host = Arena(SPAN)
        self.pinned = accelerator.pin(self.host.address, SPAN)
        np.frombuffer(self.host.view, np.uint8)[:] = np.random.default_rng(1).integers(0, 256, SPAN, dtype=np.uint8)
        self.expected = xxhash.xxh3_64_intdigest(self.host.view)
        accelerator.inward.copy(self.source, self.host.address, SPAN)
        if there:
            runtime.enable_peer(0, there)
            runtime.set_device(there)
            self.peer = runtime.malloc(SPAN)
        self.leases = 0

    async def connect(self) -> None:
        hello = self.receiver.hello
        self.transport = IpcTransport()
        await self.transport.open(None, lambda *_: False, incarnation="writer")
        self.ways: dict[str, tuple[HandOff, Plane]] = {}
        for way, checksum in (("pinned", False), ("pinned, checksum", True), ("device", False)):
            remote = await self.transport.connect(bytes.fromhex(hello["description"]), peer="receiver")
            handoff, plane = HandOff(self.accelerator, checksum=checksum), Plane(self.transport, remote)
            words = {NAME: bytes.fromhex(hello["words"].get(NAME, ""))} if way == "device" else {}
            receiver = Hello(name=way, incarnation="receiver", role=PeerRole.LANGUAGE, transports=words)
            handoff.attach(plane, receiver)
            self.ways[way] = handoff, plane

    async def close(self) -> None:
        for handoff, plane in self.ways.values():
            await handoff.detach(plane)
            await handoff.aclose()
        await self.transport.aclose()
        self.pinned.close()

    def bare(self, size: int, *copies: tuple[SideStream, int, int]) -> float:
        """Seconds for ``size`` bytes by each of the copies at once: the device's own speed, many in one queue."""
        count = max(4, 512 * MiB // size)
        began = time.perf_counter()
        for at in range(count):
            for stream, target, source in copies:
                shift = at * size % SPAN if size < SPAN else 0
                self.runtime.set_device(0)
                self.runtime.copy(target + shift, source + shift, size, stream.handle)
        for stream, _, _ in copies:
            stream.wait()
        return (time.perf_counter() - began) / count

    async def write(self, way: str, at: int, size: int, offset: int) -> bool:
        handoff, plane = self.ways[way]
        self.leases += 1
        return (await handoff.write(plane, DeviceBytes(self.source + at, size), offset, self.leases))[1]

    async def writes(self, way: str, size: int) -> float:
        """Seconds of one write, alone, until it may be committed."""
        count = 16 if size < SPAN else 4
        began = time.perf_counter()
        for at in range(count):
            await self.write(way, at * size % SPAN, size, at * size % SPAN)
        return (time.perf_counter() - began) / count

    async def flow(self, way: str, total: int, piece: int, window: int) -> float:
        """Seconds until ``total`` bytes are in the receiver's device memory, by ``window`` blocks of ``piece``."""
        blocks: asyncio.Queue[int] = asyncio.Queue()
        for block in range(min(window, SPAN // piece)):
            blocks.put_nowait(block)

        async def push(at: int, block: int) -> None:
            on_device = await self.write(way, at, piece, block * piece)
            await self.receiver.ask("take", block * piece, piece, at, int(on_device))
            blocks.put_nowait(block)

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for at in range(0, total, piece):
                group.create_task(push(at % SPAN, await blocks.get()))
        return time.perf_counter() - began

    async def check(self, way: str) -> None:
        await self.receiver.ask("digest")
        await self.flow(way, SPAN, PIECES[0], WINDOW)
        found = (await self.receiver.ask("digest"))["digest"]
        if found != self.expected:
            raise SystemExit(f"{way}: wrong bytes arrived")


async def measure(there: int, rounds: int) -> list[dict[str, object]]:
    """Rows of the table for a receiver on device ``there``."""
    accelerator = Accelerator(Cudart.load(), 0)
    receiver = await Receiver.start(there)
    bench = Bench(accelerator, receiver, there)
    await bench.connect()
    rates: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for way in bench.ways:
        await bench.check(way)
    out, back = accelerator.outward, accelerator.inward
    lag = Lag()
    for _ in range(rounds):
        limit: dict[int, tuple[float, float]] = {}
        for size in SIZES:
            name = f"{size // MiB} MiB"
            downward, upward = (out, bench.host.address, bench.source), (back, bench.other, bench.host.address)
            down, up = size / bench.bare(size, downward), size / bench.bare(size, upward)
            both = size / bench.bare(size, downward, upward)
            far = bench.peer if there else bench.other
            straight = size / bench.bare(size, (out, far, bench.source))
            limit[size] = min(down, up), straight
            rates[name, "bare: device to host"].append((down, down))
            rates[name, "bare: host to device"].append((up, up))
            rates[name, "bare: both at once, each"].append((both, min(down, up)))
            rates[name, f"bare: device {0} to {there}, one process"].append((straight, straight))
            lag.start()
            rates[name, "into the receiver's block"].append((size / await bench.writes("pinned", size), down))
            whole = size / await bench.flow("pinned", size, size, 1)
            rates[name, "GPU -> block -> GPU, one piece"].append((whole, limit[size][0]))
            cut = size / await bench.flow("pinned", size, PIECES[0], WINDOW)
            rates[name, "GPU -> block -> GPU, pieces of 4 MiB"].append((cut, limit[size][0]))
            rates[name, "CUDA IPC, into the device block"].append((size / await bench.writes("device", size), straight))
            lag.stop()
        for piece in PIECES:
            name = f"steady, {piece // MiB} MiB pieces"
            for way in bench.ways:
                lag.start()
                rate = STEADY / await bench.flow(way, STEADY, piece, WINDOW)
                lag.stop()
                against = limit[SPAN][1] if way == "device" else limit[SPAN][0]
                rates[name, f"GPU -> {way} block -> GPU"].append((rate, against))
    await bench.close()
    await receiver.end()
    rows: list[dict[str, object]] = [
        {
            "receiver": f"device {there}",
            "size": size,
            "path": path,
            "gb_s": round(statistics.median(rate for rate, _ in found) / 1e9, 1),
            "of_limit": round(statistics.median(rate / against for rate, against in found), 3),
            "spread": [round(min(r for r, _ in found) / 1e9, 1), round(max(r for r, _ in found) / 1e9, 1)],
        }
        for (size, path), found in rates.items()
    ]
    worst_ms = round(lag.worst_s * 1e3, 2)
    rows.append({"receiver": f"device {there}", "size": "", "path": "event loop, longest turn, ms", "gb_s": worst_ms})
    return rows


class Lag:
    """How late the event loop's timers come."""

    worst_s = 0.0

    def start(self) -> None:
        self._due = asyncio.get_running_loop().time() + 0.001
        self._timer = asyncio.get_running_loop().call_at(self._due, self._fire)

    def _fire(self) -> None:
        self.worst_s = max(self.worst_s, asyncio.get_running_loop().time() - self._due)
        self.start()

    def stop(self) -> None:
        self._timer.cancel()


# -- what happens to an opened pool, and why torch's way is slow ---------------------------------------------------


async def probe(end: str) -> str:
    """Copies into a device pool whose owner has freed it (``free``) or was killed (``kill``)."""
    accelerator, receiver = Accelerator(Cudart.load(), 0), await Receiver.start(0)
    pool = RemotePool(accelerator, bytes.fromhex(receiver.hello["words"][NAME]), SPAN)
    source = accelerator.runtime.malloc(SPAN)
    accelerator.outward.copy(pool.address, source, SPAN)
    await (receiver.ask("free") if end == "free" else receiver.end())
    try:
        accelerator.outward.copy(pool.address, source, SPAN)
        pool.close()
        accelerator.outward.copy(source, accelerator.runtime.malloc(SPAN), SPAN)
    except DeviceError as error:
        return f"an error: {error}"
    finally:
        if end == "free":
            await receiver.end()
    return "no error, and the device goes on working"


async def variant(opened_on: str, peer: str) -> str:
    """Rate of a copy from device 0 into a pool of device 1 that another process owns."""
    runtime, receiver = Cudart.load(), await Receiver.start(1)
    writer = Accelerator(runtime, 0)
    runtime.set_device(0)
    source = runtime.malloc(SPAN)
    if peer == "before":
        runtime.enable_peer(0, 1)
    runtime.set_device(0 if opened_on == "writer" else 1)
    target = runtime.open(msgspec.msgpack.decode(bytes.fromhex(receiver.hello["words"][NAME]))[0])
    if peer == "after":
        runtime.enable_peer(0, 1)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        writer.outward.copy(target, source, SPAN)
        times.append(time.perf_counter() - began)
    await receiver.end()
    return f"{SPAN / statistics.median(times) / 1e9:.1f} GB/s"


def again(*arguments: str) -> str:
    """What this script says when started with these arguments: a CUDA error must not outlive its experiment."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=120)
    lines = done.stdout.split("\n")
    return lines[0] if done.returncode == 0 else f"failed: {done.stderr.strip().splitlines()[-1:]}"


def table(rows: list[dict[str, object]]) -> str:
    lines = [f"{'to':9} {'size':22} {'path':44} {'GB/s':>8} {'of limit':>8}"]
    for row in rows:
        share = row.get("of_limit", "")
        lines.append(f"{row['receiver']!s:9} {row['size']!s:22} {row['path']!s:44} {row['gb_s']!s:>8} {share!s:>8}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", nargs="*", default=["bench"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--text", type=Path)
    options = parser.parse_args()
    role, *words = options.role
    roles: dict[str, Callable[[], object]] = {
        "receiver": lambda: uvloop.run(receive(int(words[0]))),
        "probe": lambda: print(uvloop.run(probe(words[0])), flush=True),
        "variant": lambda: print(uvloop.run(variant(*words)), flush=True),
    }
    if role in roles:
        roles[role]()
        return
    devices = torch.cuda.device_count()
    rows = [row for there in range(min(devices, 2)) for row in uvloop.run(measure(there, options.rounds))]
    notes = {f"a pool whose owner did this, then written to: {end}": again("probe", end) for end in ("free", "kill")}
    if devices > 1:
        for opened_on in ("owner", "writer"):
            for peer in ("none", "before", "after"):
                notes[f"device 0 to 1, opened on the {opened_on}'s device, peer access {peer}"] = again(
                    "variant", opened_on, peer
                )
    machine = f"{torch.cuda.get_device_name()} x{devices}, torch {torch.__version__}, Linux {platform.release()}"
    text = "\n".join([machine, table(rows), *(f"{what}: {found}" for what, found in notes.items())])
    print(text)
    if options.text:
        options.text.write_text(text + "\n")
    if options.json:
        found = {"machine": machine, "rounds": options.rounds, "rows": rows, "notes": notes}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
