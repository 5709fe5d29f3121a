"""A run that is killed at any moment ends as if it had not been.

Claims, for a small network on digits, trained and searched by the real commands as child processes:

1. Training killed with `kill -9` at 10 random moments, and started again each time by the same command,
   ends with the weights and optimizer tensors of an uninterrupted training, to the last bit, and with its
   records.
2. So does a search: the same archs in the same order with the same metrics, each once, in a sound SQLite
   file. The objectives are `top1` and `mmacs`, which repeat exactly. (Latency does not; where it is an
   objective it decides about parents, and later candidates may rightly be others.)
3. With latency as an objective, no trial that was in the file at the moment of a kill is lost or changed,
   none is doubled, and each candidate's accuracy is that of the uninterrupted search, where that has it.
4. The process that measures latency ends with the search that was killed.

    python benchmarks/kill_resume.py [--check] [--kills 10] [--seed 0] [--keep FOLDER]

Takes 5 to 8 minutes on 2 idle cores, half of it for starting 30 processes. The moments are uniform over the
time that an uninterrupted training or search takes once it has begun.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from killing import Command, Killed, run_killed
from record import Benchmark, Figures
from safetensors.numpy import load_file

CONFIG = Path(__file__).parent.parent / "configs" / "demo.toml"
EXACT = ["top1", "mmacs"]
TIMED = ["top1", "latency_ms"]
SETTINGS: dict[str, float | str] = {
    "search.objectives": json.dumps(EXACT),
    "train.epochs": 8,
    "train.ramp_epochs": 1,
    "train.checkpoint_seconds": 0.5,
    "search.trials": 30,
    "search.population": 8,
    "search.recalibration_images": 256,
    "search.calibration_images": 32,
    "profile.seconds": 0.1,
}

Trial = Mapping[str, Any]


def random_moments(count: int, *, seconds: float, rng: random.Random) -> list[float]:
    """`count` moments, uniform over `seconds`, sorted."""
    return sorted(rng.uniform(0.0, seconds) for _ in range(count))


def newest_checkpoint(run: Path) -> Path | None:
    """The run's newest checkpoint; None where there is none yet."""
    index = run / "training" / "checkpoints.json"
    if not index.exists():
        return None
    newest: str = json.loads(index.read_text())[0]["file"]
    return run / "training" / newest


def tensors_hash(file: Path) -> str:
    """The SHA-256 of every tensor in the safetensors `file`: names, types, shapes, bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(load_file(file).items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def training_records(run: Path) -> list[tuple[int, float, float]]:
    """Of each epoch of the run: the step, and the top-1 of the largest and of the smallest network."""
    lines = (run / "training" / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["largest_top1"], r["smallest_top1"]) for r in records]


def look_at_training(run: Path) -> dict[str, Any]:
    """What a kill left of a training."""
    checkpoint = newest_checkpoint(run)
    return {
        "kept": checkpoint.stem if checkpoint else "nothing",
        "half_written_files": len(list((run / "training").glob(".*"))),
    }


def stored_trials(database: Path) -> list[Trial]:
    """The trials in Optuna's SQLite file, in order, read by SQLite alone."""
    query = """
        select trials.number, attributes.key, attributes.value_json
        from trials left join trial_user_attributes as attributes on attributes.trial_id = trials.trial_id
        order by trials.number
    """
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute(query).fetchall()
    trials: dict[int, dict[str, Any]] = {}
    for number, key, value in rows:
        trial = trials.setdefault(number, {"number": number})
        if key in ("arch", "state", "metrics", "metrics_before", "reason"):
            trial[key] = json.loads(value)
    return list(trials.values())


def look_at_search(run: Path) -> dict[str, Any]:
    """What a kill left of a search. A copy is read: reading rolls a cut transaction back."""
    database = run / "study.db"
    journal = run / "study.db-journal"
    if not database.exists():
        return {"stored_trials": 0, "cut_transactions": 0, "stored": []}
    with tempfile.TemporaryDirectory() as copies:
        for file in (database, journal):
            if file.exists():
                shutil.copy(file, copies)
        try:
            trials = stored_trials(Path(copies) / database.name)
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise
            trials = []  # killed while the file was being laid out
    return {
        "stored_trials": len(trials),
        "cut_transactions": int(journal.exists() and journal.stat().st_size > 0),
        "stored": trials,
    }


def integrity(database: Path) -> str:
    """SQLite's own verdict; `ok` where the file is sound."""
    with closing(sqlite3.connect(database)) as connection:
        return str(connection.execute("pragma integrity_check").fetchone()[0])


