"""What a search knows of archs without asking a device: costs that are computed, latencies that were learnt.

Computing a cost means building, and for a file's size writing, the network. That is done for some hundred
archs; a stand-in learned from them answers the thousands of questions of an evolution, and is told with its
error. What was computed is kept in the run's folder, so that one process computes it for all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from nestling.models.graph import Untraceable
from nestling.pipeline.candidate import Candidate, cost_metrics, file_metadata
from nestling.pipeline.floats import FloatNetwork
from nestling.pipeline.latency import MODEL, load_predictor, predict_latency
from nestling.pipeline.listening import Listener
from nestling.pipeline.policies import quant_policy
from nestling.pipeline.studies import problem
from nestling.pipeline.workbench import Workbench
from nestling.pipeline.writing import write_file
from nestling.quant import Recipe, Unquantizable, quantize
from nestling.search import InfeasibleLimit, Problem
from nestling.search.encoding import Codes, Encoding
from nestling.search.learned import Learned, cheapest, learn
from nestling.search.losses import Exact
from nestling.space import Arch, SearchSpace

COSTS = "costs.json"
"""The run's file of costs that were computed, and of latencies that were predicted, for stand-ins."""
READS_THEM = frozenset({"predictor", "linas"})
"""Strategies that can be told what they need not learn."""
SAMPLES = {"mmacs": 300, "size_mb": 150, "peak_mb": 150, "latency_ms": 150}
"""Archs that a stand-in is learned from: counting is fast; writing files and tracing take longer."""
LEAST_SAMPLES, PER_TRIAL = 40, 4
"""Fewer are computed for a search of few candidates: this many at least, and for each candidate."""
KEEP_EVERY = 25
OFF_AT_MOST = 0.1
"""Median error on archs it was not shown up to which a stand-in takes the place of learning from trials."""
GOOD_TAU = 0.8
"""Kendall's tau on networks that were left out, from which on a latency model is believed."""
TRIED_CHEAPEST, LOOKED_AT = 5, 50
"""Of so many archs that look cheapest the first ones that can be had are tried, before a limit is refused."""
SPARED = 0.02
"""A limit this much below the least cost that was found is not refused: something less may be there."""

Ask = Callable[[Arch], float | None]
"""What is computed of an arch; None where no file is made of it."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a search is told beforehand.

    Attributes:
        exact: metrics that it need not learn.
        priors: numbers that may help to learn the others.
    """

    exact: Mapping[str, Exact]
    priors: Mapping[str, Exact]


def known_costs(bench: Workbench, *, listener: Listener, asked: Problem | None = None) -> Costs:
    """What the run's search, or one for `asked` in a part of its space, need not learn from its trials.

    The size of the file and the peak of its activations are computed where they are objectives or limits.
    Multiply-accumulates always are: accuracy and latency are learnt from fewer candidates beside them. A
    latency model that `nestling latency` has made for this device is a prior of the latency, where it put
    networks that were left out in order with a Kendall tau of `GOOD_TAU` or more.

    Raises:
        InfeasibleLimit: no network keeps a limit on a computed cost; the least that was found is named.
        RunError: the run's latency model is damaged.
    """
    if bench.config.search.strategy not in READS_THEM:
        return Costs({}, {})
    asked = asked or problem(bench)
    exact: dict[str, Exact] = {}
    for metric, ask in _computed(bench).items():
        if metric not in asked.needed() and metric != "mmacs":
            continue
        kept = _Kept(bench, metric, ask)
        try:
            learned = kept.learned(metric, asked.space)
            if metric != "mmacs":  # they are least in the smallest network, which was looked at
                _refuse_infeasible(asked, metric, learned, kept)
        except InfeasibleLimit:
            raise
        except (Untraceable, ValueError) as error:
            listener.note(f"{metric} is learnt from the candidates, it cannot be computed: {error}")
            continue
        if learned.typical > OFF_AT_MOST:
            listener.note(
                f"{metric} is learnt from the candidates: what was computed of {len(learned.known)} networks "
                f"tells it of others with an error of {learned.typical:.1%}"
            )
            continue
        listener.note(
            f"{metric} is computed, not learnt: of {len(learned.known)} networks exactly, of others by what "
            f"these tell, {learned.typical:.2%} off ({learned.worst:.1%} at most)"
        )
        exact[metric] = partial(_times_pixels, asked.space, learned) if metric == "mmacs" else learned
    return Costs(exact, _latency_prior(bench, asked, listener) if "latency_ms" in asked.needed() else {})


def _times_pixels(space: SearchSpace, per_pixel: Exact, codes: Codes) -> NDArray[np.float64]:
    """What `per_pixel` gives, times the pixels of the images that archs read: a product less to learn."""
    values = space.by_name["resolution"].values
    sides = np.array(values, dtype=np.float64)
    if len(values) > 1:
        sides = sides[codes[:, Encoding(space).names.index("resolution")]]
    return per_pixel(codes) * sides**2


class _Kept:
    """A function of archs whose values are read from, and kept in, the run's folder."""

    def __init__(self, bench: Workbench, name: str, ask: Ask) -> None:
        self._bench, self._name, self._ask = bench, name, ask
        self._known: dict[str, float | None] = (bench.run.read_json(COSTS) or {}).get(name, {})
        self._new = 0

    def __call__(self, arch: Arch) -> float | None:
        if arch.key not in self._known:
            self._known[arch.key] = self._ask(arch)
            self._new += 1
            if self._new == KEEP_EVERY:
                self.keep()
        return self._known[arch.key]

    def learned(self, metric: str, space: SearchSpace) -> Learned:
        """What stands in `space` for the function, which gives `metric` (MACs: for each pixel).

        Raises:
            Exception: as the function does.
        """
        enough = max(LEAST_SAMPLES, PER_TRIAL * self._bench.config.search.trials)
        ask = self._per_pixel if metric == "mmacs" else self
        found = learn(space, ask, samples=min(enough, SAMPLES[metric]))
        self.keep()
        return found

    def _per_pixel(self, arch: Arch) -> float | None:
        found = self(arch)
        return None if found is None else found / self._bench.resolution(arch) ** 2

    def keep(self) -> None:
        """Writes what is known."""
        if not self._new:
            return
        self._new = 0
        others = self._bench.run.read_json(COSTS) or {}
        self._bench.run.write_json(COSTS, others | {self._name: others.get(self._name, {}) | self._known})


