"""Gets the images and frames that a request names: data URLs, http(s) URLs within narrow limits, and digests of files
that were here before (:mod:`~aiodisagg.api.media_cache`).

A URL comes from a stranger. So only http and https, only public addresses (:mod:`~aiodisagg.api.addresses`, checked
for each socket), redirects followed by hand so that each target passes the same checks, and bounds on count, bytes and
time. Nothing is decompressed, no cookie is kept, no proxy or credential of the environment is used, and a client never
sees what a refused address would have answered.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TypeVar

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from aiodisagg.api.addresses import AddressGuard, AddressRefused
from aiodisagg.api.budget import Share
from aiodisagg.api.config import HttpConfig
from aiodisagg.api.data_url import decode_data_url, text_of
from aiodisagg.api.media_cache import MediaCache, referred, sha256_of
from aiodisagg.api.parse import MediaUrl
from aiodisagg.api.resolver import PoolResolver, asking
from aiodisagg.errors import MediaError
from aiodisagg.peer.turns import Turns, Workers
from aiodisagg.scheduler.shares import Tenant

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PER_REQUEST = 16
_INLINE_BYTES = 1 << 16  # decoded and hashed on the loop: below this a thread costs more than the work
_INLINE_TOTAL_BYTES = 1 << 18  # of one request, whose tasks do not suspend in between: 2-3 ms
_LONGEST_URL = 8192
_IS_URI = re.compile(r"(?:[\w.~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*", re.ASCII)
"""In RFC 3986's characters: fetched as it is written, of which it may bear a signature. What is none is quoted."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_OPAQUE_TYPES = frozenset({"", "application/octet-stream", "binary/octet-stream"})  # what object stores say


