"""The command line on a GPU, as a user runs it: a checkpoint of full size on disk, peers of their own processes, HTTP.

    python examples/gpu_http.py --folder /dev/shm/model --json http.json                  # 58 GiB, random weights
    python examples/gpu_http.py --folder /tmp/model --json http.json --tiny --shapes both,split    # on a CPU, to try it

Shapes: ``both`` is one ``aiodisagg both``; ``eight`` the same with eight threads for pictures; ``split`` a bootstrap
server, an encode and a language peer, all on one device. Each is started, measured by ``bench serve``, and ended with
SIGTERM. Results so far are in the file after each load; one that fails does not take the others with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_model import Random
from transformers import Qwen3VLMoeForConditionalGeneration

from aiodisagg.models.synthetic import save_weights

SHARD_BYTES = 4 << 30
FULL_HD = "--sizes 1920x1080 --text 128 --probes 0"
LOADS = {
    "one": f"--images 1 {FULL_HD} --output 16 --concurrency 1 --requests 12 --seeds 11",
    "four": f"--images 4 {FULL_HD} --output 16 --concurrency 1 --requests 8 --seeds 12",
    "burst": f"--images 1 {FULL_HD} --output 128 --concurrency 32 --requests 32 --seeds 13,14,15",
    "images-1-8": "--mix images-1-8 --rates 1.75,3 --requests 30 --seeds 16 --probes 0",
    "servegen": "--mix servegen --rates 4.5 --requests 60 --seeds 17 --probes 0",
}
TINY_LOADS = {"one": "--images 1 --sizes 96x64 --text 16 --output 8 --concurrency 1 --requests 4 --probes 0"}


def write_checkpoint(folder: Path, *, tiny: bool, device: str) -> dict[str, float]:
    """Weights in the hub's layout, made on ``device`` and never as a whole in the host's memory.

    The head knows the tokenizer's ordinary tokens alone, so that every token of an answer is a piece of text.
    """
    began = time.monotonic()
    model = Random.write(folder, tiny=tiny)
    with torch.device("meta"):
        state = Qwen3VLMoeForConditionalGeneration(model.config).state_dict()
    generator = torch.Generator(device).manual_seed(0)
    words = model.words()
    part: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    total = room = 0

    def flush() -> None:
        nonlocal room
        if part:
            shard = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_weights(folder, part, layout="transformers")
            (folder / "model.safetensors").rename(folder / shard)
            weight_map.update(dict.fromkeys(part, shard))
            part.clear()
            room = 0

    for name, shape in ((name, tensor.shape) for name, tensor in state.items()):
        made = torch.empty(shape, dtype=model.dtype, device=device)
        if len(shape) == 1:
            made.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            made.normal_(std=0.02, generator=generator)
        if name == "lm_head.weight":  # others are never the largest
            made[torch.ones(len(made), dtype=torch.bool).index_fill_(0, words, False)] = 0
        turned = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))  # on the device: the host takes minutes
        part[name] = (made.transpose(1, 2).contiguous() if turned else made).cpu()
        size = made.numel() * made.element_size()
        total, room = total + size, room + size
        if room >= SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"seconds": time.monotonic() - began, "gib": total / (1 << 30)}


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def ready(url: str, process: subprocess.Popen[bytes], deadline: float) -> None:
    while True:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with {process.returncode} while it loaded")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{url} is not ready")
        time.sleep(0.5)


class Peers:
    """Processes of one shape, and what they said."""

    def __init__(self, logs: Path, folder: Path, device: str, kv_mib: int) -> None:
        self.logs, self.folder, self.device, self.kv_mib = logs, folder, device, kv_mib
        self.started: list[subprocess.Popen[bytes]] = []

    def run(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        log = (self.logs / f"{name}.log").open("wb")
        command = [sys.executable, "-m", "aiodisagg", *arguments]
        self.started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        return self.started[-1]

    def start(self, shape: str) -> str:
        model = ("--model", str(self.folder), "--device", self.device)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 240
        if shape == "split":
            meet = free_port()
            self.run(f"{shape}-bootstrap", "bootstrap", "--port", str(meet))
            where = ("--bootstrap", f"http://127.0.0.1:{meet}")
            self.run(f"{shape}-encode", "encode", *model, *where)
            memory = ("--kv-mib", str(self.kv_mib))
            peer = self.run(f"{shape}-language", "language", *model, *where, *memory, "--port", str(port))
        else:
            threads = ("--prepare-threads", "8") if shape == "eight" else ()
            peer = self.run(shape, "both", *model, *threads, "--port", str(port))
        ready(f"{url}/health", peer, deadline)
        return url

    def end(self) -> dict[str, float | int]:
        """SIGTERM to all, newest first; how each ended, and after how long."""
        found: dict[str, float | int] = {}
        for process in reversed(self.started):
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            name = str(process.args[3])  # type: ignore[index]
            found[f"{name}_rc"], found[f"{name}_s"] = process.returncode, time.monotonic() - began
        self.started.clear()
        return found


def measure(url: str, load: str, file: Path) -> list[dict[str, Any]]:
    body = json.dumps({"ignore_eos": True})
    command = [sys.executable, "-m", "aiodisagg", "bench", "serve", "--url", url, "--extra-body", body]
    subprocess.run([*command, *load.split(), "--json", str(file)], check=True, timeout=200)
    runs: list[dict[str, Any]] = json.loads(file.read_text())["runs"]
    return runs


@contextlib.contextmanager
def kept(results: dict[str, Any], file: Path, key: str) -> Iterator[Callable[[Any], None]]:
    """Writes what was found, or the error, whatever happens."""
    began = time.monotonic()
    try:
        yield lambda value: results.__setitem__(key, value)
    except Exception:
        traceback.print_exc()
        results[key] = {"error": traceback.format_exc(limit=3)}
    results[f"{key} took s"] = round(time.monotonic() - began, 1)
    file.write_text(json.dumps(results, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shapes", default="both,eight,split")
    parser.add_argument("--loads", default="")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--budget-s", type=float, default=3600)
    options = parser.parse_args()
    began = time.monotonic()
    device = "cpu" if options.tiny else "cuda"
    results: dict[str, Any] = {"torch": torch.__version__, "cores": os.cpu_count()}
    if not (options.folder / "model.safetensors.index.json").exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        with kept(results, options.json, "checkpoint") as keep:
            keep(write_checkpoint(options.folder, tiny=options.tiny, device=device))
        if device == "cuda":
            torch.cuda.empty_cache()
    loads = TINY_LOADS if options.tiny else LOADS
    for shape in options.shapes.split(","):
        peers = Peers(options.json.parent, options.folder, device, 64 if options.tiny else 30 << 10)
        with kept(results, options.json, f"{shape}: start") as keep:
            url = peers.start(shape)
        for name in options.loads.split(",") if options.loads else loads:
            if "error" in results.get(f"{shape}: start", {}) or time.monotonic() - began > options.budget_s:
                break
            with kept(results, options.json, f"{shape}: {name}") as keep:
                keep(measure(url, loads[name], options.json.with_name(f"{shape}-{name}.json")))
        with kept(results, options.json, f"{shape}: end") as keep:
            keep(peers.end())
    print(json.dumps({key: value for key, value in results.items() if "took" in key or "end" in key}, indent=1))


if __name__ == "__main__":
    main()
