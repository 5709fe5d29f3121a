"""From a run's files to what its report shows."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from nestling.pipeline.evaluation import SUMMARY
from nestling.pipeline.seeding import SENSITIVITY
from nestling.pipeline.workbench import Workbench
from nestling.report.content import LayerBits, Member, ReportContent, TrainingPoint, TriedArch, Tuned
from nestling.report.units import count, duration, energy
from nestling.search import SearchResult
from nestling.train.records import read_records


def report_content(bench: Workbench, result: SearchResult | None) -> ReportContent:
    """What the report of `bench`'s run shows; stages that were not run are left out."""
    run = bench.run
    provenance = run.read_json("provenance.json") or {}
    members = run.read_json("members.json") or []
    records = read_records(bench.checkpoints)
    device = _device_facts(run.read_json("reference.json") or {})
    return ReportContent(
        title=bench.config.name,
        created=datetime.date.fromtimestamp(run.config_file.stat().st_mtime).isoformat(),
        command=shlex.join(provenance.get("command", [])),
        members=tuple(_member(card) for card in members),
        improvement=improvement_told(run.read_json(SUMMARY) or {}),
        tuned=tuple(_tuned(card) for card in _finetuned_cards(bench)),
        objectives=result.problem.objectives if result else (),
        limits=result.problem.limits if result else (),
        trials=_trials(result) if result else (),
        choices=bench.space.open_choices,
        sensitivity=(run.read_json(SENSITIVITY) or {}).get("layers", {}),
        training=tuple(
            TrainingPoint(
                step=r.step,
                epoch=r.epoch,
                loss=r.loss,
                largest_top1=r.largest_top1,
                smallest_top1=r.smallest_top1,
                lr=r.lr,
                images_per_second=r.images_per_second,
            )
            for r in records
        ),
        shrinking_step=_shrinking_step(bench),
        training_cost=training_cost(run.read_json("training.json") or {}),
        device_name=str(device.get("device", bench.config.profile.device)),
        device=device,
        data=_data_facts(bench),
        versions={**provenance.get("packages", {}), "python": str(provenance.get("python", ""))},
        space_summary={
            "family": bench.space.family,
            "networks": f"{bench.space.size:,}",
            "open choices": str(len(bench.space.open_choices)),
        },
        seconds=run.read_json("seconds.json") or {},
        config=run.config_file.read_text(),
        notes=tuple(_notes(members, result)),
    )


def _member(card: Mapping[str, Any]) -> Member:
    folder = f"exports/{card['name']}"
    return Member(
        name=card["name"],
        arch_key=card["arch_key"],
        decisions=card["decisions"],
        test_top1=card["test_top1"],
        test_top1_interval=tuple(card["test_top1_interval"]),
        search_top1=card["search_top1"],
        latency_ms=card["latency_ms"],
        latency_interval_ms=_pair(card["latency_interval_ms"]),
        latency_ratio=card["latency_ratio"],
        unstable=card["unstable"],
        size_bytes=card["size_bytes"],
        mmacs=card["mmacs"],
        params=card["params"],
        peak_bytes=card["peak_bytes"],
        resolution=card["resolution"],
        worst_error=card["worst_error"],
        onnx_path=f"{folder}/model.onnx",
        weights_path=f"{folder}/weights.safetensors",
        rebuild_path=f"{folder}/rebuild.py",
        precisions=card["precisions"],
        # a run of before has none
        layers=tuple(LayerBits(**layer) for layer in card.get("layers", ())),
    )


def _pair(values: Sequence[float] | None) -> tuple[float, float] | None:
    if values is None:
        return None
    low, high = values
    return low, high


def _finetuned_cards(bench: Workbench) -> list[Mapping[str, Any]]:
    """The cards of networks that were fine-tuned, by name; one whose export is under way has none yet."""
    files = sorted(bench.run.exports.glob("*/card.json"))
    cards = [bench.run.read_json(str(file.relative_to(bench.run.folder))) for file in files]
    return [card for card in cards if "finetuning" in card]


