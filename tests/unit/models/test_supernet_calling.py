from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nestling.models.compiling import Call, call_lent
from nestling.models.mobilenet import build
from nestling.models.supernet import Supernet
from nestling.space import Arch


def test_an_arch_without_a_call_of_its_own_computes_as_ever(
    supernet: Supernet, archs: list[Arch], images: Tensor
) -> None:
    other = Supernet(supernet.space, build, largest=supernet.largest, calling=lambda _: None)
    for arch in archs[:2]:
        assert torch.equal(other(images, arch), supernet(images, arch))


def test_a_call_of_an_arch_s_own_is_asked_for_once_and_used(
    supernet: Supernet, archs: list[Arch], images: Tensor
) -> None:
    asked: list[Arch] = []

    def doubled(network: nn.Module, lent: Mapping[str, Tensor], images: Tensor) -> Tensor:
        return 2 * call_lent(network, lent, images)

    def calling(arch: Arch) -> Call | None:
        asked.append(arch)
        return doubled if arch == archs[0] else None

    other = Supernet(supernet.space, build, largest=supernet.largest, calling=calling)
    for _ in range(2):
        assert torch.equal(other(images, archs[0]), 2 * supernet(images, archs[0]))
        assert torch.equal(other(images, archs[1]), supernet(images, archs[1]))
    assert sorted(asked.count(arch) for arch in archs[:2]) == [1, 1]
