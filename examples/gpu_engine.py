"""Qwen3-VL-30B-A3B on GPUs, with random weights: every stage against what bounds it, and the time to a first token.

    python examples/gpu_engine.py --json gpu.json                 # one GPU
    python examples/gpu_engine.py --json gpu.json --devices 2     # the tower on the second one
    python examples/gpu_engine.py --tiny                          # the same on a CPU with a tiny model, to try it

Phases (``--phases``, all unless named): limits, check, decode, prefill, profile, tower, serve. One that fails, or has
no time left (``--budget-s``), does not take the others with it; results so far are in the file after each. The table
comes last. ``encode`` and ``warm`` are how the script starts itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_model import Random
from gpu_serve import encode_peer, serve

from aiodisagg.engine.batch import EngineSequence, Runner, Work
from aiodisagg.engine.config import EngineConfig
from aiodisagg.engine.device_runner import DeviceRunner
from aiodisagg.engine.graphs import DecodeGraphs
from aiodisagg.engine.kernels import distance
from aiodisagg.engine.rows import RequestRows
from aiodisagg.engine.sampling import sample_batch
from aiodisagg.engine.schedule import Segment
from aiodisagg.engine.stream import RequestHandle
from aiodisagg.engine.types import SamplingParams
from aiodisagg.models.base import PromptPlan

PHASES = ("limits", "check", "decode", "prefill", "profile", "tower", "serve")
GiB = 1 << 30


class Bench:
    """One model on one device, and what has been measured."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.began = options, time.monotonic()
        self.device = "cpu" if options.tiny else "cuda:0"
        self.gpu = not options.tiny
        self.model = Random.write(folder, tiny=options.tiny)
        self.results: dict[str, Any] = {"torch": torch.__version__, "argv": sys.argv[1:]}
        self.lines: list[str] = []
        if self.gpu:
            torch.cuda.set_device(0)
            self.results["device"] = torch.cuda.get_device_name(0)

    def sync(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def say(self, line: str) -> None:
        self.lines.append(line)
        print(f"[{time.monotonic() - self.began:6.1f} s] {line}", flush=True)

    def save(self) -> None:
        if self.options.json:
            self.options.json.write_text(json.dumps(self.results, indent=1, default=str) + "\n")

    def left_s(self) -> float:
        return self.options.budget_s - (time.monotonic() - self.began)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[dict[str, Any]]:
        """Guards a phase: what goes wrong is written down."""
        found: dict[str, Any] = self.results.setdefault(name, {})
        began = time.monotonic()
        try:
            if self.left_s() < 0:
                raise TimeoutError("no time left")
            yield found
        except Exception as error:
            found["error"] = f"{error!r}\n{traceback.format_exc()[-3000:]}"
            self.say(f"{name} FAILED: {error!r}"[:300])
            traceback.print_exc()
        found["seconds"] = round(time.monotonic() - began, 1)
        self.save()

    def times(self, step: Callable[[], object], count: int, warm: int = 2) -> float:
        """Median milliseconds of a step, until the device has done it."""
        for _ in range(warm):
            step()
        found = []
        for _ in range(count):
            self.sync()
            began = time.perf_counter()
            step()
            self.sync()
            found.append((time.perf_counter() - began) * 1e3)
        return statistics.median(found)

    # -- the engine's runner ------------------------------------------------------------------------------------

    def open_runner(self) -> None:
        began = time.monotonic()
        self.half = self.model.language(self.device)
        self.sync()
        self.say(f"language model of {_bytes(self.half.causal) / 1e9:.1f} GB made in {time.monotonic() - began:.1f} s")
        began = time.monotonic()
        tokens = 256 if self.options.tiny else 8192
        config = EngineConfig(pool_bytes=(1 << 24) if self.options.tiny else 5 * GiB, token_budget=tokens)
        self.runner = Runner(self.half.causal, config)
        if not self.gpu:
            made = DeviceRunner.of(
                self.half.causal, self.runner.pool, token_budget=tokens, max_running=64, max_context=4096
            )
            self.runner.device_runner = made
        assert self.runner.device_runner is not None
        self.stepper = self.runner.device_runner
        experts = self.stepper.decoder.experts
        self.results["kernels"] = sorted(self.stepper.decoder.kernels.fast)
        self.results["experts"] = {"table": experts.table, "ms": {str(k): dict(v) for k, v in experts.measured.items()}}
        self.say(f"kernels {self.results['kernels']}, experts {experts.table} in {time.monotonic() - began:.1f} s")
        for size, ms in experts.measured.items():
            self.say(f"  experts of {size} tokens: " + ", ".join(f"{name} {t:.3f} ms" for name, t in ms.items()))
        began = time.monotonic()
        self.runner.warm_up()
        self.say(f"graphs {self.stepper.graphs is not None}, warm in {time.monotonic() - began:.1f} s")
        self.save()

    def sequence(self, name: str, tokens: int) -> EngineSequence:
        rng = np.random.default_rng(abs(hash((name, tokens))) % 2**32)
        where = np.tile(np.arange(tokens), (3, 1))
        plan = PromptPlan(rng.integers(0, 256, tokens), where, 0, ())
        hidden = self.model.config.text_config.hidden_size
        device, kind = torch.device(self.device), self.model.dtype
        rows = RequestRows(name, plan, hidden_size=hidden, width=None, dtype=kind, device=device)
        sampling = SamplingParams(max_tokens=1 << 20)
        return EngineSequence(RequestHandle(name, lambda _: None), plan, sampling, rows, lambda _: "")

    def pages(self, index: int, tokens: int) -> range:
        each = -(-tokens // self.runner.pool.page_size)
        return range(index * each, (index + 1) * each)

    def prefill(self, sequence: EngineSequence, index: int, room: int) -> torch.Tensor:
        total = sequence.plan.tokens
        work = Work(Segment(sequence.request_id, 0, total, True), sequence, self.pages(index, room))
        with torch.inference_mode():
            return self.runner.forward([work])[0]

    def decoding(self, batch: int, context: int, room: int) -> Callable[[], None]:
        """Prefills ``batch`` requests and gives their decode step, sampling included."""
        sequences = [self.sequence(f"r{i}", context) for i in range(batch)]
        for i, sequence in enumerate(sequences):
            sequence.generated.append(int(self.prefill(sequence, i, room)[0].argmax()))

        def step() -> None:
            work = []
            for i, s in enumerate(sequences):
                at = s.plan.tokens + len(s.generated)
                work.append(Work(Segment(s.request_id, at - 1, at, True), s, self.pages(i, room)))
            with torch.inference_mode():
                logits, _ = self.runner.forward(work)
                for s, token in zip(sequences, sample_batch(logits, [s.sampler for s in sequences]), strict=True):
                    s.generated.append(token or 0)

        return step


def _bytes(module: Any) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


# -- phases --------------------------------------------------------------------------------------------------------


def limits(bench: Bench, found: dict[str, Any]) -> None:
    """The device's own copy and product, which everything else is held against."""
    size = GiB if bench.gpu else 1 << 20
    source = torch.empty(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    ms = bench.times(lambda: target.copy_(source), 5)
    found["bytes_s"] = 2 * size / ms * 1e3
    n = 8192 if bench.gpu else 64
    a, b = torch.randn(2, n, n, device=bench.device).to(bench.model.dtype)
    ms = bench.times(lambda: a @ b, 5)
    found["flop_s"] = 2 * n**3 / ms * 1e3
    bench.say(f"limits: {found['bytes_s'] / 1e12:.2f} TB/s copied, {found['flop_s'] / 1e12:.0f} TFLOP/s")


def check(bench: Bench, found: dict[str, Any]) -> None:
    """The fused decoder against transformers' forward, and graphs against launches."""
    lengths = (5, 90, 33) if bench.options.tiny else (5, 300, 129)
    sequences = [bench.sequence(f"c{n}", n) for n in lengths]
    work = [
        Work(Segment(s.request_id, 0, s.plan.tokens, True), s, bench.pages(i, 512)) for i, s in enumerate(sequences)
    ]
    with torch.inference_mode():
        ours = bench.runner.forward(work)[0].float().clone()
        kept, bench.runner.device_runner = bench.runner.device_runner, None
        try:
            theirs = bench.runner.forward(work)[0].float()
        finally:
            bench.runner.device_runner = kept
    found["distance"] = distance(ours, theirs)
    found["same_tokens"] = int((ours.argmax(-1) == theirs.argmax(-1)).sum()), len(lengths)
    bench.say(f"check: fused against transformers {found['distance']:.1e}, same tokens {found['same_tokens']}")
    graphs, stepper = bench.stepper.graphs, bench.stepper
    for batch in (1, 3):
        logits = []
        for use in (graphs, None):
            stepper.graphs = use
            try:
                sequences = [bench.sequence(f"g{i}", 40 + i) for i in range(batch)]
                for i, s in enumerate(sequences):
                    bench.prefill(s, i, 64)
                    s.generated.append(7)
                work = [
                    Work(Segment(s.request_id, s.plan.tokens, s.plan.tokens + 1, True), s, bench.pages(i, 64))
                    for i, s in enumerate(sequences)
                ]
                with torch.inference_mode():
                    logits.append(bench.runner.forward(work)[0].float().clone())
            finally:
                stepper.graphs = graphs
        found[f"graph_{batch}"] = distance(*logits)
        bench.say(f"check: graph against launches at batch {batch}: {found[f'graph_{batch}']:.1e}")


def decode_bytes(bench: Bench, batch: int) -> float:
    """Fewest bytes of a step: what is not an expert once, and the experts that ``batch`` tokens choose by chance."""
    text = bench.model.config.text_config
    layer = bench.stepper.decoder.sparse
    assert layer is not None
    one = (layer.gate_up[0].numel() + layer.down[0].numel()) * layer.down.element_size()
    table = bench.half.causal.get_input_embeddings().weight
    rest = _bytes(bench.half.causal) - text.num_hidden_layers * text.num_experts * one
    rest -= table.numel() * table.element_size()
    chosen = text.num_experts * (1 - (1 - text.num_experts_per_tok / text.num_experts) ** batch)
    return rest + text.num_hidden_layers * chosen * one


def decode(bench: Bench, found: dict[str, Any]) -> None:
    batches = (1, 4) if bench.options.tiny else (1, 16, 64)
    count = 3 if bench.options.tiny else 30
    speed = bench.results.get("limits", {}).get("bytes_s", 0)
    chosen, graphs = bench.stepper.decoder.experts, bench.stepper.graphs
    for batch in batches:
        bound = decode_bytes(bench, batch) / speed * 1e3 if speed else 0.0
        entry: dict[str, Any] = {"bound_ms": bound}
        step = bench.decoding(batch, 64, 256)
        entry["chosen"] = bench.times(step, count, 4)
        if graphs is not None and (size := graphs.size_for(batch)) is not None:
            entry["graph alone"] = bench.times(lambda size=size: graphs._graphs[size].replay(), count)
        bench.stepper.graphs = None
        entry["launched"] = bench.times(step, max(3, count // 5))
        bench.stepper.graphs = graphs
        found[str(batch)] = entry
        shown = ", ".join(f"{name} {ms:.2f}" for name, ms in entry.items())
        bench.say(f"decode, batch {batch}, ms: {shown}")
        bench.save()
    if graphs is None or bench.left_s() < 60:
        return
    for name in chosen.ways:
        if name == "loop":
            continue
        bench.stepper.decoder.experts = chosen.only(name)
        own = DecodeGraphs(graphs._inputs, graphs._compute, batches)
        own.capture()
        for batch in batches:
            step = bench.decoding(batch, 64, 256)
            bench.stepper.graphs = own
            ms = bench.times(step, count)
            bench.stepper.graphs = graphs
            found[str(batch)][f"experts by {name}"] = ms
            bench.say(f"decode, batch {batch}, experts by {name}: {ms:.2f} ms")
        bench.stepper.decoder.experts = chosen


def prefill_flops(bench: Bench, tokens: int) -> float:
    text = bench.model.config.text_config
    h, d = text.hidden_size, text.head_dim
    projections = h * d * (2 * text.num_attention_heads + 2 * text.num_key_value_heads) + h * text.num_experts
    experts = text.num_experts_per_tok * 3 * h * text.moe_intermediate_size
    attention = 2 * tokens * tokens * text.num_attention_heads * d  # causal: half of four
    return float(text.num_hidden_layers * (2 * tokens * (projections + experts) + attention))


def prefill(bench: Bench, found: dict[str, Any]) -> None:
    sizes = (16, 64) if bench.options.tiny else (128, 512, 2048, 8192)
    measured = bench.results.get("limits", {})
    chosen = bench.stepper.decoder.experts
    for size in sizes:
        sequence = bench.sequence(f"p{size}", size)
        bound = prefill_flops(bench, size) / measured.get("flop_s", float("inf")) * 1e3
        read = decode_bytes(bench, size) / measured.get("bytes_s", float("inf")) * 1e3
        entry: dict[str, Any] = {"flops_ms": bound, "bytes_ms": read}
        count = 3 if bench.options.tiny else 5
        entry["chosen"] = bench.times(lambda s=sequence, n=size: bench.prefill(s, 0, n), count)
        with contextlib.suppress(Exception):
            entry["launching"] = _launching(bench, sequence, size)
        for name in chosen.ways:
            if name != "loop" and bench.left_s() > 60:
                bench.stepper.decoder.experts = chosen.only(name)
                entry[f"experts by {name}"] = bench.times(
                    lambda s=sequence, n=size: bench.prefill(s, 0, n), 3, 1
                )  # fmt: skip
        bench.stepper.decoder.experts = chosen
        found[str(size)] = entry
        shown = ", ".join(f"{name} {ms:.2f}" for name, ms in entry.items())
        bench.say(f"prefill of {size}, ms: {shown}")
        bench.save()


def _launching(bench: Bench, sequence: EngineSequence, size: int) -> float:
    """Milliseconds until everything is launched: near the whole time, launches are the bound."""
    bench.sync()
    began = time.perf_counter()
    bench.prefill(sequence, 0, size)
    ms = (time.perf_counter() - began) * 1e3
    bench.sync()
    return ms


def profile(bench: Bench, found: dict[str, Any]) -> None:
    """Which kernels the time goes to."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if bench.gpu else ProfilerActivity.CPU
    size = 64 if bench.options.tiny else 2048
    sequence = bench.sequence("profile", size)
    steps: dict[str, Callable[[], object]] = {f"prefill of {size}": lambda: bench.prefill(sequence, 0, size)}
    for batch in (1, 4) if bench.options.tiny else (1, 64):
        steps[f"decode, batch {batch}"] = bench.decoding(batch, 64, 256)
    for name, step in steps.items():
        step()
        bench.sync()
        with profile(activities=[activity]) as traced:
            step()
            bench.sync()
        rows = []
        for event in traced.key_averages():
            ms = getattr(event, "self_device_time_total" if bench.gpu else "self_cpu_time_total", 0) / 1e3
            rows.append((round(ms, 3), event.count, event.key[:70]))
        rows.sort(reverse=True)
        found[name] = {"ms": round(sum(r[0] for r in rows), 3), "launches": sum(r[1] for r in rows), "top": rows[:14]}
        bench.say(f"profile of {name}: {found[name]['ms']} ms in {found[name]['launches']} kernels")
        for ms, count, key in rows[:10]:
            bench.say(f"    {ms:9.3f} ms {count:5d}x {key}")
        bench.save()


def tower(bench: Bench, found: dict[str, Any]) -> None:
    from gpu_serve import picture

    from aiodisagg.models.base import ItemKind

    device = bench.device
    encoder = bench.model.encoder(device)
    height, width = (128, 192) if bench.options.tiny else (1080, 1920)
    found["attention_ms"] = encoder.use_fused()
    bench.say(f"tower attention, 3600 patches: { {k: round(v, 3) for k, v in found['attention_ms'].items()} }")
    data = picture(0, height, width)
    from aiodisagg.models.preprocessing import image_grid

    grid = image_grid(height, width, encoder._image)
    patches = encoder.prepare(ItemKind.IMAGE, (data,), grid, 0.0)
    found["prepare_ms"] = bench.times(lambda: encoder.prepare(ItemKind.IMAGE, (data,), grid, 0.0), 5)
    kept, encoder.cuts_on_device = encoder.cuts_on_device, False
    found["prepare_all_on_cpu_ms"] = bench.times(lambda: encoder.prepare(ItemKind.IMAGE, (data,), grid, 0.0), 3)
    on_cpu = encoder.prepare(ItemKind.IMAGE, (data,), grid, 0.0)
    encoder.cuts_on_device = kept
    with torch.inference_mode():
        cut = encoder._pixels(patches)
        found["pixel_difference"] = float((cut.float() - encoder._pixels(on_cpu).float()).abs().max())
        found["cut_ms"] = bench.times(lambda: encoder._pixels(patches), 5)
    ours = encoder.encode([patches])[0]
    fused, encoder.fused = encoder.fused, None
    theirs = encoder.encode([patches])[0]
    found["transformers_ms"] = bench.times(lambda: encoder.encode([patches]), 3, 1)
    encoder.fused = fused
    found["distance"] = distance(ours, theirs)
    for images in (1, 2, 4):
        found[f"x{images}"] = bench.times(lambda n=images: encoder.encode([patches] * n), 5)
    vision, n = bench.model.config.vision_config, patches.count
    h = vision.hidden_size
    flops = vision.depth * (2 * n * (4 * h * h + 2 * h * vision.intermediate_size) + 4 * n * n * h)
    found["flops_ms"] = flops / bench.results.get("limits", {}).get("flop_s", float("inf")) * 1e3
    bench.say(
        f"tower, {n} patches, ms: "
        + ", ".join(f"{k} {v:.2g}" if v < 1 else f"{k} {v:.1f}" for k, v in found.items() if k != "attention_ms")
    )


RUN: dict[str, Callable[[Bench, dict[str, Any]], None]] = {
    "limits": limits,
    "check": check,
    "decode": decode,
    "prefill": prefill,
    "profile": profile,
    "tower": tower,
    "serve": serve,
}


def warm(part: str, folder: Path) -> None:
    """Compiles one part's kernels into Triton's cache on disk, beside the others and the building of the model."""
    from aiodisagg.engine.experts import choose_experts
    from aiodisagg.engine.kernels import Shapes, choose_kernels

    text = Random.read(folder).config.text_config
    h, i, e = text.hidden_size, text.moe_intermediate_size, text.num_experts
    place: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda:0"}
    shapes = Shapes(
        h, text.num_attention_heads, text.num_key_value_heads, text.head_dim, e, text.num_experts_per_tok, 16,
        torch.bfloat16, torch.device("cuda:0"),
    )  # fmt: skip
    with torch.inference_mode():
        if part == "kernels":
            choose_kernels(shapes)
        elif part == "tower":
            Random.read(folder).encoder("cuda:0")
        else:
            gate_up = torch.randn(e, 2 * i, h, **place) * 0.02
            choose_experts(shapes, gate_up, torch.randn(e, h, i, **place) * 0.02, buckets=(int(part),))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=420.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("command", nargs="*")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    if options.command[:1] == ["warm"]:
        warm(options.command[1], Path(options.command[2]))
        return 0
    if options.command[:1] == ["encode"]:
        encode_peer(Path(options.command[1]), options.command[2])
        return 0
    wanted = options.phases.split(",")
    if unknown := set(wanted) - set(PHASES):
        parser.error(f"no such phase: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="aiodisagg-gpu-") as folder:
        bench = Bench(options, Path(folder))
        warming = []
        if bench.gpu:
            for part in ("kernels", "tower", "4", "16", "256", "4096"):
                warming.append(subprocess.Popen([sys.executable, __file__, "warm", part, folder]))
        if set(wanted) - {"limits", "tower"}:
            with bench.phase("open"):
                for process in warming:
                    process.wait(120)
                bench.open_runner()
        for name in wanted:
            with bench.phase(name) as found:
                RUN[name](bench, found)
        for process in warming:
            process.wait()
    print("\n" + "\n".join(bench.lines))
    bench.save()
    return int(any("error" in part for part in bench.results.values() if isinstance(part, dict)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
