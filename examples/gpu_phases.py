"""The phases of ``gpu_engine.py``: what each stage takes, and what bounds it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from gpu_serve import picture

from aiodisagg.device.graphs import Captures
from aiodisagg.device.streams import Priority
from aiodisagg.engine.batch import EngineSequence, Work
from aiodisagg.engine.graphs import StepGraphs, decode_sizes
from aiodisagg.engine.kernels import distance
from aiodisagg.engine.schedule import Segment
from aiodisagg.models.base import ItemKind
from aiodisagg.models.preprocessing import image_grid

if TYPE_CHECKING:
    from gpu_engine import Bench

GiB = 1 << 30


def bytes_of(module: Any) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


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
    stepper = bench.stepper
    with torch.inference_mode():
        ours = bench.runner.forward(work)[0].float().clone()
        prompts, stepper.prompt_graphs = stepper.prompt_graphs, None
        launched = bench.runner.forward(work)[0].float().clone()
        stepper.prompt_graphs = prompts
        kept, bench.runner.device_runner = bench.runner.device_runner, None
        try:
            theirs = bench.runner.forward(work)[0].float()
        finally:
            bench.runner.device_runner = kept
    found["distance"] = distance(ours, theirs)
    found["same_tokens"] = int((ours.argmax(-1) == theirs.argmax(-1)).sum()), len(lengths)
    bench.say(f"check: fused against transformers {found['distance']:.1e}, same tokens {found['same_tokens']}")
    found["prompt_graph"] = distance(ours, launched)
    bench.say(f"check: prompts by a graph ({prompts is not None}) against launches: {found['prompt_graph']:.1e}")
    graphs = stepper.graphs
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


def decodebytes_of(bench: Bench, batch: int) -> float:
    """Fewest bytes of a step: what is not an expert once, and the experts that ``batch`` tokens choose by chance."""
    text = bench.model.config.text_config
    layer = bench.stepper.decoder.sparse
    assert layer is not None
    one = (layer.gate_up[0].numel() + layer.down[0].numel()) * layer.down.element_size()
    table = bench.half.causal.get_input_embeddings().weight
    rest = bytes_of(bench.half.causal) - text.num_hidden_layers * text.num_experts * one
    rest -= table.numel() * table.element_size()
    chosen = text.num_experts * (1 - (1 - text.num_experts_per_tok / text.num_experts) ** batch)
    return rest + text.num_hidden_layers * chosen * one


def decode(bench: Bench, found: dict[str, Any]) -> None:
    batches = (1, 4) if bench.options.tiny else (1, 16, 64)
    count = 3 if bench.options.tiny else 30
    speed = bench.results.get("limits", {}).get("bytes_s", 0)
    chosen, graphs = bench.stepper.decoder.experts, bench.stepper.graphs
    for batch in batches:
        bound = decodebytes_of(bench, batch) / speed * 1e3 if speed else 0.0
        entry: dict[str, Any] = {"bound_ms": bound}
        step = bench.decoding(batch, 64, 256)
        entry["chosen"] = bench.times(step, count, 4)
        if graphs is not None and (size := graphs.size_for(batch, batch, 0)) is not None:
            entry["graph alone"] = bench.times(lambda size=size: graphs._replay[size](), count)
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
        capture = Captures(torch.device(bench.device), Priority.DECODES)
        own = StepGraphs(graphs.inputs, graphs._compute, decode_sizes(batches), capture)
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
        read = decodebytes_of(bench, size) / measured.get("bytes_s", float("inf")) * 1e3
        entry: dict[str, Any] = {"flops_ms": bound, "bytes_ms": read}
        count = 3 if bench.options.tiny else 5
        entry["chosen"] = bench.times(lambda s=sequence, n=size: bench.prefill(s, 0, n), count)
        graphs, bench.stepper.prompt_graphs = bench.stepper.prompt_graphs, None
        entry["launched"] = bench.times(lambda s=sequence, n=size: bench.prefill(s, 0, n), count)
        with contextlib.suppress(Exception):
            entry["launching"] = _launching(bench, sequence, size)
        for name in chosen.ways:
            if name != "loop" and bench.left_s() > 60:
                bench.stepper.decoder.experts = chosen.only(name)
                entry[f"experts by {name}"] = bench.times(
                    lambda s=sequence, n=size: bench.prefill(s, 0, n), 3, 1
                )  # fmt: skip
        bench.stepper.decoder.experts, bench.stepper.prompt_graphs = chosen, graphs
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
    device = bench.device
    encoder = bench.model.encoder(device)
    height, width = (128, 192) if bench.options.tiny else (1080, 1920)
    found["attention_ms"] = encoder.use_fused()
    for size, ms in found["attention_ms"].items():
        bench.say(f"tower attention, {size} patches: " + ", ".join(f"{name} {t:.3f} ms" for name, t in ms.items()))
    data = picture(0, height, width)
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