def exact_metrics(trial: Trial) -> dict[str, float]:
    """The trial's metrics but for latency, which no two measurements share."""
    return {name: value for name, value in trial.get("metrics", {}).items() if not name.startswith("latency")}


def compare_searches(whole: Sequence[Trial], killed: Sequence[Trial]) -> dict[str, Any]:
    """How the trials of a killed search differ from those of an uninterrupted one."""
    exact = {trial["arch"]: exact_metrics(trial) for trial in whole}
    return {
        "trials_whole": len(whole),
        "trials_killed": len(killed),
        "same_archs_in_order": [t["arch"] for t in whole] == [t["arch"] for t in killed],
        "other_metrics": sum(
            exact_metrics(trial) != exact[trial["arch"]] for trial in killed if trial["arch"] in exact
        ),
        "shared_archs": len(exact.keys() & {trial["arch"] for trial in killed}),
    }


def is_kept(trial: Trial, final: Trial) -> bool:
    """Whether `final` is what was stored as `trial`, or what a search makes of it at its end.

    There unstable latencies of the front are measured again; the metrics of before must be kept, in order.
    """
    before = history(trial)
    return history(final)[: len(before)] == before and all(
        final.get(key) == trial.get(key) for key in ("number", "arch", "state", "reason")
    )


def history(trial: Trial) -> list[Any]:
    """The metrics that `trial` has had, oldest first, those of now included."""
    return [*trial.get("metrics_before", []), trial.get("metrics")]


def account_of(kills: Sequence[Mapping[str, Any]], final: Sequence[Trial]) -> dict[str, int]:
    """How many stored trials were lost or changed after a kill, and how many archs were evaluated twice.

    A trial that was corrected, with its metrics of before kept, is not changed: see `is_kept`.
    """
    lost = sum(
        number >= len(final) or not is_kept(trial, final[number])
        for kill in kills
        for number, trial in enumerate(kill["stored"])
    )
    evaluated = [trial["arch"] for trial in final if trial["state"] != "duplicate"]
    return {
        "lost_or_changed": lost,
        "doubled": len(evaluated) - len(set(evaluated)),
        "evaluated": len(evaluated),
    }


def compare_trainings(whole: Path, killed: Path) -> dict[str, Any]:
    """What the trainings of two runs ended with."""
    files = [newest_checkpoint(run) for run in (whole, killed)]
    return {
        "tensors_sha256": [tensors_hash(file) if file else None for file in files],
        "ends": [file.stem if file else None for file in files],
        "same_records": training_records(whole) == training_records(killed),
    }


def search_figures(killed: Killed, whole: Sequence[Trial]) -> dict[str, Any]:
    """What became of a search that was killed, beside the trials of one that was not."""
    database = killed.run / "study.db"
    final = stored_trials(database)
    return {
        **account_of(killed.kills, final),
        **compare_searches(whole, final),
        "integrity": integrity(database),
        "kills": [{key: value for key, value in kill.items() if key != "stored"} for kill in killed.kills],
    }


def copy_trained(run: Path, folder: Path, *, objectives: list[str]) -> Path:
    """A copy of the trained `run` in `folder`, to be searched for `objectives`."""
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    config["search"]["objectives"] = objectives
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def training(run: Path, overrides: Sequence[str]) -> Command:
    """The training in the folder `run`."""
    return Command(("train", str(CONFIG), "--output", str(run), *overrides), run / "training")


def searching(run: Path) -> Command:
    """The search in the folder `run`."""
    return Command(("search", str(run)), run / "candidates")


def measure(options: argparse.Namespace) -> Figures:
    """Every figure; the runs are kept in the folder `--keep`, where one is given."""
    if options.keep is not None:
        if options.keep.exists():
            raise SystemExit(f"--keep {options.keep} is there already; name a new folder")
        options.keep.mkdir(parents=True)
        return measure_in(options.keep, options)
    with tempfile.TemporaryDirectory(prefix="kill_resume-") as folder:
        return measure_in(Path(folder), options)


