"""``aiodisagg simulate`` and ``aiodisagg plan``: clusters in virtual time. Heavy imports wait for the command."""

from __future__ import annotations

import time
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from aiodisagg.cli.measuring import plot_option, say, show, write_json
from aiodisagg.cli.process import FILE, NEW_FILE, Command, order_option
from aiodisagg.errors import ConfigError

if TYPE_CHECKING:
    from aiodisagg.bench.workload import Mix
    from aiodisagg.scheduler.order import Order


def workload_options(command: Command) -> Command:
    """What is offered, and to which hardware."""
    for option in (
        click.option("--times", default="h200-vllm", help="Service times: a profile of the package, or a JSON file."),
        click.option("--workload", "mix", default="servegen", help="A named mix, as of bench serve."),
        click.option("--small", is_flag=True, help="The mix as bench system scales it for CPU cores."),
        click.option("--requests", default=2000, type=click.IntRange(min=2), help="Of each run; of plan, at least."),
        click.option("--cv", default=1.0, help="Of the gaps between requests: 1 is Poisson, more is burstier."),
        click.option("--slo", default="5x", help="Multiple of the unloaded latency."),
        click.option("--json", "json_file", type=NEW_FILE, help="Write the results as JSON."),
        plot_option,
    ):
        command = option(command)
    return command


def mix_of(name: str, small: bool) -> Mix:
    """Raises ConfigError."""
    from aiodisagg.bench.compare import small_mixes
    from aiodisagg.bench.mixes import named_mix

    mixes = small_mixes() if small else {}
    if small and name not in mixes:
        raise ConfigError("workload", f"{name!r} is none of {', '.join(mixes)}")
    return mixes[name] if small else named_mix(name)


def slo_of(text: str) -> float:
    """``5x`` or ``5``. Raises ConfigError."""
    try:
        found = float(text.removesuffix("x"))
    except ValueError:
        found = 0.0
    if not found >= 1:
        raise ConfigError("slo", f"{text!r} is no multiple of at least 1")
    return found


@click.command()
@click.option(
    "--system",
    "systems",
    multiple=True,
    help="replicas, split-waits, split-overlap, flexible or static; may be given several times. If left out: the first "
    "four, or replicas for one device.",
)
@click.option("--devices", default=2, type=click.IntRange(min=1))
@click.option("--encode", default=1, help="Of the devices, for splits.")
@click.option("--rate", "rates", multiple=True, type=float, help="Requests per second; may be given several times.")
@click.option("--seed", default=0)
@click.option("--trace", type=FILE, help="Requests of a file, one a line, instead of a mix.")
@click.option("--protocol", is_flag=True, help="Move every item with the real protocol machines; slower.")
@click.option(
    "--shed",
    default=0.0,
    type=click.FloatRange(min=0),
    help="Put the services' admission queue before each engine, which refuses those whose first token it predicts "
    "after this multiple of the unloaded latency; 0: everybody is let in.",
)
@order_option
@click.option("--compare", "measured", type=FILE, help="Report of bench system to predict.")
@workload_options
@click.pass_context
def simulate(context: click.Context, /, measured: Path | None, **options: Any) -> None:
    """Run the scheduling policies over simulated peers: latencies, goodput and utilisation of each system."""
    if measured is not None:
        able = {"measured", "times", "small", "json_file"}
        others = {option.name for option in context.command.params} - able
        _refuse(context, "compare", "what was measured says what to simulate", others)
        _compare(measured, **options)
    else:
        if options["trace"] is not None:
            _refuse(context, "trace", "has its own requests", {"rates", "mix", "small", "requests", "cv"})
        _simulate(**options)


