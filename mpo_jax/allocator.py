"""A process on a Linux CPU enters; it leaves with its large blocks of memory kept for reuse, in huge pages.

XLA on a CPU asks malloc for all temporaries of a program anew at each call. By default glibc maps such blocks from the
system and gives them back, so each step faults every page in again: a fifth of a train step's time.
"""

import ctypes
import os
import sys

import jax

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)
_HUGE_PAGES = 14  # MADV_HUGEPAGE of madvise(2)
_NEVER = -1
_PAGE = 4096


def keep_memory(huge_pages: int = 8 << 30) -> bool:
    """Lets malloc keep what is freed, and back the first `huge_pages` bytes of it with huge pages.

    For command lines, once JAX may choose its backend. Memory that was never touched is not taken. Returns whether
    anything was done: not on accelerators, nor without glibc, nor where the environment sets malloc already.
    """
    told = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if told or not sys.platform.startswith("linux") or jax.default_backend() != "cpu":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    kept = bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, _NEVER))
    if kept and huge_pages:
        _advise(libc, huge_pages)
    return kept


def _advise(libc: ctypes.CDLL, size: int) -> None:
    """One block of the heap, advised and freed untouched: the heap keeps its range and the advice."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:
        return
    first = -(-block // _PAGE) * _PAGE
    libc.madvise(first, size - _PAGE, _HUGE_PAGES)
    libc.free(block)
