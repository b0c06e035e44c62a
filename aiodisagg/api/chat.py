"""``POST /v1/chat/completions``: body in, answer out, streamed or whole.

A client that goes away cancels the handler's task (the server runs with ``handler_cancellation``), wherever it is:
reading, fetching, generating, writing. Closing the backend's generator on the way out is what stops the work everywhere
else. The status line waits for the first delta, so whatever fails before it is an HTTP error also for a stream; but not
for longer than ``stream_keepalive_s``, since proxies cut connections on which nothing moves: from then on there are
comments, which clients skip, and failures are an event in the stream, which then ends without ``[DONE]``.
"""

from __future__ import annotations

import asyncio
import codecs
import itertools
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import msgspec
from aiohttp import HttpVersion11, web

from aiodisagg.api.backend import ChatBackend
from aiodisagg.api.budget import Budget, Share
from aiodisagg.api.callers import timeout_of
from aiodisagg.api.config import HttpConfig
from aiodisagg.api.failures import Refused, failure_of
from aiodisagg.api.fetch import MediaFetcher
from aiodisagg.api.parse import chat_messages, check_parts, check_text, media_urls, parse_request, sampling_of
from aiodisagg.api.schema import (
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChunkChoice,
    DeltaBody,
    UsageBody,
)
from aiodisagg.bootstrap.sending import taken, wait_for_all
from aiodisagg.engine.types import Delta, FinishReason, SamplingParams, Usage
from aiodisagg.errors import DeadlineExceeded, EngineError
from aiodisagg.models.base import ChatMessage
from aiodisagg.peer.turns import Workers
from aiodisagg.scheduler.shares import Tenant

logger = logging.getLogger(__name__)

_INLINE_BYTES = 1 << 16
_SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold tokens back
}
_COMMENT = b": nothing yet\n\n"
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class _Limits:
    """What a request may expect: in whose name it asks, and until when."""

    tenant: Tenant
    priority: int
    timeout_s: float
    deadline: float
    """``timeout_s`` after the body was read, on the loop's clock."""


