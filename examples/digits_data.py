"""Makes aiodisagg/data/digits.npz again from scikit-learn: ``python examples/digits_data.py [FILE]``.

One fifth of every class is held out, chosen by a fixed seed. The file is stored so that nobody else needs the seed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

HELD_OUT_SHARE = 0.2
SPLIT_SEED = 20240229


def hold_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A mask bool [n] over ``share`` of each class, the same for the same seed."""
    rng = np.random.RandomState(seed)
    mask = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(labels == label))
        mask[members[: round(share * len(members))]] = True
    return mask


def main() -> None:
    from sklearn.datasets import load_digits

    default = Path(__file__).parents[1] / "aiodisagg" / "data" / "digits.npz"
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    np.savez_compressed(target, images=images, labels=labels, held_out=hold_out(labels, HELD_OUT_SHARE, SPLIT_SEED))
    print(f"{target}: {len(labels)} digits, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
