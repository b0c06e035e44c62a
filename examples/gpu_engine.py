"""Qwen3-VL-30B-A3B on GPUs, with random weights: every stage against what bounds it, and the time to a first token.

    python examples/gpu_engine.py --json gpu.json                 # one GPU
    python examples/gpu_engine.py --json gpu.json --devices 2     # the tower on the second one
    python examples/gpu_engine.py --tiny                          # the same on a CPU with a tiny model, to try it

Phases (``--phases``, all but the last two unless named): limits, check, decode, prefill, profile, tower, serve, both,
inside, times, load. One that fails, or has no time left (``--budget-s``), does not take the others with it; results so
far are in the file after each. The table comes last. ``encode`` and ``warm`` are how the script starts itself.

``load`` are closed and open loops; two replicas are two processes with a GPU each (``--gpu``; each must see both, or
rows go by the host), with ``--share`` two peers that encode for each other::

    for i in 0 1; do name=$(echo ab | cut -c$((i + 1))); python examples/gpu_engine.py --gpu $i --phases load \\
        --closed 1,4,16 --open images-1-8:1.5,3.5 --open servegen:4,9 --meet /tmp/meet --name $name \\
        --json $name.json & done; wait
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from gpu_loops import load
from gpu_model import Random
from gpu_phases import bytes_of, check, decode, limits, prefill, profile, tower
from gpu_serve import both, encode_peer, inside, serve
from gpu_times import times

from aiodisagg.bench.mixes import MIX_NAMES
from aiodisagg.engine.batch import EngineSequence, Runner, Work
from aiodisagg.engine.config import EngineConfig
from aiodisagg.engine.device_runner import DeviceRunner
from aiodisagg.engine.rows import RequestRows
from aiodisagg.engine.sampling import sample_batch
from aiodisagg.engine.schedule import Segment
from aiodisagg.engine.stream import RequestHandle
from aiodisagg.engine.types import SamplingParams
from aiodisagg.models.base import PromptPlan

PHASES = ("load", "times", "limits", "check", "decode", "prefill", "profile", "tower", "serve", "both", "inside")
GiB = 1 << 30


class Bench:
    """One model on one device, and what has been measured."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.began = options, time.monotonic()
        self.device = "cpu" if options.tiny else f"cuda:{options.gpu}"
        self.gpu = not options.tiny
        self.model = Random.write(folder, tiny=options.tiny)
        self.results: dict[str, Any] = {"torch": torch.__version__, "argv": sys.argv[1:]}
        self.lines: list[str] = []
        self.runner: Any = None
        self.meeting: Callable[[str], Awaitable[str]] | None = None
        """Waits until the other replica says the same word."""
        if self.gpu:
            torch.cuda.set_device(options.gpu)
            self.results["device"] = torch.cuda.get_device_name(options.gpu)

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
        self.say(
            f"language model of {bytes_of(self.half.causal) / 1e9:.1f} GB made in {time.monotonic() - began:.1f} s"
        )
        began = time.monotonic()
        tokens = 256 if self.options.tiny else 8192
        config = EngineConfig(pool_bytes=(1 << 24) if self.options.tiny else 5 * GiB, token_budget=tokens)
        self.runner = Runner(self.half.causal, config, row_width=self.half.layout.width)
        if not self.gpu:
            made = DeviceRunner.of(
                self.half.causal, self.runner.pool, token_budget=tokens, max_running=64, max_context=4096
            )
            self.runner.device_runner = made
        self.runner.warm_up()
        assert self.runner.device_runner is not None
        self.stepper = self.runner.device_runner
        experts = self.stepper.decoder.experts
        self.results["kernels"] = sorted(self.stepper.decoder.kernels.fast)
        self.results["experts"] = {"table": experts.table, "ms": {str(k): dict(v) for k, v in experts.measured.items()}}
        self.say(f"kernels {self.results['kernels']}, experts {experts.table}")
        for size, ms in experts.measured.items():
            self.say(f"  experts of {size} tokens: " + ", ".join(f"{name} {t:.3f} ms" for name, t in ms.items()))
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


