"""A GPU (or, for a proof of the check itself, a CPU) enters; OUT/gpu.json and OUT/gpu.md leave.

`python -m run_scripts.gpu.check OUT [--only=numbers,whole,speed] [--platform=cpu]`, as run_scripts/gpu_check.sh starts
it. Each part is a process of its own, so that the memory it holds ends with it, and a part that dies is a failure told.
On a GPU, numbers and whole run side by side: nearly all of their time is compiling, on the host.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mpo_jax import allocator
from mpo_jax.errors import InputError
from run_scripts.gpu import report

ROOT = Path(__file__).resolve().parent.parent.parent
PARTS = ("numbers", "whole", "speed")
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12",
             "flax", "optax", "orbax-checkpoint", "transformers", "torch", "numpy")  # fmt: skip
_SECONDS = {"numbers": 400, "whole": 400, "speed": 1800}  # a part that takes longer hangs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--cases", default="", help="of the part speed: these alone, by name")
    parser.add_argument("--seconds", type=int, default=240, help="of the part speed: later no case begins")
    parser.add_argument("--no-torch", action="store_true", help="of the part speed: without torch beside it")
    given = parser.parse_args()
    only = given.only.split(",")
    for name in only:
        if name not in PARTS:
            parser.error(f"--only={name}: expected some of {', '.join(PARTS)}")
    try:
        allocator.read_share()
    except InputError as error:
        sys.exit(f"error: {error}")
    if "numbers" in only and importlib.util.find_spec("pytest") is None:
        sys.exit("error: the part numbers needs pytest; run `pip install pytest`, or choose other parts by --only")
    if given.platform == "gpu":
        check_gpu()
    given.out.mkdir(parents=True, exist_ok=True)
    extra = [f"--cases={given.cases}", f"--seconds={given.seconds}", *["--no-torch"] * given.no_torch]
    begun: list[subprocess.Popen] = []
    with concurrent.futures.ThreadPoolExecutor(2 if given.platform == "gpu" else 1) as pool:
        try:
            others = [name for name in only if name != "speed"]
            list(pool.map(lambda name: run_part(name, given.out, given.platform, begun=begun), others))
        except KeyboardInterrupt:  # which the parts, being groups of their own, do not hear
            pool.shutdown(wait=False, cancel_futures=True)
            for process in begun:
                _stop(process)
            raise
    if "speed" in only:
        run_part("speed", given.out, given.platform, extra)
    return finish(given.out, describe(given.platform))


def check_gpu() -> None:
    """Ends with a line where JAX finds no GPU: told of cuda and cpu, it would say nothing and take the CPU."""
    command = [sys.executable, "-c", "import jax; print(jax.devices()[0].platform)"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment("gpu", "numbers"))
    if done.stdout.strip() != "gpu":
        why = ([line for line in done.stderr.split("\n") if line.strip()] or ["no card is visible"])[-1].strip()
        sys.exit(f"error: JAX finds no NVIDIA GPU here ({why}); --platform=cpu tests the check itself on a CPU")


def run_part(
    name: str, out: Path, where: str, extra: Sequence[str] = (), begun: list[subprocess.Popen] | None = None
) -> None:
    """Runs a part; what it finds lies in out/name.json, also where it dies. begun: gets its process."""
    path = out / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"run_scripts.gpu.{name}", f"--out={path}", f"--platform={where}", *extra]
    # A group of its own: a part that is stopped leaves none of its processes on the card, which the next part wants.
    process = subprocess.Popen(command, cwd=ROOT, env=environment(where, name), start_new_session=True)
    if begun is not None:
        begun.append(process)
    try:
        words = f"the process ended with status {process.wait(_SECONDS[name])}"
    except subprocess.TimeoutExpired:
        words = f"stopped after {_SECONDS[name]} seconds"
    finally:
        _stop(process)
    found = json.loads(path.read_text()) if path.exists() else {"part": name, "done": False, "seconds": 0.0, "rows": []}
    if not found["done"]:
        row = {"name": "the part itself", "value": words, "unit": "", "bound": "comes to its end", "ok": False}
        found["rows"].append(row | {"note": ""})
        path.write_text(json.dumps(found, indent=1))


def _stop(process: subprocess.Popen) -> None:
    """Ends a part with all that it has begun."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(out: Path, machine: dict[str, str]) -> int:
    """Writes both files from the parts that lie in `out`, those of earlier calls too; the exit status."""
    paths = [out / f"{name}.json" for name in PARTS]
    parts = {path.stem: json.loads(path.read_text()) for path in paths if path.exists()}
    (out / "gpu.json").write_text(json.dumps({"machine": machine, "parts": parts}, indent=1))
    (out / "gpu.md").write_text(report.markdown(machine, parts))
    print(f"{report.verdict(parts)}; the table is in {out / 'gpu.md'}")
    return 1 if report.failures(parts) or not parts else 0


def environment(where: str, name: str) -> dict[str, str]:
    """Of a part: JAX's platform, with the CPU beside a GPU, to be compared with; nothing asks a network. Of the card,
    speed takes what a run takes, and the others leave room for each other and for torch."""
    share = allocator.read_share() if name == "speed" else min(0.3, allocator.read_share())
    set_here = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    set_here["JAX_PLATFORMS"] = "cpu" if where == "cpu" else "cuda,cpu"
    return allocator.environment(share) | set_here


def describe(where: str) -> dict[str, str]:
    """Date, card, driver and versions, as words."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "card": "none: run on a CPU, to prove the check itself" if where == "cpu" else _card(),
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return found


def _card() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    try:
        told = subprocess.run(
            [*asked, *(["-i", visible] if visible else [])], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown (nvidia-smi fails)"
    cells = [cell.strip() for cell in told.split("\n")[0].split(",")]
    return f"{cells[0]}, {cells[1]}, driver {cells[2]}" if len(cells) == 3 else "unknown (nvidia-smi tells of no card)"


if __name__ == "__main__":
    sys.exit(main())
