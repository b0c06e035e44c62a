"""A writer's first words to a receiver, until both know that the engine leads to this life of that process.

Nothing but the check's eight bytes is sent meanwhile, so a ``Bar`` that comes in between needs no waiting: its leases
are noted and it is answered at once. It is nothing unusual. A receiver revokes what it lends whenever an item starts
anew, and an engine's first handshake with a peer may take longer than a receiver's patience with an item.
"""

from __future__ import annotations

import contextlib
import ipaddress

import msgspec

from aiodisagg.errors import PeerGone, TransportUnavailable
from aiodisagg.transport.mooncake_side import (
    Attach,
    Attached,
    Bar,
    Barred,
    Check,
    Checked,
    Closing,
    Message,
    Refused,
    Wire,
)


class Pool(msgspec.Struct, frozen=True, array_like=True):
    """What a receiver's description says."""

    host: str
    port: int
    """Of the side connection."""
    incarnation: str
    token: bytes


class Greeting:
    """One connection's first words. All raise PeerGone if the receiver leaves or is none."""

    def __init__(self, name: str, wire: Wire, peer: str) -> None:
        self.barred: list[int] = []
        """Leases that must not be written under."""
        self._name, self._wire, self._peer = name, wire, peer

    async def attach(self, token: bytes, incarnation: str) -> Attached:
        self._wire.say(Attach(token, incarnation, self._peer))
        words = await self._wire.hear()
        if isinstance(words, Refused):
            raise PeerGone(self._name, words.message, peer=self._peer)
        if not isinstance(words, Attached) or not words.fits:
            raise self._strange(words)
        self.barred += words.barred
        return words

    async def check(self, nonce: bytes) -> None:
        """Raises TransportUnavailable if the bytes that were written to its place are not there."""
        self._wire.say(Check(nonce))
        while isinstance(words := await self._wire.hear(), Bar):
            self.barred += words.leases
            self._wire.say(Barred(words.ticket))
        if not isinstance(words, Checked):
            raise self._strange(words)
        if not words.right:
            raise TransportUnavailable(self._name, "the engine leads to another process", peer=self._peer)

    def _strange(self, words: Message | None) -> PeerGone:
        match words:
            case None:
                text = "its connection ended, or something else answers there"
            case Closing():
                text = "closes"
            case _:
                text = "something else answers there"
        return PeerGone(self._name, text, peer=self._peer)


def ipv4(name: str, text: str) -> str:
    """An address and never a name: a look-up would block the engine, and names in descriptions are untrusted."""
    with contextlib.suppress(ValueError):
        address = ipaddress.IPv4Address(text)
        if not address.is_unspecified:
            return str(address)
    raise TransportUnavailable(name, f"{text!r} is not the IPv4 address of a host")
