"""Training images made on the device: from 8x8 scans to patches, through random but plausible other scans.

``render`` repeats on tensors what ``aiodisagg.data.render_digit`` and transformers' image processor do to a file, so
the model is served what it was trained on. ``augment`` stays in the world of the data: it warps the paper, then counts
the ink in 8 x 8 cells again, as the scanner of the data set did.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from digits_model import MERGE, PATCH, TEMPORAL

from aiodisagg.data import IMAGE_SIZE


def render(ink: torch.Tensor) -> torch.Tensor:
    """Ink [n, 8, 8] in 0..1 to grey images [n, 96, 96] in 0..1, in steps of 1/255, dark on white."""
    image = torch.round(255.0 - ink * 255.0).unsqueeze(1)
    # Pillow goes across, then down, and keeps bytes between the two; antialias=True takes its bicubic kernel
    # (a = -0.5), without it torch's is another one (a = -0.75).
    for size in ((8, IMAGE_SIZE), (IMAGE_SIZE, IMAGE_SIZE)):
        image = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)
        image = image.round().clamp(0, 255)
    return image.squeeze(1) / 255.0


def patches(images: torch.Tensor) -> torch.Tensor:
    """Grey images [n, 96, 96] in 0..1 to pixel values [n * 36, 3 * 2 * 16 * 16], in the order of the processor."""
    count, cells = len(images), IMAGE_SIZE // PATCH // MERGE
    split = ((images - 0.5) / 0.5).view(count, cells, MERGE, PATCH, cells, MERGE, PATCH)
    split = split.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, 1, PATCH * PATCH)
    return split.expand(-1, 3 * TEMPORAL, -1).reshape(len(split), -1)


def augment(ink: torch.Tensor, strength: float) -> torch.Tensor:
    """Other scans [n, 96, 96] of ink [n, 8, 8] in 0..1; each image draws its own amount of everything, from none up."""
    count, device = len(ink), ink.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, device=device) * (high - low) + low

    amount = strength * torch.rand(count, device=device).sqrt()
    amount = amount * (torch.rand(count, device=device) > 0.1)
    angle = uniform(-1, 1) * amount * math.radians(17)
    shear, wide, high = uniform(-1, 1) * amount * 0.25, uniform(-1, 1) * amount * 0.16, uniform(-1, 1) * amount * 0.16
    shift = uniform(-1, 1, 2) * amount[:, None] * 0.2
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * wide.exp(), (shear - sin) * high.exp(), shift[:, 0]], dim=1)
    row_y = torch.stack([sin * wide.exp(), cos * high.exp(), shift[:, 1]], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), [count, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    bend = torch.randn(count, 2, 4, 4, device=device) * (amount * 0.07)[:, None, None, None]
    bend = F.interpolate(bend, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    grid = grid + bend.permute(0, 2, 3, 1)

    warped = F.grid_sample(1.0 - render(ink).unsqueeze(1), grid, mode="bilinear", align_corners=False)
    cells = F.avg_pool2d(warped, IMAGE_SIZE // 8).squeeze(1)
    # Warping and counting again blurs: a steeper curve sharpens. The exponent thins or thickens the stroke.
    cells = cells ** (amount * uniform(-0.5, 0.5)).exp()[:, None, None]
    cells = (cells - 0.5) * (1.0 + amount * uniform(0.2, 0.9))[:, None, None] + 0.5
    cells = cells + torch.randn_like(cells) * (amount * uniform(0, 0.08))[:, None, None] * (cells > 0.02)
    cells = torch.where(amount[:, None, None] > 0, cells, ink).clamp(0, 1)
    return render(torch.round(cells * 16) / 16)
