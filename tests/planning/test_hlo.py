"""Compiled text is read: by hand, and of programs whose loops, traffic and products are known."""

import jax
import jax.numpy as jnp
import pytest

from mpo_jax.planning import hlo, work

TEXT = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%sliced (p: f32[4,128,256], i: s32[]) -> f32[128,256] {
  %p = f32[4,128,256]{2,1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,128,256]{2,1,0:T(8,128)} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,128,256}
  ROOT %flat = f32[128,256]{1,0:T(8,128)} bitcast(%slice)
}

%body (state: (s32[], f32[8,128], f32[4,128,256])) -> (s32[], f32[8,128], f32[4,128,256]) {
  %state = (s32[], f32[8,128]{1,0:T(8,128)}, /*index=2*/f32[4,128,256]{2,1,0:T(8,128)}) parameter(0)
  %step = s32[] get-tuple-element(%state), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %w = f32[4,128,256]{2,1,0:T(8,128)} get-tuple-element(%state), index=2
  %layer = f32[128,256]{1,0:T(8,128)} fusion(%w, %step), kind=kLoop, calls=%sliced
  %gathered = f32[256,256]{1,0:T(8,128)} all-gather(%layer), channel_id=1, metadata={op_name="jit(f)/while/body/dot"}
  %reduced = f32[8,128]{1,0:T(8,128)S(1)} all-reduce(%x), channel_id=2, replica_groups=[2,2]<=[4], to_apply=%add
  %scattered = f32[4,128]{1,0:T(8,128)} reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=2] {'a'}, to_apply=%add
  %one = s32[] constant(1)
  %next = s32[] add(%step, %one)
  ROOT %out = (s32[], f32[8,128]{1,0:T(8,128)}, f32[4,128,256]{2,1,0:T(8,128)}) tuple(%next, %x, %w)
}

%condition (state.1: (s32[], f32[8,128], f32[4,128,256])) -> pred[] {
  %state.1 = (s32[], f32[8,128], f32[4,128,256]) parameter(0)
  %step.1 = s32[] get-tuple-element(%state.1), index=0
  %bound = s32[] constant(4)
  ROOT %less = pred[] compare(%step.1, %bound), direction=LT
}

ENTRY %main (arg: (s32[], f32[8,128], f32[4,128,256])) -> f32[8,128] {
  %arg = (s32[], f32[8,128], f32[4,128,256]) parameter(0)
  %loop = (s32[], f32[8,128], f32[4,128,256]) while(%arg), condition=%condition, body=%body
  ROOT %result = f32[8,128] get-tuple-element(%loop), index=1
}
"""


def test_a_loop_counts_as_often_as_its_condition_says():
    assert hlo.parse(TEXT).runs == {"main": 1, "body": 4}


def test_collectives_by_kind_with_bytes_of_their_larger_side():
    found = {each.kind: (each.bytes, each.times) for each in hlo.parse(TEXT).collectives()}
    assert found == {
        "all-gather": (256 * 256 * 4, 4),
        "all-reduce": (8 * 128 * 4, 4),
        "reduce-scatter": (2 * 4 * 128 * 4, 4),
    }


def test_a_fusion_that_slices_reads_its_slice():
    layer, gathered, x = 128 * 256 * 4, 256 * 256 * 4, 8 * 128 * 4
    # The counter's add moves 3 x 4 bytes; the index of the slice 4; the result of the all-reduce stays on the core.
    once = (layer + layer + 4) + (layer + gathered) + x + (x + x // 2) + 12
    assert hlo.parse(TEXT).bytes_moved() == 4 * once


CONDITIONAL = """HloModule f

%short (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4] parameter(0)
  ROOT %small = f32[8,4] all-reduce(%x), channel_id=1, to_apply=%add
}

%long (y: f32[8,4]) -> f32[8,4] {
  %y = f32[8,4] parameter(0)
  %wide = f32[8,16] all-gather(%y), channel_id=2, dimensions={1}
  ROOT %cut = f32[8,4] slice(%wide), slice={[0:8], [0:4]}
}

ENTRY %main (which: s32[], z: f32[8,4]) -> f32[8,4] {
  %which = s32[] parameter(0)
  %z = f32[8,4] parameter(1)
  ROOT %out = f32[8,4] conditional(%which, %z, %z, %z), branch_computations={%short, %long, %short}
}
"""


def test_of_a_conditional_the_largest_branch_counts():
    module = hlo.parse(CONDITIONAL)
    assert module.runs == {"main": 1, "long": 1}
    assert [(each.kind, each.times) for each in module.collectives()] == [("all-gather", 1)]


ASYNCHRONOUS = """HloModule f

