"""The quickstart enters, with few steps; what a user does with it leaves proven: it runs to its end, a killed stage
goes on to the same weights, and transformers writes what we write with the exported policy, on the same device.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from run_scripts.gpu.result import Part

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT = {
    "data.limit": 1200,
    "stages.sft.steps": 12,
    "stages.sft.save_every": 4,
    "stages.sft.eval_every": 12,
    "stages.reward.steps": 12,
    "stages.reward.eval_every": 12,
    "stages.dpo.steps": 8,
    "stages.dpo.log_every": 1,
    "stages.dpo.eval_every": 8,
    "stages.mpo.steps": 3,
    "stages.mpo.eval_every": 3,
    "stages.mpo.eval_prompts": 32,
}
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
UNTUNED = "--xla_gpu_autotune_level=0"  # a tiny model's kernels needn't be chosen well, and choosing takes minutes
_KILL_AFTER = 4  # steps of sft, of twelve


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--platform", required=True)
    given = parser.parse_args()
    part = Part("whole", given.out)
    folder = given.out.parent / "whole"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    workdir = folder / "run"
    with part.each("quickstart, few steps"):
        began = time.perf_counter()
        finish(start(workdir, ["--stages=mpo"], folder / "run.log"), folder / "run.log")
        part.told("quickstart to mpo, few steps", time.perf_counter() - began, "s", stages_of(workdir))
        first_steps(part, workdir)
    with part.each("export"):
        export(part, folder, workdir)
    with part.each("kill and resume"):
        resume(part, folder, workdir, "")
    if given.platform == "gpu":
        with part.each("kill and resume, deterministic"):
            whole, log = folder / "deterministic", folder / "deterministic.log"
            finish(start(whole, ["--stages=sft"], log, DETERMINISTIC), log)
            resume(part, folder, whole, DETERMINISTIC)
    return part.finish()


def first_steps(part: Part, workdir: Path) -> None:
    """What the first steps of real stages find, in the platform's own dtype, the frozen copies kept as stages do."""
    dpo, mpo = (json.loads(next(workdir.glob(f"{name}-*/metrics.jsonl")).read_text().split("\n")[0]) for name in
                ("dpo", "mpo"))  # fmt: skip
    part.at_most("dpo: |loss - ln 2| of the first step", abs(float(dpo["loss"]) - np.log(2)), 1e-3)
    for name in ("kl", "kl_k3", "ratio_deviation_first"):
        part.at_most(f"mpo: |{name}| of the first step", abs(float(mpo[name])), 1e-3)


def export(part: Part, folder: Path, workdir: Path) -> None:
    """mpo as a Hugging Face folder, and greedy replies by both libraries, float32 with products of full precision."""
    target = folder / "exported"
    asked = [sys.executable, "-m", "mpo_jax.export", f"--stage={workdir / 'mpo'}", f"--output={target}", "--verify"]
    done = subprocess.run(asked, cwd=ROOT, env=environment(), capture_output=True, text=True)
    words = (done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]])[0]
    part.true("export of mpo, verified", done.returncode == 0 and "verified" in done.stdout, words, "verified")
    if importlib.util.find_spec("torch") is None:
        part.told("greedy replies equal those of transformers", "not run", note="torch is not installed")
        return
    asked = [sys.executable, "-m", "run_scripts.gpu.greedy", str(target)]
    done = subprocess.run(asked, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-500:])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    part.true("greedy replies equal those of transformers", found["equal"] == found["of"],
              f"{found['equal']} of {found['of']}", "all", found["note"])  # fmt: skip


def resume(part: Part, folder: Path, whole: Path, flags: str) -> None:
    """sft alone, killed after some steps and run again, against the weights of the run that nothing disturbed."""
    label = "deterministic" if flags else "as it comes"
    workdir, log = folder / f"resumed-{len(flags)}", folder / f"resumed-{len(flags)}.log"
    workdir.mkdir()
    shutil.copytree(whole / "compiled", workdir / "compiled")  # the very programs, so that only the kill differs
    process = start(workdir, ["--stages=sft"], log, flags)
    killed = -1
    while process.poll() is None:
        saved = [int(path.name) for path in workdir.glob("sft-*/checkpoints/last/*") if path.name.isdigit()]
        if any(step >= _KILL_AFTER for step in saved):
            killed = max(saved)
            process.kill()
        time.sleep(0.01)
    finish(start(workdir, ["--stages=sft"], log, flags), log)
    first, second = (weights_of(next(path.glob("sft-*"))) for path in (whole, workdir))
    apart = max(float(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))
    note = f"killed after the checkpoint of step {killed}; {flags}" if killed >= 0 else "it ended before it was killed"
    if flags or part_is_cpu():
        part.true(f"kill and resume, {label}", apart == 0 and killed >= 0, apart, "bit-equal weights", note)
    else:
        part.told(f"kill and resume, {label}: weights apart by", apart, note=note)


def part_is_cpu() -> bool:
    return os.environ.get("JAX_PLATFORMS") == "cpu"


def weights_of(folder: Path) -> list[np.ndarray]:
    import jax
    import orbax.checkpoint as ocp

    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    with ocp.PyTreeCheckpointer() as reader:
        metadata = reader.metadata(folder / "weights")
        tree = getattr(metadata.item_metadata, "tree", metadata.item_metadata)
        args = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=cpu), tree)
        restored = reader.restore(folder / "weights", restore_args=args)
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(restored)]


def start(workdir: Path, arguments: list[str], log: Path, flags: str = "") -> subprocess.Popen:
    command = [sys.executable, "-m", "mpo_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in SHORT.items()] + arguments
    with log.open("a") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment(flags), stdout=file, stderr=file)


def finish(process: subprocess.Popen, log: Path) -> None:
    try:
        failed = process.wait(300)
    except subprocess.TimeoutExpired:
        raise RuntimeError("still running after 300 seconds") from None
    finally:
        process.kill()  # what goes on would hold the card; of one that has ended, nothing
        process.wait()
    if failed:
        raise RuntimeError(f"status {process.returncode}: {' '.join(log.read_text()[-700:].split())}")


def environment(flags: str = "") -> dict[str, str]:
    """flags: of XLA, beside what the environment has and no search for the fastest kernels. Programs stay in the
    workdir, from where they are copied."""
    gpu = [] if os.environ.get("JAX_PLATFORMS") == "cpu" else [UNTUNED]
    own = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    return own | {"XLA_FLAGS": " ".join(filter(None, [os.environ.get("XLA_FLAGS", ""), *gpu, flags]))}


def stages_of(workdir: Path) -> str:
    return ", ".join(sorted(path.parent.name.split("-")[0] for path in workdir.glob("*/manifest.json")))


if __name__ == "__main__":
    sys.exit(main())
