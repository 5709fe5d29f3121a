"""Accuracy of candidates, on as many search images as it takes: see `nestling.search.racing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nestling.pipeline.measuring import score
from nestling.pipeline.studies import problem
from nestling.pipeline.workbench import Workbench
from nestling.search import Trial
from nestling.search.racing import is_beaten, looks, race


class Scoring:
    """Scores candidates of a run on its search images.

    With `search.race` a candidate is scored look by look, and left where a trial beats it for sure enough. A
    trial that is not yet known here, of another process, only makes it be scored on more images.

    Args:
        bench: the run.

    Attributes:
        trials: those that a candidate must not be beaten by; to be kept up to date.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self.trials: Sequence[Trial] = ()
        images = bench.data.search
        races = bench.config.search.race and "top1" in problem(bench).needed()
        self._ends = looks(len(images)) if races else (len(images),)
        self._portions = images.portions(self._ends, seed=bench.config.seed) if races else (images,)

    def __call__(self, path: Path, *, resolution: int, costs: Mapping[str, float]) -> dict[str, float]:
        """`top1` of the file at `path`, on how many images it is (`top1_images`), and whether on a part.

        Where `top1_partial` is 1 the candidate was left: some trial is more accurate and in none of `costs`
        dearer. One whose latency is unstable is scored on all images.

        Raises:
            EvaluationFailed: the runtime crashed, hung or refused the file.
        """
        device, total = self._bench.device, self._ends[-1]
        stable = not costs.get("latency_unstable")

        def right(look: int) -> int:
            portion = self._portions[look]
            return score(device, path, portion, resolution=resolution, part_of=total).correct

        found = race(right, lambda top1: stable and is_beaten(self.trials, costs, top1), ends=self._ends)
        return {
            "top1": found.top1,
            "top1_images": float(found.seen),
            "top1_partial": float(found.seen < total),
        }