class ChatHandler:
    """Answers chat requests from ``backend``. Raises AiodisaggError before a response has begun, never after."""

    def __init__(self, backend: ChatBackend, config: HttpConfig, fetcher: MediaFetcher, workers: Workers) -> None:
        self._backend, self._config, self._fetcher, self._workers = backend, config, fetcher, workers
        self._in_use: set[str] = set()
        self._budget = Budget(config.max_held_bytes, config.tenant_names)

    async def __call__(self, request: web.Request, request_id: str, tenant: Tenant) -> web.StreamResponse:
        """The backend gets ``request_id`` too, so that its traces have the client's name for the request; while
        another request of that name is being answered, a number is appended."""
        own_id = next(name for name in self._names(request_id) if name not in self._in_use)
        self._in_use.add(own_id)
        try:
            with self._budget.share(tenant.name) as share:
                return await self._answer(request, request_id, own_id, tenant, share)
        finally:
            self._in_use.remove(own_id)

    @staticmethod
    def _names(request_id: str) -> Iterator[str]:
        yield request_id
        yield from (f"{request_id}-{n}" for n in itertools.count(2))

    async def _answer(
        self, request: web.Request, request_id: str, own_id: str, tenant: Tenant, share: Share
    ) -> web.StreamResponse:
        timeout_s = timeout_of(request, self._config.request_timeout_s)
        chat = await self._parse(await self._read_body(request, share), tenant)
        completion_id = f"chatcmpl-{uuid.uuid4().hex}"
        logger.info("%s is %s: %d messages", own_id, completion_id, len(chat.messages))
        if chat.model not in self._backend.model_names:
            raise model_not_found(chat.model, self._backend.model_names)
        sampling = sampling_of(chat, self._config.default_max_tokens)
        limits = _Limits(tenant, chat.priority or 0, timeout_s, asyncio.get_running_loop().time() + timeout_s)
        stream, with_usage = bool(chat.stream), bool(chat.stream_options and chat.stream_options.include_usage)
        answer = self._generate(chat, share, sampling, own_id, limits)
        del chat
        async with aclosing(answer) as deltas:
            if stream:
                writer = _Stream(request, completion_id, self._backend.model_names[0], with_usage, self._config)
                return await writer.run(deltas, request_id)
            return await self._whole(deltas, completion_id)

    # -- in -------------------------------------------------------------------------------------------------------

    async def _read_body(self, request: web.Request, share: Share) -> bytearray:
        limit, timeout_s = self._config.max_body_bytes, self._config.body_timeout_s
        if request.content_type != "application/json":
            raise Refused(415, "the content type must be application/json", code="unsupported_media_type")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Refused(415, "the body must not be compressed", code="unsupported_media_type")
        too_large = Refused(413, f"the body has more than {limit} bytes", code="request_too_large")
        if (request.content_length or 0) > limit:
            raise too_large
        body = bytearray()  # not request.read(), which copies the whole once more
        try:
            async with asyncio.timeout(timeout_s):
                async for piece in request.content.iter_any():
                    share.take(len(piece))
                    body += piece
                    if len(body) > limit:
                        raise too_large
        except TimeoutError as error:
            raise Refused(408, f"the body did not arrive within {timeout_s:g} s", code="request_timeout") from error
        except web.RequestPayloadError as error:
            raise Refused(400, "the body is broken off or badly framed", code="invalid_body") from error
        if body.startswith(codecs.BOM_UTF8):  # of PowerShell; JSON's readers may skip it (RFC 8259, 8.1)
            body[: len(codecs.BOM_UTF8)] = b" " * len(codecs.BOM_UTF8)
        return body

    async def _parse(self, body: bytearray, tenant: Tenant) -> ChatRequest:
        if len(body) <= _INLINE_BYTES:
            return parse_request(body)
        return await self._workers.run(tenant.name, partial(parse_request, body))

    async def _messages(self, chat: ChatRequest, limits: _Limits, share: Share) -> list[ChatMessage]:
        check_parts(chat, self._config.max_parts)
        check_text(chat, self._config.max_text_chars)
        urls = media_urls(chat, self._config.max_media_files)
        try:
            async with asyncio.timeout_at(limits.deadline):
                return chat_messages(chat, await self._fetcher.load(urls, share, limits.tenant))
        except TimeoutError as error:
            raise DeadlineExceeded("loading media", limits.timeout_s) from error

    # -- out ------------------------------------------------------------------------------------------------------

    async def _generate(
        self, chat: ChatRequest, share: Share, sampling: SamplingParams, own_id: str, limits: _Limits
    ) -> AsyncGenerator[Delta, None]:
        """The backend's deltas up to the one that ends the answer, of which there is exactly one."""
        loop = asyncio.get_running_loop()
        body_bytes = share.held
        messages = await self._messages(chat, limits, share)
        # The body may be tens of megabytes, and the messages hold what is needed of it.
        del chat
        share.give_back(body_bytes)
        answer = self._backend.generate(
            messages,
            sampling,
            request_id=own_id,
            timeout_s=max(0.0, limits.deadline - loop.time()),
            tenant=limits.tenant,
            priority=limits.priority,
        )
        del messages
        async with aclosing(answer) as deltas:
            while True:
                try:
                    async with asyncio.timeout_at(
                        limits.deadline
                    ) as limit:  # never around a yield: it would cancel a reader
                        delta = await anext(deltas)
                except StopAsyncIteration as error:
                    raise EngineError(own_id, "the answer ended without a finish reason") from error
                except TimeoutError as error:
                    if limit.expired():
                        raise DeadlineExceeded(own_id, limits.timeout_s) from error
                    raise
                if delta.finish_reason is FinishReason.CANCELLED:
                    raise Refused(503, "the server cancelled the request", code="cancelled", retry_after_s=1.0)
                yield delta
                if delta.finish_reason is not None:
                    return

    async def _whole(self, deltas: AsyncGenerator[Delta, None], completion_id: str) -> web.Response:
        text, last = [], None
        async for delta in deltas:
            text.append(delta.text)
            last = delta
        if last is None or last.finish_reason is None or last.usage is None:
            raise EngineError(completion_id, "the answer ended without usage")
        choice = Choice(AnswerMessage("".join(text)), last.finish_reason.value)
        name, created = self._backend.model_names[0], int(time.time())
        completion = ChatCompletion(completion_id, created, name, [choice], _usage(last.usage))
        return web.Response(body=_encode(completion), content_type="application/json")


