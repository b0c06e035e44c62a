"""What a digit checkpoint reaches on the held-out digits: ``python examples/digits_evaluate.py [FOLDER]``.

Files in, text out: PNG files through transformers' image processor, prompts through the chat template, answers by its
own greedy generate, the tower in bfloat16 and the text model in float32, as the project serves it on a CPU.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from digits_reader import Wording, prompt_ids
from PIL import Image

from aiodisagg.data import QUESTION, answer_of, digits_model, held_out_digits

BATCH = 60


class Monolith:
    """The whole model in one process, on the CPU."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3VLMoeForConditionalGeneration

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.model: Any = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.tower = self.model.model.visual.to(torch.bfloat16)

    @torch.no_grad()
    def answers(self, prompts: Sequence[Sequence[bytes]], question: str = QUESTION) -> list[str]:
        """Answers to prompts that all hold the same number of images (PNG files)."""
        said: list[str] = []
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            files = [Image.open(io.BytesIO(file)) for prompt in part for file in prompt]
            inputs = self.processor(images=files, return_tensors="pt")
            ids = torch.tensor([prompt_ids(self.tokenizer, Wording(len(part[0]), question))] * len(part))
            visual = (ids == self.model.config.image_token_id).int()
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=visual,
                pixel_values=inputs["pixel_values"],
                image_grid_thw=inputs["image_grid_thw"],
                max_new_tokens=16,
                do_sample=False,
            )
            said += self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return said

    @contextmanager
    def zeroed(self, *levels: int) -> Iterator[None]:
        """Within, the given DeepStack levels give zeros; level -1 is the final embedding."""
        with ExitStack() as stack:
            for level in levels:
                merger = self.tower.merger if level < 0 else self.tower.deepstack_merger_list[level]
                hook = merger.register_forward_hook(lambda _module, _inputs, out: torch.zeros_like(out))
                stack.callback(hook.remove)
            yield


def four_at_a_time(labels: Sequence[int], rounds: int, seed: int = 0) -> list[list[int]]:
    """Indices of the held-out digits for four-image prompts: whole permutations, so every digit counts alike."""
    rng = np.random.RandomState(seed)
    whole = len(labels) // 4 * 4
    return [group.tolist() for _ in range(rounds) for group in rng.permutation(len(labels))[:whole].reshape(-1, 4)]


def evaluate(folder: Path) -> dict[str, float]:
    """Shares of answers that are right to the letter; keys say of what."""
    monolith = Monolith(folder)
    files, labels = held_out_digits()
    fours = four_at_a_time(labels, rounds=3)

    def share(groups: Sequence[Sequence[int]], order: Callable[[Sequence[int]], Sequence[int]] = list) -> float:
        said = monolith.answers([[files[i] for i in order(group)] for group in groups])
        return float(
            np.mean([a == answer_of([labels[i] for i in group]) for a, group in zip(said, groups, strict=True)])
        )

    singles = [[i] for i in range(len(labels))]
    sixes = [group + fours[-1 - n][:2] for n, group in enumerate(fours[:60])]
    found = {"one_image": share(singles), "four_images": share(fours), "six_images": share(sixes)}
    found["four_images_told_backwards"] = share(fours[:60], order=lambda group: group[::-1])
    depth = len(monolith.tower.deepstack_merger_list)
    with monolith.zeroed(*range(depth)):
        found["one_image_without_deepstack"] = share(singles)
        found["four_images_without_deepstack"] = share(fours[:60])
    for level in range(depth):
        with monolith.zeroed(level):
            found[f"four_images_without_level_{level}"] = share(fours[:60])
    with monolith.zeroed(-1):
        found["four_images_without_final_embedding"] = share(fours[:60])
    return {key: round(value, 4) for key, value in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=digits_model(), help="the package's if left out")
    chosen = parser.parse_args().folder
    if not chosen.is_dir():
        parser.error(f"no such folder: {chosen}")
    print(json.dumps(evaluate(chosen), indent=2))
