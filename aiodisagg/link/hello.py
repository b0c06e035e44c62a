"""Who is there, and is it one of us: the hellos of two peers and the handshake that proves them. No I/O.

    both sides       Greeting   magic, version, a fresh nonce of 32 bytes; its form never changes
    dialling side    Hello      + HMAC-SHA256(secret, "dialler"  | both greetings | this hello)
    listening side   Hello      + HMAC-SHA256(secret, "listener" | both greetings | both hellos)

What follows: nobody without the secret learns more of a listener than its version (a dialler shows its hello to
whoever listens at the address it was given); a hello cannot be altered, moved to another connection (the nonces are
in the MAC) or sent back to its author (the labels differ). Messages after the
handshake are not authenticated one by one: whoever can alter a TCP stream on the way needs TLS to be kept out.
Without a secret the MAC's key is empty and proves nothing, which is why that is allowed on this host only.
"""

from __future__ import annotations

import enum
import hmac
import os
from typing import Annotated, TypeVar

import msgspec

from aiodisagg.errors import AuthenticationFailed, ConfigError, RemoteProtocolError
from aiodisagg.link import framing
from aiodisagg.protocol.rows import ModelFingerprint
from aiodisagg.scheduler.cost import ServiceTimes

PROTOCOL_VERSION = 1
NONCE_BYTES = 32
MIN_SECRET_BYTES = 16
MAX_HANDSHAKE_FRAME_BYTES = 128 * 1024
LOCAL = frozenset({"memory", "ipc"})
"""Transports that do not leave a host."""
WRONG_SECRET = "the other side does not know our shared secret: --secret-file must have the same bytes on both sides"
_MAGIC = "aiodisagg"

T = TypeVar("T")

MOST_NAME = 256
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MOST_NAME)]


class PeerRole(enum.StrEnum):
    ENCODE = "encode"
    LANGUAGE = "language"
    BOTH = "both"

    @property
    def encodes(self) -> bool:
        return self is not PeerRole.LANGUAGE


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer says of itself when a link opens. Fields that a later version adds are ignored by this one."""

    name: Name
    """For people; need not be unique."""
    incarnation: Name
    """Random id of this life of the process."""
    role: PeerRole
    boot_id: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """Boot id of the kernel: equal on one host only. Empty if unknown."""
    net_ns: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """Network namespace: equal with equal ``boot_id`` means that abstract unix sockets reach. Empty if unknown."""
    model: ModelFingerprint | None = None
    transports: Annotated[dict[Name, Annotated[bytes, msgspec.Meta(max_length=4096)]], msgspec.Meta(max_length=16)] = (
        msgspec.field(default_factory=dict)
    )
    """Descriptions of the pools this peer receives into, by transport; untrusted until the transport checked them."""
    times: ServiceTimes | None = None
    """What its self-test measured, if it encodes."""
    max_frame_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Largest frame it accepts, as its link fills in. 0: not said."""
    checksum: bool | None = None
    """Whether it compares checksums of the rows that it receives. None: not said."""
    sends_by: Annotated[tuple[Name, ...], msgspec.Meta(max_length=16)] | None = None
    """Transports by which it may send rows, best first. None: not said."""

    @classmethod
    def here(
        cls,
        *,
        name: str,
        incarnation: str,
        role: PeerRole,
        model: ModelFingerprint | None = None,
        transports: dict[str, bytes] | None = None,
        times: ServiceTimes | None = None,
        checksum: bool | None = None,
        sends_by: tuple[str, ...] | None = None,
    ) -> Hello:
        """The hello of this process: boot id and namespace are read from the kernel (blocking, microseconds)."""
        boot_id, net_ns, _ = host_identity()
        return cls(
            name=name,
            incarnation=incarnation,
            role=role,
            boot_id=boot_id,
            net_ns=net_ns,
            model=model,
            transports=transports or {},
            times=times,
            checksum=checksum,
            sends_by=sends_by,
        )

    def accepting(self, max_frame_bytes: int) -> Hello:
        """The same, said through a link that accepts frames of this size."""
        return msgspec.structs.replace(self, max_frame_bytes=max_frame_bytes)

    def checks(self, otherwise: bool) -> bool:
        """Whether rows for it need checksums; ``otherwise``: if it did not say."""
        return otherwise if self.checksum is None else self.checksum

    def unfit_for(self, other: Hello, model: ModelFingerprint) -> str:
        """Why this peer cannot encode for ``other``, as far as they say; empty: it can. ``model``: whose rows."""
        who = f"{self.name} ({self.incarnation})"
        if self.model != model or not self.role.encodes:
            return f"{who} runs {self.model} as {self.role}, not {model}"
        if self.sends_by is None or not other.transports:  # one of them does not say
            return ""
        near = self.same_host(other)
        if any(name in other.transports and (near or name not in LOCAL) for name in self.sends_by):
            return ""
        theirs, ours = ", ".join(self.sends_by), ", ".join(other.transports)
        hint = "" if near else "; on two hosts memory and ipc do not count"
        return f"{who} sends by {theirs}, {other.name} receives by {ours}: none in common (--transports){hint}"

    def same_host(self, other: Hello) -> bool:
        """Whether both run on one kernel and in one network namespace."""
        return bool(self.boot_id) and (self.boot_id, self.net_ns) == (other.boot_id, other.net_ns)


