"""The stages' own programs, compiled for eight TPU chips without one: what travels, and what is never made.


Read from the compiled text: the decode loop gathers no weight, FSDP gathers each layer's weights once forward and twice
backward under remat, and no [B,T,V] array is made.
"""

import math

import pytest

from mpo_jax.planning import hlo
from tests.tpu import compile_for_tpu

LAYERS, WIDTH, MLP, VOCABULARY, ROWS, PROMPT, RESPONSE, FSDP, TENSOR = 3, 512, 1536, 4096, 32, 128, 128, 4, 2
PROJECTION, MLP_KERNEL = WIDTH * WIDTH // TENSOR, WIDTH * MLP // TENSOR  # values of a kernel, gathered over fsdp
MORE = {
    "moving": ("dpo", {"reference_every": 1}),
    "odds": ("dpo", {"objective": "orpo", "reference": ""}),
    "kto": ("kto", {}),
    "hard": ("sft", {"pairs": "split/hard"}),
    "replay": ("ppo", {"replay": "split/easy", "replay_loss": "dpo"}),
}
"""Stages beside those of the paper: kind, and what tells its step from that kind's usual one."""
SOURCE = f"""
import dataclasses
from mpo_jax import settings

def with_stages(config):
    made = {{}}
    for name, (kind, given) in {MORE!r}.items():
        of = kinds.KINDS[kind].settings
        small = {{"kind": kind, "batch_size": {ROWS}, "max_new_tokens": {RESPONSE}}} | given
        known = {{key: value for key, value in small.items() if key in of.model_fields}}
        made[name] = settings.parse(of, known, f"stages.{{name}}")
    return config.model_copy(update={{"stages": config.stages | made}})

from mpo_jax.planning import chips, compile as compiler, stages
from mpo_jax.stages import kinds
from tests.planning import case

place = chips.topology("v5e:2x4")
config = case.config({ROWS}, {PROMPT}, {RESPONSE}, "full", fsdp={FSDP}, tensor={TENSOR})
config = with_stages(config)
preset = case.model(layers={LAYERS}, width={WIDTH}, heads=4, mlp={MLP}, vocabulary={VOCABULARY})
for stage, name in PROGRAMS:
    job = dataclasses.replace(stages.jobs(config, place, [stage])[stage], preset=preset)
    with jax.set_mesh(job.mesh):
        program = kinds.of(job.settings).programs(job)[name]
        found = compiler.report(program, place, job.mesh, keep_text=True)
    report[f"{{stage}}/{{name}}"] = {{"text": found.text, "fits": found.fits, "loops": program.extent.loops}}
"""


TRAINED = [name for name in MORE if name != "replay"]


def compiled(*programs: tuple[str, str]) -> dict[str, hlo.Module]:
    found = compile_for_tpu(f"PROGRAMS = {programs!r}\n" + SOURCE)
    assert all(each["fits"] for each in found.values())
    return {name: hlo.parse(each["text"], tuple(each["loops"])) for name, each in found.items()}


def values(array: hlo.Array) -> int:
    return math.prod(array.shape)


def test_the_decode_loop_gathers_no_weight():
    module = compiled(("mpo", "rollout"))["mpo/rollout"]
    gathers = [each for each in module.collectives() if each.kind == "all-gather"]
    tokens, _ = module.loops
    looped = [each for each in gathers if each.times >= tokens]
    assert max((values(array) for each in looped for array in each.arrays), default=0) < PROJECTION
    before = [each for each in gathers if each.times < tokens and max(map(values, each.arrays)) >= PROJECTION]
    assert before, "weights are gathered before the loop"
    loops = [times for times in module.runs.values() if times >= tokens]
    # One for each width of the caches, and one each for a half and a quarter of a chip's rows.
    assert len(loops) >= -(-RESPONSE // tokens) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("sft", "train"),
        ("reward", "train"),
        ("dpo", "train"),
        ("mpo", "update"),
        *((name, "train") for name in TRAINED),
    ],
)
def test_each_layers_weights_are_gathered_once_forward_and_twice_backward(stage, name):
    module = compiled((stage, name))[f"{stage}/{name}"]
    gathers = [each for each in module.collectives() if each.kind == "all-gather"]
    trunks, epochs = (2, 4) if stage == "mpo" else (1, 1)  # policy and critic, in each inner epoch
    for kernel, kernels in ((PROJECTION, 4), (MLP_KERNEL, 3)):
        times = sum(each.times for each in gathers for array in each.arrays if values(array) == kernel)
        passes = 4 if stage == "moving" else 3  # a reference that moves runs forward beside the policy
        assert 0 < times <= passes * kernels * LAYERS * trunks * epochs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("sft", "train"),
        ("dpo", "train"),
        ("mpo", "experience"),
        ("mpo", "update"),
        ("replay", "update"),
        *((name, "train") for name in TRAINED),
    ],
)
def test_logits_of_all_tokens_never_exist(stage, name):
    module = compiled((stage, name))[f"{stage}/{name}"]
    whole = ROWS // FSDP * RESPONSE * VOCABULARY // TENSOR  # of the response tokens on one chip
    arrays = [
        array
        for computation in module.computations.values()
        for instruction in computation.values()
        for array in instruction.arrays
    ]
    with_vocabulary = [values(array) for array in arrays if array.shape and array.shape[-1] == VOCABULARY // TENSOR]
    assert with_vocabulary and max(with_vocabulary) < whole


def test_replies_in_turn_move_no_cache_between_chips():
    """Rows that are done and prompts that take their places stay on their chip: what goes around at each turn are the
    prefill's sums, and at each token the step's."""
    module = compiled(("evaluate", "sample"))["evaluate/sample"]
    tokens, turns = module.loops
    looped = [each for each in module.collectives() if each.times >= min(tokens, turns)]
    moved = [values(array) for each in looped if each.kind != "all-reduce" for array in each.arrays]
    a_rows_cache = PROMPT * WIDTH // TENSOR  # keys of one prompt in one layer, on one chip
    assert looped and max(moved, default=0) < a_rows_cache
    summed = [values(array) for each in looped if each.kind == "all-reduce" for array in each.arrays]
    assert max(summed) <= ROWS // FSDP * PROMPT * WIDTH, "hidden states of a chip's rows"
