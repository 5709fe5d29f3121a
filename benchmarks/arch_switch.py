"""Going over to another architecture takes milliseconds, in every family.

For once-for-all's MobileNetV3 (width 1.0, 1,000 classes; the space of `lending_overhead.py`) and for each
space in `search_spaces/`, with 1,000 classes: the time to

- build: the shapes of a new random arch, on the meta device, as training does for each arch it has not met;
- lend: cut the largest network's tensors, statistics among them, for a network whose shapes are there;
- materialize: a new random arch as a plain network with its own weights, building included;
- build plainly: call the family's `build`, with memory and initialisers, which is what Nestling leaves out.

Claim: for once-for-all's space, on 2 idle cores, materializing takes less than 25 ms and lending less than
5 ms at the median (the published code: 59 ms, and 169 ms for AttentiveNAS, to extract a static subnet).

    python benchmarks/arch_switch.py [--check] [--archs 40] [--threads 2] [--spaces NAME ...]

Takes 2 minutes on 2 cores. The spaces take turns, in random order, one arch each at a time; each figure is
the median over the archs, with quartiles.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lending_overhead import CLASSES, ofa_space
from record import Benchmark, Figures, quartiles
from torch import Tensor, nn

from nestling.models.building import build_shapes
from nestling.models.families import family
from nestling.models.lending import lend, lend_buffers, plan_cuts
from nestling.models.supernet import Supernet
from nestling.space import SearchSpace
from nestling.space.files import load_space

SPACES = Path(__file__).parent.parent / "search_spaces"
JUDGED = "once-for-all"
MATERIALIZE_MS, LEND_MS = 25.0, 5.0
STEPS = ("build", "lend", "materialize", "build plainly")


class Switching:
    """One space's supernet, and the seconds of each step for archs of it."""

    def __init__(self, space: SearchSpace, *, rng: random.Random) -> None:
        kind = family(space.family)
        self.space = space.with_constants({"classes": CLASSES})
        self.rng = rng
        self.supernet = Supernet(self.space, kind.build, layout=kind.layout)
        self.seconds: dict[str, list[float]] = {step: [] for step in STEPS}

    def switch(self) -> None:
        """Runs each step once, in random order, each for an arch of its own."""
        steps = {
            "build": lambda: build_shapes(self.supernet.build, arch),
            "lend": self._lending(),
            "materialize": lambda: self.supernet.materialize(arch),
            "build plainly": lambda: self.supernet.build(arch),
        }
        order = list(steps)
        self.rng.shuffle(order)
        for step in order:
            arch = self.space.sample(self.rng)
            began = time.perf_counter()
            steps[step]()
            self.seconds[step].append(time.perf_counter() - began)

    def forget(self) -> None:
        """Drops what was measured so far."""
        for seconds in self.seconds.values():
            seconds.clear()

    def _lending(self) -> Callable[[], object]:
        """Lends all tensors to a random network whose shapes, and how they are cut, are known before."""
        arch = self.space.sample(self.rng)
        network = build_shapes(self.supernet.build, arch)
        largest, layout = self.supernet.largest, self.supernet.layout
        small = dict(network.named_parameters())
        cuts = plan_cuts(
            tensors(largest),
            tensors(network),
            layouts=(layout(largest, self.space.largest), layout(network, arch)),
        )

        def run() -> None:
            lend(dict(largest.named_parameters(remove_duplicate=False)), small, cuts=cuts)
            lend_buffers(dict(largest.named_buffers(remove_duplicate=False)), network, cuts=cuts)

        return run


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of `network`, by every name."""
    return {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }


def spaces(names: Sequence[str] | None) -> dict[str, SearchSpace]:
    """Once-for-all's space, then those in files: all, or those called `names`."""
    found = {JUDGED: ofa_space()}
    for path in sorted(SPACES.glob("*.toml")):
        if names is None or path.stem in names:
            found[path.stem] = load_space(path)
    return found


def measure(options: argparse.Namespace) -> Figures:
    """Milliseconds of each step in each space; prints a table."""
    torch.set_num_threads(options.threads)
    rng = random.Random(0)
    switching = {name: Switching(space, rng=rng) for name, space in spaces(options.spaces).items()}
    for each in switching.values():
        each.switch()  # or the first arch would pay for what is made once
        each.forget()
    turns = list(switching.values())
    for _ in range(options.archs):
        rng.shuffle(turns)
        gc.collect()  # or one space would pay for what another has left
        for each in turns:
            each.switch()
    found = {
        name: {
            "family": each.space.family,
            "params_of_largest": sum(p.numel() for p in each.supernet.largest.parameters()),
            "milliseconds": {step: [round(1e3 * s, 3) for s in each.seconds[step]] for step in STEPS},
        }
        for name, each in switching.items()
    }
    figures = {"threads": options.threads, "archs": options.archs, "spaces": found}
    print(table(figures), flush=True)
    return figures


def table(figures: Figures) -> str:
    """The figures for reading: medians with their quartiles, in milliseconds."""
    lines = [" " * 36 + "".join(f"{step:>24}" for step in STEPS)]
    for name, found in figures["spaces"].items():
        cells = []
        for step in STEPS:
            low, median, high = quartiles(found["milliseconds"][step])
            cells.append(f"{median:7.1f} ({low:5.1f} to {high:5.1f})")
        size = f"{found['params_of_largest'] / 1e6:.1f} M"
        lines.append(f"{name:26} {size:>8} " + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def median_ms(figures: Figures, step: str, *, space: str = JUDGED) -> float:
    """The median milliseconds of `step` in `space`."""
    return quartiles(figures["spaces"][space]["milliseconds"][step])[1]


def misses(figures: Figures) -> list[str]:
    """Which of the two limits are missed."""
    judged = (("materialize", MATERIALIZE_MS), ("lend", LEND_MS))
    return [
        f"to {step} takes {median_ms(figures, step):.1f} ms, not less than {limit:g} ms"
        for step, limit in judged
        if not median_ms(figures, step) < limit
    ]


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    worst = max(figures["spaces"], key=lambda name: median_ms(figures, "materialize", space=name))
    return (
        f"a new subnet of once-for-all's MobileNetV3 is materialized in "
        f"{median_ms(figures, 'materialize'):.1f} ms (less than {MATERIALIZE_MS:g}) and lent its weights in "
        f"{median_ms(figures, 'lend'):.1f} ms (less than {LEND_MS:g}); of {len(figures['spaces'])} spaces, "
        f"{worst} takes longest to materialize: {median_ms(figures, 'materialize', space=worst):.1f} ms"
    )


BENCHMARK = Benchmark("arch_switch", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("--archs", type=int, default=40, help="random archs of each space [default: 40]")
    parser.add_argument("--threads", type=int, default=2, help="of torch [default: 2]")
    parser.add_argument(
        "--spaces", nargs="*", metavar="NAME", help="beside once-for-all's [default: all in search_spaces/]"
    )
    options = parser.parse_args(words)
    if options.archs < 2:
        parser.error(f"--archs is {options.archs}; a median with its spread takes at least 2")
    known = {path.stem for path in SPACES.glob("*.toml")}
    unknown = sorted(set(options.spaces or ()) - known)
    if unknown:
        parser.error(f"no space {', '.join(unknown)} in search_spaces/; known: {', '.join(sorted(known))}")
    return BENCHMARK.run(options)


if __name__ == "__main__":
    sys.exit(main())
