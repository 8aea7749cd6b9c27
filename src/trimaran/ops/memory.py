"""What the C library does with memory that a program frees."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 1 << 30  # bytes: blocks up to this size, and this much free memory, stay with the process


def keep_freed_memory() -> bool:
    """Lets the process keep freed memory for its next allocations; True where the C library can (glibc).

    By default large blocks go back to the operating system when freed and come back as fresh pages, zeroed one by one:
    8-10 % of the CPU time of a small model's training step. A setting of the whole process, so programs make it
    (the verbs that train, the benchmarks), never the library by itself.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST))
