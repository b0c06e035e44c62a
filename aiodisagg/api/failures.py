"""From errors to HTTP: status, headers and OpenAI's error body.

What a client did wrong is told in full. What went wrong inside is told by kind only; the log has the rest under the
request id.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import msgspec
from aiohttp import web

from aiodisagg.errors import (
    AiodisaggError,
    DeadlineExceeded,
    Draining,
    EncodeFailed,
    InvalidRequest,
    NoEncodePeer,
    Overloaded,
)

logger = logging.getLogger(__name__)

CLIENT, SERVER = "invalid_request_error", "server_error"
_NOT_AGAIN = {"X-Should-Retry": "false"}
"""OpenAI's packages heed it. By themselves they ask twice more after any status from 500 on, also where all the time
that the client had is over."""


class Refused(AiodisaggError):
    """The edge itself turns a request down: ``status`` with OpenAI's ``param`` and ``code``."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Failure:
    """What a client is told. ``as_json`` is OpenAI's error body."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> bytes:
        inner = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": inner})

    def as_response(self) -> web.Response:
        return web.Response(
            status=self.status, body=self.as_json(), content_type="application/json", headers=self.headers
        )


def failure_of(error: Exception, request_id: str) -> Failure:
    """The failure that ``error`` means for a client. Errors that are this side's fault are logged here.

    Its traceback is gone then. Errors of task groups are cycles, and the body of a refused request, which is held by
    the functions that they came through, would stay until a collection of garbage: megabytes that no budget counts.
    """
    failure = _failure_of(error, request_id)
    _let_go(error)
    return failure


def _let_go(error: BaseException | None) -> None:
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        if isinstance(error, BaseExceptionGroup):
            for one in error.exceptions:
                _let_go(one)
        error = error.__context__


def _failure_of(error: Exception, request_id: str) -> Failure:
    match error:
        case InvalidRequest():
            return Failure(400, str(error), CLIENT, error.param, error.code)
        case Refused():
            kind = CLIENT if error.status < 500 else SERVER
            return Failure(error.status, str(error), kind, error.param, error.code, _retry_after(error.retry_after_s))
        case Draining():
            return Failure(503, "the server is stopping", SERVER, None, "stopping", _retry_after(error.retry_after_s))
        case Overloaded():
            headers = _retry_after(error.retry_after_s)
            return Failure(429, str(error), "rate_limit_error", None, "overloaded", headers)
        case web.HTTPException():
            return _of_aiohttp(error)
        case NoEncodePeer():
            logger.warning("%s no encode peer: %s", request_id, error)
            reason = f": {error.reason}" if error.reason else ""
            message = f"no encode peer is available for images and videos{reason}"
            return Failure(503, message, SERVER, None, "no_encode_peer", _retry_after(1.0))
        case DeadlineExceeded():
            logger.warning("%s %s", request_id, error)
            message = f"not finished after {error.timeout_s:g} s"
            return Failure(504, message, SERVER, None, "deadline_exceeded", _NOT_AGAIN)
        case EncodeFailed():
            logger.warning("%s %s", request_id, error)
            message = f"an image or a video could not be encoded (request {request_id})"
            return Failure(500, message, SERVER, None, "encode_failed")
        case _:
            logger.error("%s failed", request_id, exc_info=error)
            return Failure(500, f"internal error (request {request_id})", SERVER, None, "internal_error")


def _of_aiohttp(error: web.HTTPException) -> Failure:
    match error.status:
        case 404:
            message = "no such URL; chats are POST /v1/chat/completions, and a client's base URL ends with /v1"
            return Failure(404, message, CLIENT, None, "unknown_url")
        case 405:
            headers = {"Allow": error.headers.get("Allow", "")}
            return Failure(405, "this URL does not answer that method", CLIENT, None, "method_not_allowed", headers)
        case _:
            return Failure(error.status, error.reason, CLIENT if error.status < 500 else SERVER)


def _retry_after(seconds: float | None) -> dict[str, str]:
    return {} if seconds is None else {"Retry-After": str(max(1, math.ceil(seconds)))}
