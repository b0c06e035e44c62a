"""Every error aiodisagg raises, in one tree: fields first, message second.

A user catches :class:`AiodisaggError`; the HTTP edge maps :class:`InvalidRequest` to a 4xx with OpenAI's error
body, :class:`Overloaded` to 429/503, the rest to 5xx. Errors of other libraries are translated where they occur
(``raise ... from``), so nothing above an edge has to know them.
"""

from __future__ import annotations


class AiodisaggError(Exception):
    """Base of all errors of this package."""


def own_error(group: ExceptionGroup[Exception]) -> Exception:
    """The first error of this package in a group of nothing else; else the group.

    For ``raise own_error(group) from None``: what is raised in ``except*`` is wrapped again by Python before 3.11.4.
    """
    mine, others = group.split(AiodisaggError)
    if mine is None or others is not None:
        return group
    first: Exception = mine
    while isinstance(first, ExceptionGroup):
        first = first.exceptions[0]
    return first


class ConfigError(AiodisaggError):
    """A setting is missing or out of range. ``key`` names it as the user wrote it."""

    def __init__(self, key: str, message: str) -> None:
        self.key, self.message = key, message
        super().__init__(f"{key}: {message}")

    def under(self, key: str) -> ConfigError:
        """The same mistake, in a setting that is called ``key`` where it was written."""
        return ConfigError(key, self.message)


class CheckpointError(AiodisaggError):
    """A model folder cannot be used: a file, a config key or a tensor (``name``) is missing, surplus or misshapen."""

    def __init__(self, folder: str, name: str, message: str) -> None:
        self.folder, self.name = folder, name
        super().__init__(f"{folder}: {name}: {message}")


# -- requests ---------------------------------------------------------------------------------------------------


class InvalidRequest(AiodisaggError):
    """The client's request cannot be served as written. ``param`` names the field, ``code`` is stable."""

    def __init__(self, param: str, message: str, *, code: str = "invalid_value") -> None:
        self.param, self.code = param, code
        super().__init__(f"{param}: {message}")


class MediaError(InvalidRequest):
    """An image or a video of the request is not one, is truncated, or is larger than allowed."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(param, message, code="invalid_media")


class PoisonItem(InvalidRequest):
    """An image or a video of the request was in the tower when one encoder after another died: nobody is asked for it
    any more, for a while."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(param, message, code="poison_media")


class PromptTooLong(InvalidRequest):
    """Prompt plus ``max_tokens`` do not fit the model's context or the KV pool."""

    def __init__(self, tokens: int, limit: int) -> None:
        self.tokens, self.limit = tokens, limit
        super().__init__("messages", f"{tokens} tokens do not fit the limit of {limit}", code="context_length_exceeded")


class Overloaded(AiodisaggError):
    """The service sheds this request; trying again after ``retry_after_s`` seconds is sensible."""

    def __init__(self, retry_after_s: float, message: str) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class Draining(Overloaded):
    """This peer is about to end and takes nothing new; another one will."""

    def __init__(self) -> None:
        super().__init__(1.0, "this peer is about to end")


class DeadlineExceeded(AiodisaggError):
    """A request or an item ran out of time. ``story`` is its short history, oldest first."""

    def __init__(self, what: str, timeout_s: float, story: tuple[str, ...] = ()) -> None:
        self.what, self.timeout_s, self.story = what, timeout_s, story
        tail = f"; what happened: {' > '.join(story)}" if story else ""
        super().__init__(f"{what}: not finished after {timeout_s:g} s{tail}")


class EncodeFailed(AiodisaggError):
    """An item could not be encoded by any peer that tried."""

    def __init__(self, item: str, message: str, story: tuple[str, ...] = ()) -> None:
        self.item, self.story = item, story
        tail = f"; what happened: {' > '.join(story)}" if story else ""
        super().__init__(f"item {item}: {message}{tail}")


class NoEncodePeer(AiodisaggError):
    """No compatible encode peer is known, or none can bring rows here, and the language peer has no own tower.

    ``reason``: what is wrong with those that there are, for whoever asked, without addresses; or nothing.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        self.reason = reason
        super().__init__(message)


class EngineError(AiodisaggError):
    """The engine failed one request; others go on."""

    def __init__(self, request_id: str, message: str) -> None:
        self.request_id = request_id
        super().__init__(f"request {request_id}: {message}")


class PeerBroken(AiodisaggError):
    """A peer's ``part``, its engine or its tower, will compute nothing any more: its process has to be started anew."""

    def __init__(self, part: str, why: str) -> None:
        self.part = part
        super().__init__(f"the {part} is broken: {why}")


class DeviceError(AiodisaggError):
    """An accelerator is missing, or it, its driver or its memory refused what was asked."""


# -- protocol and peers -----------------------------------------------------------------------------------------


class ProtocolError(AiodisaggError):
    """Base of what can go wrong between two peers."""


class InvalidTransition(ProtocolError):
    """The event is not legal in this state. The machine is unchanged."""

    def __init__(self, state: str, event: str) -> None:
        self.state, self.event = state, event
        super().__init__(f"event {event} is not legal in state {state}")


class RemoteProtocolError(ProtocolError):
    """A peer sent something that the protocol does not allow. The only error a bad peer can cause."""

    def __init__(self, peer: str, message: str) -> None:
        self.peer, self.message = peer, message
        super().__init__(f"peer {peer}: {message}")


class LinkError(AiodisaggError):
    """A control link cannot be opened or was lost. ``peer`` is an address before the handshake, a name after."""

    def __init__(self, peer: str, message: str) -> None:
        self.peer, self.message = peer, message
        super().__init__(f"link to {peer}: {message}")


class LinkClosed(LinkError):
    """The link is gone: closed by either side, cut, or silent for longer than its timeout."""


class MessageTooLarge(LinkError):
    """No frame that both sides of the link allow can hold the message. The link is as good as before."""

    def __init__(self, peer: str, size_bytes: int, limit_bytes: int) -> None:
        self.size_bytes, self.limit_bytes = size_bytes, limit_bytes
        super().__init__(peer, f"a message of {size_bytes} bytes does not fit a frame of {limit_bytes}")


class AuthenticationFailed(LinkError):
    """The other side does not know the shared secret."""


class BootstrapError(AiodisaggError):
    """The bootstrap server cannot be reached or refused what was asked. ``lasting``: only a person can change that."""

    def __init__(self, url: str, message: str, *, lasting: bool = False) -> None:
        self.url, self.message, self.lasting = url, message, lasting
        super().__init__(f"bootstrap {url}: {message}")


# -- transports -------------------------------------------------------------------------------------------------


class TransportError(AiodisaggError):
    """Base of data-plane errors. After one, the memory involved is free only when ``fence``/``revoke`` says so."""

    def __init__(self, transport: str, message: str, *, peer: str | None = None) -> None:
        self.transport, self.peer = transport, peer
        super().__init__(f"{transport}: " + (f"peer {peer}: {message}" if peer else message))


class TransportUnavailable(TransportError):
    """This machine cannot run the transport (library, device, permission); the message says what is missing."""


class TransportClosed(TransportError):
    """Used after ``aclose``, or closed while the operation was under way."""


class PeerGone(TransportError):
    """The other process is gone, or another incarnation answers at its address."""


class WriteRefused(TransportError):
    """The destination is outside the peer's pool, or its lease is not (or no longer) valid."""


class WriteFailed(TransportError):
    """The bytes may or may not have arrived; treat both ends as in use until fenced."""
