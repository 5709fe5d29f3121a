"""Progress on stderr: a line for each stage, and bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nestling.console.words import duration, si

if TYPE_CHECKING:
    from nestling.pipeline import (
        Forecast,
        SearchResult,
        Spent,
        TrainingProgress,
        TrainingRecord,
        Trial,
    )


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
