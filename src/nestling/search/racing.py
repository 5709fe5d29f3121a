"""Racing: a candidate is scored on a few images first, and on all only where it may reach the front.

Images are drawn without replacement from those that a whole score is taken on, so what the rest can still
change is a hypergeometric question with an exact answer, after Clopper & Pearson 1934 for a finite whole. A
candidate is left at the first look at which even the best accuracy that is plausible would be beaten; the
looks share the risk, so that one which is not beaten is left with a chance of at most 1 - `CONFIDENCE`.
Racing of models is Maron & Moore 1994, "Hoeffding races"; their bound is wider than the exact one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from nestling.search.objectives import DIRECTIONS, Metrics
from nestling.search.result import Trial

CONFIDENCE = 0.99
FIRST_LOOK = 64
"""Images of the first look at least."""
FIRST_SHARE = 8
"""The first look is at this part of all images, each further one at twice as many as the one before."""


@dataclass(frozen=True, slots=True)
class Scored:
    """`correct` of the `seen` images that a race came to."""

    correct: int
    seen: int

    @property
    def top1(self) -> float:
        """The fraction classified right."""
        return self.correct / self.seen


def looks(total: int) -> tuple[int, ...]:
    """How many images were seen in all at each look, the last being all of `total`.

    Raises:
        ValueError: no images.
    """
    if total < 1:
        raise ValueError(f"{total} images; a race needs at least one")
    ends = []
    seen = max(FIRST_LOOK, -(-total // FIRST_SHARE))
    while seen < total:
        ends.append(seen)
        seen *= 2
    return (*ends, total)


@cache
def most_correct(scored: Scored, total: int, *, risk: float) -> int:
    """The most of all `total` images that may be right, given what was `scored` on some drawn at random.

    More of them would have given so few right ones with a chance below `risk`.
    """
    from scipy.stats import hypergeom  # takes a second to import, which only a race should wait for

    lowest, highest = scored.correct, total - (scored.seen - scored.correct)
    while lowest < highest:
        middle = (lowest + highest + 1) // 2
        if hypergeom.cdf(scored.correct, total, middle, scored.seen) < risk:
            highest = middle - 1
        else:
            lowest = middle
    return lowest


def race(
    score: Callable[[int], int],
    beaten: Callable[[float], bool],
    *,
    ends: Sequence[int],
    confidence: float = CONFIDENCE,
) -> Scored:
    """What a candidate reached on the images that it took to see that it is beaten, or on all.

    Args:
        score: how many images of the look with that number are right; looks do not overlap.
        beaten: whether a candidate of that accuracy over all images would be.
        ends: images seen after each look, the last being all.
        confidence: that one which is not beaten is scored on all images.
    """
    total, risk = ends[-1], _risk(ends, confidence)
    correct = 0
    for number, seen in enumerate(ends):
        correct += score(number)
        found = Scored(correct, seen)
        if seen < total and beaten(most_correct(found, total, risk=risk) / total):
            break
    return found


def unbeaten(trials: Sequence[Trial], *, total: int, confidence: float = CONFIDENCE) -> list[Trial]:
    """The trials that lost a race and that nothing beats any more, the most accurate first.

    What beat one may have been timed again since, and be dearer than it was thought to be. One whose latency
    is no more than unstable beats as before: it is doubted because the device was slow, and is no dearer.

    Args:
        trials: all there are; races were over `total` images.
        total: of a whole score.
        confidence: that of the races.
    """
    ends = looks(total)

    def reached(trial: Trial) -> float:
        seen = round(trial.metrics["top1_images"])
        scored = Scored(round(trial.metrics["top1"] * seen), seen)
        return most_correct(scored, total, risk=_risk(ends, confidence)) / total

    left = [
        trial
        for trial in trials
        if trial.state == "complete"
        and trial.is_partial
        and not _beaten(trials, trial.metrics, reached(trial))
    ]
    return sorted(left, key=lambda trial: (-trial.metrics["top1"], trial.number))


def is_beaten(trials: Sequence[Trial], costs: Metrics, top1: float) -> bool:
    """Whether a trial is more accurate than `top1` and in none of the `costs` dearer.

    All costs count, not the objectives alone, and limits do not: whatever a later limit leaves of the
    candidates, it leaves the better one. Trials that were scored on a part of the images, or whose latency is
    unstable, beat nobody.
    """
    sure = [trial for trial in trials if not trial.metrics.get("latency_unstable")]
    return _beaten(sure, costs, top1)


def _beaten(trials: Sequence[Trial], costs: Metrics, top1: float) -> bool:
    """The same, also by trials whose latency is unstable."""
    names = [name for name in costs if DIRECTIONS.get(name) == "minimise"]
    return any(
        trial.metrics["top1"] > top1 and all(trial.metrics.get(n, float("inf")) <= costs[n] for n in names)
        for trial in trials
        if trial.state == "complete" and not trial.is_partial
    )


def _risk(ends: Sequence[int], confidence: float) -> float:
    """The chance of each look but the last that it makes a race lose one which is not beaten."""
    return (1 - confidence) / max(1, len(ends) - 1)
