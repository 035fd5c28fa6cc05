"""Takes a program and abstract arguments; gives what XLA's TPU compiler makes of it, on a machine without a TPU.

libtpu compiles for a described topology. It reads its settings from the environment once, hence a process of its own:
`compile_for_tpu(source)` runs Python source in which `mesh(data, fsdp, tensor)` and `compiled(function, *arguments)`
are defined, and returns what that source leaves in the dict `report` (JSON).
"""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
_TOPOLOGY = "v5e:2x4"
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing here holds a chip, so several may compile at once
    "JAX_PLATFORMS": "cpu",
}
_PRELUDE = f"""
import json
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from mpo_jax import sharding

report = {{}}

def mesh(data=1, fsdp=1, tensor=1):
    devices = topologies.get_topology_desc(platform="tpu", topology_name="{_TOPOLOGY}").devices
    return sharding.make_mesh(data, fsdp, tensor, devices=devices[: data * fsdp * tensor])

def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()

"""


def compile_for_tpu(source: str, timeout: float = 600) -> dict[str, Any]:
    """Runs `source` after the prelude above; its `report`. AssertionError with the error's end where it fails.

    Compile under `with jax.set_mesh(mesh(...)):` and give arguments as jax.ShapeDtypeStruct with shardings. Without
    libtpu the test is skipped; in CI it fails.
    """
    if importlib.util.find_spec("libtpu") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("libtpu, the TPU compiler, is not installed")
    program = _PRELUDE + textwrap.dedent(source) + "\nprint('\\n' + json.dumps(report))\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **_ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
