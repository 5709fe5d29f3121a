"""Numbers as a person reads them: percent, milliseconds, bytes. Metrics with their titles and units."""

from __future__ import annotations

import math
from dataclasses import dataclass

THIN = "\N{NARROW NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
TO = "\N{EN DASH}"
NONE = "\N{EN DASH}"
"""Stands where a figure was not taken."""


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is shown: its title, its unit, and the factor from the stored number to the shown one."""

    title: str
    unit: str
    factor: float = 1.0

    @property
    def label(self) -> str:
        """Title and unit, for an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def shown(self, value: float) -> str:
        """`value` with its unit: 0.951 as `95.1 %`."""
        number = f"{value * self.factor:.1f}" if self.unit == "%" else short(value * self.factor)
        return f"{number}{THIN}{self.unit}" if self.unit else number


_METRICS = {
    "top1": Metric("Accuracy", "%", 100.0),
    "latency_ms": Metric("Latency", "ms"),
    "size_mb": Metric("File size", "MB"),
    "mmacs": Metric("Multiply-adds", "MMACs"),
    "peak_mb": Metric("Peak activations", "MB"),
}


def metric_named(name: str) -> Metric:
    """How the metric `name` is shown; one that is not known here keeps its own name and has no unit."""
    return _METRICS.get(name, Metric(name, ""))


def short(value: float) -> str:
    """Three significant digits without an exponent where that stays readable: 0.0123, 1.23, 12.3, 1,234."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    digits = 2 - math.floor(math.log10(abs(value)))
    if digits > 6:
        return f"{value:.1e}".replace("-", MINUS)
    rounded = round(value, digits) if abs(value) < 1000 else round(value)
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded)))) if rounded else 0
    return f"{rounded:,.{decimals}f}".replace("-", MINUS)


def percent(fraction: float, *, decimals: int = 1) -> str:
    """0.9512 as `95.1 %`."""
    return f"{100 * fraction:.{decimals}f}{THIN}%"


def percent_span(low: float, high: float) -> str:
    """0.951 and 0.963 as `95.1-96.3`, without the unit."""
    return f"{100 * low:.1f}{TO}{100 * high:.1f}"


def milliseconds(value: float) -> str:
    """1.234 as `1.23 ms`."""
    return f"{short(value)}{THIN}ms"


def count(value: float) -> str:
    """1234567 as `1.23 M`, 2600 as `2.60 k`."""
    for bound, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= bound:
            return f"{short(value / bound)}{THIN}{unit}"
    return short(value) if value != int(value) else str(int(value))


def byte_size(value: int) -> str:
    """412345 as `412 kB` (decimal units, as file managers and `size_mb` have them)."""
    for bound, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= bound:
            return f"{short(value / bound)}{THIN}{unit}"
    return f"{value}{THIN}B"


def energy(joules: float) -> str:
    """41234 as `41.2 kJ`, 12 as `12.0 J`."""
    for bound, unit in ((1e9, "GJ"), (1e6, "MJ"), (1e3, "kJ")):
        if joules >= bound:
            return f"{short(joules / bound)}{THIN}{unit}"
    return f"{short(joules)}{THIN}J"


def duration(seconds: float) -> str:
    """4321 as `1 h 12 min`, 75 as `1 min 15 s`, 2.5 as `2.5 s`."""
    if seconds < 10:
        return f"{seconds:.1f}{THIN}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{THIN}s"
    if whole < 3600:
        return f"{whole // 60}{THIN}min {whole % 60}{THIN}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}{THIN}h {minutes % 60}{THIN}min"
