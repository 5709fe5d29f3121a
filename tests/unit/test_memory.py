"""Memory is kept where the C library can be told so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nestling.memory import keep_freed_memory

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_tensors_get_the_memory_of_those_before_them() -> None:
    assert faults("kept") < 100 < faults("as it is")


def test_what_the_user_says_of_memory_stands() -> None:
    assert not keep_freed_memory({"MALLOC_TRIM_THRESHOLD_": "1"})
    assert not keep_freed_memory({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
