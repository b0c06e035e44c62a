"""Open loops of ``gpu_engine.py`` as cells that ``aiodisagg simulate --compare`` reads, and a table of them.

    python examples/gpu_cells.py cells.json gpu-dp2=a.json,b.json gpu-flexible=c.json,d.json gpu-1+1=e.json
    python examples/gpu_cells.py cells.json     # the table alone

Files of one shape are of replicas that ran together. In the table every shape is relative to the first one in the file,
of the seeds that both have; what a shape has of other seeds is told apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from aiodisagg.bench.mixes import MIX_NAMES
from aiodisagg.bench.serve_metrics import percentile


class Spread(msgspec.Struct, frozen=True):
    """Milliseconds; percentiles lie between neighbours, as everywhere in this package."""

    mean: float
    p50: float
    p99: float
    p999: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        parts = [statistics.fmean(ordered), *(percentile(ordered, p) for p in (50, 99, 99.9, 100))]
        return cls(*(round(part, 4) for part in parts))


class Summary(msgspec.Struct, frozen=True):
    requests: int
    output_tokens_per_s: float
    ttft_ms: Spread
    itl_ms: Spread


class Run(msgspec.Struct, frozen=True):
    """One seed, all replicas together. ``itl_counts``: milliseconds between tokens, and how often."""

    seed: int
    seconds: float
    output_tokens: int
    all: Summary
    all_ttft_ms: list[float]
    itl_counts: list[tuple[float, int]]


class Cell(msgspec.Struct, frozen=True):
    """``all``: of all its runs."""

    shape: str
    mix: str
    load: float
    rate_per_s: float
    all: Summary
    runs: list[Run]

    @property
    def seeds(self) -> set[int]:
        return {run.seed for run in self.runs}

    def of_seeds(self, seeds: set[int]) -> Summary:
        runs = [run for run in self.runs if run.seed in seeds]
        gaps = [ms for run in runs for ms, count in run.itl_counts for _ in range(count)]
        tokens, seconds = sum(run.output_tokens for run in runs), sum(run.seconds for run in runs)
        return summary([ms for run in runs for ms in run.all_ttft_ms], gaps, tokens, seconds)


class Cells(msgspec.Struct, frozen=True):
    cells: list[Cell]


class Loop(msgspec.Struct, frozen=True):
    """What a replica wrote of an open loop."""

    rate: float
    seed: int
    seconds: float
    tokens: list[int]
    ttft_ms: list[float]
    gaps_ms: list[float]


def summary(ttft_ms: Sequence[float], gaps_ms: Sequence[float], tokens: int, seconds: float) -> Summary:
    return Summary(len(ttft_ms), round(tokens / seconds, 4), Spread.of(ttft_ms), Spread.of(gaps_ms))


def cells_of(shape: str, files: Sequence[Path]) -> list[Cell]:
    """One for each mix and rate."""
    loops: dict[tuple[str, float], dict[int, list[Loop]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        measured = json.loads(file.read_text())["load"]
        for mix in MIX_NAMES:
            for loop in msgspec.convert(list(measured.get(mix, {}).values()), list[Loop]):
                loops[mix, loop.rate][loop.seed].append(loop)
    made = []
    for (mix, rate), seeds in sorted(loops.items()):
        runs = [run_of(seed, together) for seed, together in sorted(seeds.items())]
        cell = Cell(shape, mix, 0.0, rate, runs[0].all, runs)
        made.append(msgspec.structs.replace(cell, all=cell.of_seeds(cell.seeds)))
    return made


def run_of(seed: int, replicas: Sequence[Loop]) -> Run:
    ttft, gaps = ([ms for loop in replicas for ms in getattr(loop, key)] for key in ("ttft_ms", "gaps_ms"))
    tokens, seconds = sum(sum(loop.tokens) for loop in replicas), max(loop.seconds for loop in replicas)
    whole = summary(ttft, gaps, tokens, seconds)
    return Run(seed, round(seconds, 4), tokens, whole, ttft, sorted(Counter(gaps).items()))


ROWS: Sequence[tuple[str, str, Callable[[Summary], tuple[float, ...]]]] = (
    ("TTFT, ms: mean / p99", ".0f", lambda one: (one.ttft_ms.mean, one.ttft_ms.p99)),
    (
        "between tokens, ms: mean / p99 / p99.9 / longest",
        ".1f",
        lambda one: (one.itl_ms.mean, one.itl_ms.p99, one.itl_ms.p999, one.itl_ms.most),
    ),
    ("tokens/s", ".0f", lambda one: (one.output_tokens_per_s,)),
)


def compared(cells: Sequence[Cell]) -> list[str]:
    """Lines of a table in Markdown."""
    shapes = list(dict.fromkeys(cell.shape for cell in cells))
    lines = ["| | | " + " | ".join(shapes) + " |", "|---|---" + "|---" * len(shapes) + "|"]
    for base in (cell for cell in cells if cell.shape == shapes[0]):
        place = base.mix, base.rate_per_s
        others = {cell.shape: cell for cell in cells if (cell.mix, cell.rate_per_s) == place}
        its = [others.get(shape) for shape in shapes[1:]]
        what = f"{base.mix}, {base.rate_per_s:g}/s"
        for title, digits, values in ROWS:
            row = [" / ".join(format(value, digits) for value in values(base.all))]
            row += [" / ".join(f"{ratio:.2f}" for ratio in ratios(cell, base, values)) for cell in its]
            lines.append(f"| {what} | {title} | {' | '.join(row)} |")
            what = ""
        row = [" ".join(f"{seed}: {base.of_seeds({seed}).ttft_ms.mean:.0f}" for seed in sorted(base.seeds))]
        row += [" ".join(of_seed(cell, base, seed) for seed in sorted(cell.seeds)) if cell else "" for cell in its]
        lines.append(f"| | mean TTFT by seed | {' | '.join(row)} |")
    return lines


def ratios(cell: Cell | None, base: Cell, values: Callable[[Summary], tuple[float, ...]]) -> list[float]:
    """Of the seeds that both have."""
    if cell is None or not (both := cell.seeds & base.seeds):
        return []
    pairs = zip(values(cell.of_seeds(both)), values(base.of_seeds(both)), strict=True)
    return [own / theirs for own, theirs in pairs]


def of_seed(cell: Cell, base: Cell, seed: int) -> str:
    own = cell.of_seeds({seed}).ttft_ms
    if seed not in base.seeds:
        return f"(only here {seed}: {own.mean:.0f} ms, p99 {own.p99:.0f})"
    return f"{own.mean / base.of_seeds({seed}).ttft_ms.mean:.2f}"


def main(file: Path, shapes: Sequence[str]) -> None:
    try:
        work(file, shapes)
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise SystemExit(f"{file}, or what it is made of, is not what was expected: {error}") from error


def work(file: Path, shapes: Sequence[str]) -> None:
    if shapes:
        pairs = [shape.partition("=") for shape in shapes]
        cells = [cell for name, _, files in pairs for cell in cells_of(name, [Path(one) for one in files.split(",")])]
        lines = ",\n".join(msgspec.json.encode(cell).decode() for cell in cells)
        file.write_text(f'{{"cells": [\n{lines}\n]}}\n')
    print("\n".join(compared(msgspec.json.decode(file.read_bytes(), type=Cells).cells)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="of cells; written if there are shapes")
    parser.add_argument("shapes", nargs="*", metavar="SHAPE=FILE,...", help="what ran, and what gpu_engine.py wrote")
    given = parser.parse_args()
    main(given.file, given.shapes)
