"""One-line bugs planted into the machines, and the worlds that catch them.

``python -m tests.protocol.mutations > docs/mutations.md`` writes the table.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from aiodisagg.protocol.blocks import BlockPool
from aiodisagg.protocol.incoming import IncomingItem
from aiodisagg.protocol.meta import ItemMeta
from aiodisagg.protocol.outgoing import OutgoingItem
from aiodisagg.protocol.receiving import Receiver
from aiodisagg.protocol.sending import Sender
from aiodisagg.protocol.sources import SourceTable

from .checks import Violation
from .plans import draw
from .test_cut import ROWS_PER_BLOCK, reference, sent_twice
from .world import World

WORLDS = 1500
"""At most so many worlds are tried per mutation."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """``old`` in the source of ``where.method`` becomes ``new``."""

    what: str
    where: type
    method: str
    old: str
    new: str


MUTATIONS = (
    Mutation("the receiver believes a stale epoch", Receiver, "_message",
             "item.epoch == message.epoch", "item.epoch >= message.epoch"),
    Mutation("the sender fills a stale grant", OutgoingItem, "_granted", "event.epoch != self.epoch", "False"),
    Mutation("a block is freed twice", BlockPool, "settle",
             "self._lent.pop(lent.lend.lease, None)", "self._lent.get(lent.lend.lease)"),
    Mutation("a block becomes free and nobody is woken", Receiver, "handle",
             "return actions + self._lend(now)", "return actions + (self._lend(now) if actions else [])"),
    Mutation("DeepStack goes with the first window only", IncomingItem, "_take",
             "(chunk.stop - chunk.start) * row_bytes, meta",
             "(chunk.stop - chunk.start) * (row_bytes if chunk.start == 0 else 2), meta"),
    Mutation("M-RoPE axes are column-major in a window", ItemMeta, "cut", "self.mrope[12 * start : 12 * stop]",
             "b''.join(self.mrope[4 * i : 4 * i + 4] for a in range(3) for i in range(3 * start + a, 3 * stop, 3))"),
    Mutation("aux goes with the first rows only", ItemMeta, "cut",
             "Region.AUX in regions", "Region.AUX in regions and start == 0"),
    Mutation("a commit is taken twice", IncomingItem, "_take",
             " or any(s.overlaps(chunk.start, chunk.stop) for s in (self.held, self.pending, block.spent))", ""),
    Mutation("a quarantined block is lent before the fence", BlockPool, "settle",
             "lent.revoked and lent.fenced and", "lent.revoked and"),
    Mutation("a block is freed under its reader", BlockPool, "settle", "if lent.pins or", "if"),
    Mutation("an offer is made before the fence", OutgoingItem, "_fenced_then",
             "if self.writing is None and not self.fencing:", "if not self.fencing:"),
    Mutation("a cancelled item is not fenced", OutgoingItem, "_end", "return self._fenced_then(then, now)",
             "return then(now)"),
    Mutation("restated chunks are ignored", IncomingItem, "_offered",
             "for take in self._take(chunk, meta)", "for take in ()"),
    Mutation("a lease number is used again", BlockPool, "lend", "self._lease(self._lends)", "self._lease(block + 1)"),
    Mutation("the ledger is cleared on failover", IncomingItem, "_fail_over",
             "actions = self._withdraw(keep=False)", "actions = self._withdraw(keep=False); self.held.clear()"),
    Mutation("wrong checksums are ignored", IncomingItem, "_chunk_refused",
             "self.claimed.remove(chunk.start, chunk.stop)", "self.held.add(chunk.start, chunk.stop)"),
    Mutation("rows with a wrong checksum are not asked for again", IncomingItem, "_chunk_refused",
             "self.claimed.remove(chunk.start, chunk.stop)", "pass"),
    Mutation("a timer is not armed again", Receiver, "_after", "self._timers.arm(item.key, item.timer)",
             "item.epoch < 1 and self._timers.arm(item.key, item.timer)"),
    Mutation("a cancelled item keeps its source", Sender, "_step",
             "return actions + self.sources.release(item.digest, user)", "return actions"),
    Mutation("a want does not state the ledger", IncomingItem, "_want", "self.held.told(),", "(),"),
    Mutation("the rest of a block begins at its first byte", OutgoingItem, "_pump",
             "rest = lend.offset + (stop - lend.start) * self._row_bytes", "rest = lend.offset"),
    Mutation("a reconnect asks for no fence", Receiver, "_link_up",
             "return actions + [Send(peer, Cancel(key, epoch)) for key, epoch in stale.items()]", "return actions"),
    Mutation("a source in use is evicted", SourceTable, "_evict", "if s.idle", "if s.started and s.complete"),
    Mutation("an encode that was wanted again is forgotten", SourceTable, "stopped",
             "self._enqueue(source)", "pass"),
    Mutation("blocks of a lost link stay with the old epoch", IncomingItem, "_settle_older",
             "said = tuple(block.lend.lease for block in old if not block.fenced)", "said = ()"),
    Mutation("a lost link is waited for without end", IncomingItem, "_link_lost",
             "State.BOOTSTRAPPING, now + self._config.failover_s", "State.BOOTSTRAPPING, self.deadline"),
)  # fmt: skip


@contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """The mutation is in the code while the context lasts."""
    cls: Any = mutation.where
    original = inspect.getattr_static(cls, mutation.method)
    source = textwrap.dedent(inspect.getsource(original))
    if source.count(mutation.old) != 1:
        raise LookupError(f"{cls.__name__}.{mutation.method} does not hold {mutation.old!r} once")
    made: dict[str, Any] = {}
    code = compile(source.replace(mutation.old, mutation.new), f"<{mutation.what}>", "exec", dont_inherit=True)
    exec(code, inspect.getmodule(cls).__dict__, made)  # type: ignore[union-attr]
    table = dict(getattr(cls, "TABLE", {}))
    try:
        setattr(cls, mutation.method, made[mutation.method])
        for place, method in table.items():
            if method is original:
                cls.TABLE[place] = made[mutation.method]
        yield
    finally:
        setattr(cls, mutation.method, original)
        if table:
            cls.TABLE.update(table)


def hunt(mutation: Mutation, first: int = 0) -> tuple[str, str] | None:
    """(the world or cut that noticed, how it showed); None if nothing did. World ``first``, if any, is tried first."""
    with planted(mutation):
        if first and (found := _world(first)):
            return found
        for k in range(1, 40):
            world = World(reference(one_sided=True), cut_at=k)
            try:
                world.run(limit=6000)
            except Violation:
                break  # the worlds will tell it better
            if any(rows > ROWS_PER_BLOCK for rows in sent_twice(world).values()):
                return f"cut {k}", f"{max(sent_twice(world).values())} rows are sent twice"
        return next(filter(None, map(_world, range(1, WORLDS + 1))), None)


def _world(number: int) -> tuple[str, str] | None:
    try:
        World(draw(Random(number))).run(limit=6000)
    except Violation as violation:
        return str(number), str(violation.__cause__ or violation).split("\n")[0]
    return None


def known() -> dict[str, int]:
    """What docs/mutations.md says: by mutation, the world that noticed it."""
    path = Path(__file__).parents[2] / "docs" / "mutations.md"
    rows = (
        [line.split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")] if path.exists() else []
    )
    return {row[0].removeprefix("| "): int(row[2]) for row in rows[1:] if row[2].isdigit()}


def document() -> str:
    lines = [
        "# Planted bugs\n",
        "For whoever changes the protocol or its tests: the tests notice each of these bugs.\n",
        "Written by `python -m tests.protocol.mutations > docs/mutations.md`. Each line of code below was changed",
        "alone; the reference transfer of `tests/protocol/test_cut.py` was cut at its first messages, and the worlds",
        "of `tests/protocol/world.py` (1, 2, 3 ...) ran until one noticed. `tests/protocol/test_mutations.py` plants",
        "every one again in each test run.\n",
        "| planted bug | where | noticed by world | how it showed |",
        "|---|---|---:|---|",
    ]
    for mutation in MUTATIONS:
        found = hunt(mutation)
        worlds, how = found or ("not caught", "")
        how = str(how)[:90].replace("|", "/")
        lines.append(f"| {mutation.what} | `{mutation.where.__name__}.{mutation.method}` | {worlds} | {how} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")
