"""From a body to what the backend takes: typed, checked, every error naming the field as the client wrote it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NoReturn

import msgspec

from aiodisagg.api.schema import (
    ChatRequest,
    ImageUrl,
    Message,
    Part,
    Text,
    Unsupported,
    UnsupportedOfMessage,
    Video,
    VideoUrl,
)
from aiodisagg.engine.types import SamplingParams
from aiodisagg.errors import InvalidRequest
from aiodisagg.models import base

_decoder = msgspec.json.Decoder(ChatRequest)
_decode_value = msgspec.json.Decoder().decode
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_BAD_BYTE = re.compile(r"\(byte (\d+)\)")
_NOT_JSON_NUMBER = re.compile(rb'"(\w+)"\s*:\s*(-?(?:NaN|Infinity))\b')
_LONGEST_NOTHING = 64
_LONGEST_MESSAGE = 300
MOST_COMMAS = 1 << 21
"""Each may be a value, of some fifty bytes when it is decoded, which happens without a pause. Text has fewer."""
_PART_TYPES = "text, image_url, video"
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""``developer`` is OpenAI's newer name of ``system``; chat templates know the older one."""


@dataclass(frozen=True, slots=True)
class MediaUrl:
    """An image or a frame that a request names. ``raw`` is the URL as a JSON value, still quoted and escaped."""

    param: str
    raw: memoryview


def parse_request(body: bytes | bytearray) -> ChatRequest:
    """Decodes a body. The URLs in the result are views into ``body``. Raises InvalidRequest."""
    if body.count(b",") > MOST_COMMAS:
        raise InvalidRequest("body", f"more than {MOST_COMMAS} values", code="too_many_values")
    try:
        return _decoder.decode(body)
    except msgspec.ValidationError as error:
        _raise_at_path(str(error))
    except RecursionError as error:
        raise InvalidRequest("body", "nested too deeply", code="invalid_json") from error
    except ValueError as error:  # malformed JSON; UnicodeDecodeError for a body that is not UTF-8
        bad = _BAD_BYTE.search(str(error))
        at = int(bad[1]) if bad else 0
        found = _NOT_JSON_NUMBER.search(body, max(0, at - 100), at + 10)  # all of a body takes a second
        if found:  # what Python and JavaScript programs write by accident
            name, number = (group.decode("ascii", "replace") for group in found.groups())
            raise InvalidRequest(name, f"{number} is not a JSON number") from error
        raise InvalidRequest("body", f"not JSON: {error}", code="invalid_json") from error


def _raise_at_path(text: str) -> NoReturn:
    # From the end: what msgspec quotes in front of it is the client's own, megabytes of it if it likes.
    message, at, path = text.rpartition(" - at `$")
    message, path = (message, path.removeprefix(".").removesuffix("`")) if at else (text, "")
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]}..."
    missing = _MISSING.fullmatch(message)
    if missing:
        path = f"{path}.{missing.group(1)}" if path else missing.group(1)
        message = "is required"
    elif path.endswith("].type"):
        message += f"; known are {_PART_TYPES}"
    raise InvalidRequest(path or "body", message, code="invalid_type" if "Expected" in message else "invalid_value")


def sampling_of(request: ChatRequest, default_max_tokens: int) -> SamplingParams:
    """How to sample; a parameter that is absent or null has SamplingParams' default. Raises InvalidRequest."""
    _refuse_unsupported(request)
    default = SamplingParams()
    stop = request.stop if request.stop is not None else ()
    asked = request.max_completion_tokens or request.max_tokens
    return SamplingParams(
        max_tokens=asked or default_max_tokens,
        as_fits=asked is None,
        temperature=default.temperature if request.temperature is None else request.temperature,
        top_p=default.top_p if request.top_p is None else request.top_p,
        top_k=max(0, request.top_k or 0),
        seed=request.seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        ignore_eos=bool(request.ignore_eos),
    )


def _refuse_unsupported(request: ChatRequest) -> None:
    _refuse(request, Unsupported, "")
    if request.min_tokens:
        most = request.max_completion_tokens or request.max_tokens or 0
        if request.min_tokens > most or request.stop or not request.ignore_eos:
            message = "is supported up to max_tokens only, with ignore_eos and without stop"
            raise InvalidRequest("min_tokens", message, code="unsupported_value")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options", "is only allowed when stream is true")


