"""One streamed chat request over HTTP, timed; and which of several servers gets it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Literal

import aiohttp
import msgspec

from aiodisagg.bench.chat_body import Body
from aiodisagg.errors import AiodisaggError, ConfigError

Balance = Literal["least-outstanding", "round-robin"]


class ServerError(AiodisaggError):
    """A server cannot be measured: it is not there, or does not speak the API."""

    def __init__(self, url: str, message: str) -> None:
        self.url = url
        super().__init__(f"{url}: {message}")


class Clock:
    """Seconds that only grow, and waiting for one of them."""

    def now(self) -> float:
        return time.perf_counter()

    async def until(self, at_s: float) -> None:
        delay = at_s - self.now()
        if delay > 0:
            await asyncio.sleep(delay)


class Balancer:
    """Chooses a replica for each request. ``least-outstanding`` counts requests; ties are taken in turn."""

    def __init__(self, urls: Sequence[str], balance: Balance = "least-outstanding") -> None:
        if not urls:
            raise ConfigError("url", "at least one is needed")
        self._open = dict.fromkeys(urls, 0)
        self._balance = balance

    def take(self) -> str:
        """The server of the next request; ``give_back`` follows when it has ended."""
        chosen = next(iter(self._open))
        if self._balance == "least-outstanding":
            chosen = min(self._open, key=self._open.__getitem__)
        self._open[chosen] = self._open.pop(chosen) + 1  # to the end of the line
        return chosen

    def give_back(self, url: str) -> None:
        self._open[url] -= 1


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: object = None
    kind: str = msgspec.field(name="object", default="")
    """``error``: an error as vLLM wrote them, with the message beside it."""
    message: str = ""


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_decode = msgspec.json.Decoder(_Event).decode
_MOST_SAID = 300
_FAILED = frozenset({"abort", "error"})
"""Finish reasons with which vLLM and SGLang end an answer that they did not finish."""


class _Error(msgspec.Struct):
    message: str


class _Failed(msgspec.Struct):
    error: _Error | str


def _said(body: bytes) -> str:
    """The message of an error's body; of a body in another form, its beginning."""
    try:
        error = msgspec.json.decode(body, type=_Failed).error
    except msgspec.MsgspecError:
        return _short(body)
    return (error if isinstance(error, str) else error.message)[:_MOST_SAID]


def _short(body: bytes) -> str:
    return " ".join(body[:_MOST_SAID].decode(errors="replace").split())


class Answer:
    """What came so far of one answer. ``text_s``: by the clock, for each piece of text."""

    def __init__(self) -> None:
        self.text_s: list[float] = []
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.error = "cut off"  # until its end, or a finish reason, says otherwise
        self.said = ""
        """What the server, or a library, said of the error."""

    def hear(self, data: bytes, now: float) -> None:
        """The data of one server-sent event that was read at ``now``."""
        if data == b"[DONE]":
            self.error = "" if self.error == "cut off" else self.error
            return
        try:
            event = _decode(data)
        except msgspec.MsgspecError:
            self.error, self.said = "not understood", _short(data)
            return
        if event.error is not None:
            self.error, self.said = "error in the stream", _said(data)
        elif event.kind == "error":
            self.error, self.said = "error in the stream", event.message[:_MOST_SAID]
        if event.usage is not None:
            self.prompt_tokens = event.usage.prompt_tokens
            self.output_tokens = event.usage.completion_tokens or 0
        for choice in event.choices:
            delta = choice.delta
            if delta.content or delta.reasoning or delta.reasoning_content:
                self.text_s.append(now)
            if choice.finish_reason in _FAILED:
                self.error = f"finish reason {choice.finish_reason}"
            elif choice.finish_reason and self.error == "cut off":
                self.error = ""  # not every server says [DONE]


class ChatClient:
    """Sends to ``{url}/v1/chat/completions``. Any number of requests at once.

    Args:
        session: without limits of its own, see :func:`open_session`.
        timeout_s: of a whole request, after which it counts as an error of the kind "timeout".
    """

    def __init__(self, session: aiohttp.ClientSession, clock: Clock, *, timeout_s: float = 600.0) -> None:
        self._session, self._clock, self._timeout_s = session, clock, timeout_s

    async def ask(self, url: str, body: Body) -> Answer:
        """Returns when the answer is over, whatever became of it; raises nothing but CancelledError."""
        answer = Answer()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._stream(url, body, answer)
        except TimeoutError:
            answer.error = "timeout"
        except (aiohttp.ClientError, ConnectionError, ValueError) as error:  # ValueError: a line without an end
            answer.error, answer.said = f"connection: {type(error).__name__}", str(error)[:_MOST_SAID]
        if not answer.output_tokens:  # a server that counts nothing
            answer.output_tokens = len(answer.text_s)
        return answer

    async def _stream(self, url: str, body: Body, answer: Answer) -> None:
        headers = {"Content-Type": "application/json", "Content-Length": str(body.size_bytes)}
        if body.tenant:
            headers["X-Tenant"] = body.tenant
        endpoint = f"{url}/v1/chat/completions"
        async with self._session.post(endpoint, data=_pieces(body), headers=headers) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}"
                answer.said = _said(await response.read())
                return
            other = bytearray()
            async for line in response.content:
                if line.startswith(b"data:"):
                    answer.hear(line[5:].strip(), self._clock.now())
                elif len(other) < _MOST_SAID:
                    other += line
        if answer.error == "cut off" and response.content_type != "text/event-stream":
            answer.error, answer.said = f"no stream but {response.content_type}", _said(bytes(other))

    async def models(self, url: str) -> list[str]:
        """The models a server says it has. Raises ServerError."""
        try:
            return [model.id for model in msgspec.json.decode(await self._get(f"{url}/v1/models"), type=_Models).data]
        except msgspec.MsgspecError as error:
            raise ServerError(url, f"/v1/models is not a list of models: {error}") from error

    async def metrics(self, url: str) -> str:
        """A page of metrics as it is. Raises ServerError."""
        return (await self._get(url)).decode(errors="replace")

    async def _get(self, url: str) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s), self._session.get(url) as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ServerError(url, str(error) or type(error).__name__) from error
        if response.status != 200:
            raise ServerError(url, f"answers {response.status}: {body[:200].decode(errors='replace')}")
        return body


async def _pieces(body: Body) -> AsyncIterator[bytes]:
    for piece in body.pieces:
        yield piece


def open_session(api_key: str | None) -> aiohttp.ClientSession:
    """As many connections as there are requests; the key, if any, goes with each. Nothing is to be compressed: pieces
    of a stream would come together, and nobody here unpacks pages of metrics."""
    headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60.0),
        timeout=aiohttp.ClientTimeout(total=None),
        headers=headers,
        auto_decompress=False,
    )
