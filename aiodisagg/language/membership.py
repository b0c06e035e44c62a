"""What membership says, carried out: links to encode peers of the same model, and what is known of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from aiodisagg.bootstrap.client import BootstrapClient
from aiodisagg.bootstrap.registry import Load, PeerRecord, host_name, only_there
from aiodisagg.language.rows import RowReceiver
from aiodisagg.link.hello import PeerRole, host_identity

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocalEncoder:
    """The encode half of the same peer: linked first of all, and what the peer registers as.

    ``record``: of that half; its incarnation and addresses are the peer's.
    """

    record: PeerRecord
    load: Callable[[], Load]


async def follow(client: BootstrapClient, rows: RowReceiver) -> None:
    """Tells ``rows`` who is there, for ever."""
    strangers: set[str] = set()
    here = host_name(*host_identity())
    homes: dict[str, str] = {}  # of who is there, by incarnation
    async for change in client.watch(PeerRole.ENCODE):
        for record in change.present:
            if record.role.encodes and record.model == rows.model:
                news = homes.get(record.incarnation) != record.addresses[0]  # and not its load
                homes[record.incarnation] = record.addresses[0]
                if news and only_there(record.addresses[0], record.host, here):
                    text = "encode peer %s listens at %s, which is of its own host only: it needs %s"
                    logger.warning(text, record.name, record.addresses[0], "--listen tcp:ADDRESS:PORT")
                rows.peers.add(record.addresses[0], news=news)
            elif record.role.encodes and record.incarnation not in strangers:
                strangers.add(record.incarnation)
                logger.error("encode peer %s is not usable: it runs %s, not %s", record.name, record.model, rows.model)
        for record in change.gone:
            homes.pop(record.incarnation, None)
        if change.gone:  # often long after the next life of a process came to the same address
            left = {address for record in change.gone for address in record.addresses}
            for address in left.difference(homes.values()):
                rows.peers.remove(address)
        rows.told(change)
        strangers.difference_update(record.incarnation for record in change.gone)
