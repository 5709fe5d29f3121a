"""Evaluations of archs that several searches share: each arch is evaluated once, and kept in a file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from record import store
from strategies import T_QUANTILES

from nestling.pipeline.candidate import (
    PAUSES,
    candidate_metrics,
    latency_metrics,
    measure,
    score,
    write_candidate,
)
from nestling.pipeline.workbench import Workbench
from nestling.space import Arch

KINDS = ("searched", "judged")


class Evaluator:
    """What archs turned out to be; each is evaluated once, and kept in a file.

    Latency is told as a part of the device's reference model's, which repeats where milliseconds do not.

    Args:
        bench: of the run whose supernet lends.
        folder: for what was found.
        pauses: seconds before an unstable measurement is taken again, and again.
    """

    def __init__(self, bench: Workbench, folder: Path, *, pauses: Sequence[float] = PAUSES) -> None:
        self.bench = bench
        self.folder = folder
        self.pauses = pauses
        for kind in KINDS:
            (folder / kind).mkdir(parents=True, exist_ok=True)

    def searched(self, arch: Arch) -> Mapping[str, float]:
        """What a search is told of `arch`, a member of the run's space or of a part of it."""
        return self._kept(self.bench.space.canonical(arch), "searched")

    def judged(self, arch: Arch) -> Mapping[str, float]:
        """The same on the test images, the latency measured anew."""
        return self._kept(self.bench.space.canonical(arch), "judged")

    def _kept(self, arch: Arch, kind: str) -> Mapping[str, float]:
        path = self.folder / kind / f"{arch.key}.json"
        if path.exists():
            found: dict[str, float] = json.loads(path.read_text())
            return found
        model = self.folder / f"{arch.key}.onnx"
        candidate = write_candidate(self.bench, arch, model)
        images = self.bench.data.search if kind == "searched" else self.bench.data.test()
        accuracy = score(self.bench.device, model, images, resolution=candidate.resolution)
        measurement = measure(self.bench.device, model, pauses=self.pauses)
        metrics = candidate_metrics(candidate, accuracy) | latency_metrics(measurement, reference_ms=1.0)
        metrics |= {"unstable": float(measurement.unstable), "images": float(accuracy.total)}
        model.unlink()
        store(path, metrics)
        return metrics


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval (Student's t); infinite with one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("inf")
    return mean, T_QUANTILES[len(values) - 1] * float(np.std(values, ddof=1)) / len(values) ** 0.5
