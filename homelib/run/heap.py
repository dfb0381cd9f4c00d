"""Freed memory stays with a process that trains on a CPU, for the next step's tensors.

glibc gives large blocks back to the system as soon as they are free, and the next step has every page of them zeroed and mapped anew: about a tenth of a
step. mallopt(3) changes that within the process. The caller's own environment variables (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_) go before.
"""

import ctypes
import os
import sys

SETTINGS = {"MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1), "MALLOC_MMAP_THRESHOLD_": (-3, 2**30)}  # name: M_ number of <malloc.h>, bytes


def keep_freed_memory() -> list[str]:
    """The settings that were made, by the names of their environment variables: those that the caller has not made, under Linux with glibc."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return []
    return [name for name, (parameter, value) in SETTINGS.items() if name not in os.environ and libc.mallopt(parameter, value)]
