"""``aiodisagg bench serve``: a load generator for any server of OpenAI's chat API."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aiodisagg.cli.measuring import INTEGERS, NUMBERS, measure, plot_option, progress, show, write_json
from aiodisagg.cli.process import FILE, KEY_VARIABLE, NEW_FILE
from aiodisagg.errors import AiodisaggError, ConfigError

if TYPE_CHECKING:
    from aiodisagg.bench.serve import Run
    from aiodisagg.bench.serve_metrics import Outcome
    from aiodisagg.bench.workload import Mix


MIX_KEYS = ("mix", "images", "sizes", "tokens", "text", "output", "reuse", "pool", "tenants")


def mix_of(
    mix: str, images: str | None, sizes: str | None, tokens: str | None, text: str | None, output: str | None,
    reuse: float | None, pool: int | None, tenants: str | None,
) -> tuple[Mix, str]:  # fmt: skip
    """A named mix with what the user changed of it, and what to call it. Raises ConfigError."""
    from aiodisagg.bench.distributions import parse_ranges, parse_sizes
    from aiodisagg.bench.mixes import named_mix
    from aiodisagg.bench.workload import parse_tenants

    changes: dict[str, Any] = {}
    for key, given in (("images", images), ("text", text), ("output", output), ("tokens", tokens)):
        if given is not None:
            field = {"text": "text_tokens", "output": "output_tokens", "tokens": "sizes"}.get(key, key)
            changes[field] = parse_ranges(key, given)
    if sizes is not None:
        changes["sizes"] = parse_sizes("sizes", sizes)
    changes |= {key: value for key, value in (("reuse", reuse), ("pool", pool)) if value is not None}
    if tenants is not None:
        changes["tenants"] = parse_tenants("tenants", tenants)
    said = {"images": images, "sizes": sizes, "tokens": tokens, "text": text, "output": output, "tenants": tenants}
    changed = replace(named_mix(mix), **changes)
    if reuse is not None or pool is not None:
        said["reuse"] = f"{changed.reuse:g} of {changed.pool}"
    name = ", ".join([mix, *(f"{key} {value}" for key, value in said.items() if value)])
    return changed, name


@click.command("serve")
@click.option("--url", "urls", multiple=True, required=True, help="http://host:port; several are replicas.")
@click.option("--model", default="", help="As the server calls it; its first one if left out.")
@click.option("--api-key", envvar=KEY_VARIABLE, show_envvar=True)
@click.option("--balance", type=click.Choice(["least-outstanding", "round-robin"]), default="least-outstanding")
@click.option("--mix", default="images-1-8", help="images-1-8, mixed, servegen, reuse, documents or text.")
@click.option("--images", help="Pictures of a request: 4, 1-8, 1,2,4 or, weighted, 0:0.5,1-8:0.5.")
@click.option("--sizes", help="Pictures in pixels, each equally likely: 1280x720,1920x1080.")
@click.option("--tokens", help="Visual tokens of a picture, as --images; instead of --sizes.")
@click.option("--text", help="Text tokens of prompts, as --images.")
@click.option("--output", help="Tokens of answers, as --images.")
@click.option("--reuse", type=float, help="Chance that a picture is one of the pool; as the mix if left out.")
@click.option("--pool", type=int, help="Pictures that requests share; what the mix has if left out.")
@click.option("--tenants", help="Who asks, by share and priority (lower goes first): big:3,urgent:1:-1.")
@click.option("--trace", type=FILE, help="Replay a file of requests instead of a mix.")
@click.option("--save-trace", type=NEW_FILE, help="Write the first run's requests as such a file.")
@click.option("--rates", callback=NUMBERS, help="Open loop: requests per second of each run, as 1,2,4.")
@click.option("--cv", default=1.0, help="Burstiness of arrivals: 1 is Poisson, more is a gamma process.")
@click.option(
    "--concurrency", "concurrencies", callback=INTEGERS,
    help="Closed loop: requests at a time of each run; 8 if nothing else.",
)  # fmt: skip
@click.option("--requests", default=100, help="Of each run.")
@click.option("--seeds", default="0", callback=INTEGERS, help="Each run is repeated with each of them, as 0,1,2.")
@click.option("--warmup", default=2, help="Requests to each replica that are not counted.")
@click.option("--probes", default=5, help="Requests of each group that are sent alone, for the unloaded latency.")
@click.option(
    "--slo",
    default="5,10",
    callback=NUMBERS,
    help="Multiples of the unloaded latency within which requests count as good.",
)
@click.option("--image-format", "form", type=click.Choice(["jpeg", "png"]), default="jpeg")
@click.option("--extra-body", help='JSON added to every request: {"ignore_eos": true, "min_tokens": 128}.')
@click.option("--metrics", multiple=True, help="A /metrics URL of any peer; several are added up, run by run.")
@click.option("--timeout-s", default=600.0, help="Of one request.")
@click.option("--quick", is_flag=True, help="A dozen requests: shows that it works, not how fast.")
@click.option("--json", "json_file", type=NEW_FILE, help="Write everything as JSON.")
@click.option("--outcomes", type=NEW_FILE, help="Write every request as a line of JSON.")
@plot_option
def bench_serve_command(
    urls: tuple[str, ...], trace: Path | None, save_trace: Path | None, rates: tuple[float, ...] | None,
    concurrencies: tuple[int, ...] | None, extra_body: str | None, quick: bool, json_file: Path | None,
    outcomes: Path | None, plot_file: Path | None, **rest: Any,
) -> None:  # fmt: skip
    """Measure a server of OpenAI's chat API: latencies, throughput, goodput.

    Works against any such server. A server that caches pictures remembers those of an earlier command: give it another
    seed. The client should have a core of its own; its share of one and its delays are part of the report.
    """
    import msgspec

    from aiodisagg.bench.serve import ServeOptions, bench_serve
    from aiodisagg.bench.serve_plot import plot_serve
    from aiodisagg.bench.serve_view import append_outcomes, serve_tables
    from aiodisagg.bench.workload import generate, read_trace, write_trace

    described = {key: rest.pop(key) for key in MIX_KEYS}
    if trace is not None:
        rest |= {"trace": read_trace(trace), "workload": f"trace {trace.name}"}
    else:
        rest["mix"], rest["workload"] = mix_of(**described)
    try:
        rest["extra"] = msgspec.json.decode(extra_body or "{}", type=dict[str, object])
    except msgspec.MsgspecError as error:
        raise ConfigError("extra-body", str(error)) from error
    if quick:
        rest |= {"requests": 12, "warmup": 1, "probes": 1}
    if concurrencies is None and rates is None and trace is None:
        concurrencies = (8,)
    given = ServeOptions(
        urls=tuple(url.rstrip("/").removesuffix("/v1") for url in urls), rates=rates or (),
        concurrencies=concurrencies or (), **rest,
    )  # fmt: skip
    _, first = given.loads[0]
    if save_trace is not None and given.mix is not None and first is not None:
        write_trace(save_trace, generate(given.mix, first, given.requests, given.seeds[0]))
    if outcomes is not None:
        outcomes.write_bytes(b"")

    def keep(run: Run, ended: list[Outcome]) -> None:
        if outcomes is not None:
            append_outcomes(outcomes, run, ended)

    with progress() as say:
        report = measure(bench_serve(given, say, keep))
    write_json(json_file, report)
    show(serve_tables(report))
    if not any(run.all.completed for run in report.runs):
        raise AiodisaggError("no request was answered")
    if plot_file is not None:
        plot_serve(report, plot_file)
