"""A case enters; the speed of what surrounds a step leaves: pairs from disk to device, a model from its folder, a
command from its start to its first step, or to its end where nothing is left to do."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from mpo_jax import fingerprints
from mpo_jax.artifacts import COMPILED
from mpo_jax.data import encode
from mpo_jax.data.loader import Loader
from mpo_jax.models import hf
from run_scripts.benchmarks import measure
from run_scripts.benchmarks.programs import PAIRS, Case, random_rows, random_weights

ROOT = Path(__file__).resolve().parent.parent.parent
_BATCHES = 256
_ROWS = 160_000  # about HH's
QUICKSTART = ["--config=configs/quickstart.py"]
_COMMAND = [sys.executable, "-m", "mpo_jax.main", *QUICKSTART]
_PATIENCE = 600  # seconds until a command that shows no step is given up


def input_path(case: Case, mesh, runs: int) -> dict[str, Any]:
    """An epoch of pairs from memory-mapped arrays on disk to batches on the device, made as a training makes them."""
    with temporary() as folder:
        encode.write(random_rows(case, PAIRS * _BATCHES, 2), folder / "rows")
        loader = Loader(encode.read(folder / "rows"), PAIRS, mesh=mesh)

        def epoch(number: int) -> float:
            def read():
                with loader.batches(number * _BATCHES, (number + 1) * _BATCHES) as stream:
                    jax.block_until_ready(list(stream))

            return measure.seconds(read) / _BATCHES

        epoch(0)
        samples = [epoch(number + 1) for number in range(runs)]
    best = statistics.median(samples)
    return {"best": best, "pairs_per_second": PAIRS / best, "samples": samples}


def load(case: Case, mesh, runs: int) -> dict[str, Any]:
    """Import of a Hugging Face folder of the case's shape, f32 safetensors, from the disk's cache."""
    model = case.model(mesh)
    weights = random_weights(model, mesh, 0)
    with temporary() as folder:
        (folder / "source").mkdir()
        (folder / "source" / "config.json").write_text(json.dumps(_hf_config(model)))
        hf.export_weights(folder / "model", model, weights, folder / "source")
        size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        del weights

        def read():
            jax.block_until_ready(hf.import_weights(folder / "model", model, mesh))

        read()
        measure.reset_peak()
        samples = [measure.seconds(read) for _ in range(runs)]
    best = statistics.median(samples)
    return {
        "best": best,
        "MiB": size / measure.MIB,
        "MiB_per_second": size / measure.MIB / best,
        "peak_rss_MiB": measure.peak_rss(),
        "samples": samples,
    }


def start(case: Case, mesh, runs: int) -> dict[str, Any]:
    """Seconds from `python -m mpo_jax.main` to the first step of the quickstart's first stage: once with an empty
    compilation cache, then with the one that left behind. The workdir keeps nothing but that cache."""
    with temporary() as folder:
        cold = _first_step(folder)
        warm = [_first_step(folder) for _ in range(runs)]
    return {"best": statistics.median(warm), "cold": cold, "samples": warm}


def finished(case: Case, mesh, runs: int) -> dict[str, Any]:
    """CPU seconds, of the process and the system, of `python -m mpo_jax.main` on a quickstart of `_ROWS` rows whose
    stages are all done: what a start costs beside the work. The stages are made up, since it reads their manifests
    alone. seconds: on the clock."""
    with temporary() as folder:
        story = "Once upon a time there was a little girl named Lily. " * 8
        lines = (json.dumps({"prompt": f"{number}. {story}", "chosen": story}) for number in range(_ROWS))
        (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
        time.sleep(fingerprints.SETTLED + 1)
        command = [*_COMMAND, f"--config.data.path={folder / 'rows.jsonl'}", f"--workdir={folder / 'run'}"]
        maker = "from run_scripts.benchmarks import paths; paths.make_up()"
        subprocess.run([sys.executable, "-c", maker, *command[3:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        samples, clock = [], []
        for _ in range(runs + 1):
            before, began = cpu_of_children(), time.perf_counter()
            shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
            samples.append(cpu_of_children() - before)
            clock.append(time.perf_counter() - began)
            if "to do    nothing" not in shown:
                sys.exit(f"error: stages were left to do: {shown[-500:]}")
    return {"best": statistics.median(samples[1:]), "seconds": statistics.median(clock[1:]), "samples": samples[1:]}


def make_up() -> None:
    """Runs the command of `sys.argv` with stages that compute nothing."""
    from mpo_jax import main
    from mpo_jax.stages import kinds

    def nothing(job) -> dict[str, Any]:
        return {}

    nothing.__module__ = kinds.__name__  # or the stages would have the keys of a plugin's
    for name, kind in list(kinds.KINDS.items()):
        kinds.KINDS[name] = dataclasses.replace(kind, run=nothing)
    main.run()


def cpu_of_children() -> float:
    """CPU seconds of processes that this one began and waited for."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


PATHS = {"input": input_path, "load": load, "start": start, "finished": finished}


def empty(folder: Path, kept: str) -> None:
    """Deletes all that is in a folder but what has this name; makes a folder that is not there."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _first_step(workdir: Path) -> float:
    empty(workdir, kept=COMPILED)
    command = [*_COMMAND, f"--workdir={workdir}"]
    command += ["--stages=sft", "--config.stages.sft.log_every=1"]
    log = workdir / "log"
    with log.open("w") as file:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            while not any(path.stat().st_size for path in workdir.glob("sft-*/metrics.jsonl")):
                if process.poll() is not None or time.perf_counter() - began > _PATIENCE:
                    sys.exit(f"error: no first step; the command's last words: {log.read_text()[-500:]}")
                time.sleep(0.02)
            return time.perf_counter() - began
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _hf_config(model) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        yield Path(folder)
