"""What `sorted_net.py` trains: 160 nested networks at once, and three of them by themselves."""

from __future__ import annotations

import itertools
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from record import store
from strategies_entries import Entry, Size
from strategies_jobs import EVALUATION_BATCH, Job, data_of, key_of, macs, space_of, trained

from nestling.data import Data
from nestling.models.building import build_shapes
from nestling.models.cost import cost
from nestling.models.families import family
from nestling.models.supernet import Supernet
from nestling.space import Arch, SearchSpace
from nestling.train.evaluate import recalibrate, top1
from nestling.train.strategies.accounting import BACKWARD

SIZES = {
    "cpu": Size((24,), 10_000, 2000, 64, 6.2e12, 0.1, 160, 2, 0),
    "quick": Size((24,), 10_000, 2000, 64, 1.6e12, 0.1, 160, 1, 0),
}
"""A budget is what the largest network spends alone; all others take as many steps."""
DEPTHS = ((1, 1, 1), (1, 1, 2), (1, 1, 3), (1, 2, 3), (2, 2, 3))
"""Of the three stages: each has the blocks of the one before."""
WIDTHS = ("stem.width", "s1.width", "s2.width", "s3.width")
SORTED = "sorted-net"
CALIBRATION = (512, 256)
"""Images for the statistics of normalization, and those of a batch: of one size, as batches count alike."""
ALONE = ("largest", "median", "smallest")


def nested(space: SearchSpace) -> tuple[Arch, ...]:
    """The 160 networks, cheapest first.

    Five depths, each of which has the blocks of the one before; and for each of the stem's width, the three
    stages' and that of all blocks' middles the least or the most. So what any two share is of the set too. A
    single chain of this space has no more than 18 networks.
    """
    middles = tuple(choice.name for choice in space.choices if choice.name.endswith(".expand"))
    moved = [*((name,) for name in WIDTHS), middles]
    found = []
    for depths, ends in itertools.product(DEPTHS, itertools.product((0, -1), repeat=len(moved))):
        decided = {choice.name: choice.values[0] for choice in space.choices}
        decided |= {f"s{stage}.depth": depth for stage, depth in enumerate(depths, start=1)}
        for names, end in zip(moved, ends, strict=True):
            decided |= {name: space.by_name[name].values[end] for name in names}
        found.append(space.canonical(decided))
    return tuple(sorted(dict.fromkeys(found), key=macs))


@lru_cache(maxsize=1)
def nested_of(size: Size) -> tuple[Arch, ...]:
    """The 160 networks at the resolution of `size`."""
    return nested(space_of(size))


@cache
def parameters(arch: Arch) -> int:
    """How many numbers `arch` learns."""
    return cost(build_shapes(family("resnet").build, arch), arch.integer("resolution")).params


def alone_of(size: Size) -> dict[str, Arch]:
    """The networks that are also trained by themselves."""
    archs = nested_of(size)
    return dict(zip(ALONE, (archs[-1], archs[len(archs) // 2], archs[0]), strict=True))


def entries_of(size: Size, *, random_subnets: int) -> Mapping[str, Entry]:
    """The trainings; each one's share of the budget buys it as many steps as all buys the largest network."""
    archs = nested_of(size)
    most = macs(archs[-1])
    named = tuple(arch.to_json() for arch in archs)
    entries = {
        SORTED: Entry(
            "SortedNet, arXiv 2309.00255, 160 nested networks",
            {"strategy": "sorted-net", "subnets": named, "random_subnets": random_subnets},
            share=random_subnets * statistics.mean(map(macs, archs)) / most,
        )
    }
    for name, arch in alone_of(size).items():
        told = {"strategy": "alone", "subnets": (arch.to_json(),)}
        entries[f"{name} alone"] = Entry(f"the {name} network by itself", told, share=macs(arch) / most)
    return entries


def plan(entries: Mapping[str, Entry], size: Size, *, source: str, work: Path) -> list[Job]:
    """All trainings, seed by seed."""
    fingerprint = data_of(size, source).fingerprint
    of_largest = BACKWARD * macs(nested_of(size)[-1])
    return [
        Job(
            name,
            entry,
            size,
            seed,
            source,
            entry.share * of_largest,
            work / key_of(name, entry, size, fingerprint),
        )
        for seed in range(size.seeds)
        for name, entry in entries.items()
    ]


def run(job: Job) -> dict[str, Any]:
    """What the finished training comes to; also written to the job's file. Continues from a checkpoint.

    The 160 networks are scored, or the one that was trained by itself.
    """
    data = data_of(job.size, job.source)
    supernet, records, _ = trained(job, data)
    began = time.monotonic()
    archs = nested_of(job.size) if job.name == SORTED else (Arch.from_json(job.entry.train["subnets"][0]),)
    found = {
        "entry": job.name,
        "seed": job.seed,
        "steps": records[-1].step,
        "macs": records[-1].step * job.size.batch_size * job.macs_of_step,
        "top1": scored(supernet, archs, data, job.size),
        "seconds": sum(record.seconds for record in records),  # those of a part that was killed are lost
        "scoring_seconds": time.monotonic() - began,
        "last_loss": records[-1].loss,
    }
    store(job.result_file, found)
    shutil.rmtree(job.training, ignore_errors=True)
    return found


def scored(supernet: Supernet, archs: Iterable[Arch], data: Data, size: Size) -> list[float]:
    """The accuracy of each of `archs` on the same images of the judging split, with statistics of its own."""
    (resolution,) = size.resolutions
    count, batch_size = CALIBRATION
    calibration = data.train.calibration(count).at(resolution, batch_size=batch_size, device=size.device)
    statistics_from = [batch.images for batch in calibration]
    judging = data.test() if size.judge == "test" else data.search.take(size.test_images)
    # made once for all networks
    batches = list(judging.at(resolution, batch_size=EVALUATION_BATCH, device=size.device))
    return [top1(recalibrate(supernet.materialize(arch), statistics_from), batches).top1 for arch in archs]
