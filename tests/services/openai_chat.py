"""Chats as OpenAI's API writes them."""

from __future__ import annotations

import base64
from typing import Any

from aiodisagg import ImagePart, LanguageService, VideoPart


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def content(*parts: Any) -> list[dict[str, Any]]:
    """Parts of a message: text, images, and videos as lists of frames."""
    found: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            found.append({"type": "text", "text": part})
        elif isinstance(part, ImagePart):
            found.append({"type": "image_url", "image_url": {"url": data_url(part.data)}})
        elif isinstance(part, VideoPart):
            found.append({"type": "video", "video": [data_url(frame) for frame in part.frames], "fps": part.fps})
        else:
            found.append(part)
    return found


def chat_body(service: LanguageService, *parts: Any, **settings: Any) -> dict[str, Any]:
    """A request with one user message."""
    messages = [{"role": "user", "content": content(*parts)}]
    return {"model": service.model_name, "messages": messages, "temperature": 0.0, **settings}
