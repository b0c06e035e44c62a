"""Gate A: everything about a prompt that is known before vision compute.

Sizes come from image headers, so grids, placeholders, positions and the prompt's length are fixed here, and whoever
serves the prompt can reserve memory first and encode second. No weight is read. The results equal those of
transformers' ``Qwen3VLProcessor`` and ``get_rope_index``:

- An image becomes ``t*h*w / merge**2`` placeholders. A video becomes, for each frame pair, its time as text and a
  ``<|vision_start|>`` ... ``<|vision_end|>`` of its own inside the template's outer pair.
- Text advances all three position rows by one. A picture of (h, w) tokens holds its temporal row still, counts its
  rows and columns in the other two, and moves what follows on by max(h, w). ``delta`` is what is then missing between
  a token's place and its position.

A video of more than ``GROUP_PATCHES`` becomes several items, each a group of its frame pairs. Frame pairs do not see
each other in the tower, so the rows are those of the whole video, and groups are placed, encoded, cached and fetched
again like any other items: on several peers at once. Groups are counted from the video's start: one that goes on
longer, at the same resolution, begins with the same items.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from aiodisagg.errors import CheckpointError, InvalidRequest, MediaError, PromptTooLong
from aiodisagg.models.base import (
    ChatMessage,
    ImagePart,
    ItemKind,
    PlannedItem,
    PromptPlan,
    TextPart,
    VideoPart,
    item_digest,
)
from aiodisagg.models.checkpoint import read_info
from aiodisagg.models.folder import fail, read_json
from aiodisagg.models.loading import eos_ids
from aiodisagg.models.preprocessing import MAX_VIDEO_PIXELS, header_size, image_grid, load_settings, video_grid

_VOCABULARIES = ("tokenizer.json", "vocab.json")
_PLACEHOLDERS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
ROLES = frozenset({"system", "user", "assistant"})
DEFAULT_MAX_FRAMES = 768
GROUP_PATCHES = 2048
"""Of an item that is made of a video's frames. Half a tower batch of a GPU: large enough that the costs of an item do
not matter, small enough that a video of seconds is shared among peers."""


def _tokenizer(folder: Path) -> Any:
    """With its chat template. Raises CheckpointError."""
    if not any((folder / name).exists() for name in _VOCABULARIES):  # transformers would make one without words
        fail(folder, _VOCABULARIES[0], "no such file")
    try:
        found = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise what they raise
        raise CheckpointError(str(folder), "tokenizer", f"cannot be loaded: {error}") from error
    if not found.is_fast:
        fail(folder, "tokenizer", f"a {type(found).__name__} is none of the tokenizers library")
    found("")  # sets it to cut and to pad nothing, whatever its file says; it must not be set while it encodes
    if not found.chat_template:  # older folders keep it where only processors look
        found.chat_template = read_json(folder, "chat_template.json", {}).get("chat_template")
    if not found.chat_template:
        others = "tokenizer_config.json and chat_template.json"
        fail(folder, "chat_template.jinja", f"no such file, and {others} have no chat_template either")
    try:
        found.get_chat_template()
    except ValueError as error:  # several by name, and none of them by default: every request would be refused
        raise CheckpointError(str(folder), "chat_template", str(error)) from error
    return found


class Qwen3VLPlanner:
    """:class:`~aiodisagg.models.base.Planner` for Qwen3-VL(-MoE) folders and plain Qwen3 text models.

    Args:
        folder: config, tokenizer, chat template and preprocessor settings are read, no weights.
        max_pixels: of an image after resizing; can only lower the folder's limit. max_video_pixels: the same for all
            frames of a video together. max_frames: of a video. group_patches: of an item that a longer video is
            divided into.

    Raises CheckpointError.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_pixels: int | None = None,
        max_video_pixels: int | None = None,
        max_frames: int = DEFAULT_MAX_FRAMES,
        group_patches: int = GROUP_PATCHES,
    ) -> None:
        self._info = read_info(folder)
        self._group_patches = group_patches
        self._max_pixels, self._max_video_pixels, self._max_frames = max_pixels, max_video_pixels, max_frames
        self._tokenizer = _tokenizer(self._info.folder)
        self._check_ids()
        self._eos = eos_ids(self._info) or frozenset({self._tokenizer.eos_token_id} - {None})
        self._placeholders: dict[ItemKind, tuple[str, int]] = {}
        if self._info.is_vision_language:
            self._image, self._video = load_settings(self._info.folder)
            config = self._info.config
            ids = {ItemKind.IMAGE: config.image_token_id, ItemKind.VIDEO: config.video_token_id}
            self._placeholders = {kind: (self._token(i), i) for kind, i in ids.items()}
            self._frame = self._token(config.vision_start_token_id), self._token(config.vision_end_token_id)

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._eos

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out; bytes that are no UTF-8 (yet) become U+FFFD."""
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def plan(self, messages: Sequence[ChatMessage], *, limit: int | None = None) -> PromptPlan:
        """Renders the folder's chat template with a generation prompt, and plans every item. Thread-safe.

        Raises InvalidRequest (unknown role or part, nothing to say, placeholders in text, a system message that the
        template leaves out) or MediaError naming ``messages[i].content[j]``; PromptTooLong for more than ``limit``
        tokens, before anything of that length is made: pictures may be many and large in a small request.
        """
        chat, items = self._read(messages)
        try:
            text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except (OSError, ImportError, MemoryError):  # of this process, as out of descriptors, and not of the chat
            raise
        except Exception as error:  # a template is a program of the folder; it refuses with errors of its own
            raise InvalidRequest("messages", f"the model's chat template refuses them: {error}") from error
        _check_system(messages, str(text))
        pieces = self._expand(str(text), items)
        return self._lay_out(np.asarray(self._encode("".join(pieces)), dtype=np.int64), items, limit)

    def _check_ids(self) -> None:
        """Every id is a row of the embedding table: beyond it a text of a client would raise on a CPU, and break a GPU
        for all requests. A table with more rows than tokens is what the released models have."""
        config, folder = self._info.config, self._info.folder
        rows = int(config.get_text_config().vocab_size)
        part = "text_config." if self._info.is_vision_language else ""
        table = f"is not below {part}vocab_size {rows}, the rows of the embedding table"
        for key in _PLACEHOLDERS if self._info.is_vision_language else ():
            if not 0 <= (token_id := int(getattr(config, key))) < rows:
                fail(folder, f"config.json: {key}", f"{token_id} {table}")
        token, largest = max(self._tokenizer.get_vocab().items(), key=lambda entry: int(entry[1]))
        if largest >= rows:
            fail(folder, "tokenizer", f"its largest id {largest} ({token!r}) {table}")

    def _encode(self, text: str) -> list[int]:
        """Tokens, by any number of threads at once: two megabytes of text take a second, and nobody waits for them.

        This call alone lets other Python go on, and keeps no account of where each token was, which costs as much
        again and more. What begins a prompt is in the template; a tokenizer that adds it would say it twice.
        """
        (found,) = self._tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = found.ids
        return ids

    # -- steps of plan --------------------------------------------------------------------------------------------

    def _token(self, token_id: int) -> str:
        token = self._tokenizer.convert_ids_to_tokens(int(token_id))
        if not isinstance(token, str):
            raise CheckpointError(str(self._info.folder), "tokenizer", f"has no token {token_id}, the config names it")
        return token

    def _read(self, messages: Sequence[ChatMessage]) -> tuple[list[dict[str, Any]], list[PlannedItem]]:
        """The chat as templates take it, and its images and whole videos in order, without digests and spans. System
        messages at its start are one: templates, Qwen3-VL's among them, may print that of the first message only."""
        chat: list[dict[str, Any]] = []
        items: list[PlannedItem] = []
        for i, message in enumerate(messages):
            if not isinstance(message, ChatMessage):
                raise InvalidRequest(f"messages[{i}]", f"a {type(message).__name__} is no ChatMessage")
            if message.role not in ROLES:
                raise InvalidRequest(
                    f"messages[{i}].role", f"{message.role!r} is not one of {', '.join(sorted(ROLES))}"
                )
            if not isinstance(message.parts, tuple | list):
                raise InvalidRequest(
                    f"messages[{i}].content", f"must be a tuple of parts, not a {type(message.parts).__name__}"
                )
            content: list[dict[str, str]] = []
            for j, part in enumerate(message.parts):
                param = f"messages[{i}].content[{j}]"
                if isinstance(part, TextPart):
                    self._check_text(part.text, param)
                    content.append({"type": "text", "text": part.text})
                elif isinstance(part, ImagePart | VideoPart):
                    item = self._item(part, param)
                    items.append(item)
                    content.append({"type": item.kind.value})
                else:
                    raise InvalidRequest(param, f"a {type(part).__name__} is no TextPart, ImagePart or VideoPart")
            only_text = all(part["type"] == "text" for part in content)
            chat.append(
                {"role": message.role, "content": "".join(p["text"] for p in content) if only_text else content}
            )
        leading = itertools.takewhile(lambda said: said["role"] == "system" and isinstance(said["content"], str), chat)
        texts = [said["content"] for said in leading]
        if len(texts) > 1:
            chat[: len(texts)] = [{"role": "system", "content": "\n\n".join(filter(None, texts))}]
        if not any(message["content"] for message in chat):
            raise InvalidRequest("messages", "there is nothing to answer")
        return chat, items

    def _check_text(self, text: str, param: str) -> None:
        for token, _ in self._placeholders.values():
            if token in text:
                raise InvalidRequest(param, f"text must not contain {token}")

    def _item(self, part: ImagePart | VideoPart, param: str) -> PlannedItem:
        if not self._placeholders:
            raise InvalidRequest(param, f"{self._info.architecture} reads text only")
        media: tuple[bytes, ...]
        if isinstance(part, ImagePart):
            kind, media, fps = ItemKind.IMAGE, (part.data,), 0.0
        else:
            kind, media, fps = ItemKind.VIDEO, part.frames, float(part.fps)  # an encode peer reads one
            if not 1 <= len(media) <= self._max_frames:
                raise MediaError(param, f"a video has 1 to {self._max_frames} frames, not {len(media)}")
            if not 0.0 < fps <= 1000.0:
                raise MediaError(param, f"fps must be above 0 and at most 1000, not {fps}")
        sizes = {header_size(data, param) for data in media}
        if len(sizes) > 1:
            raise MediaError(param, "the frames of a video must be of one size")
        height, width = sizes.pop()
        if len(media) * height * width > MAX_VIDEO_PIXELS:
            raise MediaError(
                param, f"{len(media)} frames of {width} x {height} pixels are more than {MAX_VIDEO_PIXELS} together"
            )
        try:
            if kind is ItemKind.IMAGE:
                grid = image_grid(height, width, self._image, self._max_pixels)
            else:
                grid = video_grid(len(media), height, width, self._video, self._max_video_pixels)
        except ValueError as error:
            raise MediaError(param, str(error)) from error
        rows = grid[0] * grid[1] * grid[2] // self._image.merge**2
        return PlannedItem("", kind, grid, rows, (), media, fps, param)

    def _expand(self, text: str, items: Sequence[PlannedItem]) -> list[str]:
        """Text with one placeholder for each picture: an image's stays, a video's becomes its timed frame pairs."""
        pieces: list[str] = []
        at = 0
        for item in items:
            token = self._placeholders[item.kind][0]
            found = min((p for t, _ in self._placeholders.values() if (p := text.find(t, at)) >= 0), default=-1)
            if found < 0 or not text.startswith(token, found):
                raise InvalidRequest("messages", f"the model's chat template has no place for a {item.kind.value} here")
            pieces.append(text[at:found])
            at = found + len(token)
            if item.kind is ItemKind.IMAGE:
                pieces.append(token)
                continue
            start, end = self._frame
            times = frame_times(len(item.media), item.fps, self._video.temporal_patch)
            pieces.extend(f"<{time:.1f} seconds>{start}{token}{end}" for time in times)
        pieces.append(text[at:])
        return pieces

    def _lay_out(self, short: np.ndarray, items: Sequence[PlannedItem], limit: int | None) -> PromptPlan:
        """Repeats each placeholder for its picture's tokens, and gives every token its positions."""
        places = np.flatnonzero(np.isin(short, [i for _, i in self._placeholders.values()]))
        pictures = [item for item in items for _ in range(item.grid_thw[0])]
        if len(places) != len(pictures):
            raise InvalidRequest("messages", "the model's chat template does not place each image or video once")
        repeats = np.ones(len(short), dtype=np.int64)
        merge = self._image.merge if pictures else 1
        sides = [(item.grid_thw[1] // merge, item.grid_thw[2] // merge) for item in pictures]
        repeats[places] = [h * w for h, w in sides]
        if limit is not None and (tokens := int(repeats.sum())) > limit:
            raise PromptTooLong(tokens, limit)
        starts = np.cumsum(repeats) - repeats
        spans = [(int(starts[p]), int(starts[p] + repeats[p])) for p in places]
        input_ids = np.repeat(short, repeats)
        positions = mrope_positions(len(input_ids), spans, sides)
        planned: list[PlannedItem] = []
        taken = iter(spans)
        for item in items:
            planned += self._groups(item, tuple(next(taken) for _ in range(item.grid_thw[0])))
        delta = int(positions.max()) + 1 - len(input_ids)
        return PromptPlan(input_ids, positions, delta, tuple(planned))

    def _groups(self, item: PlannedItem, spans: tuple[tuple[int, int], ...]) -> Iterator[PlannedItem]:
        """The item, or the frame groups of a large video, with digests and spans."""
        t, h, w = item.grid_thw
        pairs = max(1, self._group_patches // (h * w))
        frames = self._video.temporal_patch if t > 1 else len(item.media)
        for start in range(0, t, pairs):
            own = spans[start : start + pairs]
            grid, media = (len(own), h, w), item.media[start * frames : (start + pairs) * frames]
            digest = item_digest(item.kind, grid, item.fps, media)
            rows = item.rows // t * len(own)
            yield replace(item, digest=digest, grid_thw=grid, rows=rows, spans=own, media=media)


def _check_system(messages: Sequence[ChatMessage], text: str) -> None:
    """Raises InvalidRequest for a system message that the template left out; templates may trim what they print."""
    at = 0
    for i, message in enumerate(messages):
        for said in (p.text.strip() for p in message.parts if message.role == "system" and isinstance(p, TextPart)):
            if (found := text.find(said, at)) < 0:
                raise InvalidRequest(f"messages[{i}]", "the model's chat template leaves out a system message here")
            at = found + len(said)


def frame_times(frames: int, fps: float, temporal_patch: int) -> list[float]:
    """Seconds of each frame pair: the mean of its first and last frame's time; a missing last frame is a copy."""
    times = [i / fps for i in range(frames)]
    times += times[-1:] * (-frames % temporal_patch)
    return [(times[i] + times[i + temporal_patch - 1]) / 2 for i in range(0, len(times), temporal_patch)]


def mrope_positions(tokens: int, spans: Sequence[tuple[int, int]], sides: Sequence[tuple[int, int]]) -> np.ndarray:
    """M-RoPE positions int64 [3, tokens] (temporal, height, width) of a prompt whose half-open ``spans`` are pictures
    of ``sides`` (h, w) tokens, in order. The rule of ``Qwen3VLModel.get_rope_index``."""
    positions = np.empty((3, tokens), dtype=np.int64)
    at = position = 0
    for (start, stop), (h, w) in zip(spans, sides, strict=True):
        positions[:, at:start] = position + np.arange(start - at)
        position += start - at
        positions[0, start:stop] = position
        positions[1, start:stop] = position + np.repeat(np.arange(h), w)
        positions[2, start:stop] = position + np.tile(np.arange(w), h)
        position += max(h, w)
        at = stop
    positions[:, at:] = position + np.arange(tokens - at)
    return positions
