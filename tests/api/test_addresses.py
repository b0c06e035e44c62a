"""Which addresses may be fetched from."""

from __future__ import annotations

import socket

import pytest

from aiodisagg.api.addresses import AddressGuard, AddressRefused
from aiodisagg.api.config import PRIVATE_NETWORKS

PRIVATE = [
    "0.0.0.0",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "169.254.169.254",
    "172.16.0.1",
    "192.0.0.1",
    "192.168.1.1",
    "198.18.0.1",
    "224.0.0.1",
    "239.1.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "2002:7f00:1::",
    "2001:0:4136:e378:8000:63bf:80ff:fffe",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "fc00::1",
    "fd12::1",
    "ff02::1",
    "ff0e::1",
    "2001:db8::1",
    "example.com",
    "127.1",
]
PUBLIC = [
    "1.1.1.1",
    "93.184.216.34",
    "2606:4700::1111",
    "::ffff:1.1.1.1",
    "64:ff9b::101:101",
    "2002:101:101::",
]


def test_which_addresses_are_public() -> None:
    guard = AddressGuard()
    assert [a for a in PRIVATE if guard.permits(a)] == []
    assert [a for a in PUBLIC if not guard.permits(a)] == []
    opened = AddressGuard(("10.0.0.0/8", "fd12::/16", "::1"))
    permitted = {"10.0.0.1", "::ffff:10.0.0.1", "fd12::1", "::1"}
    assert {a for a in PRIVATE if opened.permits(a)} == permitted


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "168.63.129.16",
        "100.100.100.200",
        "192.0.0.192",
        "fd00:ec2::254",
        "fd20:ce::254",
        "fd00:c1::a9fe:a9fe",
        "fd00:42::42",
    ],
)
def test_metadata_services_are_permitted_by_their_own_name_only(address: str) -> None:
    """Two of them have addresses that count as public, and most others lie in what an intranet may have."""
    assert not AddressGuard().permits(address)
    assert not AddressGuard(PRIVATE_NETWORKS).permits(address)
    assert not AddressGuard(("0.0.0.0/0", "::/0", "100.64.0.0/10")).permits(address)
    assert AddressGuard((address,)).permits(address)


def test_sockets_are_made_for_public_addresses_only() -> None:
    guard = AddressGuard()
    with guard.open_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("1.1.1.1", 80))) as made:
        assert made.family == socket.AF_INET
    for family, address in (
        (socket.AF_INET, ("127.0.0.1", 80)),
        (socket.AF_INET6, ("::1", 80, 0, 0)),
        (socket.AF_UNIX, "/run/some.sock"),
    ):
        with pytest.raises(AddressRefused):
            guard.open_socket((family, socket.SOCK_STREAM, 0, "", address))
