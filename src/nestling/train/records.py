"""TrainingRecord: what is noted of training, a line an epoch, in `records.jsonl`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nestling.run import write_atomically


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """What is noted of a moment of training. Accuracies are estimates with the batch's own statistics.

    `loss` is that of each step's first visit, before its weight: the mean of the latest 50 steps.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    images_per_second: float
    seconds: float
    largest_top1: float | None = None
    smallest_top1: float | None = None


def read_records(folder: Path, *, until: int | None = None) -> list[TrainingRecord]:
    """The records of the run in `folder`, up to step `until`; those of its end where it is None."""
    path = folder / "records.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(TrainingRecord(**json.loads(line)))
        except json.JSONDecodeError:
            break  # a line cut by a crash; the step it tells of is done again
    return [record for record in records if until is None or record.step <= until]


def write_records(folder: Path, records: list[TrainingRecord]) -> None:
    """Writes `records` as those of the run in `folder`, in place of what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    write_atomically(folder / "records.jsonl", lines.encode())


def append_record(folder: Path, record: TrainingRecord) -> None:
    """Writes `record` after the others of the run in `folder`."""
    with (folder / "records.jsonl").open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")
