"""Open loops of ``gpu_engine.py`` as cells that ``aiodisagg simulate --compare`` reads.

    python examples/gpu_cells.py cells.json gpu-dp2=a.json,b.json gpu-flexible=c.json,d.json gpu-1+1=e.json

Files of one shape are of replicas that ran together.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from aiodisagg.bench.mixes import MIX_NAMES
from aiodisagg.bench.serve_metrics import Spread


def cells_of(shape: str, files: list[Path]) -> list[dict[str, Any]]:
    """One for each mix and rate, all replicas and seeds together."""
    cells: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for file in files:
        measured = json.loads(file.read_text())["load"]
        for mix in MIX_NAMES:
            for loop in measured.get(mix, {}).values():
                cells[mix, loop["rate"]].append(loop)
    made = []
    for (mix, rate), loops in sorted(cells.items()):
        spreads = {}
        for key, of in (("ttft_ms", "ttft_ms"), ("itl_ms", "gaps_ms")):
            spread = Spread.of([ms / 1e3 for loop in loops for ms in loop[of]])
            assert spread is not None
            spreads[key] = {"mean": round(spread.mean, 1), "p50": round(spread.p50, 1), "p99": round(spread.p99, 1)}
        seeds = sorted({loop["seed"] for loop in loops})
        seconds = sum(max(loop["seconds"] for loop in loops if loop["seed"] == seed) for seed in seeds)
        whole = {
            "requests": sum(len(loop["ttft_ms"]) for loop in loops),
            "output_tokens_per_s": round(sum(sum(loop["tokens"]) for loop in loops) / seconds, 1),
            **spreads,
        }
        cell = {"shape": shape, "mix": mix, "load": 0.0, "rate_per_s": rate, "all": whole}
        made.append(cell | {"runs": [{"seed": seed} for seed in seeds]})
    return made


def main(out: Path, shapes: list[str]) -> None:
    cells = []
    for shape in shapes:
        name, _, files = shape.partition("=")
        cells += cells_of(name, [Path(file) for file in files.split(",")])
    out.write_text(json.dumps({"cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where to write the cells")
    parser.add_argument("shapes", nargs="+", metavar="SHAPE=FILE,...", help="what ran, and what gpu_engine.py wrote")
    given = parser.parse_args()
    main(given.out, given.shapes)
