"""The allocator and the garbage collector, told what a training loop is: the same tensors, made and freed again."""

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator

__all__ = ["keep_freed_memory", "rare_garbage_collection"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next tensor, and return whether it will.

    By default it gives large blocks back to the system as soon as they are freed, and the next step faults the same
    pages in again: thousands of faults in a step of a small network on a CPU, a tenth of its time
    (``benchmarks/allocator.py``). The process holds on to its peak of memory instead. Settings that the user has made
    by ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_`` are left alone; other C libraries have no such call.
    """
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return False
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such library, no such function
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(_M_MMAP_THRESHOLD, 2**30))
    return False


@contextlib.contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Within the context, leave all objects made before alone, and look for cycles among new ones a hundredth as often.

    The libraries behind a training are half a million objects that stay; going through them again costs a step of a
    small network one percent of its time. Objects that the caller has frozen stay frozen afterwards.
    """
    thresholds, frozen = gc.get_threshold(), gc.get_freeze_count() > 0
    if not frozen:
        gc.collect()
        gc.freeze()
    gc.set_threshold(100 * thresholds[0], *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if not frozen:
            gc.unfreeze()
