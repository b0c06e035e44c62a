"""Which network addresses a server may fetch from on a stranger's behalf.

A URL in a request makes this host open a connection, so a client could reach what only this host can: its own ports,
the intranet, a cloud's metadata service. Checking the host name of a URL is not enough (a name may resolve to anything,
and to something else the second time), so the check sits where a socket is made for one concrete address. Everything
passes there: names, literal addresses, each redirect, each address of a host with several.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from typing import Any

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_METADATA = tuple(
    ipaddress.ip_network(name)
    for name in (
        "169.254.0.0/16", "168.63.129.16", "100.100.100.200", "192.0.0.0/24",
        "fe80::/10", "fd00:ec2::/32", "fd20:ce::/32", "fd00:c1::/32", "fd00:42::/32",
    )
)  # fmt: skip
"""Where clouds keep services that tell a machine its credentials, and link-local addresses, where most are."""
_REFUSED = "its address is not public, and allow_private_media_hosts (--allow-private-media) does not name it"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class AddressRefused(OSError):
    """The address may not be connected to. An OSError, so that the next address of a host is tried."""

    def __init__(self) -> None:
        # The same text for every address: which ones a name has inside a network is nobody's business.
        super().__init__(_REFUSED)


class AddressGuard:
    """Makes sockets for public addresses and for those in ``exceptions`` (addresses or networks).

    A metadata service is permitted by an exception for it alone, or for what is no larger than its network.
    """

    def __init__(self, exceptions: Sequence[str] = ()) -> None:
        self._exceptions = tuple(ipaddress.ip_network(n, strict=False) for n in exceptions)

    def permits(self, address: str) -> bool:
        """``address`` is a literal IPv4 or IPv6 address; what is none is not permitted."""
        try:
            parsed = _reached(ipaddress.ip_address(address))
        except ValueError:
            return False
        known = next((network for network in _METADATA if parsed in network), None)
        if known is None:
            return _is_public(parsed) or any(parsed in network for network in self._exceptions)
        return any(parsed in network and network.prefixlen >= known.prefixlen for network in self._exceptions)

    def open_socket(self, addr_info: tuple[Any, ...]) -> socket.socket:
        """A socket for an entry of ``getaddrinfo``, to be connected to its address. Raises AddressRefused."""
        family, kind, proto, _, address = addr_info
        if family not in (socket.AF_INET, socket.AF_INET6) or not self.permits(address[0]):
            raise AddressRefused
        return socket.socket(family, kind, proto)


def _is_public(address: Address) -> bool:
    """Whether ``address`` is one single host of the open internet."""
    special = address.is_multicast or address.is_reserved or getattr(address, "is_site_local", False)
    return address.is_global and not special


def _reached(address: Address) -> Address:
    """The IPv4 address that a packet to an IPv6 address of a transition scheme ends up at, else ``address``."""
    if not isinstance(address, ipaddress.IPv6Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None) or address
