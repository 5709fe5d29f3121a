"""Accuracy of candidates, on as many search images as it takes: see `nestling.search.racing`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nestling.pipeline.measuring import score
from nestling.pipeline.studies import problem
from nestling.pipeline.workbench import Workbench
from nestling.profile import DeviceError, DevicesGoneError
from nestling.search import EvaluationFailed, Metrics, SearchResult, Trial
from nestling.search.racing import is_beaten, looks, race, unbeaten


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


def scored_whole(
    result: SearchResult,
    *,
    total: int,
    score: Callable[[Trial], Metrics],
    keep: Callable[[Trial, Metrics], SearchResult],
    note: Callable[[str], None],
    failed: set[int],
) -> SearchResult:
    """The result, in which everything that lost a race is beaten by something.

    A candidate that was left because of one that turned out dearer is scored on all images, and may then beat
    others that were left. Where the device is away the result is what it was until then.

    Args:
        result: of a search that has come to its end, its latencies as they are to stay.
        total: how many images a whole score is taken on.
        score: the metrics of a trial's network, scored on all images.
        keep: records metrics of a trial in place of its own, and gives the result that follows.
        note: is told what was scored again, what could not be, and that the device was away.
        failed: the numbers of trials that could not be scored and are left; those that follow are added.
    """
    try:
        while left := [trial for trial in unbeaten(result.trials, total=total) if trial.number not in failed]:
            trial = left[0]
            try:
                metrics = score(trial)
            except EvaluationFailed as error:
                failed.add(trial.number)
                note(f"{trial.arch.key} was not scored on all images: {error}")
                continue
            before = f"{trial.metrics['top1']:.2%} on {trial.metrics['top1_images']:.0f}"
            note(
                f"{trial.arch.key}, which nothing beats any more, was scored on all images: "
                f"{metrics['top1']:.2%}, {before}"
            )
            result = keep(trial, metrics)
    except (DeviceError, DevicesGoneError) as error:
        note(f"candidates that nothing beats any more could not be scored on all images: {error}")
    return result
