"""A command enters; it leaves with what memory needs before JAX begins: on a GPU its share of the card, on a Linux CPU
begun again with malloc's blocks in huge pages and kept.

XLA on a CPU asks malloc for a program's temporaries anew at each call. By default glibc maps such blocks from the
system in pages of 4 KiB and gives them back, so that every step faults all of them in again. On a GPU, XLA takes one
block when it begins: of three quarters of the card, unless it is told otherwise.
"""

import os
import shutil
import subprocess
import sys

from mpo_jax.errors import InputError

GPU_SHARE = 0.92
"""Of a card's memory that XLA takes when a command begins, unless the environment says another. The rest is for CUDA's
own context, cuDNN and cuBLAS."""
_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
FRACTIONS = (_FRACTION, "XLA_CLIENT_MEM_FRACTION")  # the old name and the new; XLA refuses both at once

SETTINGS = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
}
"""What glibc reads when a process begins, and mallopt(3) can't say in full: hence the new beginning."""


def restart() -> None:
    """Begins this process again under `SETTINGS`, once; to be called before anything heavy is imported.

    Only under glibc on Linux with JAX_PLATFORMS=cpu, and not where the environment sets malloc already; elsewhere a
    GPU's share is set, where the environment says none.
    """
    if not any(os.environ.get(name) for name in FRACTIONS):
        os.environ[_FRACTION] = str(GPU_SHARE)
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


def check_card() -> None:
    """InputError where other processes hold so much of a visible GPU that this process's share of it isn't free.

    To be called before JAX begins, which would fail with CUDA's words, some of them long after. Says nothing where
    there is no nvidia-smi, or JAX is told of another platform or not to take its share beforehand. InputError too for
    a share that XLA would refuse.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return
    share = read_share()
    if os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") in ("false", "False", "0"):  # XLA takes no other word for it
        return
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() == "platform":
        return
    for name, total, free in _cards():
        if share * total <= free:
            continue
        fits = int(100 * free / max(total, 1)) - 2
        remedy = f" or set {_FRACTION}=0.{fits:02d}" if fits >= 5 else ""
        raise InputError(
            f"{name}: {free / 1024:.1f} of {total / 1024:.1f} GiB are free, and this process would take "
            f"{share * total / 1024:.1f}; another process holds the rest (nvidia-smi names it). End that one, choose "
            f"another card with CUDA_VISIBLE_DEVICES,{remedy or ' or wait'}"
        )


def read_share() -> float:
    """Of a card, as the environment says. InputError for what is no share, and for two names of one."""
    if all(os.environ.get(name) for name in FRACTIONS):
        raise InputError(f"{' and '.join(FRACTIONS)} are both set; they are two names of one setting, unset one")
    name = next((name for name in FRACTIONS if os.environ.get(name)), "")
    try:
        share = float(os.environ[name]) if name else GPU_SHARE
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"{name}: {os.environ[name]!r}; expected a number above 0 and up to 1")
    return share


def environment(share: float) -> dict[str, str]:
    """This process's environment for another one, with a share of the card under one name alone."""
    return {name: value for name, value in os.environ.items() if name not in FRACTIONS} | {_FRACTION: str(share)}


def _cards() -> list[tuple[str, float, float]]:
    """Name, memory and free memory in MiB of each visible GPU; none where nvidia-smi is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if visible is None else [each.strip() for each in visible.split(",")]
    found = []
    for line in told.split("\n"):
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 5 or (wanted is not None and not any(_names(each, cells[0], cells[1]) for each in wanted)):
            continue
        if cells[3].isdigit() and cells[4].isdigit():  # "[N/A]" on cards that share the system's memory
            found.append((f"GPU {cells[0]} ({cells[2]})", float(cells[3]), float(cells[4])))
    return found


def _names(word: str, index: str, uuid: str) -> bool:
    """Whether a word of CUDA_VISIBLE_DEVICES means a card: its index, its UUID or how that begins."""
    return word == index or (word.startswith("GPU-") and uuid.startswith(word))
