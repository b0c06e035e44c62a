"""The experts of a layer, several ways, and which of them a number of tokens gets.

All take x [T, h], ids int32 [T, k] (E: padding), weights [T, k], gate_up [E, 2I, h] and down [E, h, I] as transformers
holds them, and give the weighted outputs [T*k, h] of each (token, expert) pair; the rows of padding are undefined. None
but the last waits for the device, so all others may be captured by a CUDA graph.

* ``triton`` (in three tastes): :mod:`aiodisagg.engine.triton_experts`, which reads only the chosen experts and pads
  small groups to 16.
* ``grouped``: torch's grouped matrix product over pairs sorted by expert.
* ``loop``: one expert after another; the reference.

Which is faster depends on the chip and on rows per expert, so it is measured once with the model's own weights.
"""

# torch declares no types for streams and events.
# mypy: disallow-untyped-calls=False

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from aiodisagg.engine.kernels import Shapes, distance

logger = logging.getLogger(__name__)

RunExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

BUCKETS = (4, 16, 64, 256, 1024, 1152, 2048, 4096)
"""Token counts at which implementations are compared; one serves up to the next. Other shapes of blocks begin right
behind 1,024 (128 experts, eight a token)."""


def run_loop(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Expert after expert. Waits for the device to learn who was chosen."""
    top_k = ids.shape[1]
    flat = ids.reshape(-1)
    out = x.new_zeros(flat.shape[0], down.shape[1])
    for expert in flat.unique().tolist():
        if expert >= down.shape[0]:
            continue
        pairs = (flat == expert).nonzero().view(-1)
        gate, up = functional.linear(x[pairs // top_k], gate_up[expert]).chunk(2, dim=-1)
        made = functional.linear(functional.silu(gate) * up, down[expert])
        out[pairs] = made * weights.reshape(-1)[pairs, None]
    return out


def run_grouped(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Two grouped products; ends of groups stay on the device."""
    experts, top_k = down.shape[0], ids.shape[1]
    product: Any = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    ordered, order = torch.sort(ids.reshape(-1), stable=True)
    ends = torch.searchsorted(
        ordered, torch.arange(experts, dtype=ordered.dtype, device=x.device), right=True, out_int32=True
    )
    gate, up = product(x[order // top_k], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    made = product(functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
    out = torch.empty_like(made)
    out[order] = made * weights.reshape(-1)[order, None]
    return out


def _run_triton(
    plans: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    from aiodisagg.engine.triton_experts import plan_of, run_experts

    plan = plan_of(ids.shape[0], ids.shape[1], down.shape[0], plans)
    return run_experts(x, ids, weights, gate_up, down, plan)


@dataclass(slots=True)
class Experts:
    """The implementations that work here, and for each bucket of tokens the fastest of them."""

    ways: Mapping[str, RunExperts]
    table: tuple[tuple[int, str], ...]
    """(from so many tokens on, name), ascending."""
    measured: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Milliseconds by tokens and name."""

    def name_for(self, tokens: int) -> str:
        found = self.table[0][1]
        for least, name in self.table:
            if tokens < least:
                break
            found = name
        return found

    @property
    def captured(self) -> bool:
        """Whether every choice may be in a CUDA graph."""
        return all(name != "loop" for _, name in self.table)

    def run(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        return self.ways[self.name_for(x.shape[0])](x, ids, weights, gate_up, down)

    def only(self, name: str) -> Experts:
        """The same implementations, but always this one."""
        return Experts(self.ways, ((0, name),), self.measured)


def choose_experts(
    shapes: Shapes, gate_up: torch.Tensor, down: torch.Tensor, *, buckets: Sequence[int] = BUCKETS
) -> Experts:
    """Checks each way against the loop with a layer's weights, and on a GPU times those that agree."""
    if gate_up.shape != (shapes.experts, 2 * down.shape[2], shapes.hidden) or down.shape[1] != shapes.hidden:
        raise ValueError(f"experts of shapes {tuple(gate_up.shape)}, {tuple(down.shape)} are not [E, 2I, h], [E, h, I]")
    ways: dict[str, RunExperts] = {}
    checked = (3, 40, 8 * shapes.experts, 72 * shapes.experts // shapes.top_k)  # alone, few, some and many an expert
    for name, way in _candidates().items():
        try:
            worst = max(_error(way, shapes, gate_up, down, tokens) for tokens in checked)
        except Exception as error:  # what a compiler or a driver raises
            logger.warning("experts by %s are not used: %r", name, error)
            continue
        if worst > (1e-4 if shapes.dtype is torch.float32 else 2e-2):
            logger.warning("experts by %s are not used: they are off by %.1e", name, worst)
            continue
        ways[name] = way
    if not ways:
        return Experts({"loop": run_loop}, ((0, "loop"),))
    if shapes.device.type != "cuda":
        return Experts({**ways, "loop": run_loop}, ((0, next(iter(ways))),))
    measured = {tokens: {name: _time(way, shapes, gate_up, down, tokens) for name, way in ways.items()}
                for tokens in buckets}  # fmt: skip
    best = [(tokens, min(times, key=lambda name: times[name])) for tokens, times in measured.items()]
    table = [(0, best[0][1]), *((tokens, name) for tokens, name in best[1:])]
    logger.info("experts: %s", ", ".join(f"{name} from {tokens} tokens" for tokens, name in table))
    return Experts({**ways, "loop": run_loop}, tuple(table), measured)


def _candidates() -> dict[str, RunExperts]:
    ways: dict[str, RunExperts] = {}
    try:
        from aiodisagg.engine.triton_experts import SETS

        ways.update({name: functools.partial(_run_triton, plans) for name, plans in SETS.items()})
    except Exception as error:  # no Triton, or one that cannot define them
        logger.warning("no Triton experts: %r", error)
    ways["grouped"] = run_grouped
    return ways


def draw(shapes: Shapes, tokens: int, *, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random x, ids and weights; the last ``padding`` tokens have no expert."""
    generator = torch.Generator(shapes.device).manual_seed(tokens)
    place: dict[str, Any] = {"generator": generator, "device": shapes.device}
    x = torch.randn(tokens, shapes.hidden, **place).to(shapes.dtype)
    scores = torch.rand(tokens, shapes.experts, **place).topk(shapes.top_k, dim=-1)
    ids = scores.indices.to(torch.int32)
    if padding:
        ids[-padding:] = shapes.experts
    return x, ids, (scores.values / scores.values.sum(-1, keepdim=True)).to(shapes.dtype)


def _error(way: RunExperts, shapes: Shapes, gate_up: torch.Tensor, down: torch.Tensor, tokens: int) -> float:
    x, ids, weights = draw(shapes, tokens, padding=1)
    real = slice(0, -shapes.top_k)
    return distance(way(x, ids, weights, gate_up, down)[real], run_loop(x, ids, weights, gate_up, down)[real])


def _time(way: RunExperts, shapes: Shapes, gate_up: torch.Tensor, down: torch.Tensor, tokens: int) -> float:
    """Milliseconds of one call, the median of several."""
    inputs = draw(shapes, tokens)
    for _ in range(2):
        way(*inputs, gate_up, down)
    times = []
    for _ in range(5):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)  # the launches are all queued before the first one starts
        began.record()
        way(*inputs, gate_up, down)
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return float(sorted(times)[2])
