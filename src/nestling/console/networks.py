"""Networks and spaces, on stdout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from nestling.console.words import si, wide

if TYPE_CHECKING:
    from nestling.pipeline import ReportFiles, SearchResult


def print_front(members: Sequence[Mapping[str, Any]], report: ReportFiles) -> None:
    """The front's table and where the report is."""
    print_members(members)
    Console().print(f"\nreport: {report.html.resolve()}", soft_wrap=True, markup=False, highlight=False)


def print_members(members: Sequence[Mapping[str, Any]]) -> None:
    """A table of handed-over networks; every figure was measured on the file in the row."""
    table = Table(title="Measured on the files themselves", title_justify="left")
    for heading in (
        "network",
        "test top-1",
        "latency",
        "x reference",
        "size",
        "MACs",
        "resolution",
        "quantized stages",
    ):
        table.add_column(heading, justify="left" if heading in ("network", "quantized stages") else "right")
    for member in members:
        low, high = member["test_top1_interval"]
        quantized = [f"{stage} {p}" for stage, p in member["precisions"].items() if p != "fp32"]
        timed = member["latency_ms"] is not None
        latency = f"{member['latency_ms']:.3f} ms" if timed else "none: simulated"
        latency += " (unstable)" if member["unstable"] else ""
        table.add_row(
            member["name"],
            f"{member['test_top1']:.2%} ({low:.1%}-{high:.1%})",
            latency,
            f"{member['latency_ratio']:.3f}" if timed else "",
            f"{member['size_bytes'] / 1e6:.3f} MB",
            si(member["mmacs"] * 1e6),
            str(member["resolution"]),
            ", ".join(quantized) or "none",
        )
    wide().print(table)


def print_best(card: Mapping[str, Any], result: SearchResult, folder: Path) -> None:
    """The best network that keeps the limits, as the search found it and as its file was measured again."""
    limits, best = result.problem.limits, result.best
    low, high = card["test_top1_interval"]
    again = f"top-1 {card['test_top1']:.2%} ({low:.1%}-{high:.1%}) on {card['test_total']:,} test images"
    if card["latency_ms"] is not None:
        low, high = card["latency_interval_ms"]
        again += f", {card['latency_ms']:.4g} ms ({low:.4g}-{high:.4g})"
        again += ", unstable: the machine was busy" if card["unstable"] else ""
    found = ", ".join(f"{limit.metric} {best.metrics[limit.metric]:.4g}" for limit in limits if best)
    console = Console()
    for line in (
        f"the best network with {' and '.join(map(str, limits))} on {card['device']}: {card['name']}",
        f"  in the search: {found}",
        f"  measured again, with 95 % intervals: {again}",
        f"  {folder / 'exports' / card['name'] / card['file']}",
        *(f"  {told}" for told in beyond_limits(card, result)),
    ):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def beyond_limits(card: Mapping[str, Any], result: SearchResult) -> list[str]:
    """The limits that what was measured again misses with its whole interval, a line each, and what would do.

    The best within a limit is often one whose measurement was lucky. An unstable latency tells nothing.
    """
    latency = None if card["unstable"] else card["latency_interval_ms"]
    measured = {"top1": card["test_top1_interval"], "latency_ms": latency}
    told = []
    for limit in result.problem.limits:
        interval = measured.get(limit.metric)
        if interval is None or any(limit.violation({limit.metric: end}) <= 0 for end in interval):
            continue
        option = "--at-most" if limit.is_ceiling else "--at-least"
        bound = 0.95 * limit.bound if limit.is_ceiling else limit.bound + 0.05 * (1 - limit.bound)
        told.append(f"not {limit} when measured again; {option} {limit.metric}={bound:.4g} leaves room")
    return told


def print_finetuned(card: Mapping[str, Any], *, as_json: bool) -> None:
    """A fine-tuned network's accuracy before and after, and what was handed over."""
    if as_json:
        print(json.dumps(card, indent=2))
        return
    told = card["finetuning"]
    how = "trained from scratch" if told["from_scratch"] else "fine-tuned"
    if "qat" in told:
        how = f"trained in its precisions ({told['qat']})"
    table = Table(title=f"exports/{card['name']}: {how} for {told['epochs']:g} epochs", title_justify="left")
    table.add_column("measured on the files themselves")
    for heading in ("search top-1", "test top-1"):
        table.add_column(heading, justify="right")
    for name, key in (("with the supernet's weights", "before"), (how, "after")):
        row = told[key]
        table.add_row(f"{name} ({row['file']})", *(_split_top1(row, split) for split in ("search", "test")))
    wide().print(table)
    print_members([card])


