"""The oracles of `search_efficiency.py`: searches whose every evaluation takes microseconds.

- `ofa`: ImageNet accuracies of once-for-all's MobileNetV3, which a support vector machine was fitted on, and
  exact multiply-accumulates, added up block by block from Nestling's own counter.
- `synthetic`: effects, interactions and noise drawn at random; a cost that is predicted, not computed.
- `precision`: arch and precision of each block, latency from a table of blocks that were timed.
"""

from __future__ import annotations

import ast
import csv
import functools
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from search_blocks import EXPANDS, KERNELS, PRECISIONS, STAGES, TABLE
from sklearn.svm import SVR

from nestling.models.building import build_shapes
from nestling.models.cost import cost
from nestling.models.families import family
from nestling.search import Problem
from nestling.search.encoding import Codes, Encoding
from nestling.search.losses import Exact
from nestling.space import Choice, Need, SearchSpace, load_space

ROOT = Path(__file__).parents[1]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Oracle:
    """A problem whose truth is known.

    Attributes:
        name: of it.
        problem: with its space.
        truth: every metric of codes.
        reference: the losses (accuracies in per cent, negative) that the hypervolume is counted from.
        exact: the metrics that a search may compute.
        noise: standard deviation of a measured metric, as a part of it for a cost.
    """

    name: str
    problem: Problem
    truth: Callable[[Codes], Mapping[str, Values]]
    reference: tuple[float, ...]
    exact: Mapping[str, Exact] = field(default_factory=dict)
    noise: Mapping[str, float] = field(default_factory=dict)

    def losses(self, codes: Codes) -> Values:
        """The true objectives, less is better (N, objectives)."""
        told = self.truth(codes)
        return np.stack(
            [
                -100 * told[o.name] if o.direction == "maximise" else told[o.name]
                for o in self.problem.objectives
            ],
            axis=1,
        )

    def measured(self, codes: Codes, rng: np.random.Generator) -> list[dict[str, float]]:
        """What validating the codes brings: the truth and noise."""
        told = {metric: np.array(values) for metric, values in self.truth(codes).items()}
        for metric, noise in self.noise.items():
            drawn = noise * rng.standard_normal(len(codes))
            told[metric] = told[metric] + (drawn if metric == "top1" else drawn * told[metric])
        return [{metric: float(values[row]) for metric, values in told.items()} for row in range(len(codes))]


def ofa(data: Path) -> Oracle:
    """Once-for-all's MobileNetV3 of width 1.0 at 224 pixels: depth, kernels, expansions.

    Raises:
        FileNotFoundError: no CSV files in `data`.
    """
    space = load_space(ROOT / "search_spaces" / "ofa_mobilenetv3_w10.toml")
    space = space.with_constants({"classes": 1000, "resolution": 224})
    space = space.with_constants({c.name: "fp32" for c in space.open_choices if c.name.endswith("precision")})
    encoding = Encoding(space)
    files = sorted(data.glob("*.csv"))
    if not files:
        raise FileNotFoundError(f"no CSV file in {data}; --data names the folder with measured subnets")
    codes, accuracies = _subnets(files, encoding)
    machine = SVR(C=30.0, gamma=0.01, epsilon=0.03).fit(encoding.one_hot(codes), accuracies)
    count = _block_macs(space)

    def macs(asked: Codes) -> Values:
        return count(asked) / 1e6

    def truth(asked: Codes) -> dict[str, Values]:
        return {"top1": machine.predict(encoding.one_hot(asked)) / 100, "mmacs": macs(asked)}

    problem = Problem.parse(space, objectives=["top1", "mmacs"], limits={})
    return Oracle("ofa", problem, truth, (-70.0, 600.0), exact={"mmacs": macs})


def _subnets(files: list[Path], encoding: Encoding) -> tuple[Codes, Values]:
    """The measured subnets of the files, each network once, and their mean accuracies in per cent."""
    found: dict[bytes, list[float]] = {}
    for path in files:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                told = ast.literal_eval(row["Sub-network"])
                decisions = dict(encoding.space.smallest)
                for stage, depth in enumerate(told["d"]):
                    decisions[f"s{stage + 2}.depth"] = depth
                    for block in range(4):
                        name = f"s{stage + 2}.b{block + 1}"
                        decisions[f"{name}.kernel"] = told["ks"][4 * stage + block]
                        decisions[f"{name}.expand"] = told["e"][4 * stage + block]
                code = encoding.codes([encoding.space.canonical(decisions)])[0]
                found.setdefault(code.tobytes(), []).append(float(row["Top-1 Acc (%)"]))
    codes = np.array([np.frombuffer(key, dtype=np.int64) for key in found])
    return codes, np.array([np.mean(values) for values in found.values()])


