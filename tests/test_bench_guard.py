"""The benchmarks' programs enter, at a tiny shape; the counts that no machine changes are held to bounds.

FLOPs, temporaries and compiles after warm-up. A bound that breaks means that a step does more than its law says; times
are measured by run_scripts/bench.py and asserted nowhere. Collectives of loop bodies: test_scoring, test_sampling.
"""

import jax
import jax.numpy as jnp
import pytest

from mpo_jax import lm_head, metrics, sharding
from run_scripts.benchmarks import measure, programs
from run_scripts.benchmarks.programs import SHAPES, VOCABULARY, Case

CASE = Case("XS", rows=2, prompt=64, response=64)
WIDTH, LAYERS, _, MLP = SHAPES["XS"]


def one_device():
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def compiled(work, name):
    function, arguments = work.programs[name]
    return function.lower(*arguments).compile()


def flops(program) -> float:
    found = program.cost_analysis()
    return (found[0] if isinstance(found, list) else found)["flops"]


def trunk_flops(rows: int, tokens: int) -> float:
    """One pass over rows of `tokens`: products with weights, and attention over all columns."""
    return 2.0 * rows * tokens * LAYERS * (4 * WIDTH**2 + 3 * WIDTH * MLP + 2 * tokens * WIDTH)


@pytest.fixture(scope="module")
def dpo():
    mesh = one_device()
    with jax.set_mesh(mesh):
        return programs.dpo_step(CASE, mesh)


def test_a_dpo_step_computes_what_its_law_says(dpo):
    """A pair is one row of P + 2R tokens, its prompt computed once; logits of the 2R response tokens alone. Backward
    costs two passes; of a single chunk, as here, XLA keeps the logits."""
    trunk = trunk_flops(2, 64 + 2 * 64)
    output = 2.0 * 2 * 2 * 64 * WIDTH * VOCABULARY
    with jax.set_mesh(one_device()):
        step, reference = flops(compiled(dpo, "step")), flops(compiled(dpo, "reference"))
    assert 1 < reference / (trunk + output) < 1.15
    assert 1 < step / (3 * (trunk + output)) < 1.15


@pytest.mark.parametrize("fused", [False, True])
def test_a_frozen_output_matrix_costs_no_gradient(fused):
    """Under adapters: logits forward and the hidden states' gradient, in a loop that is counted once. Where log-probs
    leave the loop, their gradient computes the logits again."""
    model, rows, window = CASE.model(one_device()), 4, 64
    hidden, targets = jnp.ones((rows, window, WIDTH)), jnp.ones((rows, window), jnp.int32)
    matrix = jnp.ones((VOCABULARY, WIDTH))

    def of_rows(logps, entropies, rows):
        return jnp.sum(logps), jnp.float32(1), {}

    def loss(matrix, hidden):
        if fused:
            return lm_head.row_losses(model, matrix, hidden, targets, None, of_rows, chunk=window)[0]
        return jnp.sum(lm_head.token_logps(model, matrix, hidden, targets, chunk=window)[0])

    pass_of_a_chunk = 2.0 * window * WIDTH * VOCABULARY
    for trained, passes in (((0, 1), 3), ((1,), 2)):
        program = jax.jit(jax.grad(loss, argnums=trained)).lower(matrix, hidden).compile()
        assert (passes + 1 - fused) * 0.98 < flops(program) / pass_of_a_chunk < (passes + 1 - fused) * 1.1
    evaluated = jax.jit(loss).lower(matrix, hidden).compile()
    assert 0.98 < flops(evaluated) / pass_of_a_chunk < 1.1


def test_a_dpo_step_holds_a_chunk_of_logits_and_no_more(dpo):
    """Four times the pairs: the response tokens' logits would be 4 x 33 MB; what is set aside stays that of chunks."""
    mesh = one_device()
    with jax.set_mesh(mesh):
        few = measure.temporaries(*dpo.programs["step"])
        many = programs.dpo_step(Case("XS", rows=16, prompt=64, response=64), mesh)
        grown = measure.temporaries(*many.programs["step"])
    chunk = 512 * VOCABULARY * 4
    assert few < 4 * chunk
    assert grown < 6 * chunk


@pytest.mark.parametrize(
    ("what", "given"),
    [
        ("dpo", {}),
        ("reward", {}),
        ("sample", {}),
        ("ppo", {"rows": 4, "response": 64, "ending": True, "microbatch": 2}),
    ],
    ids=["dpo", "reward", "sample", "ppo of unlike lengths"],
)
def test_no_compile_after_warm_up(what, given):
    mesh = one_device()
    with jax.set_mesh(mesh):
        work = programs.STEPS[what](Case("XS", **({"rows": 2, "prompt": 8, "response": 8} | given)), mesh)
        metrics.compiles()
        for _ in range(2):
            work.once()
        before = metrics.compiles()
        for _ in range(3):
            work.once()
        assert metrics.compiles() == before
        if given:
            reply, ended = (float(work.carry[1][name]) for name in ("response_len", "finished"))
            assert 5 < reply < 64 and ended > 0, "replies that end where a stop token is drawn, which one in 37 is"
