from __future__ import annotations

from dataclasses import replace

import pytest

from nestling.report import Member, ReportContent, TrainingPoint, TriedArch
from nestling.search import Limit, Objective
from nestling.space import Choice, Need


@pytest.fixture
def member() -> Member:
    return Member(
        name="small",
        arch_key="0" * 12,
        decisions={"resolution": 24, "s1.width": 16, "s1.depth": 1, "s1.b1.kernel": 3, "s1.b2.kernel": 3},
        test_top1=0.951,
        test_top1_interval=(0.93, 0.97),
        search_top1=0.944,
        latency_ms=0.21,
        latency_interval_ms=(0.208, 0.213),
        latency_ratio=0.16,
        unstable=False,
        size_bytes=412_345,
        mmacs=8.75,
        params=96_123,
        peak_bytes=75_432,
        resolution=24,
        worst_error=2.3e-6,
        onnx_path="exports/small/model.onnx",
        weights_path="exports/small/weights.safetensors",
        rebuild_path="exports/small/rebuild.py",
        precisions={"stem": "fp32", "s1": "w8a8"},
    )


@pytest.fixture
def content(member: Member) -> ReportContent:
    large = replace(
        member,
        name="large",
        arch_key="1" * 12,
        decisions={"resolution": 32, "s1.width": 32, "s1.depth": 2, "s1.b1.kernel": 5, "s1.b2.kernel": 3},
        test_top1=0.986,
        test_top1_interval=(0.972, 0.994),
        search_top1=0.981,
        latency_ms=1.9,
        latency_interval_ms=(1.7, 2.1),
        latency_ratio=1.4,
        unstable=True,
        size_bytes=1_234_567,
        mmacs=98.2,
    )
    middle = replace(member, name="middle", arch_key="2" * 12, test_top1=0.98, latency_ms=0.8, mmacs=40.0)
    trials = (
        TriedArch(
            0, "0" * 12, member.decisions, "complete", {"top1": 0.944, "latency_ms": 0.21}, on_front=True
        ),
        TriedArch(
            1, "1" * 12, large.decisions, "complete", {"top1": 0.981, "latency_ms": 1.9}, on_front=True
        ),
        TriedArch(2, "3" * 12, member.decisions, "failed", {}, "no answer after 120 s"),
        TriedArch(3, "4" * 12, large.decisions, "complete", {"top1": 0.95, "latency_ms": 1.0}),
        TriedArch(4, "4" * 12, large.decisions, "duplicate"),
    )
    return ReportContent(
        title="Digits",
        created="2026-11-21",
        command="nestling run configs/demo.toml",
        members=(large, member, middle),
        objectives=(Objective("top1", "maximise"), Objective("latency_ms", "minimise")),
        limits=(Limit("size_mb", 2.0),),
        trials=trials,
        choices=(
            Choice("resolution", (24, 32)),
            Choice("s1.depth", (1, 2)),
            Choice("s1.b1.kernel", (3, 5)),
            Choice("s1.b2.kernel", (3, 5), (Need("s1.depth", 2),)),
        ),
        training=tuple(
            TrainingPoint(step, step / 10, 2.0 - step / 20, 0.5 + step / 50, 0.1 + step / 50)
            for step in range(20)
        ),
        shrinking_step=10,
        training_cost={"multiply-accumulates": "2.20 T (forecast 2.00 T)"},
        device_name="a small board",
        device={"address": "ort:cpu?threads=1"},
        data={"source": "digits"},
        versions={"torch": "2.15.0"},
        space_summary={"family": "mobilenet"},
        seconds={"train": 121.4, "search": 62.0},
        config='{"name": "demo"}\n',
        notes=("The latency of network 3 varied by 20 %.",),
    )