ENTRY %main (w: bf16[8,512]) -> bf16[2,512] {
  %w = bf16[8,512]{1,0:T(8,128)(2,1)} parameter(0)
  %slice-start = ((bf16[8,512]{1,0:T(8,128)(2,1)}), bf16[2,512]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:2], [0:512]}
  %slice-done = bf16[2,512]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start)
  %copy-start = (bf16[8,512]{1,0:T(8,128)(2,1)}, bf16[8,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %copy-done = bf16[8,512]{1,0:T(8,128)(2,1)} copy-done(%copy-start)
  ROOT %sum = bf16[2,512]{1,0:T(8,128)(2,1)S(1)} add(%slice-done, %slice-done)
}
"""  # noqa: E501


def test_an_asynchronous_copy_moves_once_what_it_copies():
    # A slice is read onto the core, where it stays; the other copy is read and written; the sum touches the core alone.
    assert hlo.parse(ASYNCHRONOUS).bytes_moved() == 2 * 512 * 2 + 2 * 8 * 512 * 2


@pytest.mark.parametrize(
    ("instruction", "alone"),
    [
        ("%g = bf16[8,512]{1,0} all-gather(%w), channel_id=1, dimensions={1}", True),
        ("%g = (bf16[8,128]{1,0}, bf16[8,512]{1,0}) all-gather-start(%w), channel_id=1, dimensions={1}", False),
        ('%g = bf16[8,512]{1,0} all-gather(%w), channel_id=1, frontend_attributes={async_collective_name="g"}', False),
    ],
)
def test_a_collective_that_is_not_begun_before_it_is_needed_travels_alone(instruction, alone):
    whole = "  ROOT %w = bf16[8,128]{1,0} parameter(0)"
    text = "\n".join(["ENTRY %main (w: bf16[8,128]) -> bf16[8,128] {", whole, f"  {instruction}", "}", ""])
    (found,) = hlo.parse(text).collectives()
    assert (found.kind, found.bytes, found.alone) == ("all-gather", 8 * 512 * 2, alone)


WHOLE = """HloModule f

%flat (q: bf16[8,512]) -> bf16[4096] {
  %q = bf16[8,512]{1,0} parameter(0)
  ROOT %same = bf16[4096]{0} bitcast(%q)
}

%doubled (p: bf16[8,512]) -> bf16[4096] {
  %p = bf16[8,512]{1,0} parameter(0)
  %inner = bf16[4096]{0} fusion(%p), kind=kLoop, calls=%flat
  ROOT %sum = bf16[4096]{0:S(1)} add(%inner, %inner)
}

ENTRY %main (w: bf16[8,512]) -> bf16[4096] {
  %w = bf16[8,512]{1,0} parameter(0)
  ROOT %out = bf16[4096]{0:S(1)} fusion(%w), kind=kLoop, calls=%doubled
}
"""


def test_what_a_fusion_inside_a_fusion_hands_on_is_read_whole():
    assert hlo.parse(WHOLE).bytes_moved() == 8 * 512 * 2


def test_the_largest_buffer_is_the_gathered_weight():
    array, instruction = hlo.parse(TEXT).buffers()[0]
    assert (array.shape, instruction.op_name) == ((256, 256), "jit(f)/while/body/dot")


def test_loop_bounds_of_a_compiled_program():
    def scanned(x, w):
        return jax.lax.scan(lambda carry, each: (jnp.tanh(carry @ each), None), x, w)[0]

    x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
    module = hlo.parse(jax.jit(scanned).lower(x, w).compile().as_text())
    assert 5 in module.runs.values()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, w: x @ w[0], 2 * 8 * 16 * 16),
        (lambda x, w: jax.lax.scan(lambda c, each: (c @ each, None), x, w)[0], 5 * 2 * 8 * 16 * 16),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w[0], lambda: x), 2 * 8 * 16 * 16),
        (lambda x, w: jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ w[0], x), 7 * 2 * 8 * 16 * 16),
        # the two products of the backward pass: nothing reads the forward pass's
        (jax.grad(lambda x, w: (x @ w[0]).sum(), argnums=(0, 1)), 2 * 2 * 8 * 16 * 16),
        # the forward pass again
        (jax.value_and_grad(jax.checkpoint(lambda x, w: jnp.sin(x @ w[0]).sum()), argnums=(0, 1)), 4 * 2 * 8 * 16 * 16),
    ],
    ids=["product", "scan", "cond", "while", "gradient", "remat"],
)
def test_products_are_counted_as_often_as_they_run(function, expected):
    x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
    assert work.flops(jax.jit(function).trace(x, w).jaxpr, loops=(7, 1)) == expected
