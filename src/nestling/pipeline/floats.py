"""A network in floats, with what all its quantization policies share; those used last are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property

from torch import Tensor, nn

from nestling.models.cost import Cost, cost
from nestling.models.graph import Graph, Untraceable, trace
from nestling.pipeline.policies import is_precision
from nestling.quant.statistics import Statistics
from nestling.space import Arch

KEPT = 4
"""Networks: each holds its weights twice, as a network and as a graph, and histograms."""


class FloatNetwork:
    """A recalibrated network on the CPU, and what was found out about it, once.

    Nothing here depends on a policy, or on what was asked before.

    Args:
        network: in evaluation mode; not to be changed from now on.
        resolution: of its images, in pixels.
        image: (1, 3, R, R), one that it was made for.
        graph: in place of the one that tracing gives.
        counted: in place of what counting gives.

    Attributes:
        statistics: what its tensors held on the calibration images, as far as policies have asked.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        resolution: int,
        image: Tensor,
        graph: Graph | None = None,
        counted: Cost | None = None,
    ) -> None:
        self.network = network
        self._graph, self._counted = graph, counted
        self.resolution = resolution
        self.statistics: Statistics | None = None
        self._image = image

    @cached_property
    def cost(self) -> Cost:
        """What an image costs."""
        return self._counted or cost(self.network, self.resolution)

    @cached_property
    def traced(self) -> Graph | Untraceable:
        """The network as a graph, or why it cannot be one."""
        if self._graph is not None:
            return self._graph
        try:
            return trace(self.network, resolution=self.resolution, image=self._image)
        except Untraceable as error:
            return error.with_traceback(None)  # its frames hold what was traced so far

    def changed(self, *, graph: Graph, counted: Cost) -> FloatNetwork:
        """The same network, of which another graph that computes the same is to be written."""
        return FloatNetwork(
            self.network, resolution=self.resolution, image=self._image, graph=graph, counted=counted
        )


class FloatNetworks:
    """The networks that were used last, by their archs without precisions."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Arch, FloatNetwork] = OrderedDict()

    def get(self, arch: Arch, make: Callable[[], FloatNetwork]) -> FloatNetwork:
        """The float network of `arch`, whatever its precisions: one that is kept, or what `make` gives."""
        bare = Arch(tuple((name, value) for name, value in arch.decisions if not is_precision(name)))
        found = self._kept.get(bare)
        if found is None:
            found = self._kept[bare] = make()
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(bare)
        return found

    def clear(self) -> None:
        """Forgets them all."""
        self._kept.clear()
