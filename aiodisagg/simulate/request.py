"""A request on its way through a simulated cluster, and its images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from aiodisagg.bench.workload import WorkloadRequest
from aiodisagg.scheduler.order import Claim
from aiodisagg.simulate.times import PATCHES_PER_TOKEN


@dataclass(slots=True, eq=False)
class Item:
    """One image of a request. ``arrived``: contiguous rows at the language peer."""

    request: SimRequest
    index: int
    identity: int
    rows: int
    arrived: int = 0
    prepared: bool = False
    encoder: str = ""
    asked: int = 0
    """Its number among the items that its peer was asked for."""

    @property
    def patches(self) -> int:
        return self.rows * PATCHES_PER_TOKEN

    @property
    def claim(self) -> Claim:
        """As the peer that encodes it counts it."""
        request = self.request
        return Claim(self.asked, request.due_s, request.source.priority, request.work)


@dataclass(slots=True, eq=False)
class SimRequest:
    """Times in virtual seconds, negative while they have not come. Images come first in the prompt, then the text."""

    number: int
    source: WorkloadRequest
    prompt: int
    unloaded_s: float
    """Time to first token, and seconds of a token after it, alone on a monolith: what an SLO is a multiple of."""
    unloaded_tpot_s: float
    items: list[Item] = field(default_factory=list)
    generated: int = 0
    front: int = 0
    due_s: float = math.inf
    """When it has waited for its aging bound."""
    work: int = 0
    """Patches that towers are told of."""
    begun_s: float = -1.0
    """When it was let in."""
    served_s: float = -1.0
    """When the first of its images began to be encoded, or of its tokens to be computed."""
    first_s: float = -1.0
    last_s: float = -1.0
    end_s: float = -1.0
    outcome: str = ""
    """``ok``, ``shed`` or ``refused``; empty until it has ended."""
    peer: str = ""

    @property
    def name(self) -> str:
        return str(self.number)

    @property
    def output(self) -> int:
        return self.source.output_tokens

    @property
    def claim(self) -> Claim:
        """As the engine counts it, while nothing of it is computed."""
        return Claim(self.begun_s, self.due_s, self.source.priority, 2 * self.prompt - self.reach())

    @property
    def complete(self) -> bool:
        return all(item.arrived >= item.rows for item in self.items)

    def reach(self) -> int:
        """Prompt tokens before the first missing row."""
        front = 0
        for item in self.items:
            front += item.arrived
            if item.arrived < item.rows:
                return front
        return self.prompt
