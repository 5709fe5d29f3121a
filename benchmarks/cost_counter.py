"""The cost of a network is what independent counters find.

Claim: for 38 timm architectures of as many families, at the size that each is trained for,
multiply-accumulates and parameters differ by less than 0.1 % from those of PyTorch's own counter
(`torch.utils.flop_counter`), which watches a real run on the CPU; ours runs on the meta device, where
attention takes another way.

    python benchmarks/cost_counter.py [--check] [--models NAME ...]

Takes 2 minutes. Where fvcore is installed (`pip install fvcore`), a third opinion is shown beside it: its
multiply-accumulates, and its activations (the outputs of convolutions and matrix products, the quantity of
Dollár et al. 2021, arXiv 2103.06877), with attention written out. It does not know paddings given by name, so
it judges nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import time
import warnings

import timm
import torch
from record import Benchmark, Figures
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nestling.models.cost import cost

MODELS = (
    "beit_base_patch16_224", "botnet26t_256", "convnextv2_atto", "crossvit_tiny_240", "cspresnet50",
    "davit_tiny", "densenet121", "dla34", "dpn68", "edgenext_xx_small", "efficientformerv2_s0",
    "efficientnet_b0", "efficientvit_b0", "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050",
    "hgnetv2_b0", "hrnet_w18_small", "inception_next_atto", "levit_128", "maxvit_rmlp_pico_rw_256",
    "mixer_s32_224", "mobilenetv3_large_100", "mobileone_s0", "mobilevitv2_050", "mvitv2_tiny", "nest_tiny",
    "nextvit_small", "poolformer_s12", "pvt_v2_b0", "regnety_002", "repvit_m1", "resnet18", "rexnet_100",
    "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "xcit_nano_12_p16_224",
)  # fmt: skip
LIMIT = 0.001
"""Of the other counter's figure."""
FLOAT_BYTES = 4
PRODUCTS = ("addmm", "baddbmm", "bmm", "conv", "einsum", "linear", "matmul", "mm")
"""fvcore's names of what we count."""


def watched_macs(network: nn.Module, images: Tensor) -> int:
    """Half of the operations that PyTorch's counter sees while `network` computes."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(images)
    return counter.get_total_flops() // 2


def third_opinion(network: nn.Module, images: Tensor) -> tuple[int, int] | None:
    """fvcore's multiply-accumulates and activation bytes; None where it is not installed."""
    if importlib.util.find_spec("fvcore") is None:
        return None
    analysis = importlib.import_module("fvcore.nn")
    for name in ("fvcore", "fvcore.nn.jit_analysis"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about every branch
        macs = analysis.FlopCountAnalysis(network, images).by_operator()
        activations = analysis.ActivationCountAnalysis(network, images).total()
    return sum(int(macs[name]) for name in PRODUCTS if name in macs), FLOAT_BYTES * int(activations)


def measure(options: argparse.Namespace) -> Figures:
    """What each counter finds; prints a line for each model."""
    models = {}
    for name in options.models:
        torch.manual_seed(0)
        network: nn.Module = timm.create_model(name).eval()
        size = timm.data.resolve_model_data_config(network)["input_size"]
        images = torch.zeros(1, *size)
        began = time.perf_counter()
        ours = cost(network, size[-1])
        seconds = time.perf_counter() - began
        models[name] = {
            "resolution": size[-1],
            "macs": ours.macs,
            "params": ours.params,
            "activation_bytes": ours.activation_bytes,
            "peak_bytes": ours.peak_bytes,
            "seconds": round(seconds, 3),
            "counted_macs": watched_macs(network, images),
            "counted_params": sum(tensor.numel() for tensor in set(network.parameters())),
        }
        set_fused_attn(enable=False)
        written_out = timm.create_model(name).eval()
        set_fused_attn(enable=True)
        opinion = third_opinion(written_out, images)
        if opinion is not None:
            models[name] |= dict(zip(("fvcore_macs", "fvcore_activation_bytes"), opinion, strict=True))
        print(row(name, models[name]), flush=True)
    return {"models": models}


def deviation(found: Figures, name: str, other: str) -> float:
    """How far our figure `name` is from the figure `other`, as a fraction of that."""
    return float(found[name] / found[other] - 1)


def row(name: str, found: Figures) -> str:
    """One model's line of the table."""
    words = [
        f"{name:32} {found['macs'] / 1e6:9.1f} MMACs ({deviation(found, 'macs', 'counted_macs'):+.3%})",
        f"{found['params'] / 1e6:6.2f} M params ({deviation(found, 'params', 'counted_params'):+.3%})",
        f"{found['activation_bytes'] / 1e6:6.1f} MB written, {found['peak_bytes'] / 1e6:6.1f} MB at once",
    ]
    if "fvcore_macs" in found:
        macs, activations = (
            deviation(found, name, f"fvcore_{name}") for name in ("macs", "activation_bytes")
        )
        words.append(f"fvcore {macs:+.3%} MACs, {activations:+.3%} activations")
    return "  ".join(words)


def worst(figures: Figures) -> tuple[float, str]:
    """The largest deviation, and whose it is."""
    return max(
        (abs(deviation(found, what, f"counted_{what}")), f"{name}'s {what}")
        for name, found in figures["models"].items()
        for what in ("macs", "params")
    )


def misses(figures: Figures) -> list[str]:
    """Whose figures differ by more than the limit."""
    return [
        f"{name}: {found[what]} {what}, the counter finds {found[f'counted_{what}']}"
        for name, found in figures["models"].items()
        for what in ("macs", "params")
        if not abs(deviation(found, what, f"counted_{what}")) <= LIMIT
    ]


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    largest, whose = worst(figures)
    return (
        f"the cost of {len(figures['models'])} timm architectures is within {largest:.4%} of what PyTorch's "
        f"counter finds (at most {LIMIT:.1%})" + (f"; the largest difference is {whose}" if largest else "")
    )


BENCHMARK = Benchmark("cost_counter", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="of timm [default: 38]")
    return BENCHMARK.run(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
