"""What to measure enters, by flags; seconds, memory and compiles leave, as a line and as JSON.

`python run_scripts/bench.py --what=dpo --shape=S --prompt=64 --response=64 --dtype=f32 --runs=3 --json=dpo.json`

dpo, reward, ppo, sample: the package's own steps and sampler on random weights, warm-up not counted. input: pairs from
disk to device. load: import of a Hugging Face folder. start: from command to first step, with a cold and a warm
compilation cache. finished: a command that finds all stages of a run on 160,000 rows done. pipeline: each stage of the
quickstart, with a cold and a warm compilation cache, as tables; flags of the run stand after --, as in `--what=pipeline
-- --stages=sft --config.stages.sft.steps=20`. scaling: growth with layers, lengths, replies and devices, as a table and
a plot; --json names the table, beside which the plot lies.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mpo_jax import allocator

if __name__ == "__main__":
    allocator.restart()

import jax
from absl import app, flags

from mpo_jax import processes, sharding
from mpo_jax.errors import InputError
from mpo_jax.models.config import ATTENTION_SETTINGS, REMAT_POLICIES
from run_scripts.benchmarks import measure, pipeline, replies, scaling
from run_scripts.benchmarks.paths import PATHS, temporary
from run_scripts.benchmarks.programs import DTYPES, SHAPES, STEPS, Case

_WHAT = flags.DEFINE_enum("what", None, [*STEPS, *PATHS, "pipeline", "scaling"], "What is measured.")
_SHAPE = flags.DEFINE_enum("shape", "S", [*SHAPES], "S: 15 M weights, M: 110 M, 1B: 1.2 G.")
_PROMPT = flags.DEFINE_integer("prompt", 64, "Prompt tokens.", lower_bound=1)
_RESPONSE = flags.DEFINE_integer("response", 64, "Tokens of a reply.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 1, "Replies to a prompt.", lower_bound=1)
_LAYERS = flags.DEFINE_integer("layers", 0, "Layers; 0: the shape's own.", lower_bound=0)
_DEVICES = flags.DEFINE_integer("devices", 1, "Virtual CPU devices, over which rows are spread.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 0, "Pairs or prompts of a step; 0: the work's own.", lower_bound=0)
_MICROBATCH = flags.DEFINE_integer(
    "microbatch", 0, "dpo, reward, ppo: rows that are computed at a time; 0: all of them.", lower_bound=0
)
_RANK = flags.DEFINE_integer("rank", 0, "Of LoRA adapters; 0: all weights are trained.", lower_bound=0)
_REMAT = flags.DEFINE_enum("remat", "none", REMAT_POLICIES, "What a layer keeps for its backward pass.")
_ATTENTION = flags.DEFINE_enum("attention", "auto", ATTENTION_SETTINGS, "Backend.")
_EOS = flags.DEFINE_bool(
    "eos", False, "sample, ppo: replies end after 37 tokens in the mean; sample also tells what waiting for them costs."
)
_DTYPE = flags.DEFINE_enum("dtype", "f32", [*DTYPES], "Of computation.")
_KERNELS = flags.DEFINE_bool("kernels", False, "On a GPU: also trace one unit, and tell its longest kernels.")
_RUNS = flags.DEFINE_integer("runs", 3, "Timed runs, of which the median counts.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Where the result goes too.")


def main(argv) -> None:
    what = _WHAT.value
    if _JSON.value and not Path(_JSON.value).absolute().parent.is_dir():  # not first told when all is measured
        raise app.UsageError(f"--json={_JSON.value}: no folder {Path(_JSON.value).absolute().parent}")
    if what == "pipeline":
        return _pipeline(argv[1:])
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if what == "scaling":
        scaling.run(_SHAPE.value, _DTYPE.value, _RUNS.value, Path(_JSON.value or "scaling.json"))
        return
    case = Case(
        _SHAPE.value,
        _DTYPE.value,
        _PROMPT.value,
        _RESPONSE.value,
        rows=_ROWS.value,
        samples=_SAMPLES.value,
        layers=_LAYERS.value,
        attention=_ATTENTION.value,
        remat=_REMAT.value,
        rank=_RANK.value,
        ending=_EOS.value,
        microbatch=_MICROBATCH.value,
    )
    if _EOS.value and what not in ("sample", "ppo"):
        raise app.UsageError(f"--eos is of --what=sample and ppo, not of {what}")
    if _MICROBATCH.value and what not in ("dpo", "reward", "ppo"):
        raise app.UsageError(f"--microbatch is of --what=dpo, reward and ppo, not of {what}")
    if _RANK.value and what not in ("dpo", "reward", "ppo"):
        raise app.UsageError(f"--rank is of --what=dpo, reward and ppo, not of {what}")
    try:
        result = run(what, case, _RUNS.value, _DEVICES.value, _KERNELS.value)
    except InputError as error:
        sys.exit(f"error: {error}")
    line = f"{what} {case.shape} {case.dtype} prompt {case.prompt} response {case.response}: "
    print(line + ", ".join(f"{name} {_short(value)}" for name, value in result.items()), flush=True)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(result | {"case": vars(case), "jax": jax.__version__}, indent=1))


def _pipeline(given: list[str]) -> None:
    if any(each.lstrip("-").startswith("workdir") for each in given):
        raise app.UsageError("--workdir: the runs have a temporary one")
    with temporary() as folder:
        result = pipeline.run(given, folder)
    print(pipeline.table(result), flush=True)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(result | {"jax": jax.__version__}, indent=1))


def run(what: str, case: Case, runs: int, devices: int = 1, traced: bool = False) -> dict[str, Any]:
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
        processes.spare_threads(devices)
    mesh = sharding.make_mesh(devices, 1, 1, devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        if what == "sample" and case.ending:
            return replies.run(case, mesh, runs)
        if what in PATHS:
            return PATHS[what](case, mesh, runs)
        return measure.work(lambda: STEPS[what](case, mesh), runs, traced=traced)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} {_short(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + " ".join(map(_short, value)) + "]"
    return str(value)


if __name__ == "__main__":
    flags.mark_flag_as_required("what")
    app.run(main)
