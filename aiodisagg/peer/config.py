"""Settings of peers: frozen, checked once where they enter. Errors name the field; ``kv_bytes`` is ``--kv-mib``."""

from __future__ import annotations

import ipaddress
import math
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from aiodisagg.bootstrap.wire import check_token, check_url
from aiodisagg.errors import ConfigError
from aiodisagg.link import address
from aiodisagg.link.config import LinkConfig
from aiodisagg.link.hello import check_secret
from aiodisagg.peer.tls import Tls
from aiodisagg.protocol.messages import MOST_LENDS
from aiodisagg.protocol.rows import DTYPE_BYTES
from aiodisagg.scheduler.admission import AdmissionConfig

MiB = 1 << 20
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

TRANSPORTS = ("memory", "ipc", "mooncake", "stream")
"""Names of the transports that are used unless told otherwise, best first. ``mooncake`` is RDMA: it opens only where
an RDMA device is found, so that two peers use it only if both have one."""
ON_REQUEST = ("zmq", "mooncake-tcp")
"""Transports that are used only where they are named. ``zmq`` cannot send strangers away."""


def check(key: str, value: float, *, high: float = math.inf, exclusive: bool = True) -> None:
    """Raises ConfigError unless ``0 < value <= high`` (``0 <= value`` if not exclusive)."""
    if not (value > 0 if exclusive else value >= 0):
        raise ConfigError(key, f"must be {'above' if exclusive else 'at least'} 0, not {value}")
    if value > high:
        raise ConfigError(key, f"must be at most {high:g}, not {value}")


