"""What the benchmarks share: how a figure is stored, judged and said.

A benchmark measures figures, stores them with machine, date and commit in `results/<name>.json`, and says
them in one sentence: the last line of its output. With `--check` the exit code says whether they are good
enough, and nothing is stored. With `--stored` nothing is measured: the stored figures are said, or judged.
With `--quick`, where there is such an option, figures are stored as those of another benchmark,
`<name>_quick`, so that a small run never takes the place of a full one.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
UNFINISHED = Path(__file__).parents[1] / "build" / "unfinished"
"""Where parts of interrupted runs are kept; git passes it over and `make clean` removes it."""
PACKAGES = ("torch", "timm", "optuna", "onnxruntime", "numpy")

Figures = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: of its file of results.
        about: its module's docstring, shown by `--help`.
        measure: the figures, as JSON knows them.
        sentence: the figures in one line.
        misses: what is not good enough, a line each; none where all is.
    """

    name: str
    about: str
    measure: Callable[[argparse.Namespace], Figures]
    sentence: Callable[[Figures], str]
    misses: Callable[[Figures], list[str]]

    def parser(self) -> argparse.ArgumentParser:
        """The options that every benchmark has."""
        parser = argparse.ArgumentParser(
            description=self.about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument(
            "--check", action="store_true", help="exit with 1 where a figure misses its limit"
        )
        parser.add_argument("--stored", action="store_true", help="measure nothing: use the stored figures")
        parser.add_argument(
            "--output",
            type=Path,
            metavar="FILE",
            help=f"where the figures are stored [default: benchmarks/results/{self.name}.json, "
            "and nowhere with --check]",
        )
        return parser

    def run(self, options: argparse.Namespace) -> int:
        """The exit code: 1 where `--check` finds a miss, else 0."""
        apart = vars(options).get("quick", False) and not self.name.endswith("_quick")
        stored_at = options.output or RESULTS / f"{self.name}{'_quick' * apart}.json"
        if options.stored:
            if not stored_at.exists():
                print(f"there is no {stored_at}; run the benchmark without --stored first", file=sys.stderr)
                return 1
            figures: Figures = json.loads(stored_at.read_text())["figures"]
        else:
            about_here = place()
            figures = self.measure(options)
            if options.output is not None or not options.check:
                store(stored_at, {"benchmark": self.name, **about_here, "figures": figures})
        try:
            misses, sentence = self.misses(figures), self.sentence(figures)
        except KeyError as lacking:
            if not options.stored:
                raise
            print(
                f"{stored_at} was stored by an earlier form of this benchmark and lacks {lacking}; run it "
                "without --stored",
                file=sys.stderr,
            )
            return 1
        for miss in misses:
            print(f"missed: {miss}", file=sys.stderr)
        print(sentence, flush=True)
        return 1 if misses and options.check else 0


class Parts:
    """The parts of a long measurement, each kept until the whole is there: an interrupted run is continued.

    What is kept counts for the same machine, versions, commit and settings alone; else all is measured anew.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], *, folder: Path = UNFINISHED) -> None:
        """Finds what is kept of the benchmark `name`, with settings that JSON knows, in `folder`."""
        here = place()
        key = {name: here[name] for name in ("commit", "machine", "python", "packages")}
        key["machine"] = {**key["machine"], "load_at_start": None}
        self._path = folder / f"{name}.json"
        known = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._kept: dict[str, Any] = {
            "of": json.loads(json.dumps({**key, "settings": settings})),
            "parts": {},
        }
        if known.get("of") == self._kept["of"]:
            self._kept = known
            print(f"continued: {len(known['parts'])} parts are kept in {self._path}", flush=True)

    def part(self, name: str, measure: Callable[[], Any]) -> Any:
        """The part `name`: what `measure` gives, as JSON knows it, unless it is kept."""
        if name not in self._kept["parts"]:
            self._kept["parts"][name] = json.loads(json.dumps(measure()))
            store(self._path, self._kept)
        return self._kept["parts"][name]

    def finish(self) -> None:
        """Keeps nothing any longer: all is measured."""
        self._path.unlink(missing_ok=True)


def _short(word: str) -> str:
    """`word`; of a path from the machine's root its name alone, as the rest says nothing elsewhere."""
    return Path(word).name if Path(word).is_absolute() else word


def place() -> dict[str, Any]:
    """The machine, the date, the commit and the versions with which something is measured from now on."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": [Path(sys.argv[0]).name, *(_short(word) for word in sys.argv[1:])],
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "load_at_start": round(os.getloadavg()[0], 2),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def processor() -> str:
    """The processor's name."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """The installed version of `package`; None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that this file is of, marked where the working tree differs from it; None outside of git."""
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    # results of other benchmarks, stored a minute ago, change nothing about what is measured
    changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
    return f"{head} with changes" if head and changed else head


def store(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` as JSON to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile of two `values` or more."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
