"""The latencies of a run's networks, learnt from some that are measured: a filter, never a result.

Weights do not matter to latency, so that networks are measured before training as well as after it. Whatever
a report shows was measured itself.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

from nestling.config import ConfigError
from nestling.export import ExportMismatch
from nestling.models.families import Family
from nestling.models.graph import Untraceable
from nestling.models.graph_blocks import blocks
from nestling.pipeline.listening import Listener
from nestling.pipeline.policies import quant_policy
from nestling.pipeline.scale import same_device, without_settings
from nestling.pipeline.steps import block_signature, steps
from nestling.pipeline.studies import REFERENCE, searched
from nestling.pipeline.untrained import measure_blocks, measure_network, shapes_graph
from nestling.pipeline.workbench import Workbench
from nestling.profile import DeviceError, Measurement
from nestling.profile.held_out import by_macs, by_model, by_table, held_out, qualities
from nestling.profile.prediction import LEAST, Description, LatencyModel, describe, fit, predict
from nestling.quant import Unquantizable, check_policy
from nestling.run import RunError
from nestling.search import EvaluationFailed
from nestling.space import Arch
from nestling.space.sampling import stratified

MEASURED = "latency_measured.json"
"""The run's file of networks and blocks that were measured for a model."""
MODEL = "latency_model.json"
PARTS = 5
"""Groups of networks that are left out in turn."""
DRAWN_FOR_ONE = 16
"""Archs that are drawn at most for each that is measured, where some mixes of precisions cannot be had."""
MOST_REFUSALS = 3
"""Networks in a row that the device may refuse, or be lost on."""


@dataclass(frozen=True, slots=True)
class LatencyPredictor:
    """A latency model with what it takes to describe an arch.

    Attributes:
        model: of ratios to the reference model.
        reference_ms: that model's milliseconds.
        family: of the networks.
        keep: as `[quant] keep` has it.
        device: the key of the device's fingerprint.
        told: that device in words.
        networks: how many the model was learnt from.
        tau: Kendall's, of the order in which it put networks that were left out; nan where that is none.
    """

    model: LatencyModel
    reference_ms: float
    family: Family
    keep: Mapping[str, str]
    device: str
    told: str
    networks: int
    tau: float


def predict_latency(predictor: LatencyPredictor, arch: Arch) -> float:
    """The milliseconds that the network of `arch` probably takes, as a search weighs them.

    It takes some hundredths of a second: the network is built and traced without numbers.

    Raises:
        ValueError: an operator or precision that no measured network had, or a network that cannot be traced.
    """
    described = description(predictor.family, arch, keep=predictor.keep)
    return float(predict(predictor.model, [described])[0]) * predictor.reference_ms


def description(family: Family, arch: Arch, *, keep: Mapping[str, str]) -> Description:
    """What a latency model knows of the network of `arch`.

    Raises:
        Untraceable: it has no graph.
        ValueError: an unknown precision.
    """
    graph = shapes_graph(family, arch)
    return describe(steps(graph, quant_policy(family, arch, graph, keep=keep)))


def block_signatures(family: Family, arch: Arch, *, keep: Mapping[str, str]) -> tuple[str, ...]:
    """The signatures of the blocks of the network of `arch`, in order.

    Raises:
        Untraceable, ValueError: as `description`.
    """
    graph = shapes_graph(family, arch)
    policy = quant_policy(family, arch, graph, keep=keep)
    return tuple(block_signature(block.graph, policy) for block in blocks(graph))


