"""Networks with untrained weights, and their blocks: as files they take the time of trained ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from nestling.models.building import build_shapes
from nestling.models.families import Family
from nestling.models.graph import Graph, trace
from nestling.models.graph_blocks import blocks
from nestling.pipeline.measuring import PAUSES, measure
from nestling.pipeline.policies import quant_policy
from nestling.pipeline.steps import block_signature
from nestling.pipeline.verifying import check_precisions
from nestling.pipeline.writing import write_file
from nestling.profile import Device, Measurement
from nestling.quant import Quantized, QuantPolicy, quantize
from nestling.space import Arch

SEED = 0


def untrained_graph(family: Family, arch: Arch) -> Graph:
    """The graph of the network of `arch`, its weights as its constructor draws them: the same each time.

    Raises:
        Untraceable: it has none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = family.build(arch).eval()
    return trace(network, resolution=arch.integer("resolution"))


def shapes_graph(family: Family, arch: Arch) -> Graph:
    """The same graph without numbers, which take neither memory nor time: for telling what it costs.

    Raises:
        Untraceable: it has none.
    """
    resolution = arch.integer("resolution")
    network = build_shapes(family.build, arch).eval()
    with torch.device("meta"):
        return trace(network, resolution=resolution, image=torch.empty(1, 3, resolution, resolution))


def write_untrained(graph: Graph, policy: QuantPolicy, path: Path, *, reduce_range: bool) -> Quantized:
    """Writes `graph` to `path` in the precisions of `policy`, ranges being those of random inputs.

    Args:
        graph: a network or a part of one.
        policy: which layers.
        path: the file; its folder is there.
        reduce_range: whether weights keep to 7 bits, see `nestling.quant.observing.ranges`.
    """
    generator = torch.Generator().manual_seed(SEED)
    shape = graph.shapes[graph.input]
    inputs = torch.randn(shape, generator=generator)
    quantized = quantize(graph, policy, [inputs], reduce_range=reduce_range)
    write_file(quantized, path)
    return quantized


def measure_network(
    device: Device,
    family: Family,
    arch: Arch,
    *,
    keep: Mapping[str, str],
    pauses: Sequence[float] = PAUSES,
) -> Measurement:
    """How long the network of `arch` takes, with weights that were never trained.

    Args:
        device: where.
        family: of the network.
        arch: which one.
        keep: as `[quant] keep` has it.
        pauses: see `nestling.pipeline.measuring.measure`.

    Raises:
        DeviceError: the device refuses it before it is timed.
        EvaluationFailed: it is refused, or the device is lost, while it is timed.
        ExportMismatch: the device computes it in other precisions than asked for.
        Untraceable: it has no graph.
        Unquantizable: no file is made of it in its precisions.
        ValueError: an unknown precision, or one for research.
    """
    graph = untrained_graph(family, arch)
    policy = quant_policy(family, arch, graph, keep=keep)
    if policy.simulated:
        raise ValueError(f"precisions for research have no latency: {', '.join(policy.simulated)}")
    with TemporaryDirectory(prefix="nestling-") as folder:
        path = Path(folder) / f"{arch.key}.onnx"
        quantized = write_untrained(graph, policy, path, reduce_range=device.fingerprint.int8_saturates)
        check_precisions(device, path, quantized, policy)
        return measure(device, path, pauses=pauses)


def measure_blocks(
    device: Device,
    family: Family,
    arch: Arch,
    *,
    keep: Mapping[str, str],
    known: Collection[str],
    pauses: Sequence[float] = PAUSES[:1],
    on_block: Callable[[str, Measurement], None] = lambda *_: None,
) -> dict[str, Measurement]:
    """Signature -> measurement, of those blocks of `arch` that are not `known`.

    Each is a file of its own and is measured like a network. One whose measurement stays unstable is there
    too, and flagged: without it no network that has it could be looked up.

    Args:
        device, family, arch, keep, pauses: as `measure_network` has them.
        known: signatures of blocks that are passed over.
        on_block: hears of each block as soon as it was measured.

    Raises:
        DeviceError, EvaluationFailed, Untraceable, Unquantizable, ValueError: as `measure_network`; a block
            alone may be unquantizable where its network is not.
    """
    graph = untrained_graph(family, arch)
    policy = quant_policy(family, arch, graph, keep=keep)
    found: dict[str, Measurement] = {}
    with TemporaryDirectory(prefix="nestling-") as folder:
        for block in blocks(graph):
            signature = block_signature(block.graph, policy)
            if signature in known or signature in found:
                continue
            path = Path(folder) / f"{signature}.onnx"
            write_untrained(block.graph, policy, path, reduce_range=device.fingerprint.int8_saturates)
            found[signature] = measure(device, path, pauses=pauses)
            on_block(signature, found[signature])
    return found
