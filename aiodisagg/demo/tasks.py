"""The demo's requests and their truth: held-out digits, and what the monolith says to the same prompts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from aiodisagg.data import QUESTION, answer_of, held_out_digits
from aiodisagg.models.base import ChatMessage, ImagePart, TextPart

MAX_IMAGES = 6


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: its images, its question, and the right answer if there is one."""

    images: tuple[bytes, ...]
    question: str
    truth: str | None
    max_tokens: int
    group: str = ""

    def chat(self) -> tuple[ChatMessage, ...]:
        return (ChatMessage("user", (*(ImagePart(data) for data in self.images), TextPart(self.question))),)

    def body(self, model: str) -> dict[str, object]:
        """The same as an OpenAI request."""
        urls = [f"data:{_mime(data)};base64,{base64.b64encode(data).decode()}" for data in self.images]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content.append({"type": "text", "text": self.question})
        messages = [{"role": "user", "content": content}]
        return {
            "model": model,
            "messages": messages,
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def _mime(data: bytes) -> str:
    return "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"


def digit_asks(count: int) -> list[Ask]:
    """``count`` prompts of one to six held-out digits each, in a fixed random order."""
    images, labels = held_out_digits()
    draw = Random(0)
    asks = []
    for number in range(count):
        picks = draw.sample(range(len(images)), 1 + number % MAX_IMAGES)
        asks.append(_ask(images, labels, picks, f"{len(picks)} images"))
    return asks


def all_digit_asks() -> list[Ask]:
    """Every held-out digit alone; then all of them in prompts of four, and the same with two images swapped."""
    images, labels = held_out_digits()
    order = Random(0).sample(range(len(images)), len(images))
    fours = [order[i : i + 4] for i in range(0, len(order) // 4 * 4, 4)]
    asks = [_ask(images, labels, [pick], "one image") for pick in range(len(images))]
    asks += [_ask(images, labels, picks, "four images") for picks in fours]
    asks += [_ask(images, labels, [a, c, b, d], "four, two swapped") for a, b, c, d in fours]
    return asks


def _ask(images: Sequence[bytes], labels: Sequence[int], picks: Sequence[int], group: str) -> Ask:
    truth = answer_of([labels[i] for i in picks])
    return Ask(tuple(images[i] for i in picks), QUESTION, truth, max_tokens=2 * MAX_IMAGES + 2, group=group)


class Monolith:
    """transformers' own model on the same folder and dtypes, one request at a time. Blocking."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: str | None = None) -> None:
        from aiodisagg.models.loading import as_dtype, check_device, default_dtypes, load_monolith
        from aiodisagg.models.plan import Qwen3VLPlanner
        from aiodisagg.models.vision import Qwen3VLVisionEncoder

        check_device(device)
        vision, text = default_dtypes(device)
        text = text if dtype is None else as_dtype(dtype)
        self._planner = Qwen3VLPlanner(folder)
        self._encoder = Qwen3VLVisionEncoder(folder, dtype=vision)
        self._model = load_monolith(folder, vision_dtype=vision, language_dtype=text, device=device)

    def answer(self, ask: Ask) -> str:
        """Greedy answer of the monolith."""
        from aiodisagg.models.reference import reference_generate

        plan = self._planner.plan(ask.chat())
        patches = [self._encoder.prepare(item.kind, item.media, item.grid_thw, item.fps) for item in plan.items]
        ends = self._planner.eos_ids
        tokens = reference_generate(self._model, plan, patches, max_tokens=ask.max_tokens, eos_ids=ends)
        return self._planner.decode([token for token in tokens if token not in ends])
