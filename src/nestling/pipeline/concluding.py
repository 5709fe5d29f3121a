"""The end of a search: its front timed again, races that nobody won run to their end, files removed."""

from __future__ import annotations

from nestling.pipeline.candidate import write_candidate
from nestling.pipeline.listening import Listener
from nestling.pipeline.measuring import latency_metrics, measure, score
from nestling.pipeline.racing import scored_whole
from nestling.pipeline.scale import rescaled, run_reference
from nestling.pipeline.steadying import PAUSES_AT_END, steadied
from nestling.pipeline.studies import Place, problem
from nestling.pipeline.workbench import Workbench
from nestling.profile.address import Address, parse_addresses
from nestling.search import Metrics, SearchResult, Trial, correct_trial, evaluated, load_result
from nestling.search.racing import unbeaten


def concluded(
    bench: Workbench, place: Place, result: SearchResult, listener: Listener, *, fresh: bool
) -> SearchResult:
    """The result, its latencies as stable as can be and in milliseconds of the device at its best.

    Timing the front again may be what first sees the device at its best; with other milliseconds, limits let
    other members in. What lost its race to a member that turned out dearer is scored on all images.

    Args:
        bench, place, result, listener: of the search.
        fresh: whether this command evaluated candidates, so that the device is there to be asked.
    """
    address = parse_addresses(bench.config.profile.device)
    # a search that is done needs no line to a device
    away = not fresh and (not isinstance(address, Address) or address.place is not None)
    failed: set[int] = set()
    told = rescaled(bench, place, result, listener)
    while True:
        steady = _steadied(bench, place, told, listener, away=away)
        away = away and steady is told  # what was timed again has opened the line
        result = _scored_whole(bench, place, steady, listener, away=away, failed=failed)
        told = rescaled(bench, place, result, listener)
        if told is steady:
            return result


def _scored_whole(
    bench: Workbench, place: Place, result: SearchResult, listener: Listener, *, away: bool, failed: set[int]
) -> SearchResult:
    """The result, what lost a race and is not beaten any more scored on all images and recorded.

    Args:
        bench, place, result, listener: of the search.
        away: whether the device is not to be asked.
        failed: see `scored_whole`.
    """
    if not any(trial.is_partial for trial in result.complete):
        return result
    images = bench.data.search
    if away:
        if unbeaten(result.trials, total=len(images)):
            listener.note(
                "candidates that nothing beats any more are scored on a part of the images only, as a search "
                "that is done opens no line to its device; one that goes on, with more `search.trials`, "
                "scores them on all"
            )
        return result

    def score_all(trial: Trial) -> Metrics:
        path, side = bench.candidate_path(trial.arch), bench.resolution(trial.arch)
        if not path.exists():  # it was of no front when the search last came to its end
            write_candidate(bench, trial.arch, path)
        found = score(bench.device, path, images, resolution=side)
        return {"top1": found.top1, "top1_images": float(found.total), "top1_partial": 0.0}

    return scored_whole(
        result,
        total=len(images),
        score=score_all,
        keep=lambda trial, metrics: _corrected(bench, place, trial, metrics),
        note=listener.note,
        failed=failed,
    )


def _corrected(bench: Workbench, place: Place, trial: Trial, metrics: Metrics) -> SearchResult:
    """What the study holds once `metrics` are written in place of the trial's own."""
    correct_trial(problem(bench), trial, metrics, storage=place.storage, name=place.name)
    return load_result(problem(bench), storage=place.storage, name=place.name)


def _steadied(
    bench: Workbench, place: Place, result: SearchResult, listener: Listener, *, away: bool
) -> SearchResult:
    """The result, the unstable latencies of its front measured again and recorded.

    Args:
        bench, place, result, listener: of the search.
        away: whether the device is not to be asked which of the others it doubts.
    """
    if "latency_ms" not in problem(bench).needed():
        return result

    def doubted(trial: Trial) -> bool:
        path = bench.candidate_path(trial.arch)
        return not away and path.exists() and bench.device.doubts(path)

    def time_again(trial: Trial) -> Metrics:
        path = bench.candidate_path(trial.arch)
        if not path.exists():  # it was of no front when the search last came to its end
            write_candidate(bench, trial.arch, path)
        taken = measure(bench.device, path, pauses=())
        reference = run_reference(bench, place, taken)
        return latency_metrics(taken, reference_ms=float(reference["latency_ms"]))

    def keep(trial: Trial, metrics: Metrics) -> SearchResult:
        before = trial.metrics["latency_ms"]
        if "latency_ms" in metrics:
            told = f"was timed again: {metrics['latency_ms']:.4g} ms, not {before:.4g} ms"
        else:
            told = f"is doubted: the device was slower at its {before:.4g} ms than it was seen to be since"
        listener.note(f"{trial.arch.key} {told}")
        return _corrected(bench, place, trial, metrics)

    return steadied(
        result,
        doubted=doubted,
        time_again=time_again,
        keep=keep,
        note=listener.note,
        pauses=PAUSES_AT_END,
    )


def tidy(bench: Workbench, place: Place, result: SearchResult) -> None:
    """Removes the files of candidates that are done and on no front; of others somebody may be at work on."""
    asked = problem(bench)
    files = list((bench.run.folder / "candidates").glob("*.onnx"))
    # asked for before the front: what is handed in between is left
    done = evaluated(asked, storage=place.storage, name=place.name) if files else frozenset()
    now = load_result(asked, storage=place.storage, name=place.name)
    kept = {trial.arch.key for trial in (*result.front, *now.front)}
    for file in files:
        if file.stem in done - kept:
            file.unlink(missing_ok=True)
