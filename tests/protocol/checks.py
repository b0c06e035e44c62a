"""What must hold after every step of a world, and what must be true when nothing is left to happen."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from aiodisagg.protocol import events as ev
from aiodisagg.protocol.messages import Fenced, Grant, ItemKey, Message, Offer, Refuse, Want
from aiodisagg.protocol.ranges import RangeSet
from aiodisagg.protocol.receiving import Receiver
from aiodisagg.protocol.rows import Region

from . import truth

if TYPE_CHECKING:
    from .network import Process
    from .world import World


class Violation(AssertionError):
    """The protocol broke a promise."""


def _demand(holds: object, what: str) -> None:
    if not holds:
        raise Violation(what)


def receiver(world: World) -> None:
    """Blocks have one owner each, ledgers hold only the truth and only grow, nothing stays lent without a reason."""
    process = world.receiver
    machine, pool = process.machine, process.machine.pool
    lent = [pool._lent[lease] for lease in pool._lent]
    numbers = pool._free + [block.lend.offset // pool.block_bytes for block in lent]
    _demand(sorted(numbers) == list(range(pool.blocks)), f"blocks are lost or have two owners: {numbers}")
    for block in lent:
        owner = machine.items.get(block.owner)
        _demand(block.pins >= 0, f"negative pins: {block}")
        waits = block.pins > 0 or (block.revoked and not block.fenced)
        if owner is None or block.lend.lease not in owner.lends:
            _demand(waits, f"a block is kept for nobody: {block}")
        elif block.revoked:
            _demand(waits or block.kept, f"a block is kept for nothing: {block}")
        else:
            _demand(block.epoch == owner.epoch and block.peer == owner.peer, f"a lend outlived its epoch: {block}")
    world.quarantined = max(world.quarantined, pool.quarantined)
    world.windows = max(world.windows, -(-pool._lends // pool.blocks))
    history = world.history
    for key, item in machine.items.items():
        _demand(not item.state.final, f"{key} is over but remembered")
        rows, epoch = history.get(key, (0, 0))
        _demand(item.epoch >= epoch, f"{key}: epoch fell from {epoch} to {item.epoch}")
        count = len(item.held)
        _demand(count >= rows, f"{key}: the ledger shrank from {rows} to {count}")
        if (count, item.epoch) != (rows, epoch):
            history[key] = count, item.epoch
            ledger(world, key, item.held.spans(), {r: s.spans() for r, s in item.meta.held.items()})
        taking = RangeSet()
        for (owner_key, _, _), take in machine._taking.items():
            if owner_key == key:
                taking.add(take.chunk.start, take.chunk.stop)
        _demand(item.pending == taking, f"{key}: pending {item.pending}, taking {taking}")
        claimed = RangeSet((*item.held.spans(), *taking.spans()))
        for block in item.lends.values():
            for span in () if block.revoked else block.spent.gaps(block.lend.start, block.lend.stop):
                claimed.add(*span)
        _demand(item.claimed == claimed, f"{key}: claims {item.claimed}, for which there is only {claimed}")
    _demand(len(machine._timers) == len(machine.items), "an item without a timer, or a timer without an item")
    held = Counter(block.peer for block in lent)
    usable = pool.blocks - sum(count for peer, count in held.items() if peer not in machine._linked)
    for key in machine._eager if pool.free else ():
        mine, others = held[machine.items[key].peer], len(machine._linked) - 1
        has_part = others > 0 and mine >= max(1, usable // (others + 1)) and pool.free <= max(1, usable // 4)
        _demand(has_part, "a block is free and nobody lends it to an item whose rows are ready")


def stale(machine: Any, event: object) -> tuple[Any, ...] | None:
    """What an item consists of, if the event is a word of an epoch that is over: it must stay as it is."""
    if not isinstance(event, ev.MessageReceived):
        return None
    key, epoch = event.message.key, event.message.epoch
    if isinstance(machine, Receiver):
        item = machine.items.get(key)
        if item is None or (item.peer == event.peer and item.epoch == epoch):
            return None
        # a fence of whatever epoch may free blocks, which are lent again at once
        claimed = () if isinstance(event.message, Fenced | Refuse) else item.claimed.spans()
        return item.state, item.peer, item.epoch, item.held.spans(), claimed, item.ready, item.timer
    item = machine.items.get((event.peer, key))
    if item is None or item.epoch <= epoch:
        return None
    return item.state, item.epoch, tuple(item.lends), item.writing, item.fencing, tuple(item.written)


def ledger(
    world: World, key: ItemKey, held: tuple[tuple[int, int], ...], metas: dict[Region, tuple[tuple[int, int], ...]]
) -> None:
    arrived = world.arrived[key]
    _demand(not (wrong := arrived.wrong_rows(held)), str(wrong))
    for region, spans in metas.items():
        _demand(not (wrong := arrived.wrong_meta(region, spans)), str(wrong))


def finished(world: World, key: ItemKey) -> None:
    """The item is whole: every row of every wanted region."""
    spec = world.arrived[key].spec
    whole = ((0, spec.rows),)
    ledger(world, key, whole, {r: ((0, 1),) if r is Region.AUX else whole for r in spec.meta})


def sender(world: World, process: Process) -> None:
    """Sources stay within their bound, are in use or cached, and no record outlives its end."""
    machine, table = process.machine, process.machine.sources
    started = {digest: source for digest, source in table._sources.items() if source.started}
    used = sum(source.size_bytes for source in started.values())
    _demand(used == table.used_bytes, f"{process.name} counts {table.used_bytes} bytes of sources, has {used}")
    _demand(used <= table.capacity_bytes, f"{process.name} is over its capacity: {used}")
    idle = sum(source.size_bytes for source in started.values() if source.idle)
    gone = sum(source.size_bytes for source in started.values() if not source.idle and source.yielding)
    _demand(gone == table._yielding_bytes, f"{process.name} counts {table._yielding_bytes} yielding bytes, has {gone}")
    _demand(idle == table._idle_bytes, f"{process.name} counts {table._idle_bytes} bytes of cached sources, has {idle}")
    shares = Counter(peer for source in started.values() for peer in source.receivers for _ in range(source.size_bytes))
    _demand(shares == table._held, f"{process.name} counts {table._held} bytes by receiver, has {shares}")
    filed = [source.file_bytes for source in table._sources.values() if source.file_bytes]
    _demand(sum(filed) == table.file_bytes, f"{process.name} counts {table.file_bytes} bytes of files, has {filed}")
    _demand(sum(filed) <= table.capacity_file_bytes or len(filed) == 1, f"{process.name} has too many files: {filed}")
    patches = sum(source.patches for source in table._sources.values() if not source.complete)
    _demand(patches == table.waiting_patches, f"{process.name} counts {table.waiting_patches} patches, has {patches}")
    _demand(set(started) == set(process.store), f"{process.name} holds {set(process.store)}, thinks {set(started)}")
    for digest, source in table._sources.items():
        _demand(source.users or source.complete or source.cancelled, f"{digest} is kept for nobody")
        waits = [source.place > 0, digest in table._aside]
        _demand([source.started, *waits].count(True) == 1, f"{digest} is nowhere, or in two lines")
        _demand(not source.file_bytes or digest not in table._aside, f"{digest} is put aside with its files")
        for user in source.users:
            _demand(user in machine.items, f"{digest} is kept for {user}, which is over")
        queued_for = {peer for peer, queue in table._queues.items() if digest in queue}
        _demand(queued_for == (source.receivers if source.place else set()), f"{digest} is queued for {queued_for}")
    for user, item in machine.items.items():
        _demand(not item.ended, f"{user} ended and is remembered")
        _demand(item.state.final or user in machine._timers, f"{user} has no timer")
        _demand(item.source is None or table.get(item.digest) is item.source, f"{user} draws from a dropped source")
        epoch = world.history.get((process.name, user), 0)
        _demand(item.epoch >= epoch, f"{user}: epoch fell from {epoch} to {item.epoch}")
        world.history[process.name, user] = item.epoch
    for gone in [
        who
        for who in world.history
        if isinstance(who, tuple) and who[0] == process.name and who[1] not in machine.items
    ]:
        del world.history[gone]  # a record may begin anew, e.g. by a repeated word
    counters = machine.counters
    _demand(counters.total("resent") <= counters.total("sent"), "more was resent than sent")


def sent(world: World, process: Process, peer: str, message: Message) -> None:
    """Words go to whom they concern, and are true when they are said."""
    target = world.network.processes.get(peer)
    _demand(target is not None, f"{process.name} speaks to {peer}, which never was")
    if process.name.startswith("L"):
        _demand(peer.startswith("E"), f"{process.name} speaks to {peer}")
        if isinstance(message, Want | Grant):
            item = process.machine.items[message.key]
            _demand((item.peer, item.epoch) == (peer, message.epoch), f"{message} goes to {peer}, not {item}")
            held = item.held.spans()
            _demand(message.held == held, f"{message} says {message.held}, held is {held}")
        if isinstance(message, Grant):
            for lend in message.lends:
                block = process.machine.pool.get(lend.lease)
                _demand(block is not None and not block.revoked and block.owner == message.key, f"not its own: {lend}")
                _demand(not item.held.overlaps(lend.start, lend.stop), f"held already: {lend}")
        return
    _demand(message.key in world.asked and peer.startswith("L"), f"{process.name} speaks of {message.key} to {peer}")
    moving = world.landings.moving(process, peer, message.key)
    if isinstance(message, Offer):
        _demand(not [m for m in moving if m.write.epoch < message.epoch], f"an offer while older writes move: {moving}")
    if isinstance(message, Fenced | Refuse):
        _demand(not [m for m in moving if m.write.epoch <= message.epoch], f"not fenced at all: {message} {moving}")
    if isinstance(message, Refuse):
        world.refusals[message.key] = world.refusals.get(message.key, 0) + 1


def landed(world: World, home: Process, write: ev.Write, part: tuple[int, int], offset: int) -> None:
    """Bytes arrive only in a block that is lent (or quarantined) for exactly these rows."""
    block = home.machine.pool.get(write.lease)
    _demand(block is not None, f"a late write lands in a block of somebody else: {write} {part}")
    assert block is not None
    _demand(block.owner == write.key, f"a write lands in a block of {block.owner}: {write}")
    start = write.start + part[0]
    _demand(
        block.lend.start <= start and write.start + part[1] <= block.lend.stop
        and offset == block.lend.offset + (start - block.lend.start) * truth.ROW_BYTES,
        f"rows [{start},...) land beside {block.lend}",
    )  # fmt: skip
    _demand(not block.spent.overlaps(start, write.start + part[1]), f"{write} lands on rows that were taken")


def at_the_end(world: World) -> None:
    """Everything healed and nothing is left to happen: nothing may be left over either."""
    process = world.receiver
    for key, (_, deadline) in world.asked.items():
        _demand(key in world.ended, f"{key} never ended: {process.machine.items.get(key)}")
        how = world.ended[key]
        allowed = {"success", "crashed"}
        if not world.patient(key):
            allowed.add("deadline")
        if "cancel" in world.struck:
            allowed.add("cancelled")
        if "encode_fails" in world.struck:
            allowed |= {"bad_media"} | ({"oom", "cancelled"} if world.refusals.get(key, 0) >= 4 else set())
        if world.landings.failed[key] >= 8:
            allowed.add("unreachable")
        if world.corrupted >= 4:
            allowed.add("corrupt")
        _demand(how in allowed, f"{key} ended as {how} (deadline {deadline})")
    _demand(not world.owed, f"items {world.owed} were never served")
    machine = process.machine
    _demand(
        machine.pool.free == machine.pool.blocks, f"blocks are left: {machine.pool} {list(machine.pool._lent.values())}"
    )
    _demand(not machine.items and machine.next_timer() is None, f"left at the receiver: {machine}")
    _demand(not machine._taking and not machine._eager and not machine._early, "left in the receiver's lines")
    received = machine.counters.total("received", region=Region.INPUT)
    _demand(received == process.taken_rows * truth.LAYOUT.region_bytes(Region.INPUT), "received bytes miscounted")
    for peer in world.senders:
        _demand(not peer.machine.items, f"records left at {peer.name}: {peer.machine.items}")
        _demand(peer.machine.next_timer() is None, f"a timer is left at {peer.name}")
        for digest, source in peer.machine.sources._sources.items():
            _demand(source.complete and not source.users, f"{digest} is left at {peer.name}: {source}")
        table = peer.machine.sources
        _demand(not table._queues and not table._aside, f"jobs left in the queue of {peer.name}")
        _demand(not table.file_bytes, f"files left at {peer.name}")
    _demand(not world.landings.under_way, f"writes never ended: {world.landings.under_way}")
