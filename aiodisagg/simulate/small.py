"""The mixes that ``bench system`` sends to a model of 115 M parameters on CPU cores."""

from __future__ import annotations

from aiodisagg.bench.distributions import Ranges, exactly
from aiodisagg.bench.mixes import servegen_mix
from aiodisagg.bench.workload import Mix


def small_mixes() -> dict[str, Mix]:
    return {
        "images-1-8": Mix(Ranges(((1, 8, 1.0),)), ((224, 224),), Ranges(((32, 128, 1.0),)), exactly(32)),
        "servegen": servegen_mix().scaled(visual=1 / 8, text=1 / 4, output=1 / 4),
    }
