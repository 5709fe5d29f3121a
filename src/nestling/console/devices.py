"""What devices make of files and precisions, on stdout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from nestling.console.words import si, wide

if TYPE_CHECKING:
    from nestling.pipeline import Comparison, DeviceSummary, FileProfile, Refusal


def print_profiles(
    profiles: Sequence[FileProfile], *, refused: Sequence[Refusal] = (), nodes: bool, as_json: bool
) -> None:
    """What files take on devices, a column each; then where their time goes, if `nodes` says so.

    Those that were `refused` have columns too, which say so; the command's error says why.
    """
    if as_json:
        content = [profile.to_json() for profile in profiles] + [one.to_json() for one in refused]
        print(json.dumps(content, indent=2))
        return
    if not profiles:
        return
    table = Table(title="Timed in turns with a reference model", title_justify="left")
    table.add_column("")
    rows: dict[str, list[str]] = {}
    for number, profile in enumerate(profiles):
        table.add_column(f"{profile.path}\n{profile.measurement.device}", justify="right", overflow="fold")
        for name, told in _profile_facts(profile).items():
            row = rows.setdefault(name, [])
            row.extend([""] * (number - len(row)))
            row.append(told)
    for one in refused:
        table.add_column(f"{one.what}\n{one.device}", justify="right", overflow="fold")
        rows["median"].append("none: refused")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console = wide()
    console.print(table)
    for profile in profiles:
        for reason in profile.measurement.unstable_because:
            where = f"{profile.path} on {profile.measurement.device}"
            console.print(f"unstable, measure again: {where}: {reason}", markup=False, style="yellow")
        if nodes:
            console.print(_node_table(profile))


def _profile_facts(profile: FileProfile) -> dict[str, str]:
    taken = profile.measurement
    told = taken.conditions
    (low, high), (ratio_low, ratio_high) = taken.interval_ms, taken.ratio_interval
    facts = {
        "median": f"{taken.latency_ms:.3f} ms",
        "95 % of it": f"{low:.3f} to {high:.3f} ms",
        "p90, p99": f"{taken.p90_ms:.3f}, {taken.p99_ms:.3f} ms",
        "x reference model": f"{taken.ratio:.3f} ({ratio_low:.3f} to {ratio_high:.3f})",
        "first run, loading": f"{taken.first_seconds * 1e3:.1f} ms, {taken.load_seconds * 1e3:.0f} ms",
        "runs": str(len(taken.seconds)),
        "input": "\n".join(map(str, profile.inputs)),
    }
    if told.peak_bytes is not None:
        facts["peak memory"] = si(told.peak_bytes, "B")
    if told.waited is not None:
        facts["kept waiting"] = f"{told.waited:.1%} of the time"
    if told.celsius is not None:
        facts["temperature"] = f"{told.celsius:.0f} C"
    if told.mhz is not None:
        facts["clock"] = f"{told.mhz:,.0f} MHz"
    for name, joules in profile.joules.items():
        facts[f"energy, {name}"] = f"{si(joules, 'J')} a run"
    if taken.elsewhere is not None:
        moved = taken.elsewhere
        facts["ran elsewhere"] = f"{moved.kernels:.1%} of nodes, {moved.time:.1%} of time"
    return facts


def _node_table(profile: FileProfile, *, most: int = 25) -> Table:
    whole = profile.nodes_ms or 1.0
    dearest = sorted(profile.nodes, key=lambda node: -(node.microseconds or 0.0))
    shown = dearest[:most]
    table = Table(
        title=f"{profile.path} on {profile.measurement.device}: {len(dearest)} nodes, {whole:.3f} ms",
        title_justify="left",
    )
    for heading in ("node", "operator", "reads", "us", "share"):
        table.add_column(heading, justify="right" if heading in ("us", "share") else "left")
    for node in shown:
        microseconds = node.microseconds or 0.0
        reads = " ".join(dict.fromkeys(node.reads))
        table.add_row(node.name, node.op, reads, f"{microseconds:.1f}", f"{microseconds / 1e3 / whole:.1%}")
    if len(dearest) > most:
        rest = sum(node.microseconds or 0.0 for node in dearest[most:])
        table.add_row(f"{len(dearest) - most} others", "", "", f"{rest:.1f}", f"{rest / 1e3 / whole:.1%}")
    return table


def print_comparisons(
    compared: Sequence[Comparison], *, refused: Sequence[Refusal] = (), as_json: bool
) -> None:
    """How many times faster one file is than another, on each device; the command's error tells why not."""
    if as_json:
        told = [dict(one.to_json()) for one in compared] + [one.to_json() for one in refused]
        print(json.dumps(told, indent=2))
        return
    console = Console(soft_wrap=True)
    for one in compared:
        print(f"{one.device}: {one.sentence()}")
        console.print(
            f"  medians {one.first_ms:.3f} and {one.second_ms:.3f} ms, {len(one.speedups)} fresh workers",
            highlight=False,
        )


