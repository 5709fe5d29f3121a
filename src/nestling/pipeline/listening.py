"""Listener: who hears what a run does."""

from __future__ import annotations

from typing import Protocol

from nestling.pipeline.forecast import Forecast
from nestling.search import SearchResult, Trial
from nestling.train.account import Spent
from nestling.train.records import TrainingRecord
from nestling.train.strategies import Progress


class Listener(Protocol):
    """Hears what a run does; a progress display, or nothing."""

    def stage(self, name: str) -> None:
        """A stage begins."""
        ...

    def note(self, text: str) -> None:
        """Something that a person should read."""
        ...

    def forecast(self, forecast: Forecast) -> None:
        """What training will cost."""
        ...

    def spent(self, spent: Spent, forecast: Forecast) -> None:
        """What training has cost, and what was forecast of it."""
        ...

    def training(self, record: TrainingRecord, progress: Progress) -> None:
        """A training step is done."""
        ...

    def trial(self, trial: Trial, result: SearchResult, wanted: int) -> None:
        """A candidate was evaluated."""
        ...

    def scored(self, name: str, number: int, total: int) -> None:
        """A network was scored by an evaluation: its key, its number, how many there will be."""
        ...

    def exported(self, name: str, number: int, total: int) -> None:
        """A network was handed over."""
        ...


class Silent:
    """A listener that does nothing."""

    def stage(self, name: str) -> None:
        """Hears nothing."""

    def note(self, text: str) -> None:
        """Hears nothing."""

    def forecast(self, forecast: Forecast) -> None:
        """Hears nothing."""

    def spent(self, spent: Spent, forecast: Forecast) -> None:
        """Hears nothing."""

    def training(self, record: TrainingRecord, progress: Progress) -> None:
        """Hears nothing."""

    def trial(self, trial: Trial, result: SearchResult, wanted: int) -> None:
        """Hears nothing."""

    def scored(self, name: str, number: int, total: int) -> None:
        """Hears nothing."""

    def exported(self, name: str, number: int, total: int) -> None:
        """Hears nothing."""
