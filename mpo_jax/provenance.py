"""A run and one of its stages enter; what the stage's manifest tells of where its artifact comes from leaves."""

import importlib.metadata
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import mpo_jax
from mpo_jax import settings
from mpo_jax.graph import Node
from mpo_jax.run import Run

PACKAGES = ("mpo_jax", "jax", "flax", "optax", "orbax-checkpoint")


def of_stage(config: Run, node: Node) -> dict[str, Any]:
    """The versions of packages, the command, the commit, and the settings that are not at their defaults."""
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "changed": _changed(config, node),
    }


def _changed(config: Run, node: Node) -> dict[str, Any]:
    """The settings of the run, and of the stage, that are not at their defaults."""
    run = {key: value for key, value in settings.differing(config).items() if key != "stages"}
    own = {key: value for key, value in settings.differing(node.settings).items() if key != "kind"}
    return {"run": run, "stage": own}


def _commit() -> str:
    """Of the clone that the package runs from, or the archive that a script has sent; "" of an installed package."""
    root = Path(mpo_jax.__file__).resolve().parent.parent
    if (root / "COMMIT").is_file():
        return (root / "COMMIT").read_text().strip()
    if not (root / ".git").exists():
        return ""
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str:
    """Of an installed package; this one may run from a clone that nothing installed."""
    try:
        return mpo_jax.__version__ if package == mpo_jax.__name__ else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
