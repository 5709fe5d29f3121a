"""Memory that was freed stays with the process, so that the next tensors need not ask for it again."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

MAPPED_FROM = 2**30
"""Bytes: blocks of at least so many still go back to the system when they are freed."""
GROWS_BY = 2**26
"""Bytes that are asked for at a time, at the least."""
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Numbers of glibc's mallopt(3)."""
_NEVER = -1
_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Makes this process keep what it frees; whether it does so.

    Without it glibc gives every block beyond some megabytes back as soon as a tensor is freed, and the system
    hands the next tensor empty pages, one fault for each 4 KiB: tens of thousands in a training step. The
    price is that the process holds the most that it ever needed until it ends.

    Elsewhere than on Linux with glibc, and where the user's environment says how glibc is to allocate,
    nothing changes.

    Args:
        environment: of the process.
    """
    if not sys.platform.startswith("linux") or any(name in environment for name in _OWN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    asked = {_MMAP_THRESHOLD: MAPPED_FROM, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: GROWS_BY}
    accepted = [mallopt(option, value) == 1 for option, value in asked.items()]
    return all(accepted)
