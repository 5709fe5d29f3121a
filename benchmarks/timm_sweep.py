"""timm's architectures lend what they compute, each as it is and cut to subnets.

Claims, with random weights and random statistics of batch normalization, on the CPU:

1. At full size, a network with lent weights gives the plain timm network's logits to the last bit: in
   training mode, and materialized in evaluation mode.
2. A space with two elastic arguments or more is proposed from the constructor, written to TOML and loaded.
   Five random subnets of it run forward and backward, and give the logits of the materialized subnet to the
   last bit.

    python benchmarks/timm_sweep.py [--check] [--stored] [--only NAME ...]

Each architecture is one row, refused ones with the reason; takes about ten minutes on one core. The names are
those of small models of timm's families, of which many get smaller arguments still.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import Benchmark, Figures
from timm.models._registry import _model_to_module
from torch import Tensor, nn

from nestling.models import timm_family
from nestling.models.proposals import Proposal, propose
from nestling.models.supernet import Supernet
from nestling.space import Arch, Choice, SearchSpace, Value, load_space

CLASSES, IMAGES, SUBNETS = 10, 2, 5
ROUNDING = 1e-5
"""What differs by more is not the same computation; less comes of sums in another order, and is not equal."""
ENOUGH = 5
"""Of so many elastic arguments no more are tried."""
ARCHITECTURES, FAMILIES, SPACES, ELASTIC = 60, 25, 30, 2
"""The least numbers that `--check` accepts, the last of them of each space."""

SWEPT: dict[str, tuple[int, Mapping[str, Value]]] = {
    "beit_base_patch16_224": (64, {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "botnet26t_256": (128, {}),
    "cait_xxs24_224": (64, {"embed_dim": 48, "depth": 2}),
    "caformer_s18": (64, {"depths.2": 3}),
    "coat_lite_tiny": (64, {}),
    "coatnet_pico_rw_224": (64, {}),
    "convit_tiny": (64, {"embed_dim": 48, "depth": 4, "local_up_to_layer": 2}),
    "convmixer_768_32": (56, {"dim": 48, "depth": 3}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "crossvit_9_240": (120, {}),
    "cs3darknet_s": (64, {}),
    "darknet17": (64, {}),
    "davit_tiny": (64, {"depths.2": 2, "embed_dims.3": 384}),
    "deit3_small_patch16_224": (64, {"embed_dim": 48, "depth": 3, "num_heads": 3}),
    "deit_tiny_distilled_patch16_224": (64, {"embed_dim": 48, "depth": 3}),
    "densenet121": (64, {"growth_rate": 8}),
    "dla46_c": (64, {}),
    "dpn48b": (64, {}),
    "edgenext_xx_small": (64, {}),
    "efficientformer_l1": (224, {}),
    "efficientformerv2_s0": (64, {}),
    "efficientnet_b0": (64, {}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (64, {}),
    "eva02_tiny_patch14_224": (56, {"depth": 2}),
    "fasternet_t0": (64, {}),
    "fastvit_t8": (
        64,
        {},
    ),  # at 96 and 128 px torch 2.15 crashes in the plain network's backward, channels last
    "focalnet_tiny_srf": (64, {"embed_dim": 32}),
    "gcvit_xxtiny": (64, {}),
    "gernet_s": (64, {}),
    "ghostnet_100": (64, {}),
    "gmixer_12_224": (64, {"embed_dim": 48, "num_blocks": 2}),
    "gmlp_ti16_224": (64, {"embed_dim": 48, "num_blocks": 2}),
    "hardcorenas_a": (64, {}),
    "hgnetv2_b0": (64, {}),
    "hiera_tiny_224": (64, {"embed_dim": 48}),
    "hrnet_w18_small": (64, {}),
    "inception_next_atto": (64, {}),
    "inception_v3": (96, {}),
    "lcnet_050": (64, {}),
    "levit_128s": (64, {}),
    "mambaout_femto": (64, {}),
    "mixer_s32_224": (64, {"embed_dim": 48, "num_blocks": 2}),
    "mixnet_s": (64, {}),
    "mnasnet_small": (64, {}),
    "mobilenetv2_050": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "mobileone_s0": (64, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "mvitv2_tiny": (64, {}),
    "nest_tiny": (64, {"depths.2": 2}),
    "nextvit_small": (64, {}),
    "nf_resnet26": (64, {}),
    "pit_ti_224": (64, {}),
    "poolformer_s12": (64, {}),
    "pvt_v2_b0": (64, {}),
    "rdnet_tiny": (64, {}),
    "regnetx_002": (64, {}),
    "regnety_002": (64, {}),
    "repghostnet_050": (64, {}),
    "repvgg_a0": (64, {}),
    "repvit_m0_9": (64, {}),
    "res2net50_14w_8s": (64, {}),
    "resmlp_12_224": (64, {"embed_dim": 48, "num_blocks": 2}),
    "resnest14d": (64, {}),
    "resnet18": (64, {}),
    "resnet26d": (64, {}),
    "resnetv2_18": (64, {}),
    "resnext26ts": (64, {}),
    "rexnet_100": (64, {}),
    "selecsls42b": (64, {}),
    "sequencer2d_s": (64, {}),
    "seresnet18": (64, {}),
    "shvit_s1": (64, {}),
    "skresnet18": (64, {}),
    "starnet_s1": (64, {}),
    "swiftformer_xs": (64, {}),
    "swin_tiny_patch4_window7_224": (56, {"embed_dim": 48, "depths.2": 2}),
    "swinv2_tiny_window8_256": (64, {"embed_dim": 48, "depths.2": 2}),
    "tf_efficientnetv2_b0": (64, {}),
    "tiny_vit_5m_224": (64, {}),
    "tnt_s_patch16_224": (64, {"depth": 2}),
    "tresnet_m": (64, {}),
    "twins_svt_small": (64, {"depths.2": 2}),
    "visformer_tiny": (64, {}),
    "vit_relpos_small_patch16_224": (64, {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "vit_tiny_patch16_224": (64, {"embed_dim": 48, "depth": 3}),
    "volo_d1_224": (64, {"layers.2": 2}),
    "vovnet39a": (64, {}),
    "xception41": (64, {}),
    "xcit_nano_12_p16_224": (64, {"depth": 3}),
}
"""timm's name -> side of the images in pixels, and what is smaller than in timm."""


