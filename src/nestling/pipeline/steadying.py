"""The end of a search: members of its front whose latency is unstable or doubted are timed again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from nestling.profile import DeviceError, DevicesGoneError
from nestling.search import EvaluationFailed, Metrics, SearchResult, Trial

PAUSES_AT_END = (0.0, 3.0, 6.0)
"""Seconds before each round in which the unstable members of a front are timed again."""


def steadied(
    result: SearchResult,
    *,
    doubted: Callable[[Trial], bool] = lambda _: False,
    time_again: Callable[[Trial], Metrics],
    keep: Callable[[Trial, Metrics], SearchResult],
    note: Callable[[str], None],
    pauses: Sequence[float] = PAUSES_AT_END,
    sleep: Callable[[float], None] = time.sleep,
) -> SearchResult:
    """The result, its front taken of latencies that are stable, as far as the device lets them be.

    A member that turns out slower may make room for another one, which is then timed again in the next round.
    A latency that is doubted is recorded as unstable before it is timed again, and so it stays where that
    fails or is killed. One that is unstable again changes nothing. Where the device is away the result is
    what it was until then, as all candidates have their figures.

    Args:
        result: of a search that has come to its end.
        doubted: whether a trial's latency, once stable, is from when the device was slower than it can be.
        time_again: the latency metrics of a trial's network, measured now.
        keep: records metrics of a trial in place of its own, and gives the result that follows.
        note: is told what could not be timed again, and that the device was away.
        pauses: seconds before each round.
        sleep: waits for so many seconds.
    """
    try:
        for pause in pauses:
            restless = [trial for trial in result.front if trial in result.unstable or doubted(trial)]
            if not restless:
                break
            for trial in restless:
                if trial not in result.unstable:
                    result = keep(trial, {"latency_unstable": 1.0})
            sleep(pause)
            for trial in restless:
                try:
                    metrics = time_again(trial)
                except EvaluationFailed as error:
                    note(f"{trial.arch.key} was not timed again: {error}")
                    continue
                if metrics["latency_unstable"] == 0:
                    result = keep(trial, metrics)
    except (DeviceError, DevicesGoneError) as error:
        note(f"the front's latencies could not be looked at to the end: {error}")
    return result
