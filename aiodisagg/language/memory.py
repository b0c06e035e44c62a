"""Where encode peers' rows land: an arena, and on a GPU its pinning and its twin in device memory."""

from __future__ import annotations

import logging

from aiodisagg.device import pool as device_pool
from aiodisagg.device.copies import Accelerator, DeviceBytes, Pinned
from aiodisagg.device.pool import DevicePool
from aiodisagg.errors import DeviceError
from aiodisagg.transport.arena import Arena

logger = logging.getLogger(__name__)


class RowMemory:
    """Made and closed on a thread: both take about 0.3 s a GiB.

    What an accelerator refuses is done without: unpinned memory is slower, and without a twin rows come by the host.
    """

    def __init__(self, size_bytes: int, accelerator: Accelerator | None) -> None:
        self.accelerator = accelerator
        self.arena = Arena(size_bytes)
        self._pinned: Pinned | None = None
        self._twin: DevicePool | None = None
        if accelerator is None:
            return
        try:
            self._pinned = accelerator.pin(self.arena.address, self.arena.size_bytes)
            self._twin = DevicePool(accelerator, self.arena.size_bytes)
        except DeviceError as error:
            logger.warning("the receive pool is less than it could be: %s", error)

    def describe(self) -> dict[str, bytes]:
        """What a hello says beside the transports."""
        return {} if self._twin is None else {device_pool.NAME: self._twin.description}

    def on_device(self, offset: int, size_bytes: int) -> DeviceBytes:
        """The same range of the twin. Raises DeviceError if there is none."""
        if self._twin is None:
            raise DeviceError("rows are said to lie in a device pool, which was never offered")
        return self._twin.at(offset, size_bytes)

    def close(self) -> None:
        """After the last transport that used it."""
        for held in (self._pinned, self._twin):
            if held is not None:
                held.close()
        self.arena.close()
