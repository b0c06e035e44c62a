"""CUDA graphs: launches that are recorded once and then launched as one."""

# torch declares no types for streams and events.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import torch

from aiodisagg.device.streams import Priority, stream

logger = logging.getLogger(__name__)

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Of what launches something: what launches it again, at once."""


TRIES = 3
"""A thread that waits for the whole device meanwhile spoils a capture."""


class Captures:
    """Captures into one memory pool: graphs of it are replayed one after the other, and what one has made is used
    before the next one runs. Their kernels keep the ``priority`` with which they were captured, on whatever stream they
    are replayed."""

    def __init__(self, device: torch.device, priority: Priority) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), stream(device, priority)

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        """``compute`` may not wait for the device, and has run before, so that everything is compiled. It is called
        once more, without effect. Raises what a driver or a library raises."""
        for _ in range(TRIES - 1):
            try:
                return self._capture(compute)
            except Exception as error:
                logger.info("captured again, for it was spoilt: %s", error)
        return self._capture(compute)

    def _capture(self, compute: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Other threads launch and allocate meanwhile, which only a capture of this thread's own calls tolerates;
            # torch.cuda.graph would also wait for the device and give memory back.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                compute()
            except BaseException:
                with contextlib.suppress(Exception):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay
