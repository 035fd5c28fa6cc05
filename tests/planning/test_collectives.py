"""Collectives of compiled programs against a count by hand: in written-out text, and of the stages' own programs.

The hand count is what the sharding table asks for. FSDP gathers a layer's kernels forward, and under remat q, k, v and
o again to recompute and again for the gradient of the activations; gate and up, gathered once more, serve both; down
needs no recomputation. Each kernel's gradient is scattered once. Tensor parallelism sums an activation [rows,T,D] five
times in a layer: behind attention and MLP forward, behind attention recomputed, and before each backward.

The compiler is free to gather a kernel whole or to send its F parts around a ring while it multiplies, F + 1 times
where the ring is a loop. So what is compared is the sum of both, with a ring's F + 1 parts as F.
"""

import json

import pytest

from mpo_jax.planning import hlo
from tests.tpu import compile_for_tpu

CHAIN = """HloModule jit_f, is_scheduled=true

%begun (p: bf16[8,128]) -> (bf16[8,128], bf16[8,512], s32[2]) {
  %p = bf16[8,128]{1,0} parameter(0)
  %gather.1 = bf16[8,512]{1,0} all-gather(%p), channel_id=7, dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %begin = (bf16[8,128]{1,0}, bf16[8,512]{1,0}, s32[2]{0:S(4)}) custom-call(%p, %gather.1)
}

%column (w: bf16[64,4096], i: s32[]) -> bf16[64,512] {
  %w = bf16[64,4096]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %none = s32[] constant(0)
  ROOT %part = bf16[64,512]{1,0} dynamic-slice(%w, %none, %i), dynamic_slice_sizes={64,512}
}

%carried_on (p.1: bf16[8,128], g.1: bf16[8,512], s.1: s32[2], w.1: bf16[64,4096], i.1: s32[]) -> (bf16[64,512], bf16[8,128], bf16[8,512], s32[2]) {
  %p.1 = bf16[8,128]{1,0} parameter(0)
  %g.1 = bf16[8,512]{1,0} parameter(1)
  %s.1 = s32[2]{0:S(4)} parameter(2)
  %w.1 = bf16[64,4096]{1,0} parameter(3)
  %i.1 = s32[] parameter(4)
  %gather.2 = bf16[8,512]{1,0} all-gather(%p.1), channel_id=7, dimensions={1}, frontend_attributes={chain_id="0"}
  %part.1 = bf16[64,512]{1,0} fusion(%w.1, %i.1), kind=kLoop, calls=%column
  ROOT %all = (bf16[64,512]{1,0}, bf16[8,128]{1,0}, bf16[8,512]{1,0}, s32[2]{0:S(4)}) tuple(%part.1, %p.1, %gather.2, %s.1)
}

%body (state: (s32[], bf16[8,128], bf16[8,512], s32[2], bf16[64,4096])) -> (s32[], bf16[8,128], bf16[8,512], s32[2], bf16[64,4096]) {
  %state = (s32[], bf16[8,128]{1,0}, bf16[8,512]{1,0}, s32[2]{0:S(4)}, bf16[64,4096]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%state), index=0
  %p.2 = bf16[8,128]{1,0} get-tuple-element(%state), index=1
  %g.2 = bf16[8,512]{1,0} get-tuple-element(%state), index=2
  %s.2 = s32[2]{0:S(4)} get-tuple-element(%state), index=3
  %w.2 = bf16[64,4096]{1,0} get-tuple-element(%state), index=4
  %on = (bf16[64,512]{1,0}, bf16[8,128]{1,0}, bf16[8,512]{1,0}, s32[2]{0:S(4)}) fusion(%p.2, %g.2, %s.2, %w.2, %i.2), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (2, {})}, calls=%carried_on
  %p.3 = bf16[8,128]{1,0} get-tuple-element(%on), index=1
  %g.3 = bf16[8,512]{1,0} get-tuple-element(%on), index=2
  %s.3 = s32[2]{0:S(4)} get-tuple-element(%on), index=3
  %round = bf16[8,128]{1,0:S(1)} collective-permute(%p.2), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %two = s32[] constant(2)
  %next = s32[] add(%i.2, %two)
  ROOT %result = (s32[], bf16[8,128]{1,0}, bf16[8,512]{1,0}, s32[2]{0:S(4)}, bf16[64,4096]{1,0}) tuple(%next, %p.3, %g.3, %s.3, %w.2)
}

%condition (state.1: (s32[], bf16[8,128], bf16[8,512], s32[2], bf16[64,4096])) -> pred[] {
  %state.1 = (s32[], bf16[8,128]{1,0}, bf16[8,512]{1,0}, s32[2]{0:S(4)}, bf16[64,4096]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%state.1), index=0
  %bound = s32[] constant(8)
  ROOT %less = pred[] compare(%i.3, %bound), direction=LT
}

%ended (p.4: bf16[8,128], g.4: bf16[8,512], s.4: s32[2]) -> bf16[8,512] {
  %p.4 = bf16[8,128]{1,0} parameter(0)
  %g.4 = bf16[8,512]{1,0} parameter(1)
  %s.4 = s32[2]{0:S(4)} parameter(2)
  %gather.3 = bf16[8,512]{1,0} all-gather(%p.4), channel_id=7, dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %end = bf16[8,512]{1,0} custom-call(%p.4, %g.4, %gather.3, %s.4)
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (x.1: f32[16,512]) -> f32[16,128] {
  %x.1 = f32[16,512]{1,0} parameter(0)
  %whole = f32[16,512]{1,0} all-reduce(%x.1), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %kept = f32[16,128]{1,0} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={16,128}
}

ENTRY %main (shard: bf16[8,128], w.3: bf16[64,4096], x: f32[16,512]) -> bf16[8,512] {
  %shard = bf16[8,128]{1,0} parameter(0)
  %w.3 = bf16[64,4096]{1,0} parameter(1)
  %x = f32[16,512]{1,0} parameter(2)
  %start = (bf16[8,128]{1,0}, bf16[8,512]{1,0}, s32[2]{0:S(4)}) fusion(%shard), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begun
  %p.5 = bf16[8,128]{1,0} get-tuple-element(%start), index=0
  %g.5 = bf16[8,512]{1,0} get-tuple-element(%start), index=1
  %s.5 = s32[2]{0:S(4)} get-tuple-element(%start), index=2
  %initial = s32[] constant(2)
  %given = (s32[], bf16[8,128]{1,0}, bf16[8,512]{1,0}, s32[2]{0:S(4)}, bf16[64,4096]{1,0}) tuple(%initial, %p.5, %g.5, %s.5, %w.3)
  %loop = (s32[], bf16[8,128]{1,0}, bf16[8,512]{1,0}, s32[2]{0:S(4)}, bf16[64,4096]{1,0}) while(%given), condition=%condition, body=%body
  %p.6 = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
  %g.6 = bf16[8,512]{1,0} get-tuple-element(%loop), index=2
  %s.6 = s32[2]{0:S(4)} get-tuple-element(%loop), index=3
  %scattered = f32[16,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %first = f32[16,512]{1,0:S(1)} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  %second = f32[16,512]{1,0:S(1)} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %done = bf16[8,512]{1,0} fusion(%p.6, %g.6, %s.6), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%ended
}
"""  # noqa: E501
"""A gather begun before a loop, carried on inside it and ended behind it; the loop's counter goes 2, 4, 6."""


def test_a_loop_that_counts_by_two_runs_half_as_often():
    assert hlo.parse(CHAIN).runs == {"main": 1, "body": 3}


def test_a_chain_of_fusions_is_one_collective_and_a_channel_may_be_of_several():
    found = [(each.kind, each.bytes, each.times, each.alone) for each in hlo.parse(CHAIN).collectives()]
    assert sorted(found) == [
        ("all-gather", 8 * 512 * 2, 1, False),
        ("all-reduce", 16 * 512 * 4, 1, True),
        ("all-reduce", 16 * 512 * 4, 1, True),
        ("collective-permute", 8 * 128 * 2, 3, True),
        ("reduce-scatter", 16 * 512 * 4, 1, True),
    ]


def test_a_fusion_inside_a_fusion_reads_its_slice_and_a_collective_under_way_moves_once():
    shard, gathered, column, x = 8 * 128 * 2, 8 * 512 * 2, 64 * 512 * 2, 16 * 512 * 4
    looped = column + column + 4 + shard + 12  # a column read and written, its index, the permuted shard, the counter
    once = (
        gathered + shard + x + x // 4 + 2 * x
    )  # begun: written; ended: its shard read; scattered; two sums on the core
    assert hlo.parse(CHAIN).bytes_moved() == 3 * looped + once


SOURCE = """
import dataclasses
from mpo_jax.planning import chips, compile as compiler, stages
from mpo_jax.stages import kinds
from mpo_jax.models import presets
from tests.planning import case

place = chips.topology(GIVEN["topology"])
config = case.config(GIVEN["rows"], GIVEN["prompt"], GIVEN["response"], "full", microbatch=GIVEN["microbatch"],
                     fsdp=GIVEN["fsdp"], tensor=GIVEN["tensor"])
preset = case.model(**GIVEN["model"])
for stage, name in GIVEN["programs"]:
    job = dataclasses.replace(stages.jobs(config, place, [stage])[stage], preset=preset)
    with jax.set_mesh(job.mesh):
        program = kinds.of(job.settings).programs(job)[name]
        found = compiler.report(program, place, job.mesh)
    report[f"{stage}/{name}"] = found.collectives
"""


def compiled(**given) -> dict[str, dict[str, int]]:
    """Collectives by kind of some programs: see SOURCE."""
    return compile_for_tpu(f"import json\nGIVEN = json.loads({json.dumps(json.dumps(given))})\n" + SOURCE, timeout=3000)


