"""OpenAI's chat format as types: what comes in (:class:`ChatRequest`) and what goes out.

Fields that nothing here reads are ignored, as OpenAI-compatible servers do; a field of a wrong type is an error that
names it. ``video`` is an extension: ``{"type": "video", "video": [url, ...], "fps": 2.0}``, a video as a list of its
frames, each like an ``image_url``'s ``url``, all of one size, in order.

URLs stay raw JSON (``msgspec.Raw``, a view into the body): a data URL is megabytes of text, and decoding it to ``str``
costs the event loop's thread more than all the rest of the body.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Stop = Annotated[str, Meta(max_length=1024)]
"""What may become one is looked for at every token."""

# -- in -----------------------------------------------------------------------------------------------------------


class Text(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class ImageSource(msgspec.Struct):
    url: Raw
    """``data:image/...;base64,...``, http(s), or ``sha256:...``: a file that was here before."""
    detail: str | None = None
    """Read and ignored: the model's own limits say how large an image is seen."""


class ImageUrl(msgspec.Struct, tag_field="type", tag="image_url"):
    image_url: ImageSource


class Video(msgspec.Struct, tag_field="type", tag="video"):
    video: list[Raw]
    fps: float = 2.0
    """Frames per second of what ``video`` lists."""


class VideoUrl(msgspec.Struct, tag_field="type", tag="video_url"):
    """Known, so that it can be refused with advice: video files are not decoded here."""


Part: TypeAlias = Text | ImageUrl | Video | VideoUrl


class Message(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ResponseFormat(msgspec.Struct):
    type: str


class ChatRequest(msgspec.Struct):
    model: str
    messages: list[Message]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """Extension; 0 and -1 mean all."""
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | list[Stop] | None = None
    ignore_eos: bool | None = None
    """Extension: the answer ends by its length or a stop string only, as load generators ask."""
    priority: Annotated[int, Meta(ge=-8, le=8)] | None = None
    """Extension: among the requests of one tenant, lower goes first."""
    # Read to be refused: ignoring one of these would give the client something else than it asked for.
    n: int | None = None
    logprobs: bool | None = None
    tools: msgspec.Raw = msgspec.Raw()
    """Not decoded: a value of two bytes would be one of ninety."""
    functions: msgspec.Raw = msgspec.Raw()
    response_format: ResponseFormat | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None


# -- out ----------------------------------------------------------------------------------------------------------


class UsageBody(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(msgspec.Struct):
    content: str
    role: str = "assistant"
    refusal: None = None


class Choice(msgspec.Struct):
    message: AnswerMessage
    finish_reason: str
    index: int = 0
    logprobs: None = None


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: UsageBody
    object: str = "chat.completion"


class DeltaBody(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChunkChoice(msgspec.Struct):
    delta: DeltaBody
    finish_reason: str | None = None
    index: int = 0
    logprobs: None = None


class ChatChunk(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageBody | UnsetType | None = UNSET
    """Absent unless the client asked for usage; then null in every chunk but the last."""
    object: str = "chat.completion.chunk"


class ModelBody(msgspec.Struct):
    id: str
    created: int
    owned_by: str = "aiodisagg"
    object: str = "model"


class ModelList(msgspec.Struct):
    data: list[ModelBody]
    object: str = "list"