class MediaFetcher:
    """Loads media for requests; an async context manager. ``workers`` decode and hash what is large.

    ``cache`` gets all files that are loaded. ``resolver`` turns host names into addresses; None: the operating
    system's. Tenants take turns for connections, and may have all of them while no other waits.
    """

    def __init__(
        self, config: HttpConfig, workers: Workers, cache: MediaCache, resolver: AbstractResolver | None = None
    ) -> None:
        self._config, self._workers, self._cache, self._resolver = config, workers, cache, resolver
        self._guard = AddressGuard(config.allow_private_media_hosts)
        self._slots = Turns(config.media_connections)

    async def __aenter__(self) -> MediaFetcher:
        # The limit is _slots: a wait inside the connector would count against the timeout of the one who waits.
        own = None if self._resolver is not None else PoolResolver()
        self._own_resolver = own
        # With a cache, a lookup would outlive the request that it is for, however many wait before it.
        connector = aiohttp.TCPConnector(
            limit=0, use_dns_cache=False, resolver=self._resolver or own, socket_factory=self._guard.open_socket
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "aiodisagg"},
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        if self._own_resolver is not None:
            await self._own_resolver.close()

    async def load(self, urls: Sequence[MediaUrl], share: Share, tenant: Tenant) -> list[bytes]:
        """The files, in order, counted in ``share``. References mean files of ``tenant`` from earlier calls.

        Raises UnknownMedia or MediaError for the first that fails, or Overloaded, which stops the others.
        """
        load = _Load(self._config.max_media_total_bytes, share, tenant)
        # References first: loading may push out what they mean, and is in vain if one of them is unknown.
        known = [self._look_up(url, load) for url in urls]
        try:
            async with asyncio.TaskGroup() as group:
                loading = [
                    group.create_task(self._load_one(url, load))
                    for url, data in zip(urls, known, strict=True)
                    if data is None
                ]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        loaded = iter(loading)
        return [next(loaded).result() if data is None else data for data in known]

    def _look_up(self, url: MediaUrl, load: _Load) -> bytes | None:
        """The file that the URL refers to; None if it is no reference."""
        digest = referred(url.raw, url.param)
        if digest is None:
            return None
        data = self._cache.get(load.tenant, digest, url.param)
        load.take(len(data), url.param)
        return data

    async def _load_one(self, url: MediaUrl, load: _Load) -> bytes:
        async with load.slots:
            start = bytes(url.raw[:6]).lower()
            if not start.startswith(b'"'):
                raise MediaError(url.param, "must be a string")
            if start == b'"data:':
                data, digest = await self._compute(len(url.raw), load, partial(self._decode, url))
                load.take(len(data), url.param)
            else:
                if len(url.raw) > _LONGEST_URL:
                    raise MediaError(url.param, f"a URL of more than {_LONGEST_URL} characters")
                text = text_of(url.raw, url.param)
                async with self._slots.place(load.tenant.name):
                    data = await self._fetch(text, url.param, load)
                keeps = self._cache.fits(len(data))
                digest = await self._compute(len(data), load, partial(sha256_of, data)) if keeps else None
            if digest is not None:
                self._cache.put(load.tenant, digest, data)
            return data

    def _decode(self, url: MediaUrl) -> tuple[bytes, str | None]:
        """The file in a data URL, and its digest if it is to be kept. Blocks; safe on any thread."""
        data = decode_data_url(url.raw, self._config.max_media_bytes, url.param)
        return data, sha256_of(data) if self._cache.fits(len(data)) else None

    async def _compute(self, size_bytes: int, load: _Load, work: Callable[[], T]) -> T:
        """What ``work`` gives: here if ``size_bytes`` is little, else on a thread."""
        if load.may_be_inline(size_bytes):
            return work()
        return await self._workers.run(load.tenant.name, work)

    # -- http -----------------------------------------------------------------------------------------------------

    async def _fetch(self, text: str, param: str, load: _Load) -> bytes:
        timeout_s = self._config.media_timeout_s
        asking.set(load.tenant.name)  # this task fetches nothing else
        try:
            async with asyncio.timeout(timeout_s):
                return await self._follow(self._parse(text, param), param, load)
        except TimeoutError as error:
            raise MediaError(param, f"could not be fetched within {timeout_s:g} s") from error
        except aiohttp.ClientConnectorError as error:
            refused = isinstance(error.os_error, AddressRefused)
            raise MediaError(param, str(error.os_error) if refused else "its host cannot be reached") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: yarl and idna
            logger.info("fetching %s failed: %r", param, error)
            raise MediaError(param, f"could not be fetched: {type(error).__name__}") from error

    async def _follow(self, url: URL, param: str, load: _Load) -> bytes:
        for _ in range(self._config.max_media_redirects + 1):
            async with self._session.get(url, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    return await self._read(response, param, load)
                target = response.headers.get("Location", "")
            url = self._parse(target, param, base=url)
        raise MediaError(param, f"more than {self._config.max_media_redirects} redirects")

    def _parse(self, text: str, param: str, base: URL | None = None) -> URL:
        try:
            url = URL(text, encoded=_IS_URI.fullmatch(text) is not None)
            url = base.join(url) if base else url
        except ValueError as error:
            raise MediaError(param, "not a URL") from error
        if url.scheme not in ("http", "https"):
            raise MediaError(param, "must be a data:, http:, https: or sha256: URL")
        if not url.host:
            raise MediaError(param, "a URL without a host")
        if url.user is not None or url.password is not None:
            raise MediaError(param, "a URL must not carry credentials")
        domains = self._config.allowed_media_domains
        if domains is not None and not any(_is_within(url.host, domain) for domain in domains):
            raise MediaError(param, "its host is not one that media may come from")
        return url

    async def _read(self, response: aiohttp.ClientResponse, param: str, load: _Load) -> bytes:
        if response.status != 200:
            raise MediaError(param, f"its host answered {response.status}")
        mime = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
        if not mime.startswith("image/") and mime not in _OPAQUE_TYPES:
            raise MediaError(param, f"{mime[:64]} is not an image type")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise MediaError(param, "its host compressed it although asked not to")
        limit = self._config.max_media_bytes
        too_large = MediaError(param, f"more than {limit} bytes")
        if (response.content_length or 0) > limit:
            raise too_large
        data = bytearray()
        async for piece in response.content.iter_any():
            if len(data) + len(piece) > limit:
                raise too_large
            load.take(len(piece), param)
            data += piece
        if not data:
            raise MediaError(param, "its host answered with nothing")
        return bytes(data)


class _Load:
    """What one request may still load, and how much of it at once."""

    def __init__(self, max_bytes: int, share: Share, tenant: Tenant) -> None:
        self.tenant = tenant
        self._max_bytes = self._left = max_bytes
        self._share = share
        self._inline_left = _INLINE_TOTAL_BYTES
        self.slots = asyncio.Semaphore(_PER_REQUEST)

    def take(self, size_bytes: int, param: str) -> None:
        self._left -= size_bytes
        if self._left < 0:
            raise MediaError(param, f"the request's media have more than {self._max_bytes} bytes together")
        self._share.take(size_bytes)

    def may_be_inline(self, size_bytes: int) -> bool:
        """Whether so much may be decoded or hashed on the loop, which it then counts as."""
        if size_bytes > min(_INLINE_BYTES, self._inline_left):
            return False
        self._inline_left -= size_bytes
        return True


def _is_within(host: str, domain: str) -> bool:
    host, domain = host.lower().rstrip("."), domain.lower().strip(".")
    return host == domain or host.endswith("." + domain)
