"""Numbers as a person says them, and where they go."""

from __future__ import annotations

from rich.console import Console

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


def wide() -> Console:
    """Stdout; not folded where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=140)
