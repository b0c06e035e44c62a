"""OpenAI's chat format as types: what comes in (:class:`ChatRequest`) and what goes out.

Fields that nothing here reads are ignored, as OpenAI-compatible servers do; a field of a wrong type is an error that
names it. ``video`` is an extension: ``{"type": "video", "video": [url, ...], "fps": 2.0}``, a video as a list of its
frames, each like an ``image_url``'s ``url``, all of one size, in order.

URLs stay raw JSON (``msgspec.Raw``, a view into the body): a data URL is megabytes of text, and decoding it to ``str``
costs the event loop's thread more than all the rest of the body.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

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


NOTHING, NO_LIST, NO_OBJECT, NO, YES, ZERO, ONE = map(Raw, (b"null", b"[]", b"{}", b"false", b"true", b"0", b"1"))


class Unsupported(msgspec.Struct):
    """What OpenAI, vLLM or SGLang heed and this does not. Read to be refused where it is neither null nor what is the
    default here, which changes nothing: ignoring it would give the client something else than it asked for. Raw, as a
    value of two bytes would be one of ninety."""

    n: Raw = ONE
    best_of: Raw = ONE
    use_beam_search: Raw = NO
    presence_penalty: Raw = ZERO
    frequency_penalty: Raw = ZERO
    repetition_penalty: Raw = ONE
    min_p: Raw = ZERO
    logit_bias: Raw = NO_OBJECT
    allowed_token_ids: Raw = NO_LIST
    bad_words: Raw = NO_LIST
    stop_token_ids: Raw = NO_LIST
    stop_regex: Raw = NO_LIST
    include_stop_str_in_output: Raw = NO
    no_stop_trim: Raw = NO
    skip_special_tokens: Raw = YES
    add_special_tokens: Raw = NO
    logits_processors: Raw = NO_LIST
    custom_logit_processor: Raw = NOTHING
    vllm_xargs: Raw = NO_OBJECT
    repetition_detection: Raw = NOTHING
    watermarking: Raw = NO
    lora_path: Raw = NOTHING
    reasoning_effort: Raw = NOTHING
    thinking_token_budget: Raw = NOTHING
    web_search_options: Raw = NOTHING
    modalities: Raw = Raw(b'["text"]')
    audio: Raw = NOTHING
    documents: Raw = NO_LIST
    response_format: Raw = Raw(b'{"type":"text"}')
    structured_outputs: Raw = NOTHING
    guided_json: Raw = NOTHING
    guided_regex: Raw = NOTHING
    guided_choice: Raw = NOTHING
    guided_grammar: Raw = NOTHING
    regex: Raw = NOTHING
    ebnf: Raw = NOTHING
    tools: Raw = NO_LIST
    functions: Raw = NO_LIST
    logprobs: Raw = NO
    top_logprobs: Raw = ZERO
    prompt_logprobs: Raw = NOTHING
    return_token_ids: Raw = NO
    return_prompt_token_ids: Raw = NO
    return_prompt_text: Raw = NO
    return_hidden_states: Raw = NO
    return_routed_experts: Raw = NO
    return_meta_info: Raw = NO
    echo: Raw = NO
    input_ids: Raw = NOTHING
    session_params: Raw = NOTHING
    cache_salt: Raw = NOTHING
    extra_key: Raw = NOTHING
    kv_transfer_params: Raw = NOTHING
    chat_template: Raw = NOTHING
    chat_template_kwargs: Raw = NO_OBJECT
    add_generation_prompt: Raw = YES
    continue_final_message: Raw = NO
    truncate_prompt_tokens: Raw = NOTHING
    mm_processor_kwargs: Raw = NO_OBJECT
    media_io_kwargs: Raw = NO_OBJECT


class UnsupportedOfMessage(msgspec.Struct):
    """The same in a message."""

    tool_calls: Raw = NO_LIST
    function_call: Raw = NOTHING


class Message(UnsupportedOfMessage, kw_only=True):
    role: str
    content: str | list[Part] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ChatRequest(Unsupported, kw_only=True):
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
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    """Only where nothing could end the answer before, as load generators ask; else it is refused."""
    tool_choice: Literal["none", "auto"] | None = None
    """Nothing follows from these, as there are no tools."""
    function_call: Literal["none", "auto"] | None = None


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
