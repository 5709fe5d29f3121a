"""How the axes of a network's tensors are made of parts, where leading channels would mean something else.

A fused projection holds queries, keys and values one after the other: its leading third is the queries. Of a
smaller attention each of the three must be cut on its own, head by head (AutoFormer, Chen et al. 2021, arXiv
2107.00651, after whose subnets the query, key and value of fewer heads are those of the first heads).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence

from torch import Tensor, nn

from nestling.models.fused import Parts, is_made_of_parts, rows_of
from nestling.models.parts import (
    Blocks,
    FindLayout,
    Grid,
    Joined,
    Kept,
    Layout,
    Part,
    Uncuttable,
    leading,
)
from nestling.space import Arch

__all__ = [
    "Blocks", "FindLayout", "Grid", "Joined", "Kept", "Layout", "Part", "Uncuttable",
    "find_layout", "leading",
]  # fmt: skip

_POSITIONS = re.compile(r"(abs(olute)?_?)?pos(ition)?_emb\w*|(patch|pixel)_pos")
_MOST_PREFIXES = 16
"""A table has at most so many tokens before its grid; one with more is of something else."""
_CHANNELS_LAST = (
    "models.vision_transformer_sam.VisionTransformerSAM",
    "models.volo.VOLO",
    "models.naflexvit.NaFlexEmbeds",
)
_CHANNELS_FIRST = (
    "models.hiera.Hiera", "models.hieradet_sam2.HieraDet", "models.pit.PoolingVisionTransformer",
    "models.tnt.TNT", "models.visformer.Visformer",
)  # fmt: skip
_BIASES = {
    "attention_biases": (1,),
    "rel_pos_h": (0,),
    "rel_pos_w": (0,),
    "height_rel": (0,),
    "width_rel": (0,),
}
_TOKEN_MIXERS = {
    "models.mlp_mixer.MixerBlock": (
        "mlp_tokens.fc1.weight 1",
        "mlp_tokens.fc2.weight 0",
        "mlp_tokens.fc2.bias 0",
    ),
    "models.mlp_mixer.ResBlock": ("linear_tokens.weight 0", "linear_tokens.weight 1", "linear_tokens.bias 0"),
    "models.mlp_mixer.SpatialGatingUnit": ("proj.weight 0", "proj.weight 1", "proj.bias 0"),
}


def find_layout(network: nn.Module, arch: Arch) -> Layout:  # noqa: ARG001 a layout may depend on it
    """The layout of `network`, by the classes of its modules: timm's and torch's, and tables of positions.

    A projection that looks fused by its name, in a module of a class that is not known, may not be cut.
    """
    layout: Parts = {}
    for name, module in network.named_modules():
        kinds = _kinds(type(module))  # type: ignore[arg-type]  # a class is hashable
        if not kinds:
            continue
        dot = f"{name}." if name else ""
        layout |= {
            (dot + tensor, axis): part
            for (tensor, axis), part in (_tables(module, kinds) | rows_of(module, kinds)).items()
        }
    return layout | _shared(network, layout)


@functools.cache
def _kinds(of: type[nn.Module]) -> tuple[str, ...]:
    """The names of a class and those above it, timm's without `timm.`; none of a layer without parts."""
    kinds = tuple(f"{c.__module__}.{c.__qualname__}".removeprefix("timm.") for c in of.__mro__)
    return kinds if is_made_of_parts(kinds) else ()


def _shared(network: nn.Module, layout: Parts) -> Parts:
    """The parts of tensors that layers share, by the other names that they have."""
    names: dict[int, list[str]] = {}
    for name, tensor in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    others = {name: alike for alike in names.values() if len(alike) > 1 for name in alike}
    return {(other, axis): part for (name, axis), part in layout.items() for other in others.get(name, ())}


def _tables(module: nn.Module, kinds: Sequence[str]) -> Parts:
    """Tables of positions, absolute and relative, among the module's own parameters, and mixers of tokens."""
    fixed = Uncuttable("it has a value for each position, and another grid of positions needs other values")
    parts: Parts = {}
    for spot in next((_TOKEN_MIXERS[kind] for kind in kinds if kind in _TOKEN_MIXERS), ()):
        mixer, number = spot.split()
        parts[mixer, int(number)] = fixed
    for name, table in module._parameters.items():
        if table is None:
            continue
        if name == "relative_position_bias_table":  # (positions, heads), or (heads, rows, columns)
            parts |= {(name, axis): fixed for axis in ((0,) if table.ndim == 2 else (1, 2))}
        elif name in _BIASES:
            parts |= {(name, axis): fixed for axis in _BIASES[name]}
        elif _POSITIONS.fullmatch(name) and table.ndim == 4:
            parts |= _maps(name, table, kinds, fixed)
        elif _POSITIONS.fullmatch(name) and table.ndim in (2, 3):
            axis = table.ndim - 2
            grid = _grid(module, name, table.shape[axis])
            parts[name, axis] = fixed if grid is None else grid
    return parts


def _maps(name: str, table: Tensor, kinds: Sequence[str], fixed: Uncuttable) -> Parts:
    """A table with an axis for the rows and one for the columns: each is interpolated along itself."""
    if any(kind in _CHANNELS_LAST for kind in kinds):
        rows, columns, channels = 1, 2, 3
    elif any(kind in _CHANNELS_FIRST for kind in kinds):
        rows, columns, channels = 2, 3, 1
    else:
        return {(name, 1): fixed, (name, 2): fixed, (name, 3): Blocks((table.shape[3],))}
    spatial: Parts = {(name, axis): Grid(0, 1, table.shape[axis]) for axis in (rows, columns)}
    return spatial | {(name, channels): Blocks((table.shape[channels],))}


def _grid(module: nn.Module, name: str, positions: int) -> Grid | None:
    """The grid of a table of `positions`, found where the network makes its patches; None where it is not."""
    for child in ("patch_embed", "pixel_embed"):
        patches = module._modules.get(child)
        if isinstance(patches, nn.ModuleList):  # one for each table: pos_embed_0, pos_embed_1
            patches = patches[int(name[-1])] if name[-1].isdigit() and int(name[-1]) < len(patches) else None
        if patches is None:
            continue
        grid, count = vars(patches).get("grid_size"), vars(patches).get("num_patches")
        if not isinstance(grid, tuple):
            if not isinstance(count, int):
                continue
            grid = (math.isqrt(count), math.isqrt(count))
        rows, columns = grid
        if count in (None, rows * columns) and 0 <= positions - rows * columns < _MOST_PREFIXES:
            return Grid(positions - rows * columns, rows, columns)
    return None
