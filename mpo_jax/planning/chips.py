"""The name of a topology enters (v5e:4x8, 2xv5e:4x8, gpu:8x80GB, cpu); its devices and what one of them can do leave.

A TPU topology is described by its compiler, libtpu, on a machine without a TPU. Numbers of chips: cloud.google.com/tpu
/docs (system architecture) and NVIDIA's data sheets.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re

import jax

from mpo_jax import allocator, sharding
from mpo_jax.errors import InputError

GIB = 1 << 30

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing here holds a chip, so several may compile at once
    "JAX_PLATFORMS": "cpu",
}
"""What libtpu must find in the environment before it is loaded, to compile without a TPU."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. memory: bytes that a program may use. flops: peak, bfloat16, a second. bandwidth: of its memory,
    bytes a second. links: bytes a second to all other chips together, in one direction. network: bytes a second of one
    chip to other slices; 0 where there are none. capability: a GPU's compute capability."""

    name: str
    memory: int
    flops: float
    bandwidth: float
    links: float
    network: float = 0.0
    capability: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Topology:
    """devices: to compile for; compiled: by that hardware's own compiler, so that its memory figures are the truth."""

    name: str
    chip: Chip
    devices: tuple
    compiled: bool

    @property
    def size(self) -> int:
        return len(self.devices)

    @property
    def slices(self) -> int:
        return sharding.slices(self.devices)


# Usable memory is what XLA leaves of the chip's: it keeps some for itself, as "Used 17G of 15.75G hbm" tells. The
# network between slices: a pod's published figure by its chips (v5e, v6e); v3 and v4 taken as v5e, v5p as twice that.
TPUS = {
    "v3": Chip("TPU v3 core", int(15.75 * GIB), 61.5e12, 450e9, 82e9, 3.125e9),
    "v4": Chip("TPU v4", int(31.25 * GIB), 275e12, 1228e9, 150e9, 3.125e9),
    "v5e": Chip("TPU v5e", int(15.75 * GIB), 197e12, 819e9, 100e9, 3.125e9),
    "v5p": Chip("TPU v5p", int(95.0 * GIB) - GIB // 4, 459e12, 2765e9, 300e9, 6.25e9),
    "v6e": Chip("TPU v6e", int(31.25 * GIB), 918e12, 1640e9, 200e9, 12.5e9),
}
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
SLICES = {"v3": ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16"), "v4": _CUBES, "v5e": ("1x1", *_FLAT),
          "v5p": _CUBES, "v6e": ("1x1", *_FLAT)}  # fmt: skip

MOST_GPUS = 1024
"""Of one topology: each is laid out as a device of this machine's CPU."""


def _share(mib: int) -> int:
    """What a command takes of a card of so many MiB, as nvidia-smi tells them."""
    return int(allocator.GPU_SHARE * mib * (1 << 20))


GPUS = {
    16: Chip("GPU 16 GB (A2)", _share(15_356), 18e12, 200e9, 16e9, capability=(8, 6)),
    24: Chip("GPU 24 GB (L4)", _share(23_034), 121e12, 300e9, 16e9, capability=(8, 9)),
    40: Chip("GPU 40 GB (A100)", _share(40_960), 312e12, 1555e9, 300e9, capability=(8, 0)),
    48: Chip("GPU 48 GB (L40S)", _share(46_068), 362e12, 864e9, 32e9, capability=(8, 9)),
    80: Chip("GPU 80 GB (H100)", _share(81_559), 989e12, 3350e9, 450e9, capability=(9, 0)),
    141: Chip("GPU 141 GB (H200)", _share(143_771), 989e12, 4800e9, 450e9, capability=(9, 0)),
}


def prepare() -> None:
    """Sets the environment for compiling without a TPU; to be called before any device is asked for."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def topology(name: str) -> Topology:
    """The topology of a name. InputError, listing what would work, for one that does not exist."""
    if name == "cpu":
        return Topology(name, _this_machine(), tuple(jax.devices("cpu")), compiled=True)
    if name.lower().startswith("gpu"):
        count, chip = gpu(name)
        devices = tuple(jax.devices("cpu"))
        if len(devices) < count:
            raise InputError(f"--topology: {name} needs {count} devices to lay out arrays on; found {len(devices)}")
        return Topology(name, chip, devices[:count], compiled=False)
    count, version, layout = _tpu(name)
    if version not in TPUS or not count:
        raise InputError(f"--topology: unknown {name!r}; {known(name)}")
    if layout not in SLICES[version]:
        slices = ", ".join(SLICES[version])
        raise InputError(f"--topology: no slice {layout!r} of {version}; expected {version}: and one of {slices}")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology: {name} is compiled by libtpu, which is not installed; run `pip install 'jax[tpu]'`, or take "
            "cpu, or gpu:80GB (by arithmetic)"
        )
    from jax.experimental import topologies

    options: dict = {"chip_config_name": "megacore"} if version == "v4" else {}  # one device a chip, as jobs see it
    if layout == "1x1":
        options["chips_per_host_bounds"] = [1, 1, 1]
    if count > 1:
        options["num_slices"] = count
    described = topologies.get_topology_desc(platform="tpu", topology_name=f"{version}:{layout}", **options)
    return Topology(name, TPUS[version], tuple(described.devices), compiled=True)


def _tpu(name: str) -> tuple[int, str, str]:
    """How many slices, of which chip and which layout: "v5e:4x8" or "2xv5e:4x8"; 0 where the name has neither form."""
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(v\w+):(.*)", name)
    return (int(found[1] or 1), found[2], found[3]) if found else (0, "", "")


def gpu(name: str) -> tuple[int, Chip]:
    """How many, and which: "gpu:80GB" or "gpu:8x80GB"."""
    found = re.fullmatch(r"gpu:(?:(\d+)x)?(\d+)GB", name)
    if found is None or int(found.group(2)) not in GPUS or not 1 <= int(found.group(1) or 1) <= MOST_GPUS:
        sizes = ", ".join(f"gpu:{size}GB" for size in GPUS)
        raise InputError(f"--topology: unknown {name!r}; expected {sizes}, or up to {MOST_GPUS} of one as gpu:8x80GB")
    return int(found.group(1) or 1), GPUS[int(found.group(2))]


def known(name: str) -> str:
    """What would work, the nearest first."""
    names = [f"{version}:{layout}" for version, layouts in SLICES.items() for layout in layouts]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    every = "; ".join(f"{version}: {' '.join(layouts)}" for version, layouts in SLICES.items())
    return f"{hint}expected {every}; several slices as 2xv5e:4x8; cpu; gpu:80GB or gpu:8x80GB"


def larger(topology: Topology) -> list[str]:
    """Larger slices of the same chips, as many as now."""
    count, version, _ = _tpu(topology.name)
    several = f"{count}x" if count > 1 else ""
    return [
        f"{several}{version}:{layout}" for layout in SLICES.get(version, ()) if _chips(layout) * count > topology.size
    ]


def _chips(layout: str) -> int:
    return math.prod(int(side) for side in layout.split("x"))


def _this_machine() -> Chip:
    """Memory as the system tells; speeds are a core's order of magnitude, to be taken as no more."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Chip("this machine's CPU", memory, 100e9, 20e9, 10e9)
