"""A run that is about to begin enters; what it will do, on what, and where its report will lie leaves."""

import textwrap
from collections.abc import Sequence

import jax
from etils import epath

from mpo_jax import artifacts, eta, sharding
from mpo_jax.eta import Eta
from mpo_jax.models.config import compute_dtype
from mpo_jax.run import Run, mesh_of

_WIDTH = 80


def of_run(config: Run, workdir: epath.Path, mesh: jax.sharding.Mesh, done: Sequence[str], to_do: Sequence[str],
           left: Eta) -> str:  # fmt: skip
    """Lines of 80 columns, where names allow. done, to_do: stages, in order. left: of the latter."""
    where = f"{eta.devices(mesh)}{_memory(mesh)}, mesh {_axes(mesh)}"
    if jax.process_count() > 1:
        where += f", {jax.process_count()} processes"
    lines = [f"run {config.name} in {workdir}", *_wrapped("devices", where)]
    own = {name: mesh_of(config, stage) for name, stage in config.stages.items() if name in to_do}
    told = [
        f"{name}: {_axes(sharding.divided(mesh, sizes))}" for name, sizes in own.items() if sizes != dict(config.mesh)
    ]
    lines += _wrapped("meshes", "; ".join(told)) if told else []
    lines += _wrapped("numbers", _numbers(config, mesh))
    lines += _wrapped("to do", ", ".join(to_do) or "nothing")
    lines += _wrapped("done", ", ".join(done)) if done else []
    lines += _wrapped("ETA", str(left)) if to_do else []
    return "\n".join([*lines, f"  report   {workdir / artifacts.REPORT_PAGE}"])


def _axes(mesh: jax.sharding.Mesh) -> str:
    return ", ".join(f"{name} {size}" for name, size in mesh.shape.items())


def _numbers(config: Run, mesh: jax.sharding.Mesh) -> str:
    """The dtype of computation, and why where `auto` has chosen it on a CPU."""
    platform = mesh.devices.flat[0].platform
    dtype = compute_dtype(config.model.dtype, platform)
    told = {"mixed": "mixed: products of bfloat16, sums in float32"}.get(dtype, dtype)
    if config.model.dtype != "auto" or platform != "cpu":
        return told
    found, other = ("", "float32") if dtype == "mixed" else ("no ", "mixed")
    return f"{told}, because XLA finds {found}AVX512-BF16 on this CPU; model.dtype={other} chooses the other"


def _wrapped(name: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, _WIDTH - 11, break_long_words=False, break_on_hyphens=False)
    return [f"  {name if place == 0 else '':9}{line}" for place, line in enumerate(lines)]


def _memory(mesh: jax.sharding.Mesh) -> str:
    """Of a device, where it is known: a CPU does not say."""
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    stats = local[0].memory_stats() if local else None
    limit = (stats or {}).get("bytes_limit")
    return f" of {limit / 1e9:.1f} GB each" if limit else ""
