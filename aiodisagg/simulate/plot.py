"""Plots of simulations."""

from __future__ import annotations

from pathlib import Path

from aiodisagg.bench.view import drawn
from aiodisagg.simulate.plan import Plan
from aiodisagg.simulate.record import Report


def plot_plan(plan: Plan, file: Path) -> None:
    """Writes a PNG: the share within the SLO over the number of devices, with 95 % intervals over the seeds."""
    with drawn(file, figsize=(8, 4.5)) as (_, axes):
        for place, answer in enumerate(plan.answers):
            devices = [one.devices for one in answer.tried]
            means = [one.attained.mean for one in answer.tried]
            axes.errorbar(
                devices, means, yerr=[one.attained.half for one in answer.tried], fmt="o-", capsize=3,
                label=answer.kind, color=f"C{place}",
            )  # fmt: skip
            if answer.chosen is not None:
                axes.axvline(answer.chosen.devices, color=f"C{place}", linestyle=":", linewidth=1)
        goal = plan.goal
        axes.axhline(goal.share, color="black", linewidth=0.8)
        axes.set(
            xlabel="devices", ylabel=f"share within {goal.slo:g}x of unloaded", ylim=(0, 1.02),
            title=f"{goal.rate_per_s:g} requests/s, {plan.times}, {goal.seeds} seeds",
        )  # fmt: skip
        axes.legend()


def plot_runs(reports: list[Report], file: Path) -> None:
    """Writes a PNG: mean and 99th percentile of the time to first token over the rate, a line for each system."""
    with drawn(file, 1, 2, figsize=(11, 4.2)) as (_, (left, right)):
        for place, system in enumerate(dict.fromkeys(one.system for one in reports)):
            own = sorted((one for one in reports if one.system == system), key=lambda one: one.rate_per_s)
            rates = [one.rate_per_s for one in own]
            left.plot(rates, [one.ttft.mean for one in own], "o-", label=f"{system}, mean", color=f"C{place}")
            left.plot(rates, [one.ttft.p99 for one in own], "s--", label=f"{system}, p99", color=f"C{place}")
            right.plot(rates, [one.goodput_per_s for one in own], "o-", label=system, color=f"C{place}")
        left.set(xlabel="requests/s", ylabel="ms", title="Time to first token", yscale="log")
        right.set(xlabel="requests/s offered", ylabel="requests/s within the SLO", title="Goodput")
        left.legend(fontsize="small")
        right.legend(fontsize="small")
