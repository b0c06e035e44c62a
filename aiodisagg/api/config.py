"""The settings of the HTTP edge, checked where they enter."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, field, fields

import msgspec

from aiodisagg.api.budget import most_alone
from aiodisagg.errors import ConfigError
from aiodisagg.scheduler.shares import Tenant

MiB = 1 << 20
TENANT_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
NAME_RULE = "1 to 64 letters, digits, dots, dashes and underscores"
PRIVATE_NETWORKS = ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7")
"""This host and intranets. Not link-local addresses: a cloud's metadata service, and with it credentials, is there."""
_KEY = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key and whose it is. Raises ConfigError."""

    key: str = field(repr=False)
    tenant: Tenant

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key):
            raise ConfigError("http.api_keys", f"a key of {self.tenant.name} is empty, or has spaces or is not ASCII")
        if not TENANT_NAME.fullmatch(self.tenant.name):
            raise ConfigError("http.api_keys", f"{self.tenant.name!r} is not a name: {NAME_RULE}")


def read_keys(data: bytes, file: str = "the file") -> tuple[ApiKey, ...]:
    """Keys from a JSON file: ``[{"key": "...", "tenant": "...", "weight": 1.0}, ...]``. Raises ConfigError, which
    names ``file``."""
    try:
        lines = msgspec.json.decode(data, type=list[_KeyLine])
    except (ValueError, RecursionError) as error:
        wanted = '[{"key": "...", "tenant": "..."}]'
        raise ConfigError("keys_file", f"{file}: is not a list like {wanted}: {error}") from error
    return tuple(ApiKey(line.key, Tenant(line.tenant, line.weight)) for line in lines)


class _KeyLine(msgspec.Struct, forbid_unknown_fields=True):
    key: str
    tenant: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """Settings of :class:`~aiodisagg.api.server.HttpServer`. Raises ConfigError, which names the key."""

    api_key: str | None = field(default=None, repr=False)
    """The operator's key. If it or ``api_keys`` are set, ``/v1/*`` wants ``Authorization: Bearer <key>``, and
    ``/debug/*`` this key. ``/live``, ``/health`` and ``/metrics`` stay open."""
    api_keys: tuple[ApiKey, ...] = field(default=(), repr=False)
    """Keys of tenants. A tenant may have several."""
    max_requests: int = 2048
    """Chat requests at once, reading the body included; one more gets a 429, unless its tenant has less than an equal
    share of this among the tenants that have any (so n of them may have up to 1 + 1/2 + ... + 1/n times as many). More
    than what the engine runs and ``max_queue``: a line that never fills asks nobody to make room."""
    max_body_bytes: int = 64 * MiB
    """Largest request body; more is a 413."""
    max_held_bytes: int = 4096 * MiB
    """Bodies and media of all requests together, until they are answered; a request beyond that is a 429, and so is one
    of a tenant that would then hold more than fifteen times what is left. A body of ``max_body_bytes`` must find room
    while there is no other."""
    max_text_chars: int = 2 * MiB
    """Text of a request. More takes seconds to tokenize, and fits no model."""
    max_parts: int = 8192
    """Messages and parts of a request; empty ones are work too."""
    body_timeout_s: float = 60.0
    """A body that has not arrived after this long is a 408."""
    write_timeout_s: float = 60.0
    """A client that does not take an answer, or the next piece of its stream, within this time counts as gone."""
    stream_keepalive_s: float = 15.0
    """A stream on which nothing was sent for this long is sent a comment, which clients skip. The first one begins it,
    with a status of 200: what fails later is an event in it."""
    request_timeout_s: float = 600.0
    """From the parsed request to the last token, fetching media included; more is a 504."""
    default_max_tokens: int = 4096
    """For requests without ``max_completion_tokens`` and ``max_tokens``, or what the context leaves if that is less.
    KV pages are taken as an answer grows, so this bounds only answers that do not end by themselves: at 100 ms a token
    they end as ``length``, and not as a 504 of ``request_timeout_s``."""
    grace_s: float = 10.0
    """How long a stopping server lets running requests finish before it cuts them; may be 0."""

    max_media_bytes: int = 32 * MiB
    """Largest image or frame, encoded."""
    max_media_total_bytes: int = 256 * MiB
    """All images and frames of a request together."""
    max_media_files: int = 1024
    """Images and frames of a request."""
    media_cache_bytes: int = 256 * MiB
    """Images and frames of earlier requests, kept for later ones that refer to them by digest; may be 0: none."""
    media_timeout_s: float = 10.0
    """For fetching one URL, redirects included."""
    max_media_redirects: int = 3
    """May be 0."""
    media_connections: int = 128
    """Fetches at once, of all requests; further ones wait. One request has at most 16 of them."""
    allowed_media_domains: tuple[str, ...] | None = None
    """If set, only these hosts and their subdomains are fetched from. None: any."""
    allow_private_media_hosts: tuple[str, ...] = ()
    """Addresses and networks ("10.1.0.0/16") that may be fetched from although they are not public."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, int | float):
                continue
            lowest_is_legal = item.name in ("grace_s", "max_media_redirects", "media_cache_bytes")
            if not math.isfinite(value) or value < 0 or (value == 0 and not lowest_is_legal):
                raise ConfigError(f"http.{item.name}", f"must be a positive number, not {value}")
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise ConfigError("http.api_key", "must be ASCII without spaces and not empty")
        self._check_keys()
        if self.max_body_bytes > most_alone(self.max_held_bytes):
            why = f"a body of max_body_bytes, {self.max_body_bytes}, would never find room in {self.max_held_bytes}"
            raise ConfigError("http.max_held_bytes", f"{why}, of which one tenant gets 15/16 at most")
        for domain in self.allowed_media_domains or ():
            if not domain.strip(".") or "/" in domain:
                raise ConfigError("http.allowed_media_domains", f"{domain!r} is not a host name")
        for network in self.allow_private_media_hosts:
            try:
                ipaddress.ip_network(network, strict=False)
            except ValueError as error:
                raise ConfigError("http.allow_private_media_hosts", str(error)) from error

    @property
    def tenant_names(self) -> frozenset[str]:
        """Those that are configured, and the one of who says no name; none if no tenants are."""
        return frozenset({own.tenant.name for own in self.api_keys} | {Tenant().name}) if self.api_keys else frozenset()

    def _check_keys(self) -> None:
        keys = [own.key for own in self.api_keys] + ([] if self.api_key is None else [self.api_key])
        if len(set(keys)) < len(keys):
            raise ConfigError("http.api_keys", "the same key is there twice")
        tenants = {own.tenant for own in self.api_keys}
        names = [tenant.name for tenant in tenants]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError("http.api_keys", f"{', '.join(sorted(twice))}: more than one weight")
