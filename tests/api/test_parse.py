"""What a body may cost before it is refused, and how much of it an error repeats."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import msgspec
import pytest
from http_fakes import HELLO, MODEL, ScriptedBackend, asking, serving

from aiodisagg.api import parse
from aiodisagg.api.parse import check_parts, media_urls, parse_request, sampling_of
from aiodisagg.api.schema import ChatRequest
from aiodisagg.errors import InvalidRequest


def request(messages: Any, **fields: Any) -> ChatRequest:
    return parse_request(json.dumps({"model": MODEL, "messages": messages, **fields}).encode())


EMPTY = {"role": "user", "content": ""}
NOTHING = {"type": "text", "text": ""}


@pytest.mark.parametrize("messages", [[EMPTY] * 6, asking(*[NOTHING] * 5), [EMPTY, *asking(NOTHING, NOTHING)] * 2])
def test_messages_and_parts_are_counted_although_they_are_empty(messages: list[Any]) -> None:
    count = sum(1 + len(message["content"]) for message in messages)
    check_parts(request(messages), count)
    with pytest.raises(InvalidRequest, match=f"messages: more than {count - 1} messages and parts") as caught:
        check_parts(request(messages), count - 1)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.anyio
@pytest.mark.usefixtures("no_leaks")
async def test_too_many_parts_are_refused_before_anything_walks_over_them(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ScriptedBackend()
    async with serving(backend, max_parts=4) as served:
        assert (await served.post({"model": MODEL, "messages": HELLO * 4}))[0] == 200
        monkeypatch.setattr(parse, "_parts", None)  # who walks, calls it
        for messages in (HELLO * 5, asking(*[NOTHING] * 4)):
            status, error = await served.refused(messages=messages)
            assert (status, error["param"], error["code"]) == (400, "messages", "context_length_exceeded")
    assert len(backend.calls) == 1


def test_bodies_of_millions_of_values_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of which would be an object, made without a pause."""
    monkeypatch.setattr(parse, "MOST_COMMAS", 1000)
    few = request([{"role": "user", "content": "one, two"}], logit_bias={str(n): 0 for n in range(900)})
    assert bytes(few.logit_bias).count(b",") == 899
    with pytest.raises(InvalidRequest, match="body: more than 1000 values") as caught:
        request([EMPTY], tools=[0] * 1001)
    assert caught.value.code == "too_many_values"


def test_what_is_read_to_be_refused_is_not_decoded() -> None:
    """Lists in lists have no commas: 64 MiB of them were three gigabytes, made without a pause."""
    deep = b"[" * 400 + b"]" * 400
    body = b'{"model": "m", "messages": [], "tools": [%s]}' % b",".join([deep] * 2000)
    tracemalloc.start()
    try:
        asked = parse_request(body)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(body)
    finally:
        tracemalloc.stop()
    with pytest.raises(InvalidRequest, match=r"tools: other values than \[\] are not supported"):
        sampling_of(asked, 16)


@pytest.mark.parametrize("said", [None, [], ..., "[ ]"])
def test_tools_of_none_at_all_are_nothing_to_refuse(said: Any) -> None:
    body = {"model": "m", "messages": [], "tools": [], "functions": said}
    if said is ...:
        del body["functions"]
    text = json.dumps(body).replace('"[ ]"', "[ ]")
    assert sampling_of(parse_request(text.encode()), 16).max_tokens == 16


