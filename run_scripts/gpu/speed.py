"""The benchmarks' steps enter, at the shapes of a GPU; seconds, shares of the card's peak and memory leave.

Each case is run_scripts/bench.py in a process of its own, so that its peak of memory is its own; where torch and
transformers are installed, the same work as a good loop of one's own does it stands beside.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from run_scripts.benchmarks.programs import KV_HEADS, SHAPES, VOCABULARIES, VOCABULARY
from run_scripts.gpu.result import Part

ROOT = Path(__file__).resolve().parent.parent.parent
GIB = 1 << 30
ASKED = {"share": 0.45, "over torch": 1.5, "decode": 0.5, "plan": 0.1}


@dataclasses.dataclass(frozen=True)
class Timed:
    """One case. extra: further flags of bench.py. goals: whether what the project asks of itself is asked here.
    peer_of: the case that torch's own loop stands beside, or "". gib: of memory that it needs, as far as is known."""

    name: str
    what: str
    shape: str
    rows: int
    prompt: int
    response: int
    extra: tuple[str, ...] = ()
    goals: bool = False
    peer_of: str = ""
    gib: float = 0.0

    @property
    def rank(self) -> int:
        return next((int(flag.split("=")[1]) for flag in self.extra if flag.startswith("--rank=")), 0)


def _torch(case: Timed) -> Timed:
    return dataclasses.replace(case, name=f"{case.name}, torch", peer_of=case.name)


def _small(shape: str) -> list[Timed]:
    rows = {"dpo": 16, "reward": 16, "sample": 32, "ppo": 16}
    return [Timed(f"{what} {shape}", what, shape, count, 64, 64) for what, count in rows.items()]


_DPO = Timed("dpo 1B", "dpo", "1B", 8, 512, 512, goals=True, gib=42)
_SAMPLE = Timed("sample 1B", "sample", "1B", 64, 512, 512, goals=True)
_REWARD = Timed("reward 1B", "reward", "1B", 8, 512, 512)
GPU = [  # the order counts: what comes last is left out first
    _DPO,
    _SAMPLE,
    dataclasses.replace(_DPO, name="dpo 1B LoRA", extra=("--rank=16",), goals=False, gib=16),
    _REWARD,
    Timed("ppo 1B", "ppo", "1B", 8, 512, 512, ("--remat=full",)),
    _torch(_DPO),
    _torch(_SAMPLE),
    _torch(_REWARD),
    dataclasses.replace(_DPO, name="dpo 1B xla", extra=("--attention=xla",), goals=False),
    *_small("S"),
    *_small("M"),
]
_TINY = [Timed(f"{what} XS", what, "XS", 2, 8, 8) for what in ("dpo", "sample", "reward")]
CPU = [
    *_TINY,
    Timed("dpo XS LoRA", "dpo", "XS", 2, 8, 8, ("--rank=4",)),
    Timed("ppo XS", "ppo", "XS", 2, 8, 8, ("--remat=full",)),
    *map(_torch, _TINY),
]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--platform", required=True)
    parser.add_argument("--cases", default="")
    parser.add_argument("--seconds", type=int, default=240)
    parser.add_argument("--no-torch", action="store_true")
    given = parser.parse_args()
    cases = CPU if given.platform == "cpu" else GPU
    # A name such as "dpo 1B, torch" holds a comma.
    wanted = [name.strip() for name in re.split(r",(?!\s*torch)", given.cases) if name.strip()]
    if unknown := set(wanted) - {case.name for case in cases}:
        parser.error(f"--cases: no {', '.join(sorted(unknown))}; expected some of {'; '.join(c.name for c in cases)}")
    part = Part("speed", given.out)
    folder = given.out.parent / "speed"
    folder.mkdir(exist_ok=True)
    began = time.perf_counter()
    peaks: dict[str, float] = {}
    with part.each("peaks"):
        peaks = run([sys.executable, "-m", "run_scripts.gpu.peaks"], folder / "peaks.json")
        note = f"a product of {peaks['side']} x {peaks['side']} matrices"
        part.told("peak: bfloat16 products", peaks["flops"] / 1e12, "TFLOP/s", note)
        note = f"a copy of {peaks['bytes'] / GIB:.3g} GiB, read and written"
        part.told("peak: memory", peaks["bandwidth"] / 1e9, "GB/s", note)
    peers = ("torch", "transformers")
    with_torch = not given.no_torch and all(importlib.util.find_spec(each) for each in peers)
    if with_torch and given.platform == "gpu" and not torch_sees_card():
        part.told("torch", "not run", note="the torch that is installed sees no card")
        with_torch = False
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        if (wanted and case.name not in wanted) or (case.peer_of and not with_torch):
            continue
        if time.perf_counter() - began > given.seconds:
            note = f"the part's {given.seconds} seconds were over; --seconds says another number"
            part.told(case.name, "not run", note=note)
            continue
        if case.gib * GIB > peaks.get("limit", math.inf):
            part.told(case.name, "not run", note=f"it needs {case.gib:g} GiB")
            continue
        with part.each(case.name):
            if case.peer_of:
                peer(part, case, found.get(case.peer_of), folder)
            else:
                found[case.name] = bench(case, folder)
                tell(part, case, found[case.name], peaks)
    return part.finish()


def torch_sees_card() -> bool:
    """Asked in a process of its own: CUDA begun here would stay."""
    command = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(command, capture_output=True).returncode == 0


def bench(case: Timed, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "run_scripts/bench.py", f"--what={case.what}", f"--shape={case.shape}", "--dtype=auto"]
    command += [f"--rows={case.rows}", f"--prompt={case.prompt}", f"--response={case.response}", *case.extra]
    return run([*command, "--runs=3"], folder / f"{case.name.replace(' ', '_')}.json")


