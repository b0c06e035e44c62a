"""The data planes of a process, and which of them two peers use: the best that both have and that really connects."""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
import logging
import ssl
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiodisagg.errors import TransportError, TransportUnavailable
from aiodisagg.link.address import is_loopback
from aiodisagg.link.hello import LOCAL, Hello
from aiodisagg.transport.arena import Arena
from aiodisagg.transport.base import Admit, FenceKind, Remote, Transport
from aiodisagg.transport.description import loopback_of, moved

TlsContexts = tuple[ssl.SSLContext, ssl.SSLContext]
"""For those who connect, and for connecting to others."""

logger = logging.getLogger(__name__)

SLOW_S = 3.0
"""A peer that works ends its writes in milliseconds."""

_EVERYWHERE = frozenset({"stream", "zmq"})
"""Transports that can receive on every interface at once."""


def make_transport(name: str, host: str, tls: TlsContexts | None = None) -> Transport:
    """A transport by its name; its module, and with it third-party code, is imported only now.

    ``host``: where it receives. On every interface, a description says loopback, which ``Planes.connect`` reads on
    another host as the address that the link comes from; ``mooncake`` needs one address, and takes loopback.
    ``tls``: what leaves the host is encrypted, by transports that can.

    Raises:
        TransportUnavailable: this machine lacks what it needs.
    """
    wildcard = ipaddress.ip_address(host).is_unspecified
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    heard = {"host": host, "advertise": near} if wildcard else {"host": host}
    factories: dict[str, tuple[str, str, dict[str, Any]]] = {  # Any: arguments of classes not yet imported
        "memory": ("aiodisagg.transport.memory", "MemoryTransport", {}),
        "ipc": ("aiodisagg.transport.ipc", "IpcTransport", {}),
        "mooncake": ("aiodisagg.transport.mooncake", "MooncakeTransport", {"host": near}),
        "mooncake-tcp": ("aiodisagg.transport.mooncake", "MooncakeTcpTransport", {"host": near}),
        "stream": ("aiodisagg.transport.stream", "StreamTransport", {**heard, "tls": tls}),
        "zmq": ("aiodisagg.transport.zmq", "ZmqTransport", {**heard, "encrypt": tls is not None}),
    }
    module, kind, arguments = factories[name]
    try:
        made: Transport = getattr(importlib.import_module(module), kind)(**arguments)
    except ImportError as error:
        raise TransportUnavailable(name, f"cannot be imported: {error}") from error
    return made


@dataclass(frozen=True, slots=True)
class Plane:
    """A connected data plane to one peer."""

    transport: Transport
    remote: Remote


