"""The kernel that waits, see :mod:`aiodisagg.device.alone`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _wait(word_ptr, most):
    left = most
    while (tl.load(word_ptr, volatile=True) != 0) & (left > 0):
        left -= 1
    if left == 0:
        tl.atomic_add(word_ptr + 1, 1)


def wait(word: torch.Tensor, most: int) -> None:
    """Reads int32 ``word[0]`` until it is 0, ``most`` times at most; a wait that ends by that adds 1 to ``word[1]``."""
    _wait[(1,)](word, most, num_warps=1)