RUN: dict[str, Callable[[Bench, dict[str, Any]], None]] = {
    "limits": limits,
    "check": check,
    "decode": decode,
    "prefill": prefill,
    "profile": profile,
    "tower": tower,
    "serve": serve,
    "both": both,
    "inside": inside,
    "load": load,
    "times": times,
}


def warm(part: str, folder: Path) -> None:
    """Compiles one part's kernels into Triton's cache on disk, beside the others and the building of the model."""
    from aiodisagg.engine import triton_attention, triton_experts
    from aiodisagg.engine.experts import draw
    from aiodisagg.engine.inputs import Piece
    from aiodisagg.engine.kernels import Shapes, choose_kernels, new_inputs

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
        elif part == "decode":
            for batch in (1, 16, 64):
                step = new_inputs(shapes, tokens=batch, segments=batch, pages=batch)
                step.fill([Piece(1, 9, [0])] * batch, np.zeros(batch), np.zeros((3, batch)))
                pool = torch.randn(2, 16, shapes.kv_heads, shapes.head_dim, **place)
                triton_attention.attend(torch.randn(batch, shapes.heads, shapes.head_dim, **place), *pool, step, 0.1)
        else:
            name, index = part.split("/")
            weights = torch.randn(e, 2 * i, h, **place) * 0.02, torch.randn(e, h, i, **place) * 0.02
            plan = triton_experts.SETS[name][int(index)]
            triton_experts.run_experts(*draw(shapes, (8, 64, 512, 2048)[int(index)]), *weights, plan)
        torch.cuda.synchronize()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--phases", default=",".join(PHASES[2:]))
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=420.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--shape", default="both", choices=("apart", "both", "inside"), help="Of the phase load.")
    parser.add_argument("--closed", default="", help="Of the phase load: clients at a time, with commas.")
    parser.add_argument(
        "--open", action="append", default=[], metavar="MIX:RATES",
        help=f"Of the phase load: open loops of so many requests a second each; mixes are {', '.join(MIX_NAMES)}.",
    )  # fmt: skip
    parser.add_argument("--gpu", type=int, default=0, help="The device of the language model.")
    parser.add_argument("--loop-s", type=float, default=20.0, help="How long an open loop is, on average.")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--wait", action="store_true", help="Prefill waits for all pictures of a prompt.")
    parser.add_argument("--each", type=int, default=3, help="Requests for each client.")
    parser.add_argument("--name", default="a", choices=("a", "b"), help="Of two replicas that load together.")
    parser.add_argument("--meet", type=Path, help="A folder where two replicas wait for each other.")
    parser.add_argument("--share", action="store_true", help="The two encode for each other.")
    parser.add_argument(
        "--itl-budget-ms", type=float, help="Pace of answers beside prefill and tower; what peers have."
    )
    parser.add_argument("--paces", default="", help="Of serve, both and inside: several of these, one after the other.")
    parser.add_argument("command", nargs="*")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    if options.command[:1] == ["warm"]:
        warm(options.command[1], Path(options.command[2]))
        return 0
    if options.command[:1] == ["encode"]:
        encode_peer(Path(options.command[1]), options.command[2])
        return 0
    if unknown := {loops.partition(":")[0] for loops in options.open} - set(MIX_NAMES):
        parser.error(f"no such mix: {', '.join(sorted(unknown))}")
    wanted = options.phases.split(",")
    if unknown := set(wanted) - set(PHASES):
        parser.error(f"no such phase: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="aiodisagg-gpu-") as folder:
        bench = Bench(options, Path(folder))
        warming = []
        if bench.gpu:
            plans = [f"{name}/{index}" for name in ("triton", "triton, wide") for index in range(4)]
            plans.append("triton, deep/3")
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
            its = {**os.environ, "CUDA_VISIBLE_DEVICES": seen.split(",")[options.gpu]}
            for part in ("kernels", "tower", "decode", *plans):
                warming.append(subprocess.Popen([sys.executable, __file__, "warm", part, folder], env=its))
        if set(wanted) - {"limits", "tower"}:
            with bench.phase("open"):
                until = time.monotonic() + 90
                for process in warming:
                    try:
                        process.wait(max(1.0, until - time.monotonic()))
                    except subprocess.TimeoutExpired:  # then it is compiled here
                        process.kill()
                bench.say("compiled")
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