class Planes:
    """All transports of a process, opened together.

    Args:
        names: wanted, best first. host: where network transports listen. tls: as ``make_transport``.
    """

    def __init__(self, names: Sequence[str], host: str, tls: TlsContexts | None = None) -> None:
        self._names, self._host, self._tls = tuple(names), host, tls
        self.open_transports: dict[str, Transport] = {}
        self._revoking: Counter[str] = Counter()
        """Leases by the peer that must end before they are taken back."""
        self._watches: dict[str, asyncio.TimerHandle] = {}

    async def open(self, arena: Arena | None, admit: Admit, *, incarnation: str) -> None:
        """Opens every transport that works here. Raises TransportUnavailable, which says why for each, if none does."""
        reasons = []
        for name in self._names:
            try:
                transport = make_transport(name, self._host, self._tls)
                await transport.open(arena, admit, incarnation=incarnation)
            except TransportUnavailable as error:
                logger.info("transport %s is not available: %s", name, error)
                reasons.append(str(error))
            else:
                self.open_transports[name] = transport
        if not self.open_transports:
            raise TransportUnavailable("transports", f"none works on this machine: {'; '.join(reasons)}")

    def describe(self) -> dict[str, bytes]:
        """Descriptions of this process's pool, by transport, for a hello."""
        return {name: transport.describe() for name, transport in self.open_transports.items()}

    async def connect(
        self, local: Hello, remote: Hello, avoid: frozenset[str] = frozenset(), better_than: str = "", *,
        far_host: str = "",
    ) -> tuple[str, Plane, tuple[str, ...]]:  # fmt: skip
        """Connects to a peer's pool by the best plane that works, those in ``avoid`` last: its name, it, and those that
        were tried before and did not connect, which may another time.

        ``better_than``: an open transport; only those before it in this order are tried.
        ``far_host``: where the link to the peer comes from, if that is over TCP. A peer that offers loopback to another
        host means that address.

        Raises:
            TransportUnavailable: none does; the message says why for each.
        """
        same_host = local.same_host(remote)
        order = sorted(self.open_transports, key=lambda name: (name in avoid, self._names.index(name)))
        if better_than:
            del order[order.index(better_than) :]
        reasons, failed = [], []
        for name in order:
            description = remote.transports.get(name)
            if description is None:
                offered = ", ".join(remote.transports) or "nothing"
                reasons.append(f"{name}: not offered, only {offered}")
            elif name in LOCAL and not same_host:
                reasons.append(f"{name}: another host")
            else:
                loopback = "" if same_host or not far_host or is_loopback(far_host) else loopback_of(description)
                if loopback and name not in _EVERYWHERE:
                    reasons.append(f"{name}: it receives at {loopback} of another host; set --data-host there")
                    continue
                if loopback:
                    description = moved(description, far_host)
                try:
                    found = await self.open_transports[name].connect(description, peer=remote.incarnation)
                except TransportError as error:
                    hint = f" ({loopback} there, tried where the link comes from)" if loopback else ""
                    reasons.append(f"{name}: {error}{hint}")
                    failed.append(name)
                else:
                    why = "; ".join(reasons) or "first choice"
                    logger.info("data plane to %s is %s (%s)", remote.name, name, why)
                    return name, Plane(self.open_transports[name], found), tuple(failed)
        raise TransportUnavailable("any", "; ".join(reasons), peer=remote.name)

    async def revoke(self, peer: str, leases: Sequence[int]) -> None:
        """Returns when nothing of ``peer`` can land under these leases by any plane.

        No peer (``NOBODY`` of :mod:`aiodisagg.protocol.incoming`): the writer has said that it moves nothing any more,
        and only planes are asked whose receiving side places the bytes; that one may be in the middle of a copy.

        A peer that keeps leases for ``SLOW_S``, because it is stopped, or cannot say yet that nothing moves any more,
        is named in a warning: once, until all of its leases are back.
        """
        if not peer:
            placing = [one for one in self.open_transports.values() if one.capabilities.fence is FenceKind.RECEIVER]
            await asyncio.gather(*(transport.revoke(peer, leases) for transport in placing))
            return
        self._revoking[peer] += len(leases)
        if peer not in self._watches:
            self._watches[peer] = asyncio.get_running_loop().call_later(SLOW_S, self._warn, peer)
        try:
            await asyncio.gather(*(transport.revoke(peer, leases) for transport in self.open_transports.values()))
        finally:
            self._revoking[peer] -= len(leases)
            if not self._revoking[peer]:
                del self._revoking[peer]
                self._watches.pop(peer).cancel()

    def _warn(self, peer: str) -> None:
        text = "peer %s keeps %d blocks of the pool: asked to end its writes %g s ago, it has not said that they ended"
        logger.warning(text, peer, self._revoking[peer], SLOW_S)

    @property
    def leased_bytes(self) -> int:
        """Bytes of writes that are over for their callers and still in a library's hands; only mooncake has such."""
        return sum(getattr(transport, "leased_bytes", 0) for transport in self.open_transports.values())

    async def aclose(self) -> None:
        for transport in self.open_transports.values():
            await transport.aclose()
