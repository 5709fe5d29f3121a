from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestling.quant import PRECISIONS, Format
from nestling.quant.formats import Code, Codebook, Minifloat, Powers, Ternary

CODES: dict[str, Code] = {
    name: precision.weight
    for name, precision in PRECISIONS.items()
    if precision.weight is not None and not isinstance(precision.weight, Format)
}


def weight_of(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.logspace(-3, 1, shape[0]).reshape(
        -1, *(1 for _ in shape[1:])
    )


@pytest.mark.parametrize(
    ("code", "dtype"),
    [("fp8", torch.float8_e4m3fn), ("fp8-e5m2", torch.float8_e5m2)],
)
def test_small_floats_are_those_of_torch(code: str, dtype: torch.dtype) -> None:
    minifloat = CODES[code]
    assert isinstance(minifloat, Minifloat)
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[every.isfinite()]
    assert float(every.max()) == minifloat.largest
    ordered = torch.tensor(sorted(set(every.tolist())))
    halfway = (ordered[1:] + ordered[:-1]) / 2
    numbers = torch.cat([ordered, halfway, 500 * torch.randn(999).clamp(-0.8, 0.8)])
    row = torch.cat([numbers, torch.tensor([minifloat.largest])])[None]  # its scale is 1
    assert torch.equal(minifloat.nearest(row, axis=0), row.to(dtype).float())


def test_floats_of_four_bits_are_the_standards() -> None:
    row = torch.tensor([[0.0, 0.2, 0.25, 0.3, 0.75, 1.2, 1.25, 1.75, 2.5, 3.5, 4.9, 5.0, 5.1, -6.0]])
    wanted = torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 4.0, 6.0, -6.0]])
    assert torch.equal(CODES["fp4"].nearest(row, axis=0), wanted)


@pytest.mark.parametrize(("scale", "gamma"), [("mean", 2.5), ("median", 1.0)])
def test_ternary_weights_are_rounded_to_their_typical_size(scale: str, gamma: float) -> None:
    weight = torch.tensor([[0.4, -1.0, 1.0], [0.6, -2.0, 10.0]])
    assert scale in ("mean", "median")
    code = Ternary("mean" if scale == "mean" else "median")
    assert torch.allclose(code.nearest(weight, axis=0), gamma * (weight / gamma).round().clamp(-1, 1))


def test_powers_without_curvature_are_uniform() -> None:
    row = torch.linspace(-7, 7, 141)[None]
    assert torch.allclose(
        Powers(4).nearest(torch.arange(-7.0, 8.0)[None], axis=0), torch.arange(-7.0, 8.0)[None]
    )
    assert len(set(Powers(4).nearest(row, axis=0)[0].tolist())) == 15


def test_powers_find_the_curvature_of_a_tensor() -> None:
    grid = (torch.arange(-7.0, 8.0) / 7).abs().pow(2) * torch.arange(-7.0, 8.0).sign()
    weight = torch.stack([grid, 3 * grid])  # the exponent is 1 / 2
    assert torch.allclose(Powers(4).nearest(weight, axis=0), weight, atol=1e-6)
    normal = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    uniform = normal.abs().amax(1, keepdim=True) / 7
    error = (Powers(4).nearest(normal, axis=0) - normal).square().sum()
    assert error < ((normal / uniform).round() * uniform - normal).square().sum()


def test_a_codebook_holds_what_lies_in_clusters() -> None:
    places = torch.tensor([-1.0, -0.2, -0.1, 0.0, 0.3, 0.31, 0.6, 0.9])
    noise = 1e-5 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight = places.repeat(4, 8) + noise
    assert float((Codebook(3).nearest(weight, axis=0) - weight).abs().max()) < 1e-4


def test_no_other_position_of_a_codebook_is_nearer() -> None:
    weight = weight_of(6, 40)
    found = Codebook(3).nearest(weight, axis=0)
    scale = weight.abs().amax(1, keepdim=True)
    codes = (found / scale).flatten().sort().values
    codes = codes[torch.cat([torch.tensor([True]), codes.diff() > 1e-6])]
    assert len(codes) == 8
    nearest = (weight[..., None] - codes * scale[..., None]).abs().amin(2)
    assert torch.allclose((found - weight).abs(), nearest, atol=1e-6)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (5, 1, 3, 3), (3, 37), (1, 1)])
def test_codes_keep_zero_signs_and_themselves(name: str, shape: tuple[int, ...]) -> None:
    code, weight = CODES[name], weight_of(*shape)
    weight[0] = 0 if shape[0] > 1 else weight[0]
    found = code.nearest(weight, axis=0)
    assert found.shape == weight.shape
    assert found.isfinite().all()
    if not isinstance(code, Codebook):  # its list need not hold zero
        assert (found[weight == 0] == 0).all()
        assert (found * weight >= 0).all()
    assert (code.nearest(torch.zeros(shape), axis=0) == 0).all()


@pytest.mark.parametrize("name", CODES)
def test_channels_may_lie_along_any_axis(name: str) -> None:
    weight = weight_of(6, 20)
    turned = CODES[name].nearest(weight.T.contiguous(), axis=1).T
    assert torch.allclose(CODES[name].nearest(weight, axis=0), turned, atol=1e-6)


@pytest.mark.parametrize("name", CODES)
def test_a_tensor_takes_no_more_codes_than_its_bits_tell(name: str) -> None:
    code = CODES[name]
    weight = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    found = set(code.nearest(weight, axis=0)[0].tolist())
    bits = {Ternary: 1.6, Powers: 4, Codebook: 4, Minifloat: 8}[type(code)]
    assert 2 < len(found) <= 2 ** (4 if name == "fp4" else bits)


@pytest.mark.parametrize("group", [0, 8, 48])
def test_groups_that_no_kernel_reads_are_refused(group: int) -> None:
    with pytest.raises(ValueError, match=f"groups of {group} weights"):
        Format(bits=4, signed=False, symmetric=False, per_channel=True, group=group)