def _block_macs(space: SearchSpace) -> Callable[[Codes], Values]:
    """What counts multiply-accumulates of codes: those of the blocks add up."""
    build = family(space.family).build
    encoding = Encoding(space)
    column = {name: place for place, name in enumerate(encoding.names)}

    def counted(**decisions: int) -> int:
        arch = space.canonical({**space.smallest, **decisions})
        return cost(build_shapes(build, arch), 224).macs

    least = counted()
    tables: dict[tuple[int, int], Values] = {}
    for stage, block in itertools.product(range(2, 7), range(1, 5)):
        if block == 4:  # as the third: the same block at the same resolution
            tables[stage, 4] = tables[stage, 3]
            continue
        name = f"s{stage}.b{block}"
        kernels, expands = (space.by_name[f"{name}.{kind}"].values for kind in ("kernel", "expand"))
        depth = {f"s{stage}.depth": max(2, block)}
        added = [
            [counted(**depth, **{f"{name}.kernel": k, f"{name}.expand": e}) - least for e in expands]
            for k in kernels
        ]
        tables[stage, block] = np.array(added, dtype=np.float64)

    def count(codes: Codes) -> Values:
        active = encoding.active(codes)
        total = np.full(len(codes), float(least))
        for (stage, block), table in tables.items():
            kernel, expand = column[f"s{stage}.b{block}.kernel"], column[f"s{stage}.b{block}.expand"]
            total += np.where(active[:, kernel], table[codes[:, kernel], codes[:, expand]], 0.0)
        return total

    return count


def synthetic(*, seed: int = 0, stages: int = 6, blocks: int = 3, noise: float = 0.002) -> Oracle:
    """Stages of blocks with effects and interactions drawn at random; accuracy saturates with its score.

    Most effects are larger for larger values, some are not; latency multiplies within a block and is measured
    with 1 % of noise, accuracy with `noise`.
    """
    rng = np.random.default_rng(seed)
    choices = [Choice("resolution", (160, 176, 192, 208, 224))]
    for stage in range(1, stages + 1):
        depths = tuple(range(1, blocks + 1))
        choices += [Choice(f"s{stage}.depth", depths), Choice(f"s{stage}.width", (1.0, 1.25, 1.5))]
        for block in depths:
            needs = (Need(f"s{stage}.depth", block),) if block > 1 else ()
            choices.append(Choice(f"s{stage}.b{block}.kernel", (3, 5, 7), needs))
            choices.append(Choice(f"s{stage}.b{block}.expand", (2, 3, 4, 6), needs))
    space = SearchSpace("synthetic", tuple(choices))
    encoding = Encoding(space)
    width = int(encoding.levels.sum())
    steps = [
        np.cumsum(
            np.append(0.3, rng.gamma(1.5, 0.25, levels - 1)) * rng.choice((1.0, -0.3), levels, p=(0.8, 0.2))
        )
        for levels in encoding.levels
    ]
    effects = np.concatenate(steps)
    pairs = rng.integers(0, width, size=(3 * width, 2))
    strengths = 0.25 * rng.standard_normal(len(pairs))
    middle = encoding.one_hot(encoding.sample(2000, np.random.default_rng(1), tilted=True))

    def raw(rows: Values) -> Values:
        return rows @ effects + (rows[:, pairs[:, 0]] * rows[:, pairs[:, 1]]) @ strengths

    centre, spread = float(raw(middle).mean()), float(raw(middle).std())
    value_of = [np.array(choice.values, dtype=np.float64) for choice in space.open_choices]
    column = {name: place for place, name in enumerate(encoding.names)}
    weight = rng.uniform(0.5, 1.5, size=(stages + 1, blocks + 1))

    def latency(codes: Codes) -> Values:
        active = encoding.active(codes)
        told = {name: value_of[place][codes[:, place]] for name, place in column.items()}
        total = np.full(len(codes), 2.0)
        for stage, block in itertools.product(range(1, stages + 1), range(1, blocks + 1)):
            name = f"s{stage}.b{block}"
            taken = weight[stage, block] * told[f"s{stage}.width"] * told[f"{name}.expand"]
            taken = taken * (1.0 + 0.05 * told[f"{name}.kernel"] ** 2 / told[f"s{stage}.width"])
            total += np.where(active[:, column[f"{name}.kernel"]], taken, 0.0)
        return total * (told["resolution"] / 224) ** 2

    def truth(codes: Codes) -> dict[str, Values]:
        score = (raw(encoding.one_hot(codes)) - centre) / spread
        top1 = 0.55 + 0.25 / (1 + np.exp(-0.8 * score))
        return {"top1": top1, "latency_ms": latency(codes)}

    problem = Problem.parse(space, objectives=["top1", "latency_ms"], limits={})
    ends = truth(encoding.codes([space.smallest, space.largest]))
    reference = (-100 * float(ends["top1"].min()), 1.05 * float(ends["latency_ms"].max()))
    noises = {"top1": noise, "latency_ms": 0.01}
    return Oracle("synthetic", problem, truth, reference, noise=noises)