def _computed(bench: Workbench) -> dict[str, Ask]:
    @cache  # size and peak are asked of the same archs, and each of these is written for it
    def of_file(arch: Arch) -> dict[str, float] | None:
        try:
            return file_costs(bench, arch)
        except Unquantizable:  # such as signed beside unsigned activations: one candidate of many that fails
            return None

    def asked(metric: str) -> Ask:
        return lambda arch: None if (found := of_file(arch)) is None else found[metric]

    return {
        "mmacs": lambda arch: bench.macs(arch) / 1e6,
        "size_mb": asked("size_mb"),
        "peak_mb": asked("peak_mb"),
    }


def file_costs(bench: Workbench, arch: Arch) -> dict[str, float]:
    """What of the candidate of `arch` depends on no weight: `size_mb`, `peak_mb` and `mmacs`.

    The network is written with the weights that its constructor draws, and ranges of random images.

    Raises:
        Untraceable: its graph cannot be told.
        Unquantizable: no file is made of it in its precisions.
    """
    resolution = bench.resolution(arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = bench.family.build(arch).eval()
        images = torch.randn(2, 3, resolution, resolution)
    floats = FloatNetwork(network, resolution=resolution, image=images[:1])
    graph = floats.traced
    if isinstance(graph, Untraceable):
        raise graph
    policy = quant_policy(bench.family, arch, graph, keep=bench.config.quant.keep)
    # how weights are rounded takes long, and changes neither operators nor shapes
    recipe = bench.config.quant.model_dump(exclude={"keep"}) | {"rounding": "nearest"}
    reduced = bench.device.fingerprint.int8_saturates
    quantized = quantize(graph, policy, [images], recipe=Recipe(**recipe), reduce_range=reduced)
    with TemporaryDirectory(prefix="nestling-") as folder:
        path = Path(folder) / f"{arch.key}.onnx"
        metadata, dynamic = file_metadata(bench, arch), bench.config.export.dynamic_batch
        write_file(quantized, path, dynamic_batch=dynamic, metadata=metadata)
        return cost_metrics(Candidate(arch, path, floats, policy, quantized))


def _refuse_infeasible(asked: Problem, metric: str, learned: Learned, ask: _Kept) -> None:
    """Refuses a limit on `metric` that the cheapest archs do not keep.

    Those of which no file is made are passed over; where that is all that look cheapest, nothing is refused.

    Raises:
        InfeasibleLimit: see there.
    """
    limit = next((limit for limit in asked.limits if limit.metric == metric), None)
    if limit is None or any(value <= limit.bound for value in learned.known.values()):
        return
    told = ((ask(arch), arch) for arch in cheapest(asked.space, learned, count=LOOKED_AT))
    tried = list(islice(((cost, arch) for cost, arch in told if cost is not None), TRIED_CHEAPEST))
    ask.keep()
    if not tried:
        return
    cost, arch = min(tried, key=_first)
    if limit.bound < (1 - SPARED) * cost:
        raise InfeasibleLimit(
            f"no network can keep {limit}: the least {metric} that was found in the space is {cost:.4g} "
            f"({arch.to_json()}); raise the limit, or give the space smaller values"
        )


def _first(found: tuple[float, Arch]) -> float:
    return found[0]


def _latency_prior(bench: Workbench, asked: Problem, listener: Listener) -> dict[str, Exact]:
    """The logarithm of the latency that the run's model predicts; nothing where there is no good one."""
    predictor = load_predictor(bench)
    if predictor is None:
        return {}
    where = bench.run.folder / MODEL
    if predictor.device != bench.device.fingerprint.key:
        listener.note(f"{where} is not used: it is of another device or runtime ({predictor.told})")
        return {}
    if not predictor.tau >= GOOD_TAU:
        listener.note(
            f"{where} is not used: its Kendall tau on networks that were left out is {predictor.tau:.2f}, "
            f"and must be {GOOD_TAU} or more; `nestling latency --measure {2 * predictor.networks}` may help"
        )
        return {}
    digest = hashlib.sha256(predictor.model.to_json().encode()).hexdigest()[:16]
    # ratios are kept: what they are in milliseconds a search may find anew
    ratios = partial(predict_latency, replace(predictor, reference_ms=1.0))
    kept = _Kept(bench, f"latency_ratio by {digest}", ratios)
    try:
        learned = kept.learned("latency_ms", asked.space)
    except ValueError as error:
        listener.note(f"{where} is not used: {error}")
        return {}
    listener.note(
        f"{where} helps to learn latencies: Kendall tau {predictor.tau:.2f} on networks that were left "
        f"out of {predictor.networks}"
    )
    limit = next((limit for limit in asked.limits if limit.metric == "latency_ms"), None)
    unit = predictor.reference_ms
    least = unit * min(learned.known.values())
    if limit is not None and least > limit.bound:
        listener.note(f"no network is predicted to keep {limit}: the fastest may take {least:.4g} ms")
    return {"latency_ms": lambda codes: np.log(np.maximum(unit * learned(codes), 1e-9))}
