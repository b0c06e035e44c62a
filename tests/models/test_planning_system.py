"""No system message is dropped by a template that prints only one at the start: it is joined, or refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aiodisagg.errors import InvalidRequest
from aiodisagg.models.base import ChatMessage, ImagePart, TextPart
from aiodisagg.models.plan import Qwen3VLPlanner
from tests.models.halves import chat, png

Tiny = Callable[..., Path]

ONE_AT_THE_START = """\
{%- if messages and messages[0].role == "system" %}<|im_start|>system
{{ messages[0].content | trim }}<|im_end|>
{% endif %}
{%- for message in messages if message.role in ("user", "assistant") %}<|im_start|>{{ message.role }}
{%- if message.content is string %} {{ message.content }}
{%- else %}
{%- for part in message.content %} {% if part.type == "image" %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}
{%- endfor %}
{%- endif %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
ANY = """\
{%- for message in messages %}<|im_start|>{{ message.role }} {{ message.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
LOOK = chat("Look:", ImagePart(png(64, 64)), "what is it?")


def system(*texts: str) -> ChatMessage:
    return ChatMessage("system", tuple(map(TextPart, texts)))


@pytest.fixture
def planner(tiny: Tiny, tmp_path: Path) -> Callable[[str], Qwen3VLPlanner]:
    def made(template: str) -> Qwen3VLPlanner:
        folder = tmp_path / "copied"
        shutil.copytree(tiny(moe=True, levels=3), folder)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return Qwen3VLPlanner(folder)

    return made


def test_system_messages_at_the_start_are_one(planner: Callable[[str], Qwen3VLPlanner]) -> None:
    made = planner(ONE_AT_THE_START)
    one, several = (
        made.plan([*first, *LOOK]).input_ids.tolist()
        for first in (
            [system("The harbour wakes.\n\nThe town does not.\n\nWhat is right?")],
            [system("The harbour ", "wakes."), system(""), system("The town does not."), system("What is right?\n")],
        )
    )
    assert several == one
    assert "harbour" in made.decode(one) and "What is right?" in made.decode(one)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([*LOOK, system("The town is right.")], "messages[1]"),
        ([system("The harbour."), system("The town."), *LOOK, system("It is right.")], "messages[3]"),
        ([system("The harbour."), *LOOK, system("The harbour.")], "messages[2]"),
        ([*LOOK, system(" "), system("The harbour ", "wakes.")], "messages[2]"),
    ],
    ids=["the only one", "a third", "said before", "an empty one before"],
)
def test_a_system_message_that_the_template_leaves_out_is_refused(
    planner: Callable[[str], Qwen3VLPlanner], messages: list[ChatMessage], param: str
) -> None:
    with pytest.raises(InvalidRequest, match="leaves out a system message") as caught:
        planner(ONE_AT_THE_START).plan(messages)
    assert caught.value.param == param


def test_where_a_template_prints_them_all_they_may_be_anywhere(planner: Callable[[str], Qwen3VLPlanner]) -> None:
    made = planner(ANY)
    plan = made.plan([*chat("Hello"), system("The town is right."), system("The harbour wakes.")])
    text = made.decode(plan.input_ids.tolist())
    assert text.index("town") < text.index("harbour")


def test_what_this_process_lacks_is_no_fault_of_the_chat(
    planner: Callable[[str], Qwen3VLPlanner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without descriptors no template can be read, and clients were told that their chats are refused."""
    found = planner(ANY)
    raised: Exception = ValueError("roles must alternate")

    def render(*_: object, **__: object) -> str:
        raise raised

    monkeypatch.setattr(found._tokenizer, "apply_chat_template", render)
    with pytest.raises(InvalidRequest, match="refuses them: roles must alternate"):
        found.plan(chat("hello"))
    raised = OSError(24, "Too many open files")
    with pytest.raises(OSError, match="Too many open files"):
        found.plan(chat("hello"))