def precision(*, seed: int = 0) -> Oracle:
    """Blocks in 8 bits or floats: timed latency, and an accuracy that 8 bits lower block by block.

    Raises:
        FileNotFoundError: the blocks were not timed yet; `search_blocks.py` does.
    """
    if not TABLE.exists():
        raise FileNotFoundError(f"there is no {TABLE}; run benchmarks/search_blocks.py first")
    took: dict[str, float] = json.loads(TABLE.read_text())["ms"]
    choices = []
    for stage in STAGES:
        choices.append(Choice(f"{stage}.depth", (1, 2, 3, 4)))
        for block in range(1, 5):
            needs = (Need(f"{stage}.depth", block),) if block > 1 else ()
            for kind, values in (("kernel", KERNELS), ("expand", EXPANDS), ("precision", PRECISIONS)):
                choices.append(Choice(f"{stage}.b{block}.{kind}", tuple(values), needs))
    space = SearchSpace("precision", tuple(choices))
    encoding = Encoding(space)
    column = {name: place for place, name in enumerate(encoding.names)}
    rng = np.random.default_rng(seed)
    names = [(stage, block) for stage in STAGES for block in range(1, 5)]
    gain = rng.uniform(0.4, 1.0, len(names)) / np.tile([1.0, 1.6, 2.4, 3.2], len(STAGES))
    of_kernel = rng.uniform(0.0, 0.35, len(names))
    lost = rng.gamma(0.7, 0.12, size=(len(names), len(KERNELS)))

    def at(codes: Codes, name: str, kind: str) -> NDArray[np.int64]:
        return codes[:, column[f"{name}.{kind}"]]

    def truth(codes: Codes) -> dict[str, Values]:
        active = encoding.active(codes)
        score, harm, total = np.zeros(len(codes)), np.zeros(len(codes)), np.full(len(codes), 0.2)
        for number, (stage, block) in enumerate(names):
            name = f"{stage}.b{block}"
            on = active[:, column[f"{name}.kernel"]]
            kernel, expand, bits = (at(codes, name, kind) for kind in ("kernel", "expand", "precision"))
            where = "first" if block == 1 else "later"
            table = np.array(
                [
                    [[took[f"{stage}.{where}.{k}.{e}.{p}"] for p in PRECISIONS] for e in EXPANDS]
                    for k in KERNELS
                ]
            )
            total += np.where(on, table[kernel, expand, bits], 0.0)
            score += np.where(on, gain[number] * (1 + of_kernel[number] * kernel) * (1 + 0.3 * expand), 0.0)
            harm += np.where(on & (bits == 0), lost[number][kernel] * (1.3 - 0.15 * expand), 0.0)
        top1 = 0.78 - 0.3 * np.exp(-score / 6) - 0.02 * harm - 0.002 * harm**2
        return {"top1": top1, "latency_ms": total}

    problem = Problem.parse(space, objectives=["top1", "latency_ms"], limits={})
    ends = truth(encoding.codes([space.smallest, space.largest]))
    reference = (-100 * float(ends["top1"].min()) + 1.0, 1.05 * float(ends["latency_ms"].max()))
    return Oracle("precision", problem, truth, reference, noise={"top1": 0.001, "latency_ms": 0.01})


ORACLES = ("ofa", "synthetic", "precision")


@functools.cache
def oracle(name: str, data: Path) -> Oracle:
    """The oracle called `name`; `data` is the folder with measured subnets.

    Raises:
        FileNotFoundError: what it is made of is not there.
    """
    if name == "ofa":
        return ofa(data)
    return synthetic() if name == "synthetic" else precision()