def _tuned(card: Mapping[str, Any]) -> Tuned:
    asked, folder = card["finetuning"], f"exports/{card['name']}"
    before, after = asked["before"], asked["after"]
    return Tuned(
        name=card["name"],
        arch_key=card["arch_key"],
        from_scratch=asked["from_scratch"],
        epochs=asked["epochs"],
        # a file's path says nothing to a reader elsewhere
        teacher=asked["teacher"].partition("=")[0],
        search_before=before["search_top1"],
        search_after=after["search_top1"],
        test_before=before["test_top1"],
        test_before_interval=tuple(before["test_top1_interval"]),
        test_after=after["test_top1"],
        test_after_interval=tuple(after["test_top1_interval"]),
        latency_ms=card["latency_ms"],
        unstable=card["unstable"],
        onnx_path=f"{folder}/{after['file']}",
        before_path=f"{folder}/{before['file']}",
        qat=asked.get("qat"),
    )


def _trials(result: SearchResult) -> tuple[TriedArch, ...]:
    front = {trial.number for trial in result.front}
    return tuple(
        TriedArch(
            number=trial.number,
            arch_key=trial.arch.key,
            decisions=dict(trial.arch),
            state=trial.state,
            metrics=dict(trial.metrics),
            reason=trial.reason,
            seconds=trial.seconds,
            on_front=trial.number in front,
        )
        for trial in result.trials
    )


def improvement_told(evaluation: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """What `nestling evaluate` found of the front; None before that, or before there was one."""
    found = evaluation.get("search", {}).get("improvement")
    return None if found is None else (found["value"], found["low"], found["high"])


def _shrinking_step(bench: Workbench) -> int | None:
    config, finished = bench.config.train, bench.run.read_json("training.json")
    if config.strategy != "delayed-shrinking" or finished is None:
        return None
    return round(config.switch * int(finished["forecast"]["steps"]))


def training_cost(finished: Mapping[str, Any]) -> dict[str, str]:
    """What training cost, in words, beside its forecast; empty where nobody counted."""
    spent, forecast = finished.get("spent"), finished.get("forecast")
    if spent is None or forecast is None:
        return {}
    error = f" ± {count(spent['macs_error'])}" if spent["macs_error"] else ""
    facts = {
        "steps": f"{spent['steps']:,}",
        "images": count(spent["images"]),
        "multiply-accumulates": f"{count(spent['macs'])}{error} (forecast {count(forecast['macs'])})",
        "wall time": f"{duration(spent['seconds'])} (forecast {duration(forecast['seconds'])})",
    }
    told = {
        f"energy, {part}": energy(joules) for part, joules in spent["joules"].items() if joules is not None
    }
    return facts | (told or {"energy": "not told by the machine"})


def _device_facts(reference: Mapping[str, Any]) -> dict[str, str]:
    facts = {
        key.replace("_", " "): ", ".join(value) if isinstance(value, list) else str(value)
        for key, value in reference.get("fingerprint", {}).items()
    }
    if "latency_ms" in reference:
        facts["reference model"] = f"{reference['latency_ms']:.3f} ms"
    return facts


def _data_facts(bench: Workbench) -> dict[str, str]:
    config = bench.config.data
    facts = {"source": config.source, "augmentation": config.augment}
    stored = bench.run.read_json("data.json") or {}
    return facts | {key: str(value) for key, value in stored.items() if key != "few"}


def _notes(members: list[dict[str, Any]], result: SearchResult | None) -> list[str]:
    notes = []
    unstable = [card["name"] for card in members if card["unstable"]]
    if unstable:
        names = ", ".join(unstable)
        notes.append(f"The machine was busy while these were timed; do not trust their latency: {names}.")
    moved = [
        f"{card['name']} ({told['kernels']:.0%} of the nodes, {told['time']:.0%} of the time)"
        for card in members
        if (told := card.get("elsewhere")) is not None and told["kernels"] > 0  # a run of before has none
    ]
    if moved:
        notes.append(
            "Parts of these ran on another provider than the device's address asks for, which its "
            f"allow_fallback permits; their latency is of both: {', '.join(moved)}."
        )
    official = [card["name"] for card in members if card.get("writer", "nestling") != "nestling"]
    if official:
        notes.append(
            "PyTorch's own exporter (torch.onnx.export) wrote these files, in 32-bit floats, as their "
            f"networks hold operations that cannot be quantized: {', '.join(official)}."
        )
    if result is not None:
        notes += result.unmet
    if result is not None and result.failed:
        notes.append(f"{len(result.failed)} candidates failed; their reasons are listed below.")
    return notes


def data_facts(bench: Workbench) -> dict[str, Any]:
    """What a run remembers of its data."""
    data = bench.data
    return {
        "classes": len(data.classes),
        "size": data.size,
        "training images": len(data.train),
        "search images": len(data.search.labels),
        "fingerprint": data.fingerprint,
        "few": data.train.few,
    }
