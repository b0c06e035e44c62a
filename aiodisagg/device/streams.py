"""Who goes first on an accelerator that an engine and a tower share.

A device that has no room for two kernels starts the blocks of the stream with the higher priority first. What runs is
not interrupted, and who comes after gets the gaps between two kernels of who goes first:

* **Steps with prompt tokens** go first, and for those that are graphs (of up to 4,096 tokens) a tower of the same
  process waits between its own kernels (:mod:`aiodisagg.device.alone`), as gaps were half of the device. Two kinds of
  work that share a device both end late; one after the other, the first ends sooner and the second no later, and a
  prompt that can be computed is nearest to its first token.
* **The tower** is next: prompts wait for its rows.
* **Steps that only decode** come last. They are many, and read memory more than they compute: in equal parts with a
  batch of images they would make it take twice as long, while they get on in its gaps. Those too large for a graph are
  launched as steps with prompts are.
"""

# torch declares no types for streams.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import enum
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Priority(enum.IntEnum):
    """As CUDA counts: what is lower goes first."""

    PROMPTS = -2
    TOWER = -1
    DECODES = 0


def stream(device: torch.device, priority: Priority) -> torch.cuda.Stream:
    import torch

    return torch.cuda.Stream(device, priority=int(priority))


def own_stream(device: torch.device | str, priority: Priority) -> AbstractContextManager[object]:
    """Makes torch launch on a stream of this thread's own, behind all that the device was given before; nothing happens
    on a CPU."""
    import torch

    if torch.device(device).type != "cuda":
        return nullcontext()
    torch.cuda.synchronize(device)
    return torch.cuda.stream(stream(torch.device(device), priority))