def test_what_is_long_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty megabytes of spaces in brackets were read to their end, on the loop."""
    read, decode = [], parse._decode_value

    def decoded(raw: msgspec.Raw) -> Any:
        read.append(len(raw))
        return decode(raw)

    monkeypatch.setattr(parse, "_decode_value", decoded)
    short, long = (
        parse_request(b'{"model": "m", "messages": [], "tools": [%s]}' % (b" " * count)) for count in (50, 100_000)
    )
    assert sampling_of(short, 16).max_tokens == 16 and max(read) == 52
    with pytest.raises(InvalidRequest, match=r"tools: other values than \[\] are not supported"):
        sampling_of(long, 16)
    assert max(read) == 52


def test_frames_beyond_the_limit_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def media_url(param: str, raw: memoryview) -> str:
        made.append(param)
        return param

    monkeypatch.setattr(parse, "MediaUrl", media_url)
    with pytest.raises(InvalidRequest, match="more than 3 images and frames"):
        media_urls(request(asking({"type": "video", "video": [1] * 1000})), 3)
    assert len(made) <= 4


@pytest.mark.parametrize("said", ["x" * 1_000_000, " - at `$.model`" * 1000, "Object missing required field `model`"])
def test_an_error_repeats_little_of_what_the_client_said(said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request(asking({"type": said}))
    assert caught.value.param == "messages[0].content[0].type"
    assert len(str(caught.value)) < 400 and f"Invalid value '{said[:30]}" in str(caught.value)
    assert str(caught.value).endswith("; known are text, image_url, video")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "Infinity"])
def test_numbers_that_json_does_not_have(number: str) -> None:
    def refused(body: str) -> InvalidRequest:
        with pytest.raises(InvalidRequest) as caught:
            parse_request(body.encode())
        return caught.value

    long = "x" * 1_000_000
    error = refused(f'{{"user": "{long}", "top_p" : {number}, "model": "{long}"}}')
    assert (error.param, str(error)) == ("top_p", f"top_p: {number} is not a JSON number")
    for body in (f'{{"{long}": {number}}}', f'{{"user": {number[:-1]}, "model": "{long}", "top_p": {number}}}'):
        error = refused(body)
        assert error.code == "invalid_json" and len(str(error)) < 200


UNSUPPORTED: dict[str, tuple[list[Any], list[Any]]] = {
    "n": ([1], [2, 0, True, "one"]),
    "best_of": ([1], [4]),
    "logprobs": ([False], [True, 0]),
    "repetition_penalty": ([1, 1.0], [1.05, "1"]),
    "presence_penalty": ([0, 0.0], [-0.5]),
    "min_p": ([0.0], [0.1]),
    "logit_bias": ([{}], [{"7": 100}]),
    "stop_token_ids": ([[]], [[7]]),
    "bad_words": ([[]], [["sorry"]]),
    "response_format": ([{"type": "text"}], [{"type": "json_object"}, "json", {}]),
    "structured_outputs": ([], [{"regex": "a+"}]),
    "guided_json": ([], [{}, {"type": "object"}]),
    "guided_regex": ([], ["a+"]),
    "guided_choice": ([], [["yes", "no"]]),
    "guided_grammar": ([], ["root ::= 'a'"]),
    "regex": ([], ["a+"]),
    "chat_template_kwargs": ([{}], [{"enable_thinking": False}]),
    "chat_template": ([], ["{{ messages }}"]),
    "add_generation_prompt": ([True], [False]),
    "continue_final_message": ([False], [True]),
    "skip_special_tokens": ([True], [False]),
    "add_special_tokens": ([False], [True]),
    "logits_processors": ([[]], [["my.Processor"]]),
    "custom_logit_processor": ([], ["{}"]),
    "lora_path": ([], ["adapters/one"]),
    "modalities": ([["text"]], [["text", "audio"], ["audio"]]),
    "audio": ([], [{"voice": "alloy", "format": "wav"}]),
    "documents": ([[]], [[{"title": "One", "text": "..."}]]),
    "truncate_prompt_tokens": ([], [100]),
    "tools": ([[]], [[{"type": "function"}]]),
    "top_logprobs": ([0], [5]),
    "return_token_ids": ([False], [True]),
    "return_prompt_token_ids": ([False], [True]),
    "return_prompt_text": ([False], [True]),
    "return_hidden_states": ([False], [True, "last"]),
    "return_routed_experts": ([False], [True]),
    "return_meta_info": ([False], [True]),
    "reasoning_effort": ([], ["none", "high", 0.5]),
    "thinking_token_budget": ([], [0, 512]),
    "web_search_options": ([], [{}]),
    "vllm_xargs": ([{}], [{"a": 1}]),
    "repetition_detection": ([], [{"max_pattern_size": 8}]),
    "watermarking": ([False], [True]),
    "input_ids": ([], [[1, 2]]),
    "session_params": ([], [{"id": "a"}]),
    "cache_salt": ([], ["secret"]),
    "extra_key": ([], ["mine"]),
    "kv_transfer_params": ([], [{"do_remote_decode": True}]),
    "media_io_kwargs": ([{}], [{"video": {"num_frames": 8}}]),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_would_change_the_answer_is_not_ignored(name: str) -> None:
    """Only what says nothing is."""
    neutral, asked = UNSUPPORTED[name]
    for value in (None, *neutral):
        sampling_of(request([EMPTY], **{name: value}), 16)
    for value in asked:
        with pytest.raises(InvalidRequest, match=f"{name}: .*not supported") as caught:
            sampling_of(request([EMPTY], **{name: value}), 16)
        assert (caught.value.param, caught.value.code) == (name, "unsupported_value")


@pytest.mark.parametrize("name", ["tool_choice", "function_call"])
def test_a_call_of_tools_cannot_be_wanted(name: str) -> None:
    for value in (None, "none", "auto"):
        sampling_of(request([EMPTY], **{name: value}), 16)
    for wanted in ("required", {"type": "function", "function": {"name": "look"}}):
        with pytest.raises(InvalidRequest) as caught:
            request([EMPTY], **{name: wanted})
        assert caught.value.param == name


def test_calls_of_tools_in_a_chat_are_not_dropped() -> None:
    called = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "look", "arguments": "{}"}}]}
    with pytest.raises(InvalidRequest) as caught:
        media_urls(request([EMPTY, called]), 3)
    assert (caught.value.param, caught.value.code) == ("messages[1].tool_calls", "unsupported_value")
    said = {"role": "assistant", "content": "Hello", "tool_calls": [], "function_call": None}
    assert media_urls(request([EMPTY, said]), 3) == []


def test_an_answer_of_at_least_so_many_tokens() -> None:
    """What load generators send to any server: here it is as long as it may be, if nothing ends it earlier."""
    exact = {"max_tokens": 128, "ignore_eos": True, "min_tokens": 128}
    sampling = sampling_of(request([EMPTY], **exact), 16)
    assert (sampling.max_tokens, sampling.ignore_eos) == (128, True)
    for harmless in ({"min_tokens": 0}, {"min_tokens": None}):
        sampling_of(request([EMPTY], **harmless), 16)
    for change in ({"ignore_eos": False}, {"stop": "x"}, {"min_tokens": 129}, {"max_tokens": None}):
        with pytest.raises(InvalidRequest) as caught:
            sampling_of(request([EMPTY], **{**exact, **change}), 16)
        assert caught.value.param == "min_tokens"