SMALL = {
    "topology": "v5e:2x4", "fsdp": 8, "tensor": 1, "rows": 32, "prompt": 128, "response": 128, "microbatch": 0,
    "model": {"layers": 3, "width": 512, "heads": 4, "mlp": 1536, "vocabulary": 4096},
}  # fmt: skip
SEVEN_B = {
    "topology": "v5e:4x8", "fsdp": 8, "tensor": 4, "rows": 64, "prompt": 512, "response": 128, "microbatch": 32,
    "model": {"layers": 32, "width": 4096, "heads": 32, "mlp": 11_008, "vocabulary": 32_256},
}  # fmt: skip
"""configs/tldr.py; the vocabulary as it is padded."""


def weights_by_hand(given: dict, trunks: int, passes: int, tables: int, scattered: int) -> int:
    """Bytes on one chip of weights gathered and gradients scattered. passes: times that a layer runs forward and
    backward; tables: times that a table [V,D] is gathered, scattered: and that its gradient is, in float32."""
    model, tensor = given["model"], given["tensor"]
    attention = model["width"] ** 2 // tensor * 2  # bfloat16
    mlp = model["width"] * model["mlp"] // tensor * 2
    gathered = (4 + 4 + 4) * attention + (3 + 2 + 1) * mlp  # forward; recomputed or for both; for activations alone
    layer = gathered + 4 * attention + 3 * mlp
    table = model["vocabulary"] * model["width"] // tensor * 4
    return trunks * passes * model["layers"] * layer + (tables + scattered) * table


def sums_by_hand(given: dict, length: int, window: int, trunks: int, passes: int) -> int:
    """Bytes on one chip of activations summed over tensor: in layers, of the embeddings that the vocabulary's parts
    look up (float32), and of the gradient of what the policy's output matrix reads."""
    model = given["model"]
    rows = (given["microbatch"] or given["rows"]) // given["fsdp"]
    values = rows * length * model["width"]
    return passes * (trunks * (5 * model["layers"] * values * 2 + values * 4) + rows * window * model["width"] * 2)


def rollout_by_hand(given: dict) -> tuple[int, int]:
    """Bytes on one chip of weights gathered once, in bfloat16, and of activations summed: two in a layer, for the
    prompts and for every token, in loops of four widths for all rows, then for a half and a quarter of them."""
    model, tensor = given["model"], given["tensor"]
    rows, steps = given["rows"] // given["fsdp"], given["response"]
    layer = (4 * model["width"] ** 2 + 3 * model["width"] * model["mlp"]) // tensor * 2
    gathered = model["layers"] * layer + 2 * model["vocabulary"] * model["width"] // tensor * 2
    decoded = sum(-(-rows // part) for part in (1, 1, 1, 1, 2, 4)) * -(-steps // 6)
    sums = (2 * model["layers"] + 1) * (rows * given["prompt"] + decoded) * model["width"] * 2
    return gathered, sums


def weights_sent(found: dict[str, int], fsdp: int) -> float:
    ring = found.get("collective-permute", 0) * fsdp / (fsdp + 1)
    return found["all-gather"] + found["reduce-scatter"] + ring


@pytest.mark.slow
def test_a_small_dpo_step_sends_what_a_count_by_hand_says():
    found = compiled(**SMALL, programs=[("dpo", "train")])["dpo/train"]
    expected = weights_by_hand(SMALL, trunks=1, passes=1, tables=2, scattered=2)
    assert weights_sent(found, SMALL["fsdp"]) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_7b_sends_what_a_count_by_hand_says():
    """On v5e:4x8. DPO runs two microbatches and gathers its two tables for each; PPO's four epochs of two microbatches
    gather the policy's two and the critic's one once an epoch."""
    found = compiled(**SEVEN_B, programs=[("dpo", "train"), ("mpo", "update"), ("mpo", "rollout")])
    dpo, update, rollout = (found[name] for name in ("dpo/train", "mpo/update", "mpo/rollout"))
    fsdp = SEVEN_B["fsdp"]
    expected = weights_by_hand(SEVEN_B, trunks=1, passes=2, tables=4, scattered=4)
    assert weights_sent(dpo, fsdp) == pytest.approx(expected, rel=0.02)
    assert dpo["all-reduce"] == pytest.approx(sums_by_hand(SEVEN_B, 768, 256, trunks=1, passes=2), rel=0.02)
    expected = weights_by_hand(SEVEN_B, trunks=2, passes=8, tables=12, scattered=24)
    assert weights_sent(update, fsdp) == pytest.approx(expected, rel=0.02)
    assert update["all-reduce"] == pytest.approx(sums_by_hand(SEVEN_B, 640, 128, trunks=2, passes=8), rel=0.02)
    gathered, summed = rollout_by_hand(SEVEN_B)
    assert rollout["all-gather"] == pytest.approx(gathered, rel=0.02)
    assert rollout["all-reduce"] == pytest.approx(summed, rel=0.02)
