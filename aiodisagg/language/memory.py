"""Where encode peers' rows land: an arena, and on a GPU its pinning and its twin in device memory.

A GPU's memory is shared out here: the twin has its size, and what is left is divided between the engine's KV pages and
the rows of the tokens in them, which requests keep as long as they live.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING

from aiodisagg.device import pool as device_pool
from aiodisagg.device.copies import Accelerator, DeviceBytes, Pinned
from aiodisagg.device.pool import DevicePool
from aiodisagg.errors import ConfigError, DeviceError
from aiodisagg.peer.config import LanguageConfig, MiB
from aiodisagg.protocol.blocks import BlockPool
from aiodisagg.transport.arena import Arena

if TYPE_CHECKING:
    from aiodisagg.models.language import LanguageHalf

logger = logging.getLogger(__name__)


def receive_pool(config: LanguageConfig, row_bytes: int) -> BlockPool:
    """Of as many blocks as fit ``pool_bytes``, one at least."""
    rows = config.block_rows or (256 if config.device == "cpu" else 1024)
    pool_bytes = config.pool_bytes or (64 if config.device == "cpu" else 1024) * MiB
    return BlockPool(max(1, pool_bytes // (rows * row_bytes)), rows, row_bytes, secrets.token_bytes(16))


def kv_bytes(config: LanguageConfig, half: LanguageHalf) -> int | None:
    """Of the engine's KV pages: as configured, else of a GPU's memory what stays; None: as the engine thinks best.

    Each token in a page is charged a row beside its keys and values: a video is nearly all of its request, so all
    tokens may be visual. Two kinds of rows are of no token in a page of their own, those of preempted requests and
    those of requests that share pages; they come out of the tenth that ``pool_bytes_on`` leaves alone. A text model
    has no rows.

    Call it when the weights are loaded, and before the receive pool is made. Blocking; raises ConfigError if nothing
    stays.
    """
    if config.kv_bytes is not None or half.device.type != "cuda":
        return config.kv_bytes
    from aiodisagg.engine.batch import pool_bytes_on

    twin_bytes = receive_pool(config, half.layout.row_bytes).size_bytes
    try:
        left = pool_bytes_on(half.device) - twin_bytes
    except ConfigError as error:
        raise error.under("kv_bytes") from error
    if left < 1:
        what = f"the receive pool's {twin_bytes // MiB} MiB on {half.device}"
        raise ConfigError("kv_bytes", f"no room for KV pages beside {what}: a smaller pool_bytes leaves more")
    shape = half.config
    head_dim = int(getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)
    token = 2 * int(shape.num_hidden_layers) * int(shape.num_key_value_heads) * head_dim * half.dtype.itemsize
    row = 0 if half.text_only else half.layout.width * half.dtype.itemsize
    return left * token // (token + row)


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