class EventStream(web.StreamResponse):
    """``failed``: the status that the request would have had, had it failed before the stream began; 0: it did not."""

    failed = 0


class _Stream:
    """One answer as server-sent events. Each write waits until the client has taken enough of what went before."""

    def __init__(
        self, request: web.Request, completion_id: str, model: str, with_usage: bool, config: HttpConfig
    ) -> None:
        self._request, self._config = request, config
        usage = None if with_usage else msgspec.UNSET
        self._chunk = ChatChunk(completion_id, int(time.time()), model, [], usage)
        self._with_usage = with_usage
        self._response = EventStream(headers=_SSE_HEADERS)
        if request.version < HttpVersion11:  # nothing but the end of the connection says where it ends
            self._response.force_close()
        self._has_begun = False
        self._written_at = asyncio.get_running_loop().time()

    async def run(self, deltas: AsyncGenerator[Delta, None], request_id: str) -> web.StreamResponse:
        """Raises what ``deltas`` raises before the stream has begun; later errors go into the stream."""
        failed: Exception | None = None
        async with asyncio.TaskGroup() as group:
            beat = group.create_task(self._beat())
            try:
                await self._copy(deltas, request_id)
            except Exception as error:
                failed = error
            finally:
                beat.cancel()
        if failed is not None:  # not through the group, which would take its cause
            raise failed
        await taken(self._request, self._response.write_eof(), self._config.write_timeout_s)
        return self._response

    async def _beat(self) -> None:
        """A comment whenever nothing was written for so long, until it is cancelled. Each write is a whole event, so
        it falls between two others; one that is cancelled has been handed over and is only not waited for."""
        loop, every_s = asyncio.get_running_loop(), self._config.stream_keepalive_s
        while True:
            left_s = self._written_at + every_s - loop.time()
            if left_s > 0:
                await asyncio.sleep(left_s)
            else:
                await self._write(_COMMENT)

    async def _copy(self, deltas: AsyncGenerator[Delta, None], request_id: str) -> None:
        has_role = False
        while True:
            try:
                delta = await anext(deltas)
            except Exception as error:
                if not self._has_begun:
                    raise
                failure = failure_of(error, request_id)
                self._response.failed = failure.status
                await self._event(failure.as_json())
                return
            if not has_role:
                has_role = True
                await self._send(DeltaBody(role="assistant", content=""))
            if delta.text:
                await self._send(DeltaBody(content=delta.text))
            if delta.finish_reason is not None:
                break
        await self._send(DeltaBody(), delta.finish_reason)
        if self._with_usage and delta.usage is not None:
            await self._event(_encode(msgspec.structs.replace(self._chunk, usage=_usage(delta.usage))))
        await self._event(b"[DONE]")

    async def _send(self, body: DeltaBody, finish_reason: FinishReason | None = None) -> None:
        choice = ChunkChoice(body, finish_reason.value if finish_reason else None)
        await self._event(_encode(msgspec.structs.replace(self._chunk, choices=[choice])))

    async def _event(self, data: bytes) -> None:
        await self._write(b"data: " + data + b"\n\n")

    async def _write(self, data: bytes) -> None:
        self._written_at = asyncio.get_running_loop().time()
        if not self._has_begun:
            self._has_begun = True
            wait_for_all(self._request)
            # This does not suspend, so nobody writes before it is done.
            await taken(self._request, self._response.prepare(self._request), self._config.write_timeout_s)
        await taken(self._request, self._response.write(data), self._config.write_timeout_s)


def model_not_found(name: str, served: Sequence[str]) -> Refused:
    text = f"the model {name[:128]!r} does not exist here; served is {' or '.join(map(repr, served))}"
    return Refused(404, text, code="model_not_found", param="model")


def _usage(usage: Usage) -> UsageBody:
    total = usage.prompt_tokens + usage.completion_tokens
    return UsageBody(usage.prompt_tokens, usage.completion_tokens, total)
