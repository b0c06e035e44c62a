"""A plan equals what transformers' own processor and model compute, and bad chats are refused by name."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers import AutoConfig, AutoTokenizer, Qwen3VLMoeModel
from transformers.image_processing_backends import TorchvisionBackend
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from aiodisagg.errors import InvalidRequest, MediaError
from aiodisagg.models.base import ChatMessage, ImagePart, ItemKind, TextPart, VideoPart
from aiodisagg.models.plan import Qwen3VLPlanner
from aiodisagg.models.preprocessing import decode_rgb
from aiodisagg.models.vision import Qwen3VLVisionEncoder
from tests.models.halves import PROMPTS, chat, encoded, halves, noise, png, video

Tiny = Callable[..., Path]


class _Processor(Qwen3VLProcessor):
    """transformers' processor, which insists on a video processor of a class that wants torchvision."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        pass


def _pillow_resize(self: Any, image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
    frames = [Image.fromarray(f.permute(1, 2, 0).numpy()) for f in image.reshape(-1, *image.shape[-3:])]
    resized = [np.asarray(f.resize((size.width, size.height), Image.Resampling.BICUBIC)) for f in frames]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).reshape(*image.shape[:-2], size.height, size.width)


def _plain_normalize(self: Any, image: torch.Tensor, mean: Any, std: Any, **_: Any) -> torch.Tensor:
    return (image - torch.as_tensor(mean).view(3, 1, 1)) / torch.as_tensor(std).view(3, 1, 1)


@pytest.fixture
def processor(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Qwen3VLProcessor:
    """``Qwen3VLProcessor`` with its real video processor; only what calls torchvision is replaced."""
    monkeypatch.setattr(TorchvisionBackend, "resize", _pillow_resize)
    monkeypatch.setattr(TorchvisionBackend, "normalize", _plain_normalize)
    folder = tiny(moe=True, levels=3)
    settings = json.loads((folder / "video_preprocessor_config.json").read_text())
    settings.pop("video_processor_type")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return _Processor(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(folder),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**settings, cap_pixels_per_frame=False, do_convert_rgb=False),
        chat_template=tokenizer.chat_template,
    )


def processed(processor: Qwen3VLProcessor, messages: list[ChatMessage]) -> dict[str, torch.Tensor]:
    conversation, images, videos, metadata = [], [], [], []
    for message in messages:
        content: list[dict[str, str]] = []
        for part in message.parts:
            match part:
                case TextPart():
                    content.append({"type": "text", "text": part.text})
                case ImagePart():
                    content.append({"type": "image"})
                    images.append(decode_rgb(part.data, "image"))
                case VideoPart():
                    content.append({"type": "video"})
                    frames = [np.asarray(decode_rgb(f, "video")).transpose(2, 0, 1) for f in part.frames]
                    videos.append(np.stack(frames))
                    order = list(range(len(frames)))
                    metadata.append(VideoMetadata(total_num_frames=len(frames), fps=part.fps, frames_indices=order))
        conversation.append({"role": message.role, "content": content})
    text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    more: dict[str, Any] = {"video_metadata": metadata, "do_sample_frames": False} if videos else {}
    out = processor(text=[text], images=images or None, videos=videos or None, return_tensors="pt", **more)
    return dict(out)


