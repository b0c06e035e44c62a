"""From encoded images to patches, without torchvision: sizes from headers, resizing, cutting.

Images give the same float32 values, bit for bit, as transformers' ``Qwen2VLImageProcessorPil``. Videos given as frames
follow ``Qwen3VLVideoProcessor`` with sampling switched off, resized by Pillow instead of torchvision (the two bicubic
filters differ by up to 0.016 of a unit range). Both follow transformers 5.23 whatever version is installed, so peers
with different versions make equal pixels (older ones, for instance, drop transparency instead of flattening it).

Whatever a client sends ends up here, so: only common formats are tried, pixels are counted before any is decoded, and
every error of Pillow becomes a :class:`~aiodisagg.errors.MediaError`. A size taken from a header (planning) and the
size of the decoded picture must agree, so the camera's rotation (EXIF) counts in both, and one function finds it for
both without decoding.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngStream

from aiodisagg.errors import CheckpointError, MediaError
from aiodisagg.models.folder import read_json

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_SOURCE_PIXELS = 64 * 1024 * 1024
"""An image with more pixels is refused by its header. Below Pillow's own limit of 89 million."""
MAX_VIDEO_PIXELS = 2 * 1024**3
"""Of all frames of a video before they are resized: 768 frames of 1080p have fewer; more take minutes to decode."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By the value of the orientation: what makes the picture upright. Those from 5 on swap its sides."""
_SWAPS = frozenset(_TURNS[value] for value in (5, 6, 7, 8))
_PNG, _PNG_CHUNK = b"\x89PNG\r\n\x1a\n", struct.Struct(">I4s")
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_WORDS = (*_PNG_TEXTS, b"iCCP", b"eXIf")
"""Chunks that change no pixel. Texts and colour profiles may be compressed, a thousand times, and be many."""
_PNG_TURNING_TEXTS = (b"exif", b"xmp", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Keywords of the texts in which Pillow looks for an orientation."""
_MAX_EXIF_PIECES = 64
"""Pillow puts the pieces of a JPEG's EXIF together one by one, which takes minutes for millions of small ones."""
_STRIP_PIXELS = 1 << 20
_MAX_ASPECT = 200
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class PixelSettings:
    """One of a folder's two preprocessor configs. Pixels are those of all frames together for a video."""

    min_pixels: int
    max_pixels: int
    patch: int
    temporal_patch: int
    merge: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float
    resample: int
    frame_tokens: int | None = None
    """Set if ``cap_pixels_per_frame`` is: at most so many tokens a frame."""

    @property
    def factor(self) -> int:
        """Pixels along one side of a token."""
        return self.patch * self.merge

    def determining_rows(self) -> tuple[object, ...]:
        """What pixel values depend on once the grid is fixed; part of a model's fingerprint."""
        return (self.patch, self.temporal_patch, self.merge, self.mean, self.std, self.rescale, self.resample)


def load_settings(folder: Path) -> tuple[PixelSettings, PixelSettings]:
    """The settings for images and for videos. Raises CheckpointError for a missing file or an unsupported value."""
    image_name, video_name = "preprocessor_config.json", "video_preprocessor_config.json"
    both = read_json(folder, "processor_config.json", {})  # where newer transformers save them
    image = both.get("image_processor") or read_json(folder, image_name)
    video = both.get("video_processor") or read_json(folder, video_name, read_json(folder, image_name, {}))
    video = {**video, "min_pixels": None, "max_pixels": None}  # size alone counts, other than for images
    of_image = _settings(folder, image_name, image, 56 * 56, 28 * 28 * 1280, 14, _CLIP_MEAN, _CLIP_STD)
    of_video = _settings(folder, video_name, video, 128 * 32 * 32, 768 * 32 * 32, of_image.patch, _HALF, _HALF)
    if (of_image.patch, of_image.temporal_patch, of_image.merge) != (
        of_video.patch,
        of_video.temporal_patch,
        of_video.merge,
    ):
        raise CheckpointError(str(folder), video_name, "patches differ from those of images")
    return of_image, of_video


def _settings(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    min_pixels: int,
    max_pixels: int,
    patch: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> PixelSettings:
    for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if config.get(step) is False:
            raise CheckpointError(str(folder), f"{name}: {step}", "false is not supported")
    size = config.get("size") or {}
    try:
        return PixelSettings(
            min_pixels=int(config.get("min_pixels") or size.get("shortest_edge") or min_pixels),
            max_pixels=int(config.get("max_pixels") or size.get("longest_edge") or max_pixels),
            patch=int(config.get("patch_size", patch)),
            temporal_patch=int(config.get("temporal_patch_size", 2)),
            merge=int(config.get("merge_size", 2)),
            mean=tuple(float(x) for x in config.get("image_mean") or mean),
            std=tuple(float(x) for x in config.get("image_std") or std),
            rescale=float(config.get("rescale_factor", 1 / 255)),
            resample=int(config.get("resample", Image.Resampling.BICUBIC)),
            frame_tokens=int(config.get("max_video_tokens", 768)) if config.get("cap_pixels_per_frame") else None,
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(str(folder), name, f"not a preprocessor config: {error}") from error


# -- sizes ------------------------------------------------------------------------------------------------------


def image_grid(height: int, width: int, settings: PixelSettings, max_pixels: int | None = None) -> tuple[int, int, int]:
    """Grid (1, h, w) in patches of an image of ``height`` x ``width`` pixels. ``max_pixels`` can only lower the
    folder's limit. Raises ValueError for sides more than 200:1. The rule is transformers' ``smart_resize``."""
    _check_aspect(height, width)
    limit = min(settings.max_pixels, max_pixels or settings.max_pixels)
    factor = settings.factor
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > limit:
        h, w = _shrunk(height, width, math.sqrt(height * width / limit), factor)
    elif h * w < settings.min_pixels:
        h, w = _grown(height, width, math.sqrt(settings.min_pixels / (height * width)), factor)
    return 1, h // settings.patch, w // settings.patch


def video_grid(
    frames: int, height: int, width: int, settings: PixelSettings, max_pixels: int | None = None
) -> tuple[int, int, int]:
    """Grid (t, h, w) in patches of ``frames`` >= 1 frames; an odd last frame counts twice. The pixel limits are for
    all frames together. Raises ValueError for sides more than 200:1. The rule is that of ``Qwen3VLVideoProcessor``."""
    factor, pairs = settings.factor, settings.temporal_patch
    frames = max(frames, pairs)  # transformers refuses a single frame; here it counts twice like any odd last one
    limit = min(settings.max_pixels, max_pixels or settings.max_pixels)
    if settings.frame_tokens is not None:
        per_frame = min(settings.frame_tokens * factor * factor, limit // frames)
        limit = max(per_frame, int(settings.min_pixels * 1.05)) * frames
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_aspect(height, width)
    h, w = round(height / factor) * factor, round(width / factor) * factor
    t = round(frames / pairs) * pairs
    if t * h * w > limit:
        h, w = _shrunk(height, width, math.sqrt(frames * height * width / limit), factor)
    elif t * h * w < settings.min_pixels:
        h, w = _grown(height, width, math.sqrt(settings.min_pixels / (frames * height * width)), factor)
    return -(-frames // pairs), h // settings.patch, w // settings.patch


def _check_aspect(height: int, width: int) -> None:
    if max(height, width) / min(height, width) > _MAX_ASPECT:
        raise ValueError(f"{width} x {height} pixels: sides of more than {_MAX_ASPECT}:1")


def _shrunk(height: int, width: int, beta: float, factor: int) -> tuple[int, int]:
    return (
        max(factor, math.floor(height / beta / factor) * factor),
        max(factor, math.floor(width / beta / factor) * factor),
    )


def _grown(height: int, width: int, beta: float, factor: int) -> tuple[int, int]:
    return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor


# -- pictures ---------------------------------------------------------------------------------------------------


def _open(data: bytes, param: str) -> Image.Image:
    """Reads the header only."""
    if data.count(b"Exif\0\0") > _MAX_EXIF_PIECES:
        raise MediaError(param, f"its EXIF is in more than {_MAX_EXIF_PIECES} pieces")
    try:
        image = Image.open(io.BytesIO(_wordless(data)), formats=FORMATS)
        # Decoded in one call, not 64 KB at a time: after each call the thread waits for Python's lock.
        image.decodermaxblock = max(image.decodermaxblock, len(data))
        width, height = image.size
    # Malformed bytes reach Pillow's parsers here: OSError, SyntaxError, ValueError, struct.error, zlib.error, its
    # DecompressionBomb warnings and errors and more. Whatever it is, it says one thing about the file.
    except Exception as error:
        raise MediaError(param, f"not a {', '.join(FORMATS)} image: {_brief(error)}") from error
    if width * height > MAX_SOURCE_PIXELS:
        raise MediaError(param, f"{width} x {height} pixels are more than {MAX_SOURCE_PIXELS}")
    if min(width, height) < 1:
        raise MediaError(param, f"{width} x {height} pixels")
    if image.mode.startswith(("I", "F")):  # Pillow makes nearly all of it white
        raise MediaError(param, f"grey of more than 8 bits (mode {image.mode}) is not supported, RGB is")
    return image


def _brief(error: Exception) -> str:
    text = str(error) if not isinstance(error, UnidentifiedImageError) else "unknown format"
    return f"{type(error).__name__}: {text[:200]}"


def header_size(data: bytes, param: str) -> tuple[int, int]:
    """(height, width) in pixels as the picture is meant to be seen, from its header. Raises MediaError."""
    image = _open(data, param)
    try:
        width, height = image.size
        return (width, height) if _turn(image, data) in _SWAPS else (height, width)
    except Exception as error:  # as in _open
        raise MediaError(param, f"broken image: {_brief(error)}") from error


def decode_rgb(data: bytes, param: str) -> Image.Image:
    """The picture in RGB, turned as its EXIF says, transparency laid on white. Raises MediaError."""
    image = _open(data, param)
    try:
        turn = _turn(image, data)
        image.load()
        if turn is not None:
            image = image.transpose(turn)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            return _on_white(image)
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    except Exception as error:  # as in _open
        raise MediaError(param, f"broken or truncated image: {_brief(error)}") from error


def _on_white(image: Image.Image) -> Image.Image:
    """In RGB, some rows at a time: there are three pictures of four bytes a pixel on the way to it."""
    made, rows = Image.new("RGB", image.size), max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        part = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", part.size, (255, 255, 255, 255))
        made.paste(Image.alpha_composite(white, part).convert("RGB"), box)
    return made


def _turn(image: Image.Image, data: bytes) -> Image.Transpose | None:
    """What makes a picture upright of which the header was read; finds what ``ImageOps.exif_transpose`` would find, and
    decodes no pixel. A planner may be asked for a thousand pictures of 64 megapixels in files of 8 KB."""
    if image.format == "PNG":
        _read_turns(image, data)
    # The PNG class's own getexif() decodes all pixels first, to come by the chunks behind them.
    return _TURNS.get(Image.Image.getexif(image).get(_ORIENTATION, 1))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, where its body begins, length) of each, as long as they are chunks to Pillow."""
    at = len(_PNG)
    while at + _PNG_CHUNK.size <= len(data):
        length, kind = _PNG_CHUNK.unpack_from(data, at)
        at += _PNG_CHUNK.size
        if kind == b"IEND" or not kind.replace(b"_", b"0").isalnum():
            return
        yield kind, at, length
        at += length + 4  # and its checksum


def _wordless(data: bytes) -> bytes:
    """A PNG without its ``_PNG_WORDS``, which Pillow reads, and decompresses, all. Other files as they are."""
    if not data.startswith(_PNG):
        return data
    kept, since = [], 0
    for kind, at, length in _png_chunks(data):
        if kind in _PNG_WORDS:
            kept.append(data[since : at - _PNG_CHUNK.size])
            since = at + length + 4
    return b"".join([*kept, data[since:]]) if kept else data


def _read_turns(image: Image.Image, data: bytes) -> None:
    """Adds to a PNG's ``info`` what turns the picture, before or behind its pixels.

    Of several chunks that say the same the last one counts, and only that is read.
    """
    found: dict[bytes, tuple[bytes, int, int]] = {}
    animated, behind = getattr(image, "is_animated", False), False
    for kind, at, length in _png_chunks(data):
        behind |= kind in (b"IDAT", b"fdAT")
        if behind and animated and kind == b"fcTL":
            break  # where Pillow stops, too: behind the first frame
        if kind == b"eXIf":
            says = b"exif"
        elif kind in _PNG_TEXTS:
            says = data[at : at + min(length, 80)].split(b"\0", 1)[0]
        else:
            continue
        if says not in _PNG_TURNING_TEXTS:
            continue
        end = at + length
        if not behind and zlib.crc32(data[at - 4 : end]).to_bytes(4, "big") != data[end : end + 4]:
            raise ValueError(f"broken PNG file: the checksum of {kind!r} is wrong")
        found[says] = kind, at, length
    source = io.BytesIO(data)
    stream = PngStream(source)
    stream.im_info = image.info
    for kind, at, length in found.values():
        source.seek(at)
        stream.call(kind, at, length)


# -- patches ----------------------------------------------------------------------------------------------------


def resized(frame: Image.Image, grid_thw: tuple[int, int, int], settings: PixelSettings) -> np.ndarray:
    """The bytes of an RGB frame at the grid's size: uint8 [h*patch, w*patch, 3]."""
    size = grid_thw[2] * settings.patch, grid_thw[1] * settings.patch
    return np.asarray(frame.resize(size, resample=Image.Resampling(settings.resample)))


def cut_patches(frames: Sequence[np.ndarray], grid_thw: tuple[int, int, int], settings: PixelSettings) -> np.ndarray:
    """Cuts frames that are ``resized`` to the grid: float32 [t*h*w, 3*temporal_patch*patch*patch].

    The order of patches is the model's: the merge x merge patches of one token are neighbours. One frame (an image)
    fills all temporal places; a missing last frame is a copy of the one before.
    """
    t, h, w = grid_thw
    p, m, n = settings.patch, settings.merge, settings.temporal_patch
    pixels = np.stack(frames)
    # Bytes are put in order, a quarter of what the values are; and those of a still image once for all its places.
    places = 1 if len(frames) == 1 and t == 1 else n
    pixels = np.concatenate([pixels, np.repeat(pixels[-1:], t * places - len(frames), axis=0)])
    ordered = pixels.reshape(t, places, h // m, m, p, w // m, m, p, 3).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    ordered = ordered.reshape(t * h * w, 3, places, p * p)
    table, values = value_table(settings), np.empty((t * h * w, 3, n, p * p), dtype=np.float32)
    for c in range(3):
        values[:, c, :places] = table[:, c][ordered[:, c]]
    if places < n:
        values[:, :, places:] = values[:, :, :1]
    return values.reshape(t * h * w, 3 * n * p * p)


def value_table(settings: PixelSettings) -> np.ndarray:
    """float32 [256, 3]: a value depends on its byte and channel only, so this gives the very floats of the long way."""
    scaled = (np.arange(256).astype(np.float64) * settings.rescale).astype(np.float32)
    mean, std = np.array(settings.mean, dtype=np.float32), np.array(settings.std, dtype=np.float32)
    table: np.ndarray = (scaled[:, None] - mean) / std
    return table


def fits(height: int, width: int, grid_thw: tuple[int, int, int], settings: PixelSettings) -> bool:
    """Whether a picture of this size can have been planned with this grid, whatever the planner's pixel limit: for
    some scale both sides are within one token of the grid's."""
    factor, sides = settings.factor, (grid_thw[1] * settings.patch, grid_thw[2] * settings.patch)
    if any(side < factor or side % factor for side in sides):
        return False
    lowest = max((sides[0] - factor - 1) / height, (sides[1] - factor - 1) / width)
    highest = min((sides[0] + factor + 1) / height, (sides[1] + factor + 1) / width)
    return lowest <= highest
