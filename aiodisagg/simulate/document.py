"""The tables of docs/simulate.md: each study is run and put between its marks; the text around them is written by
hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from aiodisagg.bench.mixes import named_mix
from aiodisagg.bench.view import markdown
from aiodisagg.errors import ConfigError
from aiodisagg.simulate import studies
from aiodisagg.simulate.runs import Offered, Say, work
from aiodisagg.simulate.tables import ladder_markdown
from aiodisagg.simulate.times import read_times

SLO, SHARE = 5.0, 0.9


class Scale(msgspec.Struct, frozen=True):
    """How much is simulated."""

    requests: int
    ladder_devices: int
    ladder_requests: int


FULL = Scale(4000, 128, 12000)
QUICK = Scale(60, 8, 200)


def two_devices(scale: Scale, say: Say) -> str:
    cells = studies.two_devices(read_times("h200-modelled"), requests=scale.requests, loads=(0.2, 0.5, 0.7), say=say)
    systems = list(dict.fromkeys(cell.report.system for cell in cells))
    rows = []
    for mix, load in dict.fromkeys((cell.mix, cell.load) for cell in cells):
        found = [cell.report.ttft for cell in cells if (cell.mix, cell.load) == (mix, load)]
        rows.append((mix, f"{load:g}", *(f"{ttft.mean:.0f} / {ttft.p99:.0f}" for ttft in found)))
    return markdown(("images", "load", *systems), rows)


def ladder(scale: Scale, say: Say) -> str:
    times, parts = read_times("h200-vllm"), []
    for mix in ("servegen", "images-1-8"):
        offered = Offered(named_mix(mix), scale.ladder_requests)
        spent = work(times, offered.at(1.0, 0))
        devices = scale.ladder_devices
        encode = max(1, round(devices * spent.tower_s / spent.total_s))
        rungs = studies.climb(
            times, offered, mix, devices=devices, encode=encode, slo=SLO, share=SHARE, seeds=(0,), say=say
        )
        shares = ", ".join(
            f"{name} {seconds / spent.total_s:.0%}"
            for name, seconds in (("tower", spent.tower_s), ("prefill", spent.prefill_s), ("decode", spent.decode_s))
        )
        parts.append(f"{mix}, {devices} devices; device time by kind of work: {shares}\n\n")
        parts.append(ladder_markdown(rungs) + "\n\n")
    return "".join(parts).rstrip()


def overload(scale: Scale, say: Say) -> str:
    offered = Offered(named_mix("images-1-8"), scale.requests)
    times = read_times("h200-vllm")
    found = studies.overload(times, offered, devices=2, slo=SLO, factors=(1.0, 1.2, 1.5, 2.0), say=say)
    best = max(max(one.shedding.goodput_per_s, one.open_door.goodput_per_s) for one in found)
    columns = ["load", "goodput, all let in", "of the best", "TTFT p99", "TPOT p90"]
    columns += ["goodput, shedding", "of the best", "TTFT p99", "TPOT p90", "shed"]
    rows = []
    for one in found:
        row = [f"{one.factor:g}"]
        for said in (one.open_door, one.shedding):
            row += [f"{said.goodput_per_s:.2f}", f"{said.goodput_per_s / max(best, 1e-9):.2f}"]
            row += [f"{said.ttft.p99:.0f}", f"{said.tpot.p90:.1f}"]
        rows.append((*row, f"{one.shedding.shed / one.shedding.requests:.0%}"))
    return f"{found[0].inside} requests inside each peer when shedding\n\n" + markdown(columns, rows)


def text(scale: Scale, say: Say) -> str:
    times, loads = read_times("h200-vllm"), (0.5, 0.7, 0.9)
    found = studies.text_beside_images(times, requests=scale.requests, loads=loads, cvs=(1.0, 4.9), say=say)
    columns = ["cv", "load", "system", "text TTFT p99, first-come", "short-first", "ratio"]
    columns += ["mean of all, first-come", "short-first", "p99 of all, first-come", "short-first"]
    columns += ["longest wait of images, s, first-come", "short-first", "bound, s"]
    rows = []
    for before, after in zip(found[::2], found[1::2], strict=True):
        texts, alls = [(one.report.ttft_text, one.report.ttft) for one in (before, after)], (before, after)
        ratio = texts[1][0].p99 / max(texts[0][0].p99, 1e-9)
        rows.append(
            (
                f"{before.cv:g}", f"{before.load:g}", before.report.system,
                *(f"{text.p99:.0f}" for text, _ in texts), f"{ratio:.2f}",
                *(f"{whole.mean:.0f}" for _, whole in texts), *(f"{whole.p99:.0f}" for _, whole in texts),
                *(f"{one.longest_wait_s:.1f}" for one in alls), f"{before.bound_s:g}",
            )
        )  # fmt: skip
    return markdown(columns, rows)


STUDIES: dict[str, Callable[[Scale, Say], str]] = {
    "two-devices": two_devices,
    "ladder": ladder,
    "overload": overload,
    "text": text,
}


def write(file: Path, names: Sequence[str], scale: Scale, say: Say) -> None:
    """Replaces what is between ``<!-- NAME -->`` and ``<!-- /NAME -->``. Raises ConfigError for a missing mark."""
    for name in names:
        before = _read(file)
        marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        found = marked.search(before)
        if found is None:
            raise ConfigError("out", f"{file} has no marks for {name}")
        made = STUDIES[name](scale, say)
        start, stop = found.end(1), found.start(2)
        file.write_text(f"{before[:start]}\n{made}\n\n{before[stop:]}", encoding="utf-8")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError("out", str(error)) from error
