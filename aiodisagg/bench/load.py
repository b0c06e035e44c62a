"""What loading costs: each half of a model against the monolith, in fresh processes that do nothing else.

A process imports everything first, so that the numbers are of the model and not of torch. It then loads, and reads
every weight once: weights that lie in a mapped file count only when they have been touched. All three are loaded in
one dtype, on the CPU, each in turn, ``repeats`` times.

Peak memory is the process's resident high-water mark above what the imports left (``VmHWM`` - ``VmRSS`` before);
``kept`` is what is proportionally the process's own after loading (PSS), again above the imports.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from aiodisagg.errors import CheckpointError

PARTS = ("monolith", "encode", "language")


class Loaded(msgspec.Struct, frozen=True):
    """One loading. Memory in bytes, above what the imports take."""

    part: str
    seconds: float
    peak_bytes: int
    kept_bytes: int
    weight_bytes: int
    """Sum of the parameters' and buffers' sizes."""


class LoadReport(msgspec.Struct, frozen=True):
    """All loadings, and medians with their ratios to the monolith's."""

    model: str
    dtype: str
    repeats: int
    medians: list[Loaded]
    runs: list[Loaded]

    def median(self, part: str) -> Loaded:
        return next(found for found in self.medians if found.part == part)


def bench_load(folder: Path | None, *, dtype: str = "bfloat16", repeats: int = 5) -> LoadReport:
    """Measures ``folder``, or a synthetic model of about 115 M parameters. Blocking.

    Raises:
        CheckpointError: the folder cannot be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="aiodisagg-bench-") as temporary:
        name = str(folder) if folder is not None else "synthetic, 115 M parameters"
        if folder is None:
            folder = _build(Path(temporary), dtype)
        runs = [_measure(part, folder, dtype) for _ in range(repeats) for part in PARTS]
    return LoadReport(name, dtype, repeats, [_median(part, runs) for part in PARTS], runs)


def _build(folder: Path, dtype: str) -> Path:
    from aiodisagg.models.loading import as_dtype
    from aiodisagg.models.synthetic import build_synthetic

    return build_synthetic(folder, "115m", dtype=as_dtype(dtype))


def _median(part: str, runs: Sequence[Loaded]) -> Loaded:
    own = [run for run in runs if run.part == part]

    def middle(values: Sequence[float]) -> int:
        return round(statistics.median(values))

    return Loaded(
        part,
        statistics.median([run.seconds for run in own]),
        middle([run.peak_bytes for run in own]),
        middle([run.kept_bytes for run in own]),
        own[0].weight_bytes,
    )


def _measure(part: str, folder: Path, dtype: str) -> Loaded:
    command = [sys.executable, "-m", "aiodisagg.bench.load", part, str(folder), dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(str(folder), part, f"loading ended with code {ended.returncode}: {last}")
    return msgspec.json.decode(ended.stdout.splitlines()[-1], type=Loaded)


# -- in the fresh process ---------------------------------------------------------------------------------------


def _bytes(file: str, key: str) -> int:
    """A line of a file of /proc/self, in bytes."""
    text = Path("/proc/self", file).read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{key}:"))


def measure_here(part: str, folder: Path, dtype: str) -> Loaded:
    """Loads one part in this process. ``part``: one of ``PARTS``."""
    import torch

    from aiodisagg.models.loading import load_language, load_monolith, load_vision

    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the high-water mark so far
    resident, own = _bytes("status", "VmRSS"), _bytes("smaps_rollup", "Pss")
    began = time.perf_counter()
    module: Any
    match part:
        case "encode":
            module = load_vision(folder, dtype=dtype)
        case "language":
            module = load_language(folder, dtype=dtype, row_dtype=dtype).causal
        case _:
            module = load_monolith(folder, vision_dtype=dtype, language_dtype=dtype)
    tensors = {tensor.data_ptr(): tensor for tensor in [*module.parameters(), *module.buffers()]}
    for tensor in tensors.values():
        tensor.reshape(-1).view(torch.uint8).max()
    seconds = time.perf_counter() - began
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    peak, kept = _bytes("status", "VmHWM"), _bytes("smaps_rollup", "Pss")
    return Loaded(part, seconds, peak - resident, kept - own, weights)


def table(report: LoadReport) -> str:
    """The medians as text."""
    whole = report.median("monolith")
    lines = [f"{report.model}, {report.dtype}, median of {report.repeats}"]
    lines.append(f"{'':10}{'weights MB':>12}{'peak MB':>10}{'kept MB':>10}{'load s':>9}{'peak':>8}{'time':>8}")
    for found in report.medians:
        sizes = (found.weight_bytes, found.peak_bytes, found.kept_bytes)
        weights, peak, kept = (size / 1e6 for size in sizes)
        ratios = found.peak_bytes / whole.peak_bytes, found.seconds / whole.seconds
        lines.append(
            f"{found.part:10}{weights:12.1f}{peak:10.1f}{kept:10.1f}{found.seconds:9.2f}{ratios[0]:8.2f}{ratios[1]:8.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """``python -m aiodisagg.bench.load PART FOLDER DTYPE``: one loading, as JSON on the last line."""
    part, folder, dtype = arguments
    print(json.dumps(msgspec.to_builtins(measure_here(part, Path(folder), dtype))))


if __name__ == "__main__":
    main(sys.argv[1:])
