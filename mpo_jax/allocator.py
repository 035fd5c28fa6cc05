"""A command on a Linux CPU enters; the same command leaves, begun again with malloc's blocks in huge pages and kept.

XLA on a CPU asks malloc for a program's temporaries anew at each call. By default glibc maps such blocks from the
system in pages of 4 KiB and gives them back, so that every step faults all of them in again.
"""

import os
import sys

SETTINGS = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
}
"""What glibc reads when a process begins, and mallopt(3) can't say in full: hence the new beginning."""


def restart() -> None:
    """Begins this process again under `SETTINGS`, once; to be called before anything heavy is imported.

    Does nothing but under glibc on Linux with JAX_PLATFORMS=cpu, nor where the environment sets malloc already.
    """
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if told or os.environ.get("JAX_PLATFORMS") != "cpu" or not _is_glibc():
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | SETTINGS)


def _is_glibc() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (OSError, ValueError):
        return False