def print_devices(found: Sequence[DeviceSummary], *, as_json: bool) -> None:
    """Devices, what they are, and how noisy they were."""
    if as_json:
        print(json.dumps([one.to_json() for one in found], indent=2))
        return
    table = Table()
    for heading in ("device", "where", "fingerprint", "measured", "interval", "reference", "A/A"):
        table.add_column(
            heading, justify="left" if heading in ("device", "where", "fingerprint") else "right"
        )
    for one in found:
        kind = one.fingerprint
        table.add_row(
            one.address,
            one.source,
            f"cannot be used: {one.refusal}" if kind is None else f"{kind.key}: {kind}",
            str(one.measurements or ""),
            *(
                "" if part is None else f"+-{part:.2%}"
                for part in (one.interval, one.reference_spread, one.aa_spread)
            ),
        )
    console = wide()
    console.print(table)
    console.print(
        "interval: half of that of a ratio, the median; reference: the spread of the reference model's time "
        "over measurements; A/A: that of its ratio to itself (--noise)",
        style="dim",
    )


def print_latency(found: Mapping[str, Any], *, as_json: bool) -> None:
    """How well latencies are predicted of networks that were left out, by what was learnt and otherwise."""
    if as_json:
        print(json.dumps({name: told for name, told in found.items() if name != "model"}, indent=2))
        return
    fastest, slowest = (ratio * found["reference_ms"] for ratio in found["ratios"])
    table = Table(
        title=f"{found['networks']} networks from {fastest:.3f} to {slowest:.3f} ms, each told from others",
        title_justify="left",
    )
    for heading in ("by", "mean error", "Kendall's tau"):
        table.add_column(heading, justify="left" if heading == "by" else "right")
    names = {"model": "latency model", "table": "lookup table of blocks", "macs": "MACs alone"}
    for name, words in names.items():
        if name in found["held_out"]:
            told = found["held_out"][name]
            table.add_row(words, f"{told['mape']:.1%}", f"{told['tau']:.3f}")
    console = wide()
    console.print(table)
    untold = {
        words: found["networks"] - found["held_out"][name]["told"]
        for name, words in names.items()
        if name in found["held_out"]
    }
    for words, count in untold.items():
        if count:
            console.print(f"the {words} cannot tell {count} of them; all are judged on the others")
    console.print(f"on {found['told']}", markup=False, highlight=False)


def print_precisions(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """What a device makes of each precision: a row for each kind of operator."""
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    findings = facts["findings"]
    cells = {(found["kind"], found["precision"]): found for found in findings}
    asked = {found["precision"]: False for found in findings}
    for found in findings:
        asked[found["precision"]] |= found["status"] != "simulated" or found["error"] is not None
    columns = [name for name, tried in asked.items() if tried]
    research = [name for name, tried in asked.items() if not tried]
    console = wide()
    console.print(f"{facts['device']}: speed against fp32, bytes of a layer", markup=False, highlight=False)
    table = Table()
    table.add_column("operator")
    for name in columns:
        table.add_column(name, justify="right")
    for kind in dict.fromkeys(found["kind"] for found in findings):
        table.add_row(kind, *(_cell(cells.get((kind, name))) for name in columns))
    console.print(table)
    untold = any(found["status"] == "untold" for found in findings)
    lines = [
        "2.00x: twice as fast as fp32, in a chain of such layers; ?: the machine was restless; "
        "float: it runs, but computes in 32-bit floats; -: the precision leaves it as it is"
        + ("; untold: the runtime does not say in what it computes" if untold else "")
    ]
    if facts["fingerprint"]["int8_saturates"]:
        lines.append("8-bit products saturate here, so weights keep to 7 bits")
    if research:
        lines.append(f"simulated only, for research: {', '.join(research)}")
    lines += [
        f"not usable: {name}: {reason}" for name, reason in facts["dropped"].items() if name not in research
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _cell(found: Mapping[str, Any] | None) -> str:
    """One finding in few characters, such as `2.81x 27%`."""
    if found is None:
        return "-"
    if found["status"] == "refused":
        return "refused"
    words = [] if found["right"] else ["wrong"]
    if found["status"] == "simulated":
        words.append("float")
    if found["status"] == "untold":
        words.append("untold")
    if found["speedup"] is not None:
        words.append(f"{found['speedup']:.2f}x{'?' if found['unstable'] else ''}")
    if found["size"] is not None:
        words.append(f"{found['size']:.0%}")
    return " ".join(words)
