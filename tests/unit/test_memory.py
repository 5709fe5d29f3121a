"""Memory is kept where the C library can be told so."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from dataclasses import dataclass

import pytest

from nestling.memory import keep_by, keep_freed_memory

FAULTS = """
import resource, sys
import torch
from nestling.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory({})
layer = torch.nn.Conv2d(16, 16, 1)
images = torch.rand(8, 16, 128, 128)  # 8 MiB, as what the layer writes
def once():
    layer(layer(layer(images))).sum().backward()
for _ in range(10):
    once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    given = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # as at the start of every process: it adapts
    ran = subprocess.run([sys.executable, "-c", FAULTS, how], env=given, capture_output=True, check=True)
    return int(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not told")
def test_tensors_get_the_memory_of_those_before_them() -> None:
    # a few find no room between others at first: as many pages as they have
    assert 10 * faults("kept") < faults("as it is")


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_user_says_of_memory_stands(name: str) -> None:
    assert not keep_freed_memory({name: ""})


@dataclass
class Malloc:
    """glibc's mallopt, as far as it is asked here: any but a size that it takes ends its adapting of it."""

    largest: float
    """The largest size from which blocks are mapped that it takes: 32 MiB before glibc 2.35."""
    mapped_from: int = 128 * 2**10
    adapts: bool = True

    def mallopt(self, option: int, value: int) -> int:
        if option == -3:
            if value > self.largest:
                return 0
            self.mapped_from = value
        self.adapts = False
        return 1


@pytest.mark.parametrize(("largest", "mapped_from"), [(math.inf, 2**30), (2**25, 2**25)])
def test_blocks_are_mapped_from_the_largest_size_that_the_library_takes(
    largest: float, mapped_from: int
) -> None:
    malloc = Malloc(largest)
    assert keep_by(malloc.mallopt)
    assert malloc.mapped_from == mapped_from


def test_a_library_that_takes_no_such_size_goes_on_adapting_its_own() -> None:
    malloc = Malloc(2**19)
    assert not keep_by(malloc.mallopt)
    assert malloc.adapts