def _simulate(
    systems: tuple[str, ...], devices: int, encode: int, rates: tuple[float, ...], seed: int, trace: Path | None,
    protocol: bool, shed: float, order: Order, times: str, mix: str, small: bool, requests: int, cv: float, slo: str,
    json_file: Path | None, plot_file: Path | None,
) -> None:  # fmt: skip
    import msgspec

    from aiodisagg.bench.workload import read_trace
    from aiodisagg.simulate.doors import Doors, Line
    from aiodisagg.simulate.plot import plot_runs
    from aiodisagg.simulate.runs import Offered, burst, run, work
    from aiodisagg.simulate.systems import named_system
    from aiodisagg.simulate.tables import run_table
    from aiodisagg.simulate.times import read_times

    hardware = read_times(times)
    offered = Offered(mix_of(mix, small), requests, cv)
    chosen = systems or (("replicas", "split-waits", "split-overlap", "flexible") if devices > 1 else ("replicas",))
    if trace is not None:
        workloads = [read_trace(trace)]
    else:
        if not rates:
            spent = work(hardware, offered.at(1.0, seed))
            rates = (0.5 * devices / spent.total_s,)
            say(f"no rate given: half of what {devices} devices can do is {rates[0]:.2f} requests/s")
        workloads = [offered.at(rate, seed) for rate in rates]
    began, found = time.perf_counter(), []
    doors = Doors(line=Line.ADMISSION if shed else Line.ARRIVAL, shed_at=shed, order=order)
    for name in chosen:
        system = msgspec.structs.replace(named_system(name, devices, encode), doors=doors)
        for workload in workloads:
            found.append(run(system, hardware, workload, seed=seed, slo=slo_of(slo), protocol=protocol))
    spent_s = time.perf_counter() - began
    show(run_table(f"{devices} devices, {hardware.name}, SLO {slo}; milliseconds", found), 200)
    say(
        f"{sum(one.requests for one in found):,} requests, {sum(one.events for one in found):,} events, {spent_s:.1f} s"
    )
    if trace is None:
        for number, workload in enumerate(workloads):
            if warning := burst(hardware, workload, found[number :: len(workloads)]):
                say(warning)
    write_json(json_file, found)
    if plot_file is not None:
        plot_runs(found, plot_file)


def _refuse(context: click.Context, key: str, why: str, others: Container[str | None]) -> None:
    """Raises ConfigError if one of ``others`` is given beside the option ``key``, which would ignore it."""
    for option in context.command.params:
        name = option.name or ""
        if name in others and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise ConfigError(key, f"{why}: {option.opts[0]} cannot be given")


def _compare(measured: Path, *, times: str, small: bool, json_file: Path | None, **_: Any) -> None:
    from aiodisagg.bench.compare import small_mixes
    from aiodisagg.bench.mixes import MIX_NAMES, named_mix
    from aiodisagg.simulate.compare import compare, read_measured, verdict
    from aiodisagg.simulate.tables import compare_table
    from aiodisagg.simulate.times import read_times

    mixes = small_mixes() if small else {name: named_mix(name) for name in MIX_NAMES}
    cells = compare(read_measured(measured), read_times(times), mixes)
    show(compare_table(cells), 200)
    write_json(json_file, cells)
    click.echo(verdict(cells))


@click.command("plan")
@click.option("--load", "rate", type=float, required=True, help="Requests per second.")
@click.option("--share", default=0.9, help="Of all requests that must meet the SLO.")
@click.option("--seeds", default=3, type=click.IntRange(min=1), help="Runs of each candidate.")
@workload_options
def plan_command(
    rate: float, share: float, seeds: int, times: str, mix: str, small: bool, requests: int, cv: float, slo: str,
    json_file: Path | None, plot_file: Path | None,
) -> None:  # fmt: skip
    """Say how many peers of which role a load needs to meet an SLO, and how sure that is."""
    from aiodisagg.simulate.plan import PlanGoal, plan
    from aiodisagg.simulate.plot import plot_plan
    from aiodisagg.simulate.runs import Offered
    from aiodisagg.simulate.tables import plan_table
    from aiodisagg.simulate.times import read_times

    goal = PlanGoal(rate, slo_of(slo), share, seeds)
    found = plan(read_times(times), Offered(mix_of(mix, small), requests, cv), goal, say=say)
    title = f"{rate:g} requests/s of {mix} on {found.times}: {share:.0%} within {goal.slo:g}x of the unloaded latency"
    show(plan_table(title, found), 200)
    click.echo("The service times are taken as true: the intervals are of the workload's chance only.")
    write_json(json_file, found)
    if plot_file is not None:
        plot_plan(found, plot_file)


@click.command("simulate")
@click.option("--study", "names", multiple=True, help="two-devices, ladder, overload or text; all if left out.")
@click.option("--quick", is_flag=True, help="Few requests: shows that it works, not what is so.")
@click.option("--out", type=NEW_FILE, default=Path("docs/simulate.md"), help="Has the marks.")
def bench_simulate(names: tuple[str, ...], quick: bool, out: Path) -> None:
    """Fill the tables of docs/simulate.md."""
    from aiodisagg.simulate.document import FULL, QUICK, STUDIES, write

    for name in names:
        if name not in STUDIES:
            raise ConfigError("study", f"{name!r} is none of {', '.join(STUDIES)}")
    write(out, names or tuple(STUDIES), QUICK if quick else FULL, say)
