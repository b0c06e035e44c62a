"""Items under way: whose they are. Their rows go to the engine, and so does what went wrong with them."""

from __future__ import annotations

from dataclasses import dataclass

from aiodisagg.device.copies import DeviceBytes
from aiodisagg.engine.engine import Engine
from aiodisagg.engine.stream import RequestHandle
from aiodisagg.errors import AiodisaggError, DeadlineExceeded, EncodeFailed, MediaError, NoEncodePeer, PoisonItem
from aiodisagg.models.base import PlannedItem
from aiodisagg.protocol.events import Fail, ItemSpec
from aiodisagg.protocol.messages import ItemKey, Urgency
from aiodisagg.protocol.rows import RowLayout


@dataclass(frozen=True, slots=True)
class Item:
    """Whose an item is, and which one of its prompt.

    ``handle``: not the request's id, which a client may use again while a thread delivers rows to the one before.
    """

    handle: RequestHandle
    index: int
    timeout_s: float
    param: str = ""
    """Where the client named it."""


def spec_of(item: PlannedItem, urgency: Urgency) -> ItemSpec:
    """What is asked for of an item of a plan."""
    return ItemSpec(item.digest, item.kind.value, item.grid_thw, item.rows, item.fps, item.media, urgency=urgency)


class Items:
    """Between what fetches rows and the engine. Methods belong to the loop's thread, but for ``deliver``."""

    def __init__(self, engine: Engine, layout: RowLayout) -> None:
        self._engine, self._layout = engine, layout
        self._open: dict[ItemKey, Item] = {}

    def add(self, key: ItemKey, item: Item) -> None:
        """Its rows are going to be asked for."""
        self._open[key] = item

    def drop(self, key: ItemKey) -> None:
        """Its request is over. Does nothing if it has ended."""
        self._open.pop(key, None)

    def deliver(self, key: ItemKey, start: int, data: memoryview | DeviceBytes) -> None:
        """As ``RowReceiver`` has it. On any thread."""
        item = self._open.get(key)
        if item is not None:
            self._engine.deliver_bytes(item.handle, item.index, start, data, layout=self._layout)

    def ended(self, key: ItemKey, failed: Fail | None) -> None:
        """As ``RowReceiver`` has it: a failed item fails its request."""
        item = self._open.pop(key, None)
        if item is None or failed is None:
            return
        error: AiodisaggError
        match failed.code:
            case "deadline":
                error = DeadlineExceeded(f"item {key}", item.timeout_s, failed.story)
            case "invalid_media" | "too_large":
                error = MediaError(item.param or f"media[{item.index}]", failed.message)
            case "poison":
                error = PoisonItem(item.param or f"media[{item.index}]", failed.message)
            case "unreachable" | "draining":
                error = NoEncodePeer(f"item {key}: {failed.message}")
            case _:
                error = EncodeFailed(str(key), f"{failed.code}: {failed.message}", failed.story)
        self._engine.fail(item.handle, error)
