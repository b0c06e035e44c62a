"""Steps with prompts have an accelerator to themselves: a tower in the same process waits between two of its blocks.

Theory. Priorities of streams (:mod:`aiodisagg.device.streams`) decide whose blocks of threads start when there is room,
and a step is hundreds of kernels one after the other. At the end of each a tower's kernel takes the room, and keeps the
next one waiting for as long as its own blocks of threads run: beside a tower, a step of 2,170 tokens took 63 to 73 ms
on an H200 instead of 33, and a picture 59 instead of 31. Both end late; one after the other, the first ends twice as
early and the second no later.

So there is a word on the device, set by a step's first kernel and cleared by its last one, that a small kernel between
two blocks of the tower reads until it is clear. Neither waits for the host. **Only a step that is launched as a whole
may take it, as a graph**: who launches kernel after kernel may have to wait until the device is idle (to load a kernel,
or for memory), and so for the tower that waits for it. Nobody waits for ever: who has read it ``MOST`` times goes on,
and is counted.

The word holds any tower of the process. That prompts without end do not stop one for ever is for the gate of a peer
that is both to see to (:mod:`aiodisagg.encode.device`).
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

logger = logging.getLogger(__name__)

MOST = 4_000_000
"""Reads of the word: a third of a second of an H200."""


class Alone:
    """The word of a device. What it launches goes to the current stream, and may be captured.

    Args:
        word: int32 [2] on the device: whether it is taken, and how often somebody has waited too long.
        most: reads of a wait.
    """

    def __init__(self, word: torch.Tensor, most: int = MOST) -> None:
        self._word, self._most = word, most
        self._taken = word[:1]

    @contextmanager
    def taken(self) -> Iterator[None]:
        """What is captured inside goes on while others wait."""
        self._taken.fill_(1)
        try:
            yield
        finally:
            self._taken.zero_()

    def wait(self) -> None:
        """What is launched from here on begins when nobody has the device alone."""
        from aiodisagg.device.triton_alone import wait

        wait(self._word, self._most)

    @property
    def gave_up(self) -> int:
        """How often a wait was too long. Waits for the device."""
        return int(self._word[1])


def alone_on(device: torch.device) -> Alone | None:
    """This process's word of an accelerator; None on a CPU, and where the kernel that waits does not work."""
    if device.type != "cuda":
        return None
    with _making:  # both halves of a peer ask
        return _word_of(torch.cuda.current_device() if device.index is None else device.index)


_making = threading.Lock()


@functools.cache
def _word_of(index: int) -> Alone | None:
    device = torch.device("cuda", index)
    with torch.inference_mode(False), torch.cuda.device(device):
        alone = Alone(torch.zeros(2, dtype=torch.int32, device=device))
        try:
            alone.wait()
            torch.cuda.synchronize(device)
        except Exception as error:  # no Triton, or what a compiler or a driver raises
            logger.warning("a tower does not wait for steps with prompts on %s: %r", device, error)
            return None
    return alone
