"""Memory of this process, and its growth during a call. No torch at import."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

MIB = 2**20


def resident(peak: bool) -> float:
    """Memory of this process in MiB: now, or the most it ever was."""
    if not peak and Path("/proc/self/statm").exists():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def peak_growth(work: Callable[[], object]) -> float:
    """By how many MiB this process grows at its peak, over what it held before `work()`.

    True only while the process has never held more than at the start: measure in a fresh one.
    """
    gc.collect()
    if sys.platform == "linux":  # what building a network freed must not look like memory in use
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    before = resident(peak=False)
    work()
    return resident(peak=True) - before