def sweep(name: str, *, resolution: int, given: Mapping[str, Value]) -> dict[str, Any]:
    """The row of one architecture: what works, and the reason where something is refused."""
    row: dict[str, Any] = {"name": name, "family": _model_to_module[name], "full_size": False}
    row |= {"elastic": [], "subnets": 0, "reasons": []}
    began = time.perf_counter()
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 3, resolution, resolution)
    try:
        row["full_size_difference"] = full_size(name, images, given=given)
        row["full_size"] = row["full_size_difference"] == 0
        row["reasons"] += (
            [] if row["full_size"] else [f"full size differs by {row['full_size_difference']:.1e}"]
        )
    except Exception as error:
        row["reasons"].append(f"full size: {told(error)}")
    try:
        proposal = propose(name, resolution=resolution, classes=CLASSES, given=given, enough=ENOUGH)
        row["elastic"] = [argument.name for argument in proposal.elastic]
        if row["elastic"]:
            differences = subnets(reloaded(proposal), images)
            row["subnet_differences"] = differences
            row["subnets"] = differences.count(0.0)
            if max(differences) > 0:
                row["reasons"].append(f"subnets differ by {max(differences):.1e}")
            elif len(differences) < SUBNETS:
                row["reasons"].append(f"the space has only {len(differences)} networks")
        else:
            row["reasons"].append("no argument is elastic")
    except Exception as error:
        row["reasons"].append(f"subnets: {told(error)}")
    row["seconds"] = round(time.perf_counter() - began, 2)
    return row


def full_size(name: str, images: Tensor, *, given: Mapping[str, Value]) -> float:
    """The largest difference between the lent largest network's logits and the plain timm network's."""
    constants = {"model": name, "resolution": images.shape[-1], "classes": CLASSES, **given}
    space = SearchSpace("timm", tuple(Choice(key, (value,)) for key, value in constants.items()))
    plain = timm_family.build(space.largest)
    randomize(plain)
    supernet = Supernet(space, timm_family.build, largest=plain)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        materialized = supernet.materialize(space.largest)
        evaluated = difference(logits(materialized.eval(), images), logits(plain.eval(), images))
        supernet.train()
        lent = logits(partial(supernet, arch=space.largest), images)
        return max(evaluated, difference(lent, logits(plain.train(), images)))