def peer(part: Part, case: Timed, ours: dict[str, Any] | None, folder: Path) -> None:
    """torch's own loop; ours: what was measured of the same work here, if it was."""
    command = [sys.executable, "-m", "run_scripts.gpu.torch_loop", f"--what={case.what}", f"--shape={case.shape}"]
    command += [f"--rows={case.rows}", f"--prompt={case.prompt}", f"--response={case.response}"]
    command += ["--compile=0"] if case.shape == "XS" else []
    found = run(command, folder / f"{case.name.replace(' ', '_')}.json")
    how = "torch.compile" if found["compiled"] else f"eager; torch.compile: {found.get('compile_error', 'not asked')}"
    memory = "" if found["device_peak_MiB"] is None else f", peak {found['device_peak_MiB'] / 1024:.1f} GiB"
    part.told(f"{case.name}: seconds", found["best"], "s", f"{found['versions']}, {how}{memory}")
    if ours is None:
        return
    times = found["best"] / ours["best"]
    if case.goals and case.what == "dpo" and found["compiled"]:
        part.at_least(f"{case.peer_of}: times as fast as torch", times, ASKED["over torch"])
    else:
        part.told(f"{case.peer_of}: times as fast as torch", times)


def tell(part: Part, case: Timed, found: dict[str, Any], peaks: dict[str, float]) -> None:
    compiled = f"compiled in {found['compile_seconds']:.0f} s, {found['compiles_after_warmup']} compiles after warm-up"
    part.told(f"{case.name}: seconds", found["best"], "s", f"{found['tokens_per_second']:.0f} tokens/s, {compiled}")
    if case.what in ("dpo", "reward") and peaks:
        share = flops(case) / found["best"] / peaks["flops"]
        note = f"{flops(case) / 1e12:.1f} TFLOP of work, {flops(case) / found['best'] / 1e12:.0f} TFLOP/s"
        if case.goals:
            part.at_least(f"{case.name}: share of the products' peak", share, ASKED["share"], note=note)
        else:
            part.told(f"{case.name}: share of the products' peak", share, note=note)
    if case.what == "sample" and peaks:
        least = decode_bytes(case) / peaks["bandwidth"]
        share = least / found["best"]
        note = f"{decode_bytes(case) / 1e9:.0f} GB to read at least: {least:.3g} s"
        if case.goals:
            part.at_least(f"{case.name}: share of the bandwidth bound", share, ASKED["decode"], note=note)
        else:
            part.told(f"{case.name}: share of the bandwidth bound", share, note=note)
    if found["device_peak_MiB"] is not None:
        temporaries = ", ".join(f"{name} {size / 1024:.2f}" for name, size in found["temporaries_MiB"].items())
        note = f"temporaries in GiB: {temporaries}" if temporaries else ""
        part.told(f"{case.name}: peak memory", found["device_peak_MiB"] / 1024, "GiB", note)
        if found.get("planned_MiB"):
            planned = found["planned_MiB"] / 1024
            apart = abs(planned / (found["device_peak_MiB"] / 1024) - 1)
            note = f"the plan reckons with {planned:.2f} GiB"
            if case.goals:
                part.at_most(f"{case.name}: plan and peak apart", apart, ASKED["plan"], note=note)
            else:
                part.told(f"{case.name}: plan and peak apart", apart, note=note)


def run(command: list[str], path: Path) -> dict[str, Any]:
    """A command that writes JSON to `path`; its last words where it fails."""
    path.unlink(missing_ok=True)
    keep = {"JAX_COMPILATION_CACHE_DIR": str(path.parent / "compiled")}
    keep["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    done = subprocess.run(
        [*command, f"--json={path}"], cwd=ROOT, env=os.environ | keep, capture_output=True, text=True, timeout=300
    )
    if done.returncode or not path.exists():
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(" ")]
        raise RuntimeError(f"status {done.returncode}: {' / '.join(lines[-6:])[-700:]}")
    return json.loads(path.read_text())


# Laws -----------------------------------------------------------------------------------------------------------------


def sizes(shape: str) -> tuple[int, int, int]:
    """Weights of all layers, weights of the output matrix, bytes of one token's keys and values."""
    width, layers, heads, mlp = SHAPES[shape]
    dim, kv_heads = width // heads, KV_HEADS.get(shape, heads)
    trunk = layers * (width * dim * (2 * heads + 2 * kv_heads) + 3 * width * mlp)
    return trunk, width * VOCABULARIES.get(shape, VOCABULARY), 2 * layers * kv_heads * dim * 2


def flops(case: Timed) -> float:
    """Multiply-adds twice over, of what is asked and not of what is computed again: a pair's prompt counts once, of
    attention only what a query sees, of logits those of replies. Three passes of what is trained, two under adapters,
    and one of a DPO reference."""
    width, layers, heads, _ = SHAPES[case.shape]
    trunk, output, _ = sizes(case.shape)
    p, r = case.prompt, case.response
    seen = p * (p + 1) / 2 + 2 * (r * p + r * (r + 1) / 2)
    forward = 2.0 * trunk * (p + 2 * r) + 4.0 * layers * heads * (width // heads) * seen
    if case.what == "dpo":
        forward += 2.0 * output * 2 * r
    passes = (2 if case.rank else 3) + (1 if case.what == "dpo" else 0)
    return case.rows * passes * forward


def decode_bytes(case: Timed) -> float:
    """Read at least, in bfloat16: every weight once for each token, and the caches as they are filled by then."""
    trunk, output, of_token = sizes(case.shape)
    columns = case.prompt + sum(range(case.response)) / case.response
    return case.response * (2.0 * (trunk + output) + case.rows * columns * of_token)


if __name__ == "__main__":
    sys.exit(main())
