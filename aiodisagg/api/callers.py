"""Who asks: keys, tenants, and how much of the server one of them may take."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from aiodisagg.api.config import NAME_RULE, TENANT_NAME, HttpConfig
from aiodisagg.api.failures import Refused
from aiodisagg.errors import InvalidRequest, Overloaded
from aiodisagg.scheduler.shares import Tenant


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose key a request has."""

    tenant: Tenant
    is_operator: bool
    """The operator may look into the server and ask in the name of a tenant; so may anybody if there are no keys."""
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    """The configured ones, in whose name it may ask; others have a weight of 1."""


class Callers:
    """Recognizes callers and counts their chats."""

    def __init__(self, config: HttpConfig) -> None:
        # By a keyed hash: how long a look-up takes says nothing about a key.
        self._salt = secrets.token_bytes(16)
        self._by_key = {self._hash(own.key.encode()): Caller(own.tenant, False) for own in config.api_keys}
        tenants = {own.tenant.name: own.tenant for own in config.api_keys}
        default = Tenant()
        self._operator = Caller(tenants.get(default.name, default), True, tenants)
        if config.api_key is not None:
            self._by_key[self._hash(config.api_key.encode())] = self._operator
        self._configured = tenants.keys() | {default.name}
        self._most = config.max_requests
        self._chats: Counter[str] = Counter()
        """By tenant; of those only that have some."""

    @property
    def anybody(self) -> bool:
        """Whether no key is needed."""
        return not self._by_key

    def _hash(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._salt).digest()

    def recognize(self, request: web.Request) -> Caller:
        """Raises Refused (401)."""
        if self.anybody:
            return self._operator
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        caller = self._by_key.get(self._hash(given.strip().encode(errors="surrogateescape")))
        if scheme.lower() != "bearer" or caller is None:
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")
        return caller

    @contextmanager
    def chat(self, tenant: Tenant) -> Iterator[None]:
        """Around one chat. Raises Overloaded where there are ``max_requests``, unless the tenant has less than its
        share of them: then another one has more, and is refused until it has not."""
        name, chats = tenant.name, self._chats
        if chats.total() >= self._most and chats[name] >= self._share(name):
            raise Overloaded(1.0, f"{chats.total()} requests are being answered already, {chats[name]} of this tenant")
        chats[name] += 1
        try:
            yield
        finally:
            chats[name] -= 1
            if not chats[name]:
                del chats[name]

    def _share(self, name: str) -> int:
        """An equal one among those that have chats, and at least one chat. Names that ``X-Tenant`` makes up cost
        nothing: all of them have one share together, and are promised none of it."""
        asking = self._chats.keys() | {name}
        configured = len(asking & self._configured)
        made_up = len(asking) - configured
        share = self._most // (configured + bool(made_up))
        return max(1, share) if name in self._configured else share // made_up


def tenant_of(request: web.Request, caller: Caller) -> Tenant:
    """The caller's own tenant, or the one in ``X-Tenant`` if it may ask for others. Raises InvalidRequest."""
    name = request.headers.get("X-Tenant")
    if name is None or not caller.is_operator:
        return caller.tenant
    if not TENANT_NAME.fullmatch(name):
        raise InvalidRequest("X-Tenant", f"must be {NAME_RULE}")
    return caller.tenants.get(name) or Tenant(name)


def timeout_of(request: web.Request, most_s: float) -> float:
    """Seconds in ``X-Request-Timeout``, at most ``most_s``, which is also the default. Raises InvalidRequest."""
    text = request.headers.get("X-Request-Timeout")
    if text is None:
        return most_s
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise InvalidRequest("X-Request-Timeout", "must be a positive number of seconds")
    return min(seconds, most_s)