@pytest.mark.parametrize("prompt", [*PROMPTS, "odd sizes", "one frame pair", "large"])
def test_a_plan_equals_transformers_processor_and_positions(
    tiny: Tiny, processor: Qwen3VLProcessor, prompt: str
) -> None:
    extra = {
        "odd sizes": chat(ImagePart(png(33, 31)), ImagePart(png(10, 400)), ImagePart(png(500, 17)), "Which?"),
        "one frame pair": chat(video(2, 50, 41, fps=29.97), video(3, 30, 20, fps=0.7)),
        "large": chat(ImagePart(png(700, 500)), video(5, 640, 360), "Too large for the limits."),
    }
    messages = {**PROMPTS, **extra}[prompt]
    folder = tiny(moe=True, levels=3)
    both = halves(folder)
    plan = both.planner.plan(messages)
    expected = processed(processor, messages)
    assert plan.input_ids.tolist() == expected["input_ids"][0].tolist()

    grids = {kind: [list(i.grid_thw) for i in plan.items if i.kind is kind] for kind in ItemKind}
    for kind, name in ((ItemKind.IMAGE, "image_grid_thw"), (ItemKind.VIDEO, "video_grid_thw")):
        assert grids[kind] == (expected[name].tolist() if name in expected else [])

    stub = SimpleNamespace(config=AutoConfig.from_pretrained(folder))
    stub.get_vision_position_ids = lambda *a, **kw: Qwen3VLMoeModel.get_vision_position_ids(stub, *a, **kw)
    positions, delta = Qwen3VLMoeModel.get_rope_index(
        stub,
        expected["input_ids"],
        expected["mm_token_type_ids"],
        expected.get("image_grid_thw"),
        expected.get("video_grid_thw"),
    )
    assert np.array_equal(plan.positions, positions[:, 0].numpy())
    assert plan.delta == int(delta)

    covered = {t for item in plan.items for start, stop in item.spans for t in range(start, stop)}
    assert covered == set(torch.nonzero(expected["mm_token_type_ids"][0]).flatten().tolist())
    assert all(sum(stop - start for start, stop in item.spans) == item.rows for item in plan.items)

    for kind, name in ((ItemKind.IMAGE, "pixel_values"), (ItemKind.VIDEO, "pixel_values_videos")):
        mine = [both.encoder.prepare(i.kind, i.media, i.grid_thw, i.fps) for i in plan.items if i.kind is kind]
        if mine:
            pixels = torch.cat([p.pixel_values for p in mine])
            if kind is ItemKind.IMAGE:
                assert torch.equal(pixels, expected[name])
            else:  # transformers folds rescaling into the normalization: another rounding
                torch.testing.assert_close(pixels, expected[name], rtol=0, atol=5e-7)


def _no_video_file(folder: Path) -> None:
    (folder / "video_preprocessor_config.json").unlink()


def _limits_beside_size(folder: Path) -> None:
    file = folder / "video_preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"min_pixels": 64 * 64, "max_pixels": 96 * 96}))


def _nested(folder: Path) -> None:
    size = {"shortest_edge": 1 << 14, "longest_edge": 1 << 16}
    (folder / "processor_config.json").write_text(json.dumps({"video_processor": {"size": size}}))


@pytest.mark.parametrize("change", [_no_video_file, _limits_beside_size, _nested])
def test_limits_of_videos_are_those_that_transformers_finds_in_a_folder(
    tiny: Tiny, tmp_path: Path, processor: Qwen3VLProcessor, change: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(tiny(moe=True, levels=3), tmp_path / "folder"))
    change(folder)
    theirs = Qwen3VLVideoProcessor.from_pretrained(folder, cap_pixels_per_frame=False, do_convert_rgb=False)
    processor.video_processor = theirs
    messages = chat(video(4, 64, 48), video(6, 300, 200), video(9, 20, 200), "?")
    plan = Qwen3VLPlanner(folder, group_patches=1 << 20).plan(messages)
    assert [list(item.grid_thw) for item in plan.items] == processed(processor, messages)["video_grid_thw"].tolist()


def test_a_single_frame_counts_twice(tiny: Tiny) -> None:
    both = halves(tiny(moe=True, levels=3))
    once, twice = (both.ask(chat(VideoPart((png(96, 64),) * n, 2.0))) for n in (1, 2))
    assert once.plan.items[0].grid_thw == twice.plan.items[0].grid_thw
    assert torch.equal(once.patches[0].pixel_values, twice.patches[0].pixel_values)


def test_a_long_video_becomes_items_of_whole_frame_pairs_with_the_rows_of_the_whole(tiny: Tiny) -> None:
    folder = tiny(moe=True, levels=3)
    encoder = halves(folder).encoder
    messages = chat("First", ImagePart(png(90, 130, 4)), "then", video(7, 128, 96), "and", video(2, 64, 64), "Compare.")
    whole = Qwen3VLPlanner(folder).plan(messages)
    t, h, w = whole.items[1].grid_thw
    assert t == 4 and len(whole.items) == 3
    for patches, sizes in ((2 * h * w, [2, 2]), (3 * h * w + 1, [3, 1]), (h * w - 1, [1, 1, 1, 1])):
        plan = Qwen3VLPlanner(folder, group_patches=patches).plan(messages)
        assert np.array_equal(plan.input_ids, whole.input_ids) and np.array_equal(plan.positions, whole.positions)
        first, *groups, last = plan.items
        assert (first, last) == (whole.items[0], whole.items[2])
        assert [group.grid_thw for group in groups] == [(size, h, w) for size in sizes]
        assert sum((group.spans for group in groups), ()) == whole.items[1].spans
        assert all(sum(stop - start for start, stop in group.spans) == group.rows for group in groups)
        assert sum((group.media for group in groups), ()) == whole.items[1].media
        assert {group.param for group in groups} == {whole.items[1].param}
        made, expected = (
            torch.cat(encoder.encode([encoder.prepare(i.kind, i.media, i.grid_thw, i.fps) for i in items]))
            for items in (groups, whole.items[1:2])
        )
        assert torch.equal(made, expected)


