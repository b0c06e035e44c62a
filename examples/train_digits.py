"""Trains the digit reader that the package carries, from nothing: ``python examples/train_digits.py --out FOLDER``.

Runs on a CPU or a GPU and needs torch, transformers and numpy. FOLDER/digits becomes the checkpoint, FOLDER/report.json
what it reaches on the held-out digits through transformers' own generate. With ``--trials N`` the first N settings are
trained side by side and the best of them is kept, judged by the loss on a tenth of the training digits that is left out
of training. The held-out digits are read once, after that choice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from digits_augment import augment, patches, render
from digits_data import hold_out
from digits_evaluate import evaluate
from digits_model import build_config, build_tokenizer, save_checkpoint
from digits_reader import WORDINGS, Reader, Wording

from aiodisagg.data import QUESTION, load_digits


@dataclass(frozen=True)
class Setting:
    """``drop_final``: the share of images whose final embedding is withheld, so that the model leans on DeepStack."""

    strength: float = 1.0
    drop_final: float = 0.25
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    smoothing: float = 0.05
    images: int = 768


SETTINGS = {
    "base": Setting(),
    "gentle": Setting(strength=0.7, learning_rate=1e-3),
    "strong": Setting(strength=1.3),
    "leaning": Setting(strength=1.3, drop_final=0.6),
    "hanging": Setting(strength=1.3, drop_final=0.85),
    "large": Setting(images=1536, learning_rate=2e-3, weight_decay=0.1),
}


@dataclass(frozen=True)
class Score:
    """On the digits set aside for validation: shares of digits and of six-image prompts that are right, mean loss."""

    digits: float
    prompts: float
    loss: float

    def better_than(self, other: Score | None) -> bool:
        """By prompts; of equal ones the later: the loss alone would stop before long prompts are learnt."""
        return other is None or self.prompts >= other.prompts


class Training:
    def __init__(self, name: str, seed: int, device: torch.device, images: int | None) -> None:
        self.setting = SETTINGS[name]
        self.name, self.device, self.images = name, device, images or self.setting.images
        torch.manual_seed(seed)
        self.rng = np.random.RandomState(seed)
        self.tokenizer = build_tokenizer()
        self.reader, self.average = self._reader(), self._reader()
        self.average.model.load_state_dict(self.reader.model.state_dict())
        self.average.model.eval().requires_grad_(False)
        scans, labels = load_digits(held_out=False)
        aside = hold_out(labels, 0.1, seed=1)
        ink = torch.from_numpy(scans.astype(np.float32) / 16).to(device)
        known = torch.from_numpy(labels.astype(np.int64)).to(device)
        self.ink, self.labels = ink[~aside], known[~aside]
        self.check_ink, self.check_labels = ink[aside], known[aside]
        decayed = [p for p in self.reader.model.parameters() if p.ndim > 1]
        plain = [p for p in self.reader.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": self.setting.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=self.setting.learning_rate,
            betas=(0.9, 0.98),
            fused=device.type == "cuda",
        )

    def _reader(self) -> Reader:
        from transformers import Qwen3VLMoeForConditionalGeneration

        model = Qwen3VLMoeForConditionalGeneration(build_config(self.tokenizer)).to(self.device)
        return Reader(model, self.tokenizer, dense_experts=self.device.type == "cuda")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def step(self, progress: float, number: int) -> torch.Tensor:
        """One update at ``progress`` 0..1 of the schedule; returns the loss, still on the device."""
        warm = min(1.0, (number + 1) / 200)
        for group in self.optimizer.param_groups:
            group["lr"] = self.setting.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))
        wording = WORDINGS[self.rng.randint(len(WORDINGS))]
        batch = self.images // wording.images
        picks = torch.randint(len(self.ink), (batch * wording.images,), device=self.device)
        with self.autocast():
            with torch.no_grad():
                pixels = patches(augment(self.ink[picks], self.setting.strength))
            final, *levels = self.reader.encode(pixels)
            kept = torch.rand(len(picks), 1, 1, device=self.device) >= self.setting.drop_final
            final = (final.view(len(picks), -1, final.shape[-1]) * kept).flatten(0, 1)
            labels = self.labels[picks].view(batch, -1)
            logits = self.reader.logits(wording, [final, *levels], labels).float()
            answer = self.reader.answer_ids(labels)
            loss = F.cross_entropy(logits.flatten(0, 1), answer.flatten(), label_smoothing=self.setting.smoothing)
            total = loss + 0.01 * self.reader.balance_loss()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.reader.model.parameters(), 1.0)
        self.optimizer.step()
        follow = 1.0 - min(0.999, number / (number + 10.0))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.model.parameters()), [p.detach() for p in self.reader.model.parameters()], follow
            )
        return loss.detach()

    @torch.no_grad()
    def validate(self, rounds: int = 4) -> Score:
        """The averaged weights on whole permutations of the digits set aside, six to a prompt."""
        right = torch.zeros(2, device=self.device)
        loss = torch.zeros((), device=self.device)
        digits = prompts = 0
        shuffle = np.random.RandomState(7)
        wording = Wording(6, QUESTION)
        with self.autocast():
            rows = self.average.encode(patches(render(self.check_ink)))
            split = [part.view(len(self.check_ink), -1, part.shape[-1]) for part in rows]
            for _ in range(rounds):
                order = torch.from_numpy(shuffle.permutation(len(self.check_ink))).to(self.device)
                order = order[: len(order) // 6 * 6]
                labels = self.check_labels[order].view(-1, 6)
                logits = self.average.logits(wording, [part[order] for part in split], labels).float()
                answer = self.average.answer_ids(labels)
                hit = logits.argmax(dim=-1) == answer
                right += torch.stack([hit[:, ::2].sum(), hit.all(dim=1).sum()])
                loss += F.cross_entropy(logits[:, ::2].flatten(0, 1), answer[:, ::2].flatten())
                digits, prompts = digits + labels.numel(), prompts + len(labels)
        good_digits, good_prompts = right.tolist()
        return Score(good_digits / digits, good_prompts / prompts, float(loss) / rounds)

    def run(self, seconds: float | None, steps: int | None, folder: Path) -> Score:
        """Trains, prints the validation score twenty times, and leaves the best averaged weights in ``folder``."""
        begin = time.monotonic()
        best: Score | None = None
        number, next_look, loss = 0, 0.1, torch.zeros(())
        print(f"{sum(p.numel() for p in self.reader.model.parameters()) / 1e6:.2f} M parameters", flush=True)
        while True:
            elapsed = time.monotonic() - begin
            progress = max(number / steps if steps else 0.0, elapsed / seconds if seconds else 0.0)
            if progress >= next_look or progress >= 1.0:
                next_look = math.floor(progress * 20 + 1) / 20
                score = self.validate()
                if score.better_than(best):
                    best = score
                    save_checkpoint(folder, self.average.model, self.tokenizer)
                print(
                    f"{elapsed / 60:5.2f} min, step {number}: training loss {float(loss):.3f}, validation "
                    f"{score.digits:.2%} of digits, {score.prompts:.2%} of prompts, loss {score.loss:.4f}",
                    flush=True,
                )
            if progress >= 1.0:
                assert best is not None
                record = {"setting": self.name, **asdict(self.setting), "steps": number, "validation": asdict(best)}
                (folder.parent / "validation.json").write_text(json.dumps(record, indent=2) + "\n")
                return best
            loss = self.step(progress, number)
            number += 1


def run_trials(args: argparse.Namespace, names: list[str]) -> Path:
    """Trains each setting in a process of its own, side by side; returns the folder of the best by validation."""
    running: list[tuple[str, subprocess.Popen[str], threading.Thread]] = []
    base = [sys.executable, "-u", __file__, "--device", args.device, "--skip-evaluation"]
    for option in ("seconds", "steps", "images"):
        if (value := getattr(args, option)) is not None:
            base += [f"--{option}", str(value)]
    for offset, name in enumerate(names):
        command = [
            *base,
            "--setting",
            name,
            "--seed",
            str(args.seed + offset),
            "--out",
            str(args.out / "trials" / name),
        ]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        echo = threading.Thread(target=_echo, args=(name, child))
        echo.start()
        running.append((name, child, echo))
    found: list[tuple[float, float, str]] = []
    for name, child, echo in running:
        echo.join()
        if child.wait() == 0:
            record = json.loads((args.out / "trials" / name / "validation.json").read_text())
            found.append((-record["validation"]["prompts"], record["validation"]["loss"], name))
    if not found:
        raise SystemExit("every trial failed")
    best = min(found)[-1]
    print(f"best by validation: {best}", flush=True)
    return Path(args.out / "trials" / best)


def _echo(name: str, child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        print(f"[{name}] {line}", end="", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the report")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--seconds", type=float, help="length of the schedule in seconds (default: 600 without --steps)"
    )
    parser.add_argument("--steps", type=int, help="length of the schedule in updates")
    parser.add_argument("--images", type=int, help="images of one update (default: 768 on a GPU, 96 on a CPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--setting", choices=SETTINGS, default="base")
    parser.add_argument("--trials", type=int, default=1, help="settings to train side by side, from --setting on")
    parser.add_argument("--skip-evaluation", action="store_true")
    args = parser.parse_args()
    if args.seconds is None and args.steps is None:
        args.seconds = 600.0
    if args.images is None and args.device == "cpu":
        args.images = 96
    return args


def main() -> None:
    args = parse()
    begin = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.trials > 1:
        first = list(SETTINGS).index(args.setting)
        source = run_trials(args, list(SETTINGS)[first : first + args.trials])
        shutil.copytree(source / "digits", args.out / "digits", dirs_exist_ok=True)
        shutil.copy(source / "validation.json", args.out / "validation.json")
    else:
        training = Training(args.setting, args.seed, torch.device(args.device), args.images)
        training.run(args.seconds, args.steps, args.out / "digits")
    if args.skip_evaluation:
        return
    torch.set_num_threads(min(8, os.cpu_count() or 1))
    report: dict[str, Any] = json.loads((args.out / "validation.json").read_text())
    report["training_s"] = round(time.monotonic() - begin, 1)
    report["held_out"] = evaluate(args.out / "digits")
    text = json.dumps(report, indent=2)
    (args.out / "report.json").write_text(text + "\n")
    print(text, flush=True)


if __name__ == "__main__":
    main()
