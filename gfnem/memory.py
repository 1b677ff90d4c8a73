"""What the process does with memory that tensors no longer need."""

from __future__ import annotations

import ctypes
import platform

# glibc's names for what mallopt sets; -1 as a threshold means never.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER, _GROW_BY = -1, 64 * 2**20


def keep_freed_memory() -> bool:
    """Have the C library keep what tensors free on a CPU for those that come after them.

    glibc asks the system for pages of their own for every large tensor and hands them back with it,
    so that every step of training waits for the same pages to be cleared again: 5 to 20 % of its
    time where the grammar's rules see the parent. PyTorch has no setting for it.

    Returns whether there was something to set; other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _GROW_BY), (_MMAP_MAX, 0))
    return all([mallopt(*setting) for setting in settings])


TOO_MUCH = (
    "can't allocate memory",
    "out of memory",
    "Storage size calculation overflowed",
    "Overflow when unpacking",  # a size of more than 64 bits
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or PyTorch, on any device, asked for more memory than there is."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in TOO_MUCH)