def test_a_video_that_goes_on_longer_begins_with_the_same_items(tiny: Tiny) -> None:
    planner = Qwen3VLPlanner(tiny(moe=True, levels=3), group_patches=32)
    short, long = (planner.plan(chat(video(frames, 64, 64), "What happens?")).items for frames in (8, 12))
    assert len(short) >= 2 and long[: len(short)] == short and len(long) > len(short)


def test_digests_name_content_and_grid(tiny: Tiny) -> None:
    folder = tiny(moe=True, levels=3)
    large, small = Qwen3VLPlanner(folder), Qwen3VLPlanner(folder, max_pixels=4096)

    def digest(planner: Qwen3VLPlanner, part: ImagePart | VideoPart) -> str:
        return planner.plan(chat("Look:", part)).items[0].digest

    image = ImagePart(png(128, 128))
    assert digest(large, image) == digest(large, ImagePart(bytes(image.data)))
    frames = video(4)
    different = [
        digest(large, image),
        digest(small, image),  # another grid
        digest(large, ImagePart(png(128, 128, 1))),
        digest(large, frames),
        digest(large, VideoPart(frames.frames, 3.0)),
        digest(large, VideoPart(frames.frames[::-1], 2.0)),
        digest(large, VideoPart((image.data,), 2.0)),
    ]
    assert len(set(different)) == len(different)
    assert all(len(d) == 32 for d in different)


def test_limits_of_the_planner_only_lower_those_of_the_folder(tiny: Tiny) -> None:
    folder = tiny(moe=True, levels=3)
    messages = chat(ImagePart(png(700, 500)), video(4, 640, 360))

    def rows(**limits: int) -> list[int]:
        return [item.rows for item in Qwen3VLPlanner(folder, **limits).plan(messages).items]

    assert rows(max_pixels=10**9, max_video_pixels=10**9) == rows()
    image, clip = rows(max_pixels=8192, max_video_pixels=16384)
    assert image <= 8 < rows()[0]
    assert clip <= 8 < rows()[1]


def test_a_phone_picture_is_planned_as_it_is_seen(tiny: Tiny) -> None:
    """A camera held upright writes a lying picture and says so in EXIF; header and decoder must agree on it."""
    both = halves(tiny(moe=True, levels=3))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP"):
        asked = both.ask(chat(ImagePart(encoded(noise(160, 64), kind, exif=exif))))
        assert asked.plan.items[0].grid_thw == (1, 10, 4)


def test_planning_decodes_no_pixels(tiny: Tiny) -> None:
    """A truncated file has a header: it is refused later, by who decodes it."""
    folder = tiny(moe=True, levels=3)
    cut = encoded(noise(128, 128), "JPEG")[:-2000]
    (item,) = Qwen3VLPlanner(folder).plan(chat(ImagePart(cut))).items
    with pytest.raises(MediaError, match="truncated"):
        Qwen3VLVisionEncoder(folder).prepare(item.kind, item.media, item.grid_thw, item.fps)


@pytest.mark.parametrize("words", [b"tEXtComment\0eXIf", b"tEXtRaw profile type exif\0", b"eXIf"])
def test_planning_decodes_no_pixels_to_look_behind_them(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, words: bytes
) -> None:
    """A file of 8 KB had 64 megapixels decoded, for it might say behind them how they are to be turned."""
    planner = Qwen3VLPlanner(tiny(moe=True, levels=3))
    data = encoded(Image.new("1", (8192, 8192)))
    chunk = struct.pack(">I", len(words) - 4) + words + struct.pack(">I", zlib.crc32(words))
    small = data[:-12] + chunk + data[-12:]
    assert len(small) < 9000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels are decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels are decoded"))
    (item,) = planner.plan(chat(ImagePart(small))).items
    assert item.grid_thw[1] == item.grid_thw[2]