def subnets(space: SearchSpace, images: Tensor) -> list[float]:
    """Of five random subnets, the largest difference between lent and materialized logits, in training mode.

    Raises:
        ArithmeticError: a subnet's gradient is not finite, or none reaches the largest network.
    """
    rng = random.Random(0)
    supernet = Supernet(space, timm_family.build).train()
    randomize(supernet.largest)
    archs: dict[Arch, None] = {}
    while len(archs) < min(SUBNETS, space.size):
        archs[space.sample(rng)] = None
    found = []
    for arch in archs:
        lent = logits(partial(supernet, arch=arch), images)
        torch.autograd.backward(lent.square().mean())
        gradients = [p.grad for p in supernet.largest.parameters() if p.grad is not None]
        if not gradients or not all(bool(g.isfinite().all()) for g in gradients):
            raise ArithmeticError(f"{arch.to_json()}: gradients are missing or not finite")
        supernet.zero_grad(set_to_none=True)
        channels_last = images.contiguous(memory_format=torch.channels_last)
        found.append(difference(lent, logits(supernet.materialize(arch).train(), channels_last)))
    return found


def logits(network: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """What the network gives; layers that draw lots draw the same ones each time."""
    torch.manual_seed(1)
    given = network(images)
    result: Tensor = torch.cat(given) if isinstance(given, list | tuple) else given
    return result


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference; infinite where a number is not finite."""
    gap = float((one - other).detach().abs().max())
    return gap if math.isfinite(gap) else math.inf


def randomize(network: nn.Module) -> None:
    """Gives each vector of the state values of its own: fresh ones are all alike, and hide a wrong order."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim <= 1:
            positive = name.endswith(("running_var", "weight", "gamma", "scale"))
            tensor.uniform_(0.5, 1.5) if positive else tensor.uniform_(-0.1, 0.1)


def reloaded(proposal: Proposal) -> SearchSpace:
    """The proposal's space, by way of a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "space.toml"
        path.write_text(proposal.to_toml(), encoding="utf-8")
        space = load_space(path)
    if space != proposal.space():
        raise ValueError("the space that was written is not the one that was read")
    return space


def told(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def measure(options: argparse.Namespace) -> Figures:
    """A row for each architecture, printed as it is found."""
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # timm's own remarks on deprecated names and small windows
    logging.getLogger("timm").setLevel(logging.CRITICAL)
    began = time.perf_counter()
    chosen = {name: SWEPT[name] for name in options.only} if options.only else SWEPT
    print(f"{'architecture':34} {'family':24} full size  elastic  subnets  seconds  reason")
    rows = []
    for name, (resolution, given) in chosen.items():
        rows.append(sweep(name, resolution=resolution, given=given))
        print(line(rows[-1]), flush=True)
        gc.collect()
    return {
        "threads": options.threads,
        "subnets_of_each": SUBNETS,
        "seconds": round(time.perf_counter() - began, 1),
        "rows": rows,
    }


def line(row: Mapping[str, Any]) -> str:
    """One row, for reading."""
    told_of = f"{row['name']:34} {row['family']:24} {'ok' if row['full_size'] else 'no':9}"
    counts = f"{len(row['elastic']):8} {row['subnets']:8} {row['seconds']:8.1f}"
    return f"{told_of}  {counts}  {'; '.join(row['reasons'])}".rstrip()


def counted(figures: Figures) -> tuple[int, int, int]:
    """Architectures that are equal at full size, their families, and spaces whose subnets are all equal."""
    equal = [row for row in figures["rows"] if row["full_size"]]
    spaces = [row for row in equal if len(row["elastic"]) >= ELASTIC and row["subnets"] == SUBNETS]
    return len(equal), len({row["family"] for row in equal}), len(spaces)


def misses(figures: Figures) -> list[str]:
    """Which of the claims fail, and what computes something else without being refused."""
    judged = zip(
        ("architectures equal at full size", "families", "spaces"),
        counted(figures),
        (ARCHITECTURES, FAMILIES, SPACES),
        strict=True,
    )
    found = [f"{name}: {count}, at least {least}" for name, count, least in judged if count < least]
    for row in figures["rows"]:
        gaps = [row.get("full_size_difference", 0.0), *row.get("subnet_differences", [])]
        if max(gaps) > ROUNDING:
            found.append(f"{row['name']} differs by {max(gaps):.1e}")
    return found


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    equal, families, spaces = counted(figures)
    rows = figures["rows"]
    return (
        f"{equal} of {len(rows)} timm architectures of {families} families lend what they compute at full "
        f"size, difference 0.0; {spaces} proposed spaces of {ELASTIC} or more elastic arguments gave "
        f"{SUBNETS} random subnets each that equal their materialized networks, difference 0.0"
    )


BENCHMARK = Benchmark("timm_sweep", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--only", nargs="+", choices=SWEPT, metavar="NAME", help="architectures of the sweep")
    parser.add_argument("--threads", type=int, default=1, help="of torch [default: 1]")
    return BENCHMARK.run(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