def load_predictor(bench: Workbench) -> LatencyPredictor | None:
    """The run's latency predictor; None where `learn_latency` has made none.

    Where the run's search was on the model's device, its milliseconds are those of the trials.

    Raises:
        RunError: its file is damaged.
    """
    try:
        told = bench.run.read_json(MODEL)
        if told is None:
            return None
        return LatencyPredictor(
            LatencyModel.from_json(json.dumps(told["model"])),
            _reference_ms(bench, told),
            bench.family,
            bench.config.quant.keep,
            _word(told["device"]),
            _word(told["told"]),
            int(told["networks"]),
            float(told["held_out"]["model"]["tau"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(bench, MODEL, error) from None


def learn_latency(
    bench: Workbench, *, networks: int, with_blocks: bool = False, listener: Listener
) -> dict[str, Any]:
    """What `latency_model.json` holds: the model, and how well it tells networks that it has not seen.

    Networks are spread over the logarithm of their multiply-accumulates. What was measured is in
    `latency_measured.json` from then on, and is not measured again; trials of the run's search count too.
    Those that stay unstable do not, nor what was measured with other settings of the runtime.

    Args:
        bench: the run; it need not be trained.
        networks: how many are measured.
        with_blocks: whether their blocks are as well, each alone, for a lookup table to compare with.
        listener: hears of every network.

    Raises:
        ConfigError: too few networks, or networks that cannot be traced.
        RunError: the run was measured on another device or runtime, a file of it is damaged, or too few of
            the measurements were stable.
        DeviceError, EvaluationFailed: the device refuses, or is lost on, `MOST_REFUSALS` networks in a row,
            or the blocks of as many.
    """
    if networks < 2 * LEAST:
        raise ConfigError(
            f"{networks} networks are too few for a latency model; measure at least {2 * LEAST}"
        )
    listener.stage("latency")
    known = _known(bench, listener)
    archs = spread(bench, networks)
    refused = 0
    for number, arch in enumerate(archs, 1):
        if arch.key not in known["networks"]:
            try:
                _measure(bench, arch, known)
                refused = 0
            except Unquantizable as error:  # which says nothing of the device
                listener.note(f"{arch.key} left out: {error}")
            except (DeviceError, EvaluationFailed, ExportMismatch) as error:
                refused += 1
                listener.note(f"{arch.key} left out: {error}")
                if refused == MOST_REFUSALS:
                    raise
        listener.scored(arch.key, number, len(archs))
    if with_blocks:
        listener.stage("blocks")
        _measure_blocks(bench, known, listener)
    return _learn(bench, known, with_blocks=with_blocks)


def spread(bench: Workbench, count: int) -> list[Arch]:
    """`count` archs of the run's space, or somewhat fewer, cheapest first; the same each time.

    Those of a space whose networks all have the same multiply-accumulates are drawn at random. Mixes of
    precisions of which no file is made are not among them.
    """
    space, rng = bench.space, random.Random(bench.config.seed)
    lowest, highest = bench.macs(space.smallest), bench.macs(space.largest)
    can_be_had = partial(_can_be_had, bench)
    if not 0 < lowest < highest:
        drawn = (space.sample(rng) for _ in range(DRAWN_FOR_ONE * count))
        return list(dict.fromkeys(islice(filter(can_be_had, drawn), count)))
    # 1 above the logarithm, as a cost must be above 0
    return stratified(
        space,
        lambda arch: 1 + math.log(bench.macs(arch) / lowest),
        count,
        seed=bench.config.seed,
        allowed=can_be_had,
    )


def _can_be_had(bench: Workbench, arch: Arch) -> bool:
    """Whether the precisions of `arch` can stand beside one another, so that there is a file to measure."""
    try:
        graph = shapes_graph(bench.family, arch)
        check_policy(graph, quant_policy(bench.family, arch, graph, keep=bench.config.quant.keep))
    except Unquantizable:
        return False
    except Untraceable:  # which measuring refuses, with what to do
        return True
    return True


def _known(bench: Workbench, listener: Listener) -> dict[str, Any]:
    """What was measured before on this device; nothing, and a note, where the runtime had other settings.

    Raises:
        RunError: the file is damaged, or of another device.
    """
    fingerprint = bench.device.fingerprint
    here = {"device": fingerprint.key, "told": str(fingerprint), "fingerprint": asdict(fingerprint)}
    known: dict[str, Any] | None = bench.run.read_json(MEASURED)
    if known is None:
        return {**here, "networks": {}, "blocks": {}}
    if not {"device", "told", "networks", "blocks"} <= known.keys():
        raise _damaged(bench, MEASURED, "it lacks a part")
    if known["device"] == fingerprint.key:
        return known | here
    before, now = known["told"], str(fingerprint)
    if before != now and without_settings(before) == without_settings(now):
        listener.note(
            f"what {bench.run.folder / MEASURED} holds is measured anew: the runtime had other settings "
            f"({before}) than it has now ({now})"
        )
        return {**here, "networks": {}, "blocks": {}}
    raise RunError(
        f"{bench.run.folder / MEASURED} is of another device or runtime ({before}) than this one ({now}); "
        "their latencies do not compare: remove it to measure anew"
    )


def _measure(bench: Workbench, arch: Arch, known: dict[str, Any]) -> None:
    """Adds the network of `arch` to what is `known`, and keeps it, unless its measurement is unstable."""
    try:
        found = measure_network(bench.device, bench.family, arch, keep=bench.config.quant.keep)
    except Untraceable as error:
        raise ConfigError(
            f"latencies of networks that cannot be traced are not predicted: {error}"
        ) from error
    if found.unstable:
        return
    # the first may be from when others slowed the device, and its best was not known
    known["reference_ms"] = min(known.get("reference_ms", math.inf), found.reference_ms)
    row = {"decisions": dict(arch), "ratio": found.ratio, "noise": found.ratio_noise}
    known["networks"][arch.key] = row
    bench.run.write_json(MEASURED, known)


def _measure_blocks(bench: Workbench, known: dict[str, Any], listener: Listener) -> None:
    """Adds the blocks of all networks to what is `known`; those that were unstable are taken again.

    Each block is kept as soon as it was measured. One whose measurement stays unstable is used, for want of a
    better one, and stands under `unstable_blocks`.

    Raises:
        DeviceError, EvaluationFailed: as `learn_latency`.
    """
    rows, refused = _rows(bench, known), 0
    unstable: set[str] = set(known.get("unstable_blocks", ()))
    taken: set[str] = set()  # unstable now, and once is enough for one run of this

    def keep(signature: str, found: Measurement) -> None:
        known["blocks"][signature] = found.ratio
        (unstable.add if found.unstable else unstable.discard)(signature)
        known["unstable_blocks"] = sorted(unstable)
        taken.add(signature)
        bench.run.write_json(MEASURED, known)

    for number, arch in enumerate(rows, 1):
        passed = (known["blocks"].keys() - unstable) | taken
        try:
            measure_blocks(
                bench.device, bench.family, arch, keep=bench.config.quant.keep, known=passed, on_block=keep
            )
            refused = 0
        except Unquantizable as error:  # alone, a block may stand between other integers than in its network
            listener.note(f"blocks of {arch.key} left out: {error}")
        except (DeviceError, EvaluationFailed) as error:
            refused += 1
            listener.note(f"blocks of {arch.key} left out: {error}")
            if refused == MOST_REFUSALS:
                raise
        listener.scored(arch.key, number, len(rows))
    if unstable:
        listener.note(
            f"{len(unstable)} of {len(known['blocks'])} blocks are unstable; run this again for them"
        )


def _rows(bench: Workbench, known: Mapping[str, Any]) -> dict[Arch, tuple[float, float | None]]:
    """Arch -> ratio to the reference model and its noise, of what was measured for this and by a search.

    The noise is None where it was not kept.
    """
    rows: dict[Arch, tuple[float, float | None]] = {}
    if _has_ratios(bench, known):
        for trial in searched(bench).trials:
            told = trial.metrics
            if trial.state == "complete" and told.get("latency_unstable") == 0:
                rows[trial.arch] = float(told["latency_ratio"]), None
    for row in known["networks"].values():
        rows[bench.space.canonical(row["decisions"])] = float(row["ratio"]), row.get("noise")
    return rows


def _has_ratios(bench: Workbench, known: Mapping[str, Any]) -> bool:
    """Whether the run's search began on the device and with the settings of what is `known`."""
    told: dict[str, Any] | None = bench.run.read_json(REFERENCE)
    return told is not None and told["key"] == known["device"]


def _reference_ms(bench: Workbench, told: Mapping[str, Any]) -> float:
    """What the reference model takes, by the run's search, where that was on the device that `told` is of.

    It is the scale of all trials, whatever settings they were timed with, and a search may find it anew.

    Args:
        bench: the run.
        told: what was measured, or the model that was learnt of it.
    """
    found: dict[str, Any] | None = bench.run.read_json(REFERENCE)
    if found is not None and "fingerprint" in told:
        here = same_device(found["fingerprint"], told["fingerprint"])
    else:  # a model of before fingerprints were kept with it
        here = found is not None and found["key"] == told["device"]
    return float(found["latency_ms"] if found is not None and here else told["reference_ms"])


def _learn(bench: Workbench, known: Mapping[str, Any], *, with_blocks: bool) -> dict[str, Any]:
    """Fits, judges and keeps the model."""
    rows, keep = _rows(bench, known), bench.config.quant.keep
    ratios = [ratio for ratio, _ in rows.values()]
    noises = [noise for _, noise in rows.values()]
    if len(ratios) < 2 * LEAST:
        raise RunError(
            f"only {len(ratios)} measurements on {bench.device.name} were stable; the machine may be busy. A "
            f"latency model needs {2 * LEAST}: run `nestling latency` again, which measures the others"
        )
    described = [description(bench.family, arch, keep=keep) for arch in rows]
    learners = {
        "model": by_model(described, ratios, noises=noises),
        "macs": by_macs([bench.macs(arch) for arch in rows], ratios),
    }
    if with_blocks:
        parts = [block_signatures(bench.family, arch, keep=keep) for arch in rows]
        learners["table"] = by_table(known["blocks"], parts, ratios)
    told_of = {
        name: held_out(len(ratios), learn, parts=PARTS, seed=bench.config.seed)
        for name, learn in learners.items()
    }
    found = {name: asdict(one) for name, one in qualities(told_of, ratios).items()}
    told = {
        "device": known["device"],
        "told": known["told"],
        "fingerprint": known["fingerprint"],
        "reference_ms": _reference_ms(bench, known),
        "networks": len(ratios),
        "ratios": [min(ratios), max(ratios)],
        "held_out": found,
        "model": json.loads(fit(described, ratios, noises=noises).to_json()),
    }
    bench.run.write_json(MODEL, told)
    return told


def _word(part: object) -> str:
    if not isinstance(part, str):
        raise TypeError(f"{part!r} is no text")
    return part


def _damaged(bench: Workbench, name: str, why: object) -> RunError:
    return RunError(
        f"{bench.run.folder / name} is damaged ({why}); remove it and run `nestling latency` again"
    )