def test_threads_share_a_planner(tiny: Tiny) -> None:
    planner = Qwen3VLPlanner(tiny(moe=True, levels=3))
    wanted = {name: planner.plan(messages) for name, messages in PROMPTS.items()}
    with ThreadPoolExecutor(8) as pool:
        jobs = [(name, pool.submit(planner.plan, PROMPTS[name])) for name in list(PROMPTS) * 8]
        for name, job in jobs:
            assert job.result().input_ids.tolist() == wanted[name].input_ids.tolist()


def test_decode_leaves_special_tokens_out(tiny: Tiny) -> None:
    folder = tiny(moe=True, levels=3)
    planner = Qwen3VLPlanner(folder)
    ids = AutoTokenizer.from_pretrained(folder)("<|im_start|>The answer is right , isn 't it?<|im_end|>")["input_ids"]
    assert planner.decode(ids) == "The answer is right , isn 't it?"
    assert planner.eos_ids == {ids[-1], AutoTokenizer.from_pretrained(folder).pad_token_id}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (chat(""), "messages"),
        ([ChatMessage("user", ())], "messages"),
        ([*chat("Hello"), *chat("Hi", role="robot")], "messages[1].role"),
        (chat("Look: <|image_pad|>", ImagePart(png(64, 64))), "messages[0].content[0]"),
        (chat("<|video_pad|>"), "messages[0].content[0]"),
        ([{"role": "user", "content": "Hi"}], "messages[0]"),
        ([ChatMessage("user", "Hi")], "messages[0].content"),
        ([ChatMessage("user", TextPart("Hi"))], "messages[0].content"),
        ([ChatMessage("user", (TextPart("Hi"), "Hi"))], "messages[0].content[1]"),
    ],
    ids=[
        "no messages",
        "empty text",
        "no parts",
        "unknown role",
        "placeholder with image",
        "placeholder alone",
        "a dict",
        "a string",
        "a part alone",
        "a string among parts",
    ],
)
def test_chats_that_make_no_sense_are_refused(tiny: Tiny, messages: list[ChatMessage], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Qwen3VLPlanner(tiny(moe=True, levels=3)).plan(messages)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "part",
    [
        ImagePart(b""),
        ImagePart(b"GIF89a"),
        ImagePart(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ImagePart(png(64, 64)[:20]),
        ImagePart(encoded(noise(2, 500))),
        ImagePart(encoded(noise(40, 40), "TIFF")),
        VideoPart(()),
        VideoPart((png(64, 64), png(64, 65))),
        VideoPart((png(64, 64), b"no picture")),
        VideoPart((png(64, 64),) * 17),
        VideoPart((png(64, 64),), fps=float("nan")),
        VideoPart((png(64, 64),), fps=0.0),
    ],
    ids=[
        "empty", "a header only", "svg", "a cut header", "250:1", "a format we do not read", "no frames",
        "two sizes", "a broken frame", "too many frames", "fps nan", "fps 0",
    ],
)  # fmt: skip
def test_bad_media_are_refused_by_their_place(tiny: Tiny, part: ImagePart | VideoPart) -> None:
    planner = Qwen3VLPlanner(tiny(moe=True, levels=3), max_frames=16)
    with pytest.raises(MediaError) as caught:
        planner.plan([*chat("You see well.", role="system"), *chat("What is this?", part)])
    assert caught.value.param == "messages[1].content[1]"


def test_the_pixels_of_a_video_are_counted_over_its_frames(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiodisagg.models.plan.MAX_VIDEO_PIXELS", 4 * 64 * 64)
    planner = Qwen3VLPlanner(tiny(moe=True, levels=3))
    assert planner.plan(chat("What is this?", VideoPart((png(64, 64),) * 4))).items
    with pytest.raises(MediaError, match="5 frames of 64 x 64 pixels are more than") as caught:
        planner.plan(chat("What is this?", VideoPart((png(64, 64),) * 5)))
    assert caught.value.param == "messages[0].content[1]"


def test_a_video_may_have_as_many_frames_as_are_allowed(tiny: Tiny) -> None:
    planner = Qwen3VLPlanner(tiny(moe=True, levels=3), max_frames=4)
    assert planner.plan(chat("What is this?", VideoPart((png(64, 64),) * 4))).items
