"""The packaged digit reader: what the demo promises, held against digits that the model has never seen."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from aiodisagg.data import IMAGE_SIZE, answer_of, digits_model, held_out_digits, load_digits, render_digit

if TYPE_CHECKING:
    from examples.digits_evaluate import Monolith

EXAMPLES = str(Path(__file__).parents[1] / "examples")


@pytest.fixture(scope="module")
def monolith() -> Iterator[Monolith]:
    """The model of the package as transformers loads it, tower in bfloat16, text in float32."""
    sys.path.insert(0, EXAMPLES)
    from digits_evaluate import Monolith

    yield Monolith(digits_model())
    sys.path.remove(EXAMPLES)


@pytest.fixture(scope="module")
def digits() -> tuple[list[bytes], list[int]]:
    return held_out_digits()


def groups_of(size: int, count: int, total: int, seed: int) -> list[list[int]]:
    rng = np.random.RandomState(seed)
    return [[int(i) for i in rng.permutation(total)[:size]] for _ in range(count)]


def right(monolith: Monolith, digits: tuple[list[bytes], list[int]], groups: Sequence[Sequence[int]]) -> float:
    """The share of prompts whose answer is right to the letter."""
    files, labels = digits
    said = monolith.answers([[files[i] for i in group] for group in groups])
    return float(np.mean([a == answer_of([labels[i] for i in g]) for a, g in zip(said, groups, strict=True)]))


def test_a_folder_that_is_not_there_is_told_in_a_line() -> None:
    ran = subprocess.run(
        [sys.executable, f"{EXAMPLES}/digits_evaluate.py", "no/such/folder"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert "no such folder: no/such/folder" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_digits_are_those_of_scikit_learn_and_no_scan_is_on_both_sides() -> None:
    source = pytest.importorskip("sklearn.datasets").load_digits()
    kept, held = load_digits(held_out=False), load_digits(held_out=True)
    assert (len(kept[0]), len(held[0])) == (1438, 359)
    stored = {
        (scan.tobytes(), int(label))
        for scan, label in zip(*map(np.concatenate, zip(kept, held, strict=True)), strict=True)
    }
    assert stored == {(s.astype(np.uint8).tobytes(), int(t)) for s, t in zip(source.images, source.target, strict=True)}
    assert not {scan.tobytes() for scan in kept[0]} & {scan.tobytes() for scan in held[0]}


def test_rendered_digit_is_dark_ink_on_white_paper() -> None:
    scan = np.zeros((8, 8), dtype=np.uint8)
    scan[3:5, 3:5] = 16
    image = Image.open(io.BytesIO(render_digit(scan)))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (IMAGE_SIZE, IMAGE_SIZE))
    assert image.getpixel((0, 0)) == 255 and image.getpixel((IMAGE_SIZE // 2, IMAGE_SIZE // 2)) == 0


def test_training_sees_what_a_file_gives(monolith: Monolith, digits: tuple[list[bytes], list[int]]) -> None:
    import torch
    from digits_augment import patches, render

    scans, _ = load_digits(held_out=True)
    files = [Image.open(io.BytesIO(file)) for file in digits[0][:40]]
    served = monolith.processor(images=files, return_tensors="pt")["pixel_values"]
    trained = patches(render(torch.from_numpy(scans[:40].astype(np.float32) / 16)))
    steps = (served - trained).abs() * 127.5
    # Both round to bytes after each of two passes: a tie that falls the other way is one step each time.
    assert float(steps.max()) < 2.01 and float(steps.mean()) < 0.002


def test_training_computes_what_the_model_does(monolith: Monolith, digits: tuple[list[bytes], list[int]]) -> None:
    import torch
    from digits_model import build_config
    from digits_reader import WORDINGS, Reader, prompt_ids
    from transformers import Qwen3VLMoeForConditionalGeneration

    torch.manual_seed(0)
    config = build_config(monolith.tokenizer)
    plain = Qwen3VLMoeForConditionalGeneration(config).eval()
    files, labels = digits
    for dense in (False, True):
        twin = Qwen3VLMoeForConditionalGeneration(config).eval()
        twin.load_state_dict(plain.state_dict())
        reader = Reader(twin, monolith.tokenizer, dense_experts=dense)
        for wording in WORDINGS[64:68]:
            known = torch.tensor(labels[: 2 * wording.images]).view(2, -1)
            images = [Image.open(io.BytesIO(file)) for file in files[: known.numel()]]
            inputs = monolith.processor(images=images, return_tensors="pt")
            answer = reader.answer_ids(known)
            prompt = torch.tensor([prompt_ids(monolith.tokenizer, wording)]).expand(2, -1)
            ids = torch.cat([prompt, answer[:, :-1]], dim=1)
            with torch.no_grad():
                visual = (ids == config.image_token_id).int()
                expected = plain(input_ids=ids, mm_token_type_ids=visual, **inputs).logits[:, -answer.shape[1] :]
                found = reader.logits(wording, reader.encode(inputs["pixel_values"]), known)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_checkpoint_has_the_layout_of_released_ones() -> None:
    from safetensors import safe_open

    config = json.loads((digits_model() / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    hidden, inner = text["hidden_size"], text["moe_intermediate_size"]
    experts = text.get("num_experts", text.get("num_local_experts"))
    assert config["architectures"] == ["Qwen3VLMoeForConditionalGeneration"]
    assert hidden not in (inner, 2 * inner) and len(vision["deepstack_visual_indexes"]) == 3
    with safe_open(digits_model() / "model.safetensors", "np") as stored:
        layer = "model.language_model.layers.0.mlp.experts."
        assert stored.get_slice(layer + "gate_up_proj").get_shape() == [experts, hidden, 2 * inner]
        assert stored.get_slice(layer + "down_proj").get_shape() == [experts, inner, hidden]
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"BF16"}  # noqa: SIM118
    assert sum(file.stat().st_size for file in digits_model().iterdir()) < 8_000_000


def test_tokenizer_and_template_come_with_the_model(monolith: Monolith) -> None:
    tokenizer = monolith.tokenizer
    assert [len(tokenizer.encode(str(digit))) for digit in range(10)] == [1] * 10
    assert tokenizer.decode(tokenizer.encode("Füße & 東京\n")) == "Füße & 東京\n"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("size", [8, 28, 50, 64, 97, 112, 333, 1000])
def test_every_square_image_has_nine_visual_tokens(monolith: Monolith, size: int) -> None:
    grid = monolith.processor(images=[Image.new("L", (size, size))], return_tensors="np")["image_grid_thw"]
    assert grid.tolist() == [[1, 6, 6]]


def test_reads_digits_it_has_never_seen(monolith: Monolith, digits: tuple[list[bytes], list[int]]) -> None:
    total = len(digits[1])
    assert right(monolith, digits, groups_of(1, 120, total, seed=1)) >= 0.97
    assert right(monolith, digits, groups_of(4, 60, total, seed=2)) >= 0.92


@pytest.mark.parametrize("size", [2, 3, 5, 6])
def test_reads_any_number_of_images_up_to_six(
    monolith: Monolith, digits: tuple[list[bytes], list[int]], size: int
) -> None:
    assert right(monolith, digits, groups_of(size, 12, len(digits[1]), seed=size)) >= 0.75


def test_deepstack_carries_what_the_model_reads(monolith: Monolith, digits: tuple[list[bytes], list[int]]) -> None:
    groups = groups_of(4, 30, len(digits[1]), seed=2)
    with monolith.zeroed(0, 1, 2):
        without = right(monolith, digits, groups)
    assert right(monolith, digits, groups) - without >= 0.2


def test_answer_swaps_when_images_swap(monolith: Monolith, digits: tuple[list[bytes], list[int]]) -> None:
    files, labels = digits
    pairs = [pair for pair in groups_of(2, 24, len(labels), seed=3) if labels[pair[0]] != labels[pair[1]]]
    there = monolith.answers([[files[a], files[b]] for a, b in pairs])
    back = monolith.answers([[files[b], files[a]] for a, b in pairs])
    assert np.mean([one.split() == two.split()[::-1] for one, two in zip(there, back, strict=True)]) >= 0.9
    assert all(one != two for one, two in zip(there, back, strict=True))