def no_folder(model: Path) -> ConfigError:
    """What to say of a ``model`` that is none."""
    hint = ""
    if _HUB_NAME.fullmatch(str(model)):
        hint = f"; names on the hub are not fetched, `hf download {model} --local-dir FOLDER` does that"
    return ConfigError("model", f"no such folder: {model}{hint}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """What every peer needs to know."""

    model: Path
    """Folder of a Qwen3-VL(-MoE) checkpoint; a string becomes a path."""
    bootstrap: tuple[str, ...] = ()
    """URLs of bootstrap servers; none: peers are joined by hand (``LanguageService.add_peer``)."""
    name: str = ""
    """For people; empty: made from the role and the incarnation."""
    listen: str = "unix:"
    """Where links are accepted: ``unix:`` (a fresh name), ``unix:/path`` or ``tcp:host:port``."""
    secret: bytes | None = field(default=None, repr=False)
    """Shared by all peers, at least 16 bytes; needed as soon as a link leaves the host."""
    bootstrap_token: str | None = field(default=None, repr=False)
    tls: Tls | None = None
    """Encrypts links over TCP and ``stream``, and switches on ``zmq``'s own encryption. ``mooncake`` has none: leave it
    out of ``transports``, or keep its network to yourselves."""
    transports: tuple[str, ...] = TRANSPORTS
    """Data planes that may be used, best first."""
    data_host: str = ""
    """Address of this host on which mooncake, zmq and stream receive. Empty: loopback, and every interface where links
    may leave the host (with a ``secret``); peers of other hosts then use the address that their link comes from.
    mooncake and IPv6 between hosts need an address."""
    device: str = "cpu"
    row_dtype: str = "bfloat16"
    """Element type of rows on the wire, and of the vision tower."""
    checksum: bool = True
    """xxh3-64 of every chunk, checked before it counts. Who receives rows decides: an encode peer's own setting is for
    language peers that do not say whether they check."""
    link: LinkConfig = field(default_factory=LinkConfig)
    incarnation: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        known = TRANSPORTS + ON_REQUEST
        if unknown := [name for name in self.transports if name not in known]:
            raise ConfigError("transports", f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        if not self.transports:
            raise ConfigError("transports", "at least one is needed")
        object.__setattr__(self, "model", Path(self.model))
        if not self.model.is_dir():
            raise no_folder(self.model)
        if self.row_dtype not in DTYPE_BYTES:
            raise ConfigError("row_dtype", f"must be one of {', '.join(DTYPE_BYTES)}, not {self.row_dtype}")
        for url in self.bootstrap:
            check_url("bootstrap", url)
        if self.tls is not None:
            self.tls.contexts()
        check_secret(self.secret)
        check_token("bootstrap_token", self.bootstrap_token)
        try:
            address.parse(self.listen)
        except ConfigError as error:
            raise error.under("listen") from None
        if not self.data_host:
            object.__setattr__(self, "data_host", "127.0.0.1" if self.secret is None else "0.0.0.0")
        try:
            ipaddress.ip_address(self.data_host)
        except ValueError:
            text = f"{self.data_host!r} is not an address; it is one of this host, such as 127.0.0.1"
            raise ConfigError("data_host", text) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeConfig(PeerConfig):
    """Settings of an encode peer."""

    source_bytes: int = 1024 * MiB
    """Memory for encoded items: those in transfer and, as far as it goes, a cache of earlier ones. Up to 256 MiB of
    files come on top, of items that are not encoded yet, and ``link.max_frame_bytes`` of those that are on their way;
    the files of more wait where they come from. An item that needs more is refused (``too_large``). Linked language
    peers share it: none gets what the others would need."""
    batch_patches: int | None = None
    """Patches of one tower batch; an image with more goes alone. None: as the device gains from batching, few on a CPU.
    Rows leave batch by batch."""
    prepare_threads: int = 2
    self_test_s: float = 1.0
    """How long the tower may be measured at the start; 0: not at all."""
    retain_s: float = 30.0
    """How long rows are kept for a receiver whose link is lost. One that is linked and takes none of the rows that
    exist for so long yields its room to others that need it, as one without a link does at once."""

    def __post_init__(self) -> None:
        PeerConfig.__post_init__(self)
        check("source_bytes", self.source_bytes)
        if self.batch_patches is not None:
            check("batch_patches", self.batch_patches)
        check("self_test_s", self.self_test_s, exclusive=False)
        check("prepare_threads", self.prepare_threads)
        check("retain_s", self.retain_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig(PeerConfig):
    """Settings of a language peer."""

    served_names: tuple[str, ...] = ()
    """What clients may call the model; answers have the first. Empty: the last part of ``model``, as it is written."""
    dtype: str | None = None
    """Of the language half's weights; None: float32 on a CPU, bfloat16 elsewhere."""
    pool_bytes: int | None = None
    """Memory that encode peers write into; None: 64 MiB, or 1 GiB for a GPU, pinned."""
    block_rows: int | None = None
    """Rows of a block; a chunk is at most one block. None: 256, or 1024 for a GPU, whose copies want to be large."""
    window_blocks: int = 4
    """Blocks lent to one item at a time."""
    kv_bytes: int | None = None
    """Memory of the paged KV pool; None: what a GPU has left of 0.9 of its memory, 256 MiB on a CPU."""
    token_budget: int | None = None
    """Tokens of one engine step; a prompt that is over it by an eighth at most is computed to its end. None: 8192, and
    2048 on a CPU."""
    max_running: int = 64
    """Requests that hold KV pages at once; the items of others are not asked for yet."""
    itl_budget_ms: float | None = None
    """What prefill, and a tower on the same accelerator, may make a running answer wait between two of its tokens, or
    one and a half times what its step takes before any prompt token if that is more. 0: as long as ``token_budget``
    tokens take. None: 50, and 100 on a CPU, whose decodes alone take as long."""
    overlap: bool = True
    """Prefill what has arrived of a prompt; off, to measure what that is worth: wait for all of its items first."""
    prefix_cache: bool = True
    """Reuse KV pages of earlier prompts and answers; an item that is all in such pages is not encoded."""
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    """Who of those that wait goes next, and who is sent away."""
    max_pixels: int | None = None
    """Pixels of an image after resizing; None or 0: what the checkpoint says."""
    request_timeout_s: float = 300.0
    """Deadline of a request's items, at most 1e9."""
    peer_wait_s: float = 10.0
    """For how long there may be no encode peer before requests that need one fail with NoEncodePeer, those that wait
    for one and those whose items are under way."""
    failover_s: float = 1.0
    stall_s: float = 5.0
    cache_bytes: int = 256 * MiB
    """Memory for rows of earlier items, so that a repeated image is neither encoded nor sent, and as much again for
    those on their way, which requests share that want the same image at once. 0: neither."""
    hedge_s: float = 2.0
    """An item this far behind its predicted finish is asked of a second peer as well; 0: never."""

    def __post_init__(self) -> None:
        PeerConfig.__post_init__(self)
        names = self.served_names
        if not all(map(str.strip, names)) or len(set(names)) < len(names):
            raise ConfigError("served_names", f"one is empty or there twice: {', '.join(map(repr, names))}")
        if self.dtype is not None and self.dtype not in DTYPE_BYTES:
            raise ConfigError("dtype", f"must be one of {', '.join(DTYPE_BYTES)}, not {self.dtype}")
        for key in ("pool_bytes", "block_rows", "kv_bytes", "token_budget"):
            if (value := getattr(self, key)) is not None:
                check(key, value)
        check("max_pixels", self.max_pixels or 0, exclusive=False)
        for key in ("stall_s", "max_running"):
            check(key, getattr(self, key))
        check("window_blocks", self.window_blocks, high=MOST_LENDS)
        check("request_timeout_s", self.request_timeout_s, high=1e9)
        check("peer_wait_s", self.peer_wait_s, exclusive=False)
        for key in ("failover_s", "cache_bytes", "hedge_s"):
            check(key, getattr(self, key), exclusive=False)
        check("itl_budget_ms", self.pace_ms, exclusive=False)

    @property
    def model_names(self) -> tuple[str, ...]:
        """``served_names``, or what stands for them: not what a link points to, which in a cache is a commit's hash."""
        return self.served_names or (os.path.basename(os.path.abspath(self.model)),)

    @property
    def step_tokens(self) -> int:
        """``token_budget``, or what stands for it on this device."""
        if self.token_budget is not None:
            return self.token_budget
        return 2048 if self.device == "cpu" else 8192

    @property
    def pace_ms(self) -> float:
        """``itl_budget_ms``, or what stands for it on this device."""
        if self.itl_budget_ms is not None:
            return self.itl_budget_ms
        return 100.0 if self.device == "cpu" else 50.0