def _split_top1(row: Mapping[str, Any], split: str) -> str:
    return _top1({name: row[f"{split}_{name}"] for name in ("top1", "top1_interval")})


def print_trials(result: SearchResult) -> None:
    """The search's front, as found on the search split."""
    table = Table(
        title=f"{len(result.complete)} candidates, {len(result.failed)} failed; the front (search split)"
    )
    metrics = sorted({name for trial in result.front for name in trial.metrics})
    for heading in ("key", *metrics):
        table.add_column(heading, justify="right")
    for trial in result.front:
        cells = (trial.metrics.get(name) for name in metrics)  # records of before lack some
        table.add_row(trial.arch.key, *("" if cell is None else f"{cell:.4g}" for cell in cells))
    wide().print(table)
    if result.unstable:
        keys = ", ".join(trial.arch.key for trial in result.unstable)
        Console().print(
            f"the latency of {len(result.unstable)} of {len(result.front)} is unstable, do not trust it: "
            f"{keys}; the same command measures them again, on a quieter machine better",
            soft_wrap=True,
            markup=False,
            highlight=False,
            style="yellow",
        )


def print_evaluation(found: Mapping[str, Any], *, as_json: bool) -> None:
    """How good a supernet is: its subnets, and the figures with their 95 % intervals."""
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table(title=f"On {found['images']:,} images of the search split", title_justify="left")
    for heading in ("network", "MACs", "top-1, shared weights", "top-1, trained alone"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    alone = {row["arch_key"]: row for row in found["alone"]["networks"]}
    for row in found["subnets"]:
        other = alone.get(row["arch_key"])
        table.add_row(row["arch_key"], si(row["macs"]), _top1(row), "" if other is None else _top1(other))
    console = wide()
    console.print(table)
    figures = Table(show_header=False)
    for name, estimate, percent in (
        ("area under accuracy over log MACs", found["area"], True),
        ("front over subnets of the same MACs", found["search"]["improvement"], True),
        ("Kendall tau with training alone", found["alone"].get("tau"), False),
        ("the same, of the MACs", found["alone"].get("tau_of_macs"), False),
        ("the same, beyond the MACs", found["alone"].get("partial_tau"), False),
        ("top-1 above training alone", found["alone"].get("gap"), True),
        ("gained by choosing of two alike in MACs", found["alone"].get("improvement"), True),
        ("the same, choosing the dearer", found["alone"].get("improvement_of_macs"), True),
    ):
        if estimate is not None:
            value, low, high = (
                f"{estimate[key]:.2%}" if percent else f"{estimate[key]:.2f}"
                for key in ("value", "low", "high")
            )
            figures.add_row(name, f"{value} ({low} to {high})")
    console.print(figures)


def _top1(row: Mapping[str, Any]) -> str:
    low, high = row["top1_interval"]
    return f"{row['top1']:.2%} ({low:.1%}-{high:.1%})"


def print_space(file: Path, summary: Mapping[str, Any]) -> None:
    """A space's size, choices and extremes."""
    size = summary["size"]
    told = f"{size:,}" if size < 10**9 else f"about 10^{math.floor(math.log10(size))}"
    console = wide()
    console.print(f"{file}: {told} networks of the family {summary['family']}", markup=False, highlight=False)
    choices = Table()
    choices.add_column("choice")
    choices.add_column("values, cheapest to dearest")
    constants = {}
    for name, values in summary["choices"].items():
        if len(values) > 1:
            choices.add_row(name, "  ".join(str(value) for value in values))
        else:
            constants[name] = values[0]
    console.print(choices)
    told_constants = ", ".join(f"{name} {value}" for name, value in constants.items())
    console.print(f"constant: {told_constants}", markup=False, highlight=False)
    extremes = Table()
    for heading in ("", "resolution", "MACs", "parameters", "activations", "peak activations"):
        extremes.add_column(heading, justify="right")
    for name in ("smallest", "largest"):
        found = summary[name]
        extremes.add_row(
            name,
            str(found["resolution"]),
            si(found["macs"]),
            si(found["params"]),
            si(found["activation_bytes"], "B"),
            si(found["peak_bytes"], "B"),
        )
    console.print(extremes)


def print_next(command: str) -> None:
    """The command that comes next."""
    Console(stderr=True).print(f"next: {command}", markup=False, highlight=False)
