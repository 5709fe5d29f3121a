"""What a person sees in the terminal: progress on stderr, results on stdout."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from nestling.pipeline import (
        Comparison,
        DeviceSummary,
        FileProfile,
        Forecast,
        Refusal,
        ReportFiles,
        SearchResult,
        Spent,
        TrainingProgress,
        TrainingRecord,
        Trial,
    )

_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float, unit: str = "") -> str:
    """`value` with three digits and a decimal prefix, such as `5.66 GMACs`."""
    for factor, prefix in _SI:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def duration(seconds: float) -> str:
    """`seconds` as a person says them, such as `2 min 5 s`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def spent_words(spent: Spent, forecast: Forecast) -> str:
    """What training cost, and how many times the forecast that is."""
    error = spent.macs_error / spent.macs if spent.macs else 0.0
    macs = f"{si(spent.macs, 'MACs')}" + (f" (+- {error:.1%})" if error >= 0.0005 else "")
    energy = [f"{part} {si(joules, 'J')}" for part, joules in spent.joules.items() if joules is not None]
    words = [
        f"{spent.steps:,} steps",
        f"{si(spent.images)} images",
        f"{macs}, {spent.macs / forecast.macs:.2f} of the forecast",
        f"{duration(spent.seconds)}, {spent.seconds / forecast.seconds:.2f} of the forecast",
        f"energy {', '.join(energy)}" if energy else "energy not told by this machine",
    ]
    return f"spent: {'; '.join(words)}"


class Display:
    """A listener that shows bars, and a line for each stage."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self.console = console
        self.progress = progress
        self.expected: Forecast | None = None
        self._task: TaskID | None = None
        self._accuracy = ""

    def stage(self, name: str) -> None:
        """A stage begins: its bar replaces the last one's."""
        if self._task is not None:
            self.progress.stop_task(self._task)
            self._task = None
        self.console.print(f"[bold]{name}[/bold]")

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, style="yellow", markup=False)

    def forecast(self, forecast: Forecast) -> None:
        """What training will cost."""
        self.expected = forecast
        self.console.print(
            f"  forecast: {forecast.steps:,} steps, {si(forecast.images)} images, "
            f"{si(forecast.macs, 'MACs')}, about {duration(forecast.seconds)} at the speed of a trial step"
        )

    def spent(self, spent: Spent, forecast: Forecast) -> None:
        """What training has cost, beside what was forecast."""
        self.console.print(f"  {spent_words(spent, forecast)}", highlight=False)

    def training(self, record: TrainingRecord, progress: TrainingProgress) -> None:
        """The bar of training."""
        text = f"epoch {record.epoch:.1f}  loss {record.loss:.3f}  {record.images_per_second:,.0f} images/s"
        if record.largest_top1 is not None and record.smallest_top1 is not None:
            self._accuracy = f"  largest {record.largest_top1:.1%}, smallest {record.smallest_top1:.1%}"
            if not self.console.is_terminal:
                self.console.print(f"  {text}{self._accuracy}")
        self._advance("training", progress.step, progress.steps, text + self._accuracy)

    def trial(self, trial: Trial, result: SearchResult, wanted: int) -> None:
        """The bar of the search."""
        done = len(result.complete) + len(result.failed)
        objectives = (objective.name for objective in result.problem.objectives)
        last = trial.reason or ", ".join(f"{name} {trial.metrics[name]:.4g}" for name in objectives)
        text = f"{done} of {wanted} candidates, {len(result.front)} on the front; last: {last}"
        if not self.console.is_terminal and done % 10 == 0 and trial.state != "duplicate":
            self.console.print(f"  {text}", markup=False)
        self._advance("searching", done, wanted, text)

    def scored(self, name: str, number: int, total: int) -> None:
        """The bar of an evaluation."""
        self._advance("scoring", number, total, name)

    def exported(self, name: str, number: int, total: int) -> None:
        """The bar of the export."""
        self._advance("exporting", number, total, name)

    def trying(self, text: str) -> None:
        """A probe of a device is done."""
        if self._task is None:
            self._task = self.progress.add_task("trying", total=None, text=text)
        self.progress.update(self._task, text=text)

    def _advance(self, what: str, done: int, total: int, text: str) -> None:
        if self._task is None:
            self._task = self.progress.add_task(what, total=total, text=text)
        self.progress.update(self._task, completed=done, text=text)


@contextmanager
def display() -> Iterator[Display]:
    """A listener on stderr for the time of a command."""
    console = Console(stderr=True)
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Display(console, progress)


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
    _wide().print(table)


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
    _wide().print(table)
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
    _wide().print(table)
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
    console = _wide()
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
    console = _wide()
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
    console = _wide()
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
    console = _wide()
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
    console = _wide()
    console.print(f"{facts['device']}: speed against fp32, bytes of a layer", markup=False, highlight=False)
    table = Table()
    table.add_column("operator")
    for name in columns:
        table.add_column(name, justify="right")
    for kind in dict.fromkeys(found["kind"] for found in findings):
        table.add_row(kind, *(_cell(cells.get((kind, name))) for name in columns))
    console.print(table)
    lines = [
        "2.00x: twice as fast as fp32, in a chain of such layers; ?: the machine was restless; "
        "float: it runs, but computes in 32-bit floats; -: the precision leaves it as it is"
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
    if found["speedup"] is not None:
        words.append(f"{found['speedup']:.2f}x{'?' if found['unstable'] else ''}")
    if found["size"] is not None:
        words.append(f"{found['size']:.0%}")
    return " ".join(words)


def print_space(file: Path, summary: Mapping[str, Any]) -> None:
    """A space's size, choices and extremes."""
    size = summary["size"]
    told = f"{size:,}" if size < 10**9 else f"about 10^{math.floor(math.log10(size))}"
    console = _wide()
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


def _wide() -> Console:
    """Stdout; not folded where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=140)
