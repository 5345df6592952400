"""What malloc keeps of memory that was freed, in a process whose memory is bounded.

glibc keeps a heap for every few threads, and in each of them, once something large was freed, up to
twice as much: the four members of a fused model (ResNet-50, SqueezeNet, DenseNet-121, Inception v2)
had 8 MiB of freed memory in theirs, which no budget counted.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h."""
_KEPT_BYTES = 128 << 10
"""What glibc begins with: blocks as large are given back when they are freed, a heap's free end
when it is longer. It raises both by what it sees, unless it is told."""


def keep_little() -> None:
    """From now on one heap for all threads, that keeps little of what is freed.

    Another C library than glibc has settings of its own; then nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
