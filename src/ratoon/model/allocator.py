"""The C library's allocator, told to keep what it gets.

glibc gives every large block back to the kernel when it is freed, and the next one of that size costs page faults
again: in training these cost more than the arithmetic. Decides nothing at import; verbs that compute call it once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys

# Numbers of the settings, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLDS_BYTES = (2**31 - 1, 32 * 1024 * 1024)  # glibc before 2.35 refuses more than 32 MiB
_NEVER_TRIM = -1  # becomes the largest size there is
_TOP_PAD_BYTES = 64 * 1024 * 1024  # the heap grows in steps of this, so it grows seldom

_GROWTH = 1.25
"""Memory that was taken above what a step needs is given back at so many times that."""

_done: str | None = None


def tune_allocator() -> str:
    """Let glibc keep freed memory for the next tensor of that size; returns one sentence saying what was done.

    Does nothing on other systems, when another allocator is preloaded, or when called a second time in a process.
    Memory that was once used stays with the process. Never raises.
    """
    global _done
    if _done is None:
        _done = _tune()
    return _done


def release_freed() -> None:
    """Give memory that is freed by now back to the system once: weights as they were loaded, rows as they were read.

    Does nothing where there is no glibc. Never raises.
    """
    if sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


class Kept:
    """Sees to it that what the allocator keeps stays near to what a step needs.

    Blocks of many sizes that come and go leave holes which no later block fits, so that the process grows for hundreds
    of steps while it uses no more than in the first: training all parameters of a small model went from 2 GiB to 5.
    """

    def __init__(self) -> None:
        self.needed: int | None = None
        self._just_given = False

    def step(self, held_bytes: int) -> None:
        """Look at the memory held behind a step; all that is free is given back where it has grown. The step that
        follows says anew what is needed: the most that was seen so."""
        if self.needed is None or self._just_given:
            self.needed = max(self.needed or 0, held_bytes)
            self._just_given = False
        elif held_bytes > _GROWTH * self.needed:
            release_freed()
            self._just_given = True


def _tune() -> str:
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return "allocator left as it is: only glibc on Linux needs tuning"
    preloaded = os.environ.get("LD_PRELOAD", "")
    if any(name in preloaded for name in ("jemalloc", "tcmalloc", "mimalloc")):
        return f"allocator left as it is: {preloaded} is preloaded"
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return "allocator left as it is: mallopt cannot be reached"
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    mallopt.restype = ctypes.c_int
    threshold = next((size for size in _MMAP_THRESHOLDS_BYTES if mallopt(_M_MMAP_THRESHOLD, size) == 1), None)
    trimming_off = mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM) == 1
    padded = mallopt(_M_TOP_PAD, _TOP_PAD_BYTES) == 1
    if threshold is None or not trimming_off or not padded:
        return "allocator partly tuned: glibc refused a setting"
    return f"allocator tuned: glibc keeps freed blocks up to {threshold // 2**20} MiB"
