"""Which kernels compute a tower on the device it is on: those that agree with torch there, and the fastest of them."""

# torch declares no types for streams, events and some methods.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend

from aiodisagg.device.alone import alone_on
from aiodisagg.device.graphs import Captures
from aiodisagg.device.streams import Priority
from aiodisagg.models.tower import (
    Attend,
    BySize,
    FusedTower,
    add_norm,
    flash_4,
    flash_4_ranges,
    grow,
    grow_at_once,
    sdpa,
    turn,
)

logger = logging.getLogger(__name__)

SIZES = (1024, 3600, 8160)
"""Patches of a segment at which ways to attend are compared; the fastest serves up to the next (720p, 1080p)."""
_CALLS = 10


def candidates(head_dim: int, device: torch.device) -> dict[str, Attend]:
    """Ways to attend, by name; some may not work here."""
    ways: dict[str, Attend] = {"sdpa": sdpa(None)}
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, backend in backends.items() if device.type == "cuda" else ():
        ways[name] = sdpa(backend)
        for size in (96, 128):
            if head_dim < size:
                ways[f"{name}, padded to {size}"] = sdpa(backend, size)
    if device.type == "cuda":
        try:
            ways["flash 4"] = flash_4()
        except Exception as error:  # not installed, or not for this torch
            logger.info("attention by flash-attn-4 is not used: %s", error)
    try:
        from aiodisagg.models.triton_vision import SHAPES
    except Exception as error:  # no Triton, or one that cannot define it
        logger.warning("no Triton attention: %r", error)
    else:
        ways |= {f"triton, {t.m} x {t.n}, {t.warps} warps": t for t in SHAPES}
    return ways


def choose_kernels(tower: FusedTower, dtype: torch.dtype, device: torch.device) -> dict[int, dict[str, float]]:
    """Gives the tower its rope and its fastest attention. Milliseconds of one block's attention, by patches of the
    segment and by name; those that fail or disagree with torch's reference are not in it."""
    draw = torch.Generator(device).manual_seed(1)
    small = torch.randn(2 * 200, 3, tower.heads, tower.head_dim, generator=draw, device=device).to(dtype)
    limit = 1e-4 if dtype is torch.float32 else 2e-2
    _use_small_kernels(tower, small, limit)
    wanted = torch.empty(400, tower.heads, tower.head_dim, dtype=torch.float32, device=device)
    sdpa(SDPBackend.MATH)(small.float(), 2, 200, wanted, tower.head_dim**-0.5)
    ways = candidates(tower.head_dim, device)
    large = torch.randn(
        max(SIZES) if device.type == "cuda" else 1, 3, tower.heads, tower.head_dim, generator=draw, device=device
    ).to(dtype)
    times: dict[int, dict[str, float]] = {size: {} for size in SIZES}
    for name, way in ways.items():
        try:
            found = torch.empty_like(wanted, dtype=dtype)
            way(small, 2, 200, found, tower.head_dim**-0.5)
            if _distance(found, wanted) > limit:
                logger.warning("attention by %s is not used: it disagrees", name)
                continue
            for size in SIZES:
                times[size][name] = _time(way, large[:size])
        except Exception as error:  # a backend that does not take this head size, or is not built in
            logger.info("attention by %s is not used: %s", name, str(error).splitlines()[0] if str(error) else error)
            for of_size in times.values():
                of_size.pop(name, None)
    best = {size: min(found, key=lambda name: found[name]) for size, found in times.items()}
    tower.attend = BySize(tuple((size, ways[name]) for size, name in best.items()))
    for size, name in best.items():
        shown = {other: round(ms, 3) for other, ms in times[size].items()}
        logger.info("tower: attention over %d patches by %s; ms: %s", size, name, shown)
    tower.alone = alone_on(device)
    if device.type == "cuda":
        _use_graphs(tower, small, limit)
    return times


def _use_small_kernels(tower: FusedTower, qkv: torch.Tensor, limit: float) -> None:
    """Those that agree here with what they stand for."""
    size, block, device = qkv.shape[0], tower.block, qkv.device
    draw = torch.Generator(device).manual_seed(2)
    cos, sin = torch.randn(2, size, tower.head_dim, generator=draw, device=device)
    x, delta = torch.randn(2, size, block.norm1.weight.shape[0], generator=draw, device=device).to(qkv.dtype)

    def rope() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        from aiodisagg.models.triton_vision import turn as fast

        yield fast(qkv.clone(), cos, sin), turn(qkv.clone(), cos, sin)
        tower.turn = fast

    def norms() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        from aiodisagg.models.triton_vision import add_norm as fast

        yield from zip(fast(x.clone(), delta, block.norm1), add_norm(x, delta, block.norm1), strict=True)
        tower.add_norm = fast

    def activation() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if tower.activation != "gelu_pytorch_tanh":  # others are near enough to be taken for it
            return
        yield grow_at_once(block.mlp, x), grow(block.mlp, x)
        tower.grow = grow_at_once

    for name, pairs in (("rope", rope()), ("norm", norms()), ("activation", activation())):
        try:
            for found, reference in pairs:  # past the last one it is used
                if (off := _distance(found, reference)) > limit:
                    logger.warning("the tower's %s kernel is not used: it is off by %.1e", name, off)
                    break
        except Exception as error:  # what a compiler or a driver raises
            logger.warning("the tower's %s kernel is not used: %r", name, error)


def _use_graphs(tower: FusedTower, qkv: torch.Tensor, limit: float) -> None:
    """If attention over segments of any sizes works here: two of them, and something behind."""
    try:
        attend = flash_4_ranges(qkv.shape[3] ** -0.5)
        bounds = torch.tensor([0, 130, 300, 300], dtype=torch.int32, device=qkv.device)
        found, wanted = attend(qkv, bounds, 400), torch.empty(400, *qkv.shape[2:], device=qkv.device)
        for start, stop in ((0, 130), (130, 300)):
            sdpa(SDPBackend.MATH)(qkv[start:stop].float(), 1, stop - start, wanted[start:stop], qkv.shape[3] ** -0.5)
        if (off := _distance(found[:300], wanted[:300].view(300, -1))) > limit:
            logger.warning("the tower is launched, not replayed from graphs: attention is off by %.1e", off)
        else:
            tower.use_graphs(attend, Captures(qkv.device, Priority.TOWER))
    except ImportError as error:
        logger.info("the tower is launched, not replayed from graphs: %s", error)
    except Exception as error:  # of a driver or a library, or no memory
        logger.warning("the tower is launched, not replayed from graphs: %r", error)


def _distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    found = float((ours.double() - reference.double()).norm() / reference.double().norm())
    return found if found == found else float("inf")


def _time(way: Attend, qkv: torch.Tensor) -> float:
    """Milliseconds of a call in a row of calls."""
    out = torch.empty(qkv.shape[0], *qkv.shape[2:], dtype=qkv.dtype, device=qkv.device)
    way(qkv, 1, qkv.shape[0], out, qkv.shape[3] ** -0.5)
    if not qkv.is_cuda:
        return 0.0
    times = []
    for _ in range(3):
        torch.cuda.synchronize(qkv.device)
        began = time.perf_counter()
        for _ in range(_CALLS):  # one after the other, so what launching costs counts where it is what one waits for
            way(qkv, 1, qkv.shape[0], out, qkv.shape[3] ** -0.5)
        torch.cuda.synchronize(qkv.device)
        times.append((time.perf_counter() - began) / _CALLS * 1e3)
    return min(times)