def _refuse(given: msgspec.Struct, unsupported: type[msgspec.Struct], where: str) -> None:
    """Raises InvalidRequest if ``given`` asks for something by one of the fields of ``unsupported``."""
    for name, nothing in zip(unsupported.__struct_fields__, unsupported.__struct_defaults__, strict=True):
        said = getattr(given, name)
        if said is not nothing and not _is_nothing(said, nothing):
            message = f"other values than {bytes(nothing).decode()} are not supported"
            raise InvalidRequest(f"{where}{name}", message, code="unsupported_value")


def _is_nothing(said: msgspec.Raw, nothing: msgspec.Raw) -> bool:
    """Whether it is null or what ``nothing`` is. What is long says something, if only spaces."""
    if len(said) > _LONGEST_NOTHING:
        return False
    try:
        value, default = map(_decode_value, (said, nothing))
    except ValueError:
        return False
    return value is None or (value == default and isinstance(value, bool) is isinstance(default, bool))


def check_parts(request: ChatRequest, max_parts: int) -> None:
    """Raises InvalidRequest if there are more messages and parts than that, having looked at no more than that."""
    lengths = (len(m.content) for m in request.messages if isinstance(m.content, list))
    if any(count > max_parts for count in accumulate(lengths, initial=len(request.messages))):
        raise InvalidRequest("messages", f"more than {max_parts} messages and parts", code="context_length_exceeded")


def check_text(request: ChatRequest, max_chars: int) -> None:
    """Raises InvalidRequest if the messages have more text than that."""
    parts = (part for message in request.messages for part in _parts(message))
    chars = sum(len(part.text) for part in parts if isinstance(part, Text))
    if chars > max_chars:
        message = f"{chars} characters of text are more than {max_chars}"
        raise InvalidRequest("messages", message, code="context_length_exceeded")


def media_urls(request: ChatRequest, max_files: int) -> list[MediaUrl]:
    """The media of a request in prompt order, its messages checked. Raises InvalidRequest."""
    if not request.messages:
        raise InvalidRequest("messages", "must not be empty")
    found: list[MediaUrl] = []
    for i, message in enumerate(request.messages):
        where = f"messages[{i}]"
        if message.role not in _ROLES:
            raise InvalidRequest(f"{where}.role", f"{message.role[:64]!r} is not one of {', '.join(_ROLES)}")
        _refuse(message, UnsupportedOfMessage, f"{where}.")
        if message.content is None or (not message.content and not isinstance(message.content, str)):
            raise InvalidRequest(f"{where}.content", "must be text or a list of parts that is not empty")
        for j, part in enumerate(_parts(message)):
            for url in _media_of(part, message.role, f"{where}.content[{j}]"):
                if len(found) == max_files:
                    raise InvalidRequest("messages", f"more than {max_files} images and frames")
                found.append(url)
    return found


def _media_of(part: Part, role: str, where: str) -> Iterator[MediaUrl]:
    """One by one: 64 MiB hold millions of frames, and the caller stops at its limit."""
    if isinstance(part, Text):
        return
    if role != "user":
        raise InvalidRequest(where, f"{role} messages hold text only")
    match part:
        case ImageUrl():
            yield MediaUrl(f"{where}.image_url.url", memoryview(part.image_url.url))
        case Video():
            if not part.video:
                raise InvalidRequest(f"{where}.video", "must list at least one frame")
            if not (math.isfinite(part.fps) and part.fps > 0):
                raise InvalidRequest(f"{where}.fps", f"must be positive, not {part.fps}")
            for k, raw in enumerate(part.video):
                yield MediaUrl(f"{where}.video[{k}]", memoryview(raw))
        case VideoUrl():
            message = 'video files are not read; send frames: {"type": "video", "video": [url, ...], "fps": 2.0}'
            raise InvalidRequest(f"{where}.type", message)


def chat_messages(request: ChatRequest, files: Iterable[bytes]) -> list[base.ChatMessage]:
    """The request's messages with ``files`` in the places of the URLs that :func:`media_urls` listed, in its order."""
    rest = iter(files)
    return [
        base.ChatMessage(_ROLES[m.role], tuple(_filled(part, rest) for part in _parts(m))) for m in request.messages
    ]


def _filled(part: Part, files: Iterator[bytes]) -> base.Part:
    match part:
        case Text():
            return base.TextPart(part.text)
        case ImageUrl():
            return base.ImagePart(next(files))
        case Video():
            return base.VideoPart(tuple(next(files) for _ in part.video), part.fps)
        case VideoUrl():
            raise AssertionError("refused by media_urls")


def _parts(message: Message) -> list[Part]:
    content = message.content or ""
    return [Text(content)] if isinstance(content, str) else content
