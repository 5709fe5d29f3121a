"""Memory that was freed stays with the process, so that the next tensors need not ask for it again."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Mapping

MAPPED_FROM = (2**30, 2**25)
"""Bytes: blocks of at least so many still go back to the system when they are freed. glibc before 2.35 takes
the second at the most."""
GROWS_BY = 2**26
"""Bytes that are asked for at a time, at the least."""
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Numbers of glibc's mallopt(3)."""
_NEVER = -1
OWN = ("MALLOC_", "GLIBC_TUNABLES")
"""How the names begin by which a user tells glibc how to allocate."""


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Makes this process keep what it frees; whether it does so.

    Without it glibc gives every block beyond some megabytes back as soon as a tensor is freed, and the system
    hands the next tensor empty pages, one fault for each 4 KiB: tens of thousands in a training step. The
    price is that the process holds the most that it ever needed until it ends. So it is for programs, not for
    libraries: the whole process is changed.

    Elsewhere than on Linux with glibc, and where the user's environment says how glibc is to allocate (any
    MALLOC_..., or GLIBC_TUNABLES, be it empty), nothing changes.

    Args:
        environment: of the process.
    """
    if not sys.platform.startswith("linux") or any(name.startswith(OWN) for name in environment):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return keep_by(mallopt)


def keep_by(mallopt: Callable[[int, int], int]) -> bool:
    """Tells glibc's `mallopt` to keep what is freed; whether it does.

    Where it refuses every size from which blocks are mapped, nothing changes: each of the other two settings
    would end glibc's own adapting of that size, which begins with 128 KiB.

    Args:
        mallopt: option, value -> 1 if it was taken.
    """
    if not any(mallopt(_MMAP_THRESHOLD, size) == 1 for size in MAPPED_FROM):
        return False
    accepted = [mallopt(_TRIM_THRESHOLD, _NEVER), mallopt(_TOP_PAD, GROWS_BY)]
    return accepted == [1, 1]
