"""Links carry words: our own small protocol for control messages between two peers, over unix sockets or TCP."""

from aiodisagg.link.config import LinkConfig
from aiodisagg.link.hello import Hello, PeerRole
from aiodisagg.link.link import Link, dial
from aiodisagg.link.server import LinkServer

__all__ = ["Hello", "Link", "LinkConfig", "LinkServer", "PeerRole", "dial"]
