"""Files of earlier requests, to which later ones refer by digest: ``sha256:<64 hex digits>`` in the place of a URL.

Each turn of a chat has all pictures of the turns before it, and a client need not send them each time. A tenant reaches
what it sent itself and nothing else: for it, a file of another one is as unknown as a file that nobody sent. Whoever
knows a digest within a tenant may use the file.
"""

from __future__ import annotations

import hashlib
import re

from prometheus_client.core import Metric

from aiodisagg.errors import InvalidRequest, MediaError
from aiodisagg.peer.metrics import counter, gauge
from aiodisagg.scheduler.flight import RowCache
from aiodisagg.scheduler.shares import Tenant

ENTRY_BYTES = 512
"""What a file takes besides its own bytes, rounded up: without it, files of one byte would fill the memory unseen."""
_SCHEME = b'"sha256:'
_DIGEST = re.compile(rb"[0-9a-fA-F]{64}")


class UnknownMedia(InvalidRequest):
    """A digest that no file kept for this tenant has (any more)."""

    def __init__(self, param: str) -> None:
        super().__init__(param, "no file with this digest is kept here: send the file again", code="unknown_media")


def referred(raw: memoryview, param: str) -> str | None:
    """The digest in a URL, in lower case; None if it is a URL of another kind. ``raw`` is the URL as a JSON string
    with its quotes. Raises MediaError naming ``param``."""
    if bytes(raw[: len(_SCHEME)]).lower() != _SCHEME:
        return None
    found = _DIGEST.fullmatch(raw[len(_SCHEME) : -1])
    if found is None:
        raise MediaError(param, "a reference is sha256:<64 hex digits>")
    return found[0].decode().lower()


def sha256_of(data: bytes) -> str:
    """In hex. Blocks for 1 to 3 ms a megabyte; safe on any thread, and lets others run."""
    return hashlib.sha256(data).hexdigest()


class MediaCache:
    """Encoded files by tenant and digest, within ``capacity_bytes``, the least recently used first to go; 0 keeps none.

    All tenants share the capacity. Belongs to one loop.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._files: RowCache[bytes] = RowCache(capacity_bytes)

    def fits(self, size_bytes: int) -> bool:
        """Whether a file of that size would be kept. Safe on any thread."""
        return size_bytes + ENTRY_BYTES <= self._files.capacity_bytes

    def get(self, tenant: Tenant, digest: str, param: str) -> bytes:
        """The file, now the last to go. Raises UnknownMedia naming ``param``."""
        data = self._files.get(_key(tenant, digest))
        if data is None:
            raise UnknownMedia(param)
        return data

    def put(self, tenant: Tenant, digest: str, data: bytes) -> None:
        """Keeps a file that fits, as the last to go."""
        self._files.put(_key(tenant, digest), data, len(data) + ENTRY_BYTES)

    def metrics(self) -> list[Metric]:
        files = self._files
        saved_bytes = files.saved_bytes - files.hits * ENTRY_BYTES
        return [
            counter("media_cache_hits", "References to files that were here.", files.hits),
            counter("media_cache_misses", "References to files that were not.", files.misses),
            counter("media_cache_saved_bytes", "Bytes of files that were not sent again.", saved_bytes),
            counter("media_cache_evictions", "Files that were dropped for others.", files.evicted),
            gauge("media_cache_bytes", "Bytes of files kept, and of keeping them.", files.used_bytes),
        ]


def _key(tenant: Tenant, digest: str) -> str:
    return f"{digest} {tenant.name}"