def host_identity() -> tuple[str, str, str]:
    """(boot id, network namespace, mount namespace) of this process; empty strings where the kernel does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot_id = file.read().strip()
        return boot_id, os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/mnt")
    except OSError:
        return "", "", ""


class _Greeting(msgspec.Struct, frozen=True, array_like=True):
    magic: str
    version: int
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]


class _Signed(msgspec.Struct, frozen=True, array_like=True):
    hello: bytes
    mac: bytes


class Bye(msgspec.Struct, frozen=True, array_like=True):
    """The last frame of a side that closes on purpose."""

    code: Annotated[str, msgspec.Meta(max_length=32)]
    """``closed``, ``auth``, ``protocol`` or ``timeout``."""
    reason: Annotated[str, msgspec.Meta(max_length=512)]


_encode = msgspec.msgpack.Encoder().encode
_greetings: msgspec.msgpack.Decoder[_Greeting] = msgspec.msgpack.Decoder(_Greeting)
_signed: msgspec.msgpack.Decoder[_Signed] = msgspec.msgpack.Decoder(_Signed)
_hellos: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello)
_byes: msgspec.msgpack.Decoder[Bye] = msgspec.msgpack.Decoder(Bye)


def bye(code: str, reason: str) -> bytes:
    """A ``Bye`` frame."""
    return framing.frame(framing.BYE, _encode(Bye(code, reason[:512])))


def decode_bye(payload: bytes | bytearray, peer: str) -> Bye:
    return _decode(_byes, payload, peer, "a bye")


def check_secret(secret: bytes | None) -> None:
    """Raises ConfigError for a secret too short to be one."""
    if secret is not None and len(secret) < MIN_SECRET_BYTES:
        raise ConfigError("secret", f"must have at least {MIN_SECRET_BYTES} bytes, not {len(secret)} (--secret-file)")


class Handshake:
    """One side of a handshake. ``greeting`` is the frame to send first; ``receive`` takes the other side's frames."""

    def __init__(self, *, dialling: bool, hello: Hello, secret: bytes | None, nonce: bytes, peer: str) -> None:
        self.local = hello
        self.remote: Hello | None = None
        """Set when the handshake is done."""
        self._dialling, self._secret, self._peer = dialling, secret or b"", peer
        self._mine = _encode(_Greeting(_MAGIC, PROTOCOL_VERSION, nonce))
        self._theirs: bytes | None = None
        self._hello = _encode(hello)
        self.greeting = framing.frame(framing.GREETING, self._mine)

    @property
    def done(self) -> bool:
        return self.remote is not None

    def receive(self, kind: int, payload: bytes | bytearray) -> bytes | None:
        """Takes a frame; returns the frame to send now, if any.

        Raises:
            RemoteProtocolError: not a handshake, or another version.
            AuthenticationFailed: the other side's secret is not ours.
        """
        if self._theirs is None and kind == framing.GREETING:
            greeting = _decode(_greetings, payload, self._peer, "a greeting")
            if greeting.magic != _MAGIC:
                raise RemoteProtocolError(self._peer, "does not speak this protocol")
            if greeting.version != PROTOCOL_VERSION:
                raise RemoteProtocolError(
                    self._peer, f"speaks link version {greeting.version}, not {PROTOCOL_VERSION}; update the older side"
                )
            self._theirs = bytes(payload)
            return self._prove(self._hello) if self._dialling else None
        if self._theirs is not None and self.remote is None and kind == framing.HELLO:
            signed = _decode(_signed, payload, self._peer, "a hello")
            said = (self._hello, signed.hello) if self._dialling else (signed.hello,)
            if not hmac.compare_digest(signed.mac, self._mac(not self._dialling, *said)):
                raise AuthenticationFailed(self._peer, WRONG_SECRET)
            # Nothing of an unproved hello is looked at before this line.
            self.remote = _decode(_hellos, signed.hello, self._peer, "a hello")
            return None if self._dialling else self._prove(signed.hello, self._hello)
        raise RemoteProtocolError(self._peer, f"frame of kind {kind} does not belong here in a handshake")

    def _prove(self, *hellos: bytes) -> bytes:
        signed = _Signed(self._hello, self._mac(self._dialling, *hellos))
        return framing.frame(framing.HELLO, _encode(signed))

    def _mac(self, by_dialler: bool, *hellos: bytes) -> bytes:
        assert self._theirs is not None
        greetings = (self._mine, self._theirs) if self._dialling else (self._theirs, self._mine)
        mac = hmac.new(self._secret, b"dialler" if by_dialler else b"listener", "sha256")
        for part in (*greetings, *hellos):
            mac.update(len(part).to_bytes(8, "big") + part)
        return mac.digest()


def _decode(decoder: msgspec.msgpack.Decoder[T], payload: bytes | bytearray, peer: str, what: str) -> T:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(peer, f"not {what}: {error}") from error