def measure_in(work: Path, options: argparse.Namespace) -> Figures:
    """Every figure; the runs are made in the folder `work`."""
    rng = random.Random(options.seed)
    settings = {**SETTINGS, "train.epochs": options.epochs, "search.trials": options.trials}
    overrides = [f"--set={key}={value}" for key, value in settings.items()]
    whole = work / "whole"

    def begin_training(number: int) -> tuple[Path, Command]:
        run = work / f"training-{number}"
        return run, training(run, overrides)

    train_seconds = training(whole, overrides).finish()
    print(f"training, not killed: {train_seconds:.1f} s", flush=True)
    moments = random_moments(options.kills, seconds=train_seconds, rng=rng)
    trained = run_killed(begin_training, moments, look=look_at_training)

    reference = copy_trained(whole, work / "search-whole", objectives=EXACT)
    search_seconds = searching(reference).finish()
    print(f"search, not killed: {search_seconds:.1f} s", flush=True)
    trials = stored_trials(reference / "study.db")

    def searched(name: str, objectives: list[str], kills: int) -> list[dict[str, Any]]:
        def begin(number: int) -> tuple[Path, Command]:
            run = copy_trained(whole, work / f"{name}-{number}", objectives=objectives)
            return run, searching(run)

        print(f"search for {' and '.join(objectives)}:", flush=True)
        moments = random_moments(kills, seconds=search_seconds, rng=rng)
        return [search_figures(killed, trials) for killed in run_killed(begin, moments, look=look_at_search)]

    return {
        "settings": settings,
        "seed": options.seed,
        "seconds": {"train": round(train_seconds, 2), "search": round(search_seconds, 2)},
        "wanted": {"kills": options.kills, "timed_kills": options.timed_kills, "trials": options.trials},
        "training": [{**compare_trainings(whole, killed.run), "kills": killed.kills} for killed in trained],
        "search": searched("search", EXACT, options.kills),
        "search_timed": searched("search-timed", TIMED, options.timed_kills),
    }


def count_kills(runs: Sequence[Mapping[str, Any]]) -> int:
    """How often these runs were killed."""
    return sum(len(run["kills"]) for run in runs)


def misses(figures: Figures) -> list[str]:
    """What a kill has changed."""
    found = []
    wanted = figures["wanted"]
    for name, kills in (("training", "kills"), ("search", "kills"), ("search_timed", "timed_kills")):
        if (count := count_kills(figures[name])) != wanted[kills]:
            found.append(f"{name}: {count} kills, {wanted[kills]} were to be")
        if not all(kill["worker_ended"] for run in figures[name] for kill in run["kills"]):
            found.append(f"{name}: a worker outlived the command that was killed")
    for run in figures["training"]:
        if not is_identical(run):
            found.append(f"training: the tensors differ ({run['tensors_sha256']} at {run['ends']})")
        if not run["same_records"]:
            found.append("training: the records differ")
    for name in ("search", "search_timed"):
        for run in figures[name]:
            if run["lost_or_changed"]:
                found.append(f"{name}: {run['lost_or_changed']} stored trials were lost or changed")
            if run["doubled"]:
                found.append(f"{name}: {run['doubled']} archs were evaluated twice")
            if run["evaluated"] != wanted["trials"]:
                found.append(f"{name}: {run['evaluated']} archs evaluated, {wanted['trials']} were to be")
            if run["other_metrics"]:
                found.append(f"{name}: {run['other_metrics']} archs got other metrics")
            if run["integrity"] != "ok":
                found.append(f"{name}: the study's file is damaged: {run['integrity']}")
    if not all(run["same_archs_in_order"] for run in figures["search"]):
        found.append("search: other archs, or another order")
    return found


def is_identical(run: Mapping[str, Any]) -> bool:
    """Whether a killed training has the tensors of the whole one."""
    whole, killed = run["tensors_sha256"]
    return whole is not None and whole == killed


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    trainings, searches, timed = (figures[key] for key in ("training", "search", "search_timed"))
    same = "bit-identical" if all(is_identical(run) for run in trainings) else "NOT the same"
    order = (
        "the same archs in order" if all(run["same_archs_in_order"] for run in searches) else "OTHER archs"
    )
    both = (*searches, *timed)
    lost, doubled = (sum(run[key] for run in both) for key in ("lost_or_changed", "doubled"))
    return (
        f"training killed {count_kills(trainings)} times: weights {same}; search killed "
        f"{count_kills(searches)} times: {order}; and {count_kills(timed)} times with latency: "
        f"{lost} trials lost, {doubled} doubled"
    )


BENCHMARK = Benchmark("kill_resume", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--kills", type=int, default=10, help="of training, and of search [default: 10]")
    parser.add_argument("--timed-kills", type=int, default=5, help="of the search for latency [default: 5]")
    parser.add_argument("--epochs", type=int, default=SETTINGS["train.epochs"], help="of training")
    parser.add_argument("--trials", type=int, default=SETTINGS["search.trials"], help="of each search")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [default: 0]")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="a new folder for the runs, which are kept"
    )
    return BENCHMARK.run(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
