"""On the receiving side a row counts, and its block is given back, only after the copy's event."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch
import xxhash

from aiodisagg.device.copies import Accelerator, DeviceBytes
from aiodisagg.engine.rows import RequestRows
from aiodisagg.errors import DeviceError, EngineError
from aiodisagg.language.memory import RowMemory
from aiodisagg.language.take import Taker
from aiodisagg.protocol.events import RowsRefused, RowsTaken, Take
from aiodisagg.protocol.messages import Chunk, ItemKey
from tests.device.fake_cuda import FakeCuda
from tests.engine.tiny_engine import make_plan

H, WIDTH, KEY = 4, 12, ItemKey(1, 0)


def request(accelerator: Accelerator, dtype: torch.dtype = torch.float32) -> RequestRows:
    plan = make_plan([1, (1, 2, 2)])
    cpu = torch.device("cpu")
    return RequestRows(
        "r", plan, hidden_size=H, width=WIDTH, dtype=dtype, device=cpu, stream=accelerator.inward
    )  # fmt: skip


@pytest.fixture
def memory(accelerator: Accelerator) -> Iterator[RowMemory]:
    made = RowMemory(4096, accelerator)
    yield made
    made.close()


def test_rows_count_after_the_event(accelerator: Accelerator, cuda: FakeCuda, memory: RowMemory) -> None:
    rows, values = request(accelerator), torch.randn(4, WIDTH)
    block = memory.arena.view[64 : 64 + values.nbytes]
    block[:] = values.view(torch.uint8).numpy().tobytes()
    cuda.gate.clear()
    thread = threading.Thread(target=rows.write_bytes, args=(0, 0, block), kwargs={"width": WIDTH, "dtype": "float32"})
    thread.start()
    assert cuda.waiting.wait(30)
    assert rows.front == 1, "the device has not copied anything yet"
    cuda.gate.set()
    thread.join()
    assert rows.front == 5
    assert torch.equal(rows.take(1, 5)[1], values)
    assert ("copy", "pinned", "other") in cuda.log
    block.release()


@pytest.mark.parametrize("place", ["arena", "device pool"])
def test_rows_of_another_type_are_cast_on_the_device(
    accelerator: Accelerator, memory: RowMemory, cuda: FakeCuda, place: str
) -> None:
    rows, values = request(accelerator), torch.randn(4, WIDTH).to(torch.bfloat16)
    raw = values.view(torch.uint8).numpy().tobytes()
    data: memoryview | DeviceBytes = memoryview(raw)
    if place == "device pool":
        data = memory.on_device(0, len(raw))
        cuda.allocated[data.address][: len(raw)] = raw
    rows.write_bytes(0, 0, data, width=WIDTH, dtype="bfloat16")
    assert torch.equal(rows.take(1, 5)[1], values.float())


def test_device_memory_needs_a_stream() -> None:
    plan = make_plan([1, (1, 2, 2)])
    rows = RequestRows("r", plan, hidden_size=H, width=WIDTH, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(EngineError, match="without a stream"):
        rows.write_bytes(0, 0, DeviceBytes(1, WIDTH * 16), width=WIDTH, dtype="float32")


def test_a_pool_without_an_accelerator_has_no_twin() -> None:
    memory = RowMemory(100, None)
    assert memory.describe() == {}
    with pytest.raises(DeviceError):
        memory.on_device(0, 1)
    memory.close()


async def taken(memory: RowMemory, action: Take, accelerator: Accelerator) -> tuple[object, RequestRows, str]:
    """What taking the chunk told, the request's rows, and the thread that delivered."""
    told: asyncio.Queue[RowsTaken | RowsRefused] = asyncio.Queue()
    rows, where = request(accelerator), [""]

    def deliver(take: Take, data: memoryview | DeviceBytes) -> None:
        where[0] = threading.current_thread().name
        rows.write_bytes(0, take.chunk.start, data, width=WIDTH, dtype="float32")

    async with Taker(memory, deliver, told.put_nowait, checksum=True) as taker:
        taker.take(action)
        return await told.get(), rows, where[0]


@pytest.mark.anyio
async def test_a_chunk_is_taken_from_where_it_landed_and_never_on_the_loop(
    accelerator: Accelerator, memory: RowMemory, cuda: FakeCuda
) -> None:
    values = torch.randn(4, WIDTH)
    raw = values.view(torch.uint8).numpy().tobytes()
    twin = memory.on_device(256, len(raw))
    offset = twin.address - memory.on_device(0, 0).address
    cuda.allocated[memory.on_device(0, 0).address][offset : offset + len(raw)] = raw
    chunk = Chunk(1, 0, 4, 0, True)
    event, rows, thread = await taken(memory, Take(KEY, chunk, 256, len(raw), None), accelerator)
    assert event == RowsTaken(KEY, chunk) and torch.equal(rows.take(1, 5)[1], values)
    assert thread.startswith("aiodisagg-take"), "waiting for a device blocks a thread"

    memory.arena.view[512 : 512 + len(raw)] = raw
    chunk = Chunk(1, 0, 4, xxhash.xxh3_64_intdigest(raw))
    event, rows, thread = await taken(memory, Take(KEY, chunk, 512, len(raw), None), accelerator)
    assert event == RowsTaken(KEY, chunk) and torch.equal(rows.take(1, 5)[1], values)
    assert thread.startswith("aiodisagg-take")


@pytest.mark.anyio
async def test_a_chunk_in_a_pool_that_was_never_offered_is_refused(accelerator: Accelerator) -> None:
    memory, chunk = RowMemory(4096, None), Chunk(1, 0, 4, 0, True)
    event, rows, _ = await taken(memory, Take(KEY, chunk, 0, 4 * WIDTH * 4, None), accelerator)
    assert isinstance(event, RowsRefused) and event.why and rows.front == 1
    memory.close()
