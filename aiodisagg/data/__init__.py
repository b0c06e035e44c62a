"""What the package carries for its demo: scanned handwritten digits and a small model that reads them.

``digits.npz`` holds the 1,797 scans of scikit-learn's digits as counts 0..16 (uint8 [1797, 8, 8]), their labels and
which of them are held out. The split is data, not a seed, so that the training script, the tests and the demo cannot
disagree on what the model has never seen. Nothing here needs torch.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["IMAGE_SIZE", "QUESTION", "answer_of", "digits_model", "held_out_digits", "load_digits", "render_digit"]

IMAGE_SIZE = 96
"""Pixels on a side: 6 x 6 patches, 9 visual tokens. The model's pixel budget brings every square image to it."""

QUESTION = "Which digits are these, in order?"

_FOLDER = Path(__file__).parent


def digits_model() -> Path:
    """The folder of the packaged model, laid out as a released Qwen3-VL-MoE checkpoint."""
    return _FOLDER / "digits"


def load_digits(*, held_out: bool) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Scans uint8 [n, 8, 8] with ink counts 0..16, and labels uint8 [n]: the held-out fifth, or the rest."""
    with np.load(_FOLDER / "digits.npz") as stored:
        chosen = stored["held_out"] == held_out
        return stored["images"][chosen], stored["labels"][chosen]


def held_out_digits() -> tuple[list[bytes], list[int]]:
    """PNG files of the digits the model was never trained on, and what they show."""
    images, labels = load_digits(held_out=True)
    return [render_digit(image) for image in images], [int(label) for label in labels]


def render_digit(counts: npt.NDArray[np.uint8], size: int = IMAGE_SIZE) -> bytes:
    """A grey PNG, dark ink on white, of ``size`` x ``size`` pixels from a scan [8, 8] with counts 0..16."""
    paper = np.round(255.0 - counts.astype(np.float64) * (255.0 / 16.0)).astype(np.uint8)
    image = Image.fromarray(paper).resize((size, size), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def answer_of(labels: Sequence[int]) -> str:
    """What the model is trained to say to these digits."""
    return " ".join(str(label) for label in labels)
